"""Which statement do sums by rule keep true? They are the definition's, without its gradients."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import clipping
from tests import _clipping_common as common


def _loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]))


def _params():
    source = np.random.default_rng(0)
    w, b = source.normal(size=(3, 4)), source.normal(size=4)
    return {"w": jnp.asarray(w, jnp.float32), "b": jnp.asarray(b, jnp.float32)}


def _rows(count=6, length=5):
    return jnp.asarray(np.random.default_rng(1).normal(size=(count, length, 3)), jnp.float32)


by_rule = pytest.mark.parametrize("method", ["two_pass", "one_pass"])


@pytest.mark.parametrize("name", ["language", "sequences"])
def test_two_pass_is_the_sum_of_the_definition(name):
    loss, params, args = common.problem(name)
    rows = common.exact_rows(name)
    norms = sorted(common.length(row) for row in rows)
    bound = (norms[2] + norms[3]) / 2
    run = clipping.clipped_grad(loss, clip_norm=bound, method="two_pass", microbatch_size=4)
    got = jax.jit(run)(params, *args)
    want = common.clip_in_order(rows, bound * clipping.shrinkage(len(rows)))
    assert common.distance(got.tree, want) <= 2**-12 * bound * len(rows)
    assert (int(got.clipped), int(got.examples), int(got.nonfinite)) == (3, 6, 0)
    assert got.method == "two_pass" and got.clip_norm == bound


def test_two_pass_of_a_bfloat16_model_sums_in_float32():
    def loss(params, x):
        narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, x))
        return _loss(*narrow).astype(jnp.float32)

    # Rows of one direction: summed in 8 bits, 600 of them would stop growing.
    rows = jnp.broadcast_to(_rows(1), (600, 5, 3))
    ways = {
        method: jax.jit(clipping.clipped_grad(loss, clip_norm=1.0, method=method))(_params(), rows)
        for method in ("vmap", "two_pass", "one_pass")
    }
    want = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(ways["vmap"].tree)]
    for method in ("two_pass", "one_pass"):
        # The margin of 2⁻⁶ for 16-bit backward passes, and as much for what two of them differ by.
        assert common.distance(ways[method].tree, want) <= 2 * 2**-6 * common.length(want)
        leaves = jax.tree.leaves(ways[method].tree)
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
        assert common.length(leaves) <= 600.0


@by_rule
@pytest.mark.parametrize(("normalize", "size", "length"), [(None, None, 2), (0.3, 2, 5)])
def test_two_pass_equals_vmap_with_masks_bad_rows_and_aux(normalize, size, length, method):
    rows = _rows(length=length).at[1, 1, 0].set(jnp.nan).at[4].set(jnp.inf)
    assert clipping.explain(_loss, _params(), rows).in_full == (("w",) if length == 5 else ())
    mask = jnp.array([False, True, True, True, True, True])
    loss = lambda params, x: (_loss(params, x), jnp.sum(x))  # noqa: E731
    options: dict[str, Any] = dict(
        has_aux=True, normalize=normalize, microbatch_size=size, clip_norm=0.5
    )
    got, aux = jax.jit(clipping.clipped_grad(loss, method=method, **options))(
        _params(), rows, mask=mask
    )
    want, other = jax.jit(clipping.clipped_grad(loss, method="vmap", **options))(
        _params(), rows, mask=mask
    )
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(want.tree)]
    assert common.distance(got.tree, leaves) <= 2**-16 * common.length(leaves)
    assert [int(x) for x in (got.examples, got.clipped, got.nonfinite)] == [5, 3, 2]
    assert [int(x) for x in (want.examples, want.clipped, want.nonfinite)] == [5, 3, 2]
    assert np.array_equal(aux, other, equal_nan=True)


@by_rule
def test_two_pass_of_nothing_and_of_nans_is_zero(method):
    run = jax.jit(clipping.clipped_grad(_loss, clip_norm=1.0, method=method))
    for rows, mask, bad in (
        (_rows(3), jnp.zeros(3, bool), 0),
        (jnp.full((3, 5, 3), jnp.nan), jnp.ones(3, bool), 3),
        (_rows(0), jnp.ones(0, bool), 0),
    ):
        got = run(_params(), rows, mask=mask)
        assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(got.tree))
        assert int(got.nonfinite) == bad


def test_two_pass_refuses_groups_units_and_bounds_too_short_for_squares():
    params, rows = _params(), _rows()
    cases: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
        (dict(clip_norm={"w": 1.0, "b": 1.0}), {}, "one group", "one_pass"),
        (dict(clip_norm=1.0, unit=2), dict(unit_ids=jnp.zeros(6, jnp.int32)), "no unit", "vmap"),
        (dict(clip_norm=1e-12), {}, "clip_norm >= 1e-09", "vmap"),
    ]
    for options, given, message, fits in cases:
        with pytest.raises(NotImplementedError, match=message):
            clipping.clipped_grad(_loss, method="two_pass", **options)(params, rows, **given)
        run = clipping.clipped_grad(_loss, method="auto", **options)
        auto = jax.eval_shape(functools.partial(run, **given), params, rows)
        assert auto.method == fits
    run = jax.jit(
        lambda bound: clipping.clipped_grad(_loss, clip_norm=bound, method="two_pass")(params, rows)
    )
    for bound in (1e-12, -1.0, math.nan):
        assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(run(bound).tree))
    assert np.all(np.isfinite(run(1.0).tree["w"]))


def _tied(params, tokens):
    """A tied embedding seen through views: a flat parameter, reshaped and transposed."""
    table = params["flat"].reshape(7, 4)
    x = jax.checkpoint(lambda x, w: jnp.tanh(x @ w.T))(jnp.take(table, tokens, axis=0), params["w"])
    y = jnp.einsum("td,hkd->thk", x, params["heads"]) + params["b"]
    x = x * jnp.take(params["table"], tokens, axis=0)
    logits = x @ params["table"].T + jnp.sum(y)
    return -jnp.sum(jax.nn.log_softmax(logits * jnp.arange(7.0))[:, 2])


@by_rule
def test_sums_by_rule_are_those_of_the_definition_through_views_and_ties(method):
    source = np.random.default_rng(3)
    shapes = {"flat": (28,), "w": (4, 4), "heads": (2, 3, 4), "b": (3,), "table": (7, 4)}
    params = {
        name: jnp.asarray(source.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }
    tokens = jnp.array([[1, 1, 1, 5], [0, 6, 2, 2], [4, 4, 0, 0]])
    made = clipping.explain(_tied, params, tokens)
    assert made.rules["table"] == "tied embedding" and set(made.full) == {"b"}
    rows = common.gradients_one_by_one(_tied, params, (tokens,))
    bound = 0.5 * min(common.length(row) for row in rows)  # every row is cut to it
    run = jax.jit(clipping.clipped_grad(_tied, clip_norm=bound, method=method))
    got = run(params, tokens)
    want = common.clip_in_order(rows, bound * clipping.shrinkage(3))
    assert common.distance(got.tree, want) <= 2**-12 * bound * 3


@pytest.mark.parametrize(("length", "in_full"), [(3, ()), (40, ("table", "w"))])
@pytest.mark.parametrize("remat", [False, True])
def test_one_pass_makes_gradients_in_full_where_that_is_cheaper(length, in_full, remat):
    def layer(w, x):
        return jnp.tanh(x @ w)

    def loss(params, tokens):
        x = jnp.take(params["table"], tokens, axis=0)
        x = (jax.checkpoint(layer) if remat else layer)(params["w"], x)
        logits = jax.nn.log_softmax(x @ params["table"].T)
        return -jnp.mean(jnp.take_along_axis(logits, tokens[:, None], 1))

    source = np.random.default_rng(3)
    params = {"table": source.normal(size=(16, 8)), "w": source.normal(size=(8, 8))}
    params = jax.tree.map(jnp.float32, params)
    tokens = jnp.asarray(source.integers(0, 16, (5, length)), jnp.int32)
    made = clipping.explain(loss, params, tokens)
    assert made.in_full == in_full and dict(made.full) == {}
    rows = common.gradients_one_by_one(loss, params, (tokens,))
    bound = sorted(common.length(row) for row in rows)[2]
    run = clipping.clipped_grad(loss, clip_norm=bound, method="one_pass", microbatch_size=3)
    want = common.clip_in_order(rows, bound * clipping.shrinkage(5))
    got = jax.jit(run)(params, tokens)
    assert common.distance(got.tree, want) <= 2**-12 * bound * 5 and int(got.clipped) == 3


def test_one_pass_clips_groups_of_whole_parameters():
    params, rows = _params(), _rows()
    bounds = {"b": 0.3, "w": 0.5}
    got, want = (
        jax.jit(clipping.clipped_grad(_loss, clip_norm=bounds, method=method))(params, rows)
        for method in ("one_pass", "vmap")
    )
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(want.tree)]
    assert common.distance(got.tree, leaves) <= 2**-16 * common.length(leaves)
    assert int(got.clipped) == int(want.clipped) and got.clip_norm == want.clip_norm
    split = clipping.Groups((0, np.array([[0, 1, 0, 1]])), (1.0, 1.0), ("even", "odd"))
    with pytest.raises(NotImplementedError, match="splits a parameter"):
        clipping.clipped_grad(_loss, clip_norm=split, method="one_pass")(params, rows)


def test_two_pass_makes_no_gradient_per_row_of_a_parameter_with_a_rule():
    # 9 rows and a 16 × 24 matrix: nothing of 9·16·24 entries is in the compiled program.
    params = {"w": jnp.ones((16, 24)), "b": jnp.ones(24)}
    rows = jnp.ones((9, 2, 16))
    found = {}
    for method in ("vmap", "two_pass", "one_pass"):
        run = clipping.clipped_grad(_loss, clip_norm=1.0, method=method)
        text = str(jax.jit(run).lower(params, rows).compile().as_text())
        sizes = [
            math.prod(int(n) for n in shape.split(",") if n)
            for shape in re.findall(r"f32\[([\d,]*)\]", text)
        ]
        found[method] = max(sizes)
    assert max(found["two_pass"], found["one_pass"]) < 9 * 16 * 24 <= found["vmap"]


def test_explain_names_rules_reasons_and_a_choice():
    made = clipping.explain(_loss, _params(), _rows())
    assert dict(made.rules) == {"w": "matrix product"} and dict(made.full) == {"b": "used in `add`"}
    assert made.entries_in_full == 4
    assert made.choice in str(made) and "in full, used in `add`" in str(made)
    short, long = (
        clipping.explain(_loss, _params(), jax.ShapeDtypeStruct((2, length, 3), jnp.float32))
        for length in (2, 4096)
    )
    assert (short.in_full, long.in_full) == ((), ("w",))
    assert short.one_pass_bytes == 2 * (3 + 4) * 4 and long.one_pass_bytes == 12 * 4
    run = clipping.clipped_grad(_loss, clip_norm=1.0, method="auto")
    got = jax.eval_shape(run, _params(), _rows())
    assert got.method == made.choice == "one_pass"
