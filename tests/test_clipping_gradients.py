"""Which statement does `clipping.clipped_grad` keep true? The sum is the one of the definition."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import ZERO_OUT, clipping
from tests import _clipping_common as common

every_model = pytest.mark.parametrize("name", ["language", "picture", "sequences"])


def _line(w, x):
    """A loss whose gradient at w = 0 is −x."""
    return 0.5 * jnp.sum((w - x) ** 2)


def _sum(clip_norm, rows, **options):
    return clipping.clipped_grad(_line, clip_norm=clip_norm, **options)(
        jnp.zeros(rows.shape[1:]), rows
    )


# Against the definition --------------------------------------------------------------------------


@every_model
def test_clipped_grad_is_the_sum_of_the_definition(name):
    loss, params, args = common.problem(name)
    rows = common.exact_rows(name)
    norms = sorted(common.length(row) for row in rows)
    bound = (norms[2] + norms[3]) / 2  # half of the rows are clipped
    run = jax.jit(clipping.clipped_grad(loss, clip_norm=bound, microbatch_size=4))
    got = run(params, *args)
    want = common.clip_in_order(rows, bound * clipping.shrinkage(len(rows)))
    # Twice the error of the plain float32 gradient of each row, against the same float64 rows.
    plain = jax.jit(jax.grad(loss))
    error = sum(
        common.distance(plain(params, *(arg[i] for arg in args)), row) for i, row in enumerate(rows)
    )
    assert common.distance(got.tree, want) <= 2 * error + 2**-12 * bound * len(rows)
    assert jax.tree.structure(got.tree) == jax.tree.structure(params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got.tree))
    assert int(got.examples) == len(rows) and int(got.nonfinite) == 0
    assert int(got.clipped) == sum(norm > bound for norm in norms)
    assert got.clip_norm == bound == got.sensitivity(ZERO_OUT)


def test_clipped_grad_with_no_bound_to_reach_is_the_sum_of_gradients():
    loss, params, args = common.problem("picture")
    got = jax.jit(clipping.clipped_grad(loss, clip_norm=1e30))(params, *args)
    total = jax.jit(jax.grad(lambda p: jnp.sum(jax.vmap(loss, (None, 0, 0))(p, *args))))(params)
    want = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(total)]
    assert common.distance(got.tree, want) <= 1e-5 * common.length(want)
    assert int(got.clipped) == 0


def test_clipped_grad_of_marked_rows_adds_each_row_once():
    # Row i's gradient is full of −(i + 1), and all are shorter than the bound: the sum is exact.
    rows = jnp.arange(1.0, 8.0)[:, None] * jnp.ones(3)
    for size in (None, 2, 100):
        got = _sum(100.0, rows, microbatch_size=size)
        assert got.tree.tolist() == [-28.0] * 3
        assert (int(got.examples), int(got.clipped)) == (7, 0)


def test_clipped_grad_is_the_same_for_any_microbatch_size():
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(9, 40)), jnp.float32)
    whole, *others = (
        jax.jit(clipping.clipped_grad(_line, clip_norm=6.0, microbatch_size=size))(
            jnp.zeros(40), rows
        )
        for size in (None, 4, 1)
    )
    assert 0 < int(whole.clipped) < 9
    want = [np.asarray(whole.tree, np.float64)]
    for parts in others:
        # What the note allows: 2·R·N·2⁻²⁴ of C, R = 6.
        assert common.distance(parts.tree, want) <= 2 * 6 * 9 * 2**-24 * 6.0
        assert int(parts.clipped) == int(whole.clipped)


def test_clipped_grad_of_bfloat16_parameters_is_bounded_and_float32():
    narrow = jnp.full((3, 2), 0.25, jnp.bfloat16)
    run = jax.jit(
        clipping.clipped_grad(lambda w, x: jnp.sum(jnp.tanh(x.astype(w.dtype) @ w)), clip_norm=0.01)
    )
    for row in ([[1.0, 2.0, -3.0]], [[1e20, 0.0, 1e-20]], [[1e-3, 0.3, 7.0]]):
        got = run(narrow, jnp.array(row)).tree
        assert got.dtype == jnp.float32
        assert common.length([got]) <= 0.01
    assert common.length([got]) >= 0.0099


def test_normalize_is_the_formula_of_automatic_clipping():
    rows = jnp.array([[3.0, 4.0], [0.0, 1e-3], [0.0, 0.0], [1e30, 0.0]])
    got = _sum(2.0, rows, normalize=0.5)
    norms = np.array([5.0, 1e-3, 0.0, 1e30])
    want = -(2.0 * np.asarray(rows, np.float64) / (norms + 0.5)[:, None]).sum(0)
    assert np.allclose(got.tree, want, rtol=1e-3)
    assert got.clip_norm == 2.0


# Groups ------------------------------------------------------------------------------------------


def test_clip_norm_as_a_prefix_tree_clips_each_part_by_itself():
    loss, params, args = common.problem("picture")
    rows = common.exact_rows("picture")
    names = list(params["params"])
    bounds = {"params": {name: 0.05 * (i + 1) for i, name in enumerate(names)}}
    got = jax.jit(clipping.clipped_grad(loss, clip_norm=bounds))(params, *args)
    paths = [str(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    order = sorted(names)
    groups = [[i for i, path in enumerate(paths) if f"'{name}'" in path] for name in order]
    norms = np.array([bounds["params"][name] for name in order])
    want = common.clip_in_order(rows, norms * clipping.shrinkage(len(rows)), groups)
    assert common.distance(got.tree, want) <= 1e-3 * common.length(want)
    assert math.isclose(got.clip_norm, math.hypot(*norms), rel_tol=1e-12)
    assert [group.name.split("/")[-1] for group in got.groups] == order


def test_traced_bounds_of_groups_are_added_up_as_numbers_are():
    params = {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(1)}

    def loss(p, x):
        return sum(jnp.sum(leaf) * x for leaf in p.values())

    @jax.jit
    def run(norms):
        bounds = {"a": norms[0], "b": norms[1], "c": norms[2]}
        made = clipping.clipped_grad(loss, clip_norm=bounds)(params, jnp.full(1, 1e15))
        return made.clip_norm, made.tree

    for scale in (1e-12, 1.0, 1e12):
        joint, tree = run(jnp.array([3.0, 4.0, 12.0]) * scale)
        assert 13.0 * scale <= float(joint) * (1 + 2**-22) <= 13.0 * scale * (1 + 2**-18)
        for name, bound in (("a", 3.0), ("b", 4.0), ("c", 12.0)):
            assert 0.999 * bound * scale <= common.length([tree[name]]) <= bound * scale


def test_label_groups_clips_each_head_by_itself():
    loss, params, args = common.problem("language")

    def label(path, leaf):
        if "attention" not in path or path.endswith("out/bias"):
            return "rest"
        return ("head", 0 if path.endswith("out/kernel") else leaf.ndim - 2)

    bounds = {"head": 0.01, "rest": 0.1}
    run = clipping.clipped_grad(
        loss, clip_norm=lambda tree: clipping.label_groups(tree, label, bounds)
    )
    got = jax.jit(run)(params, *(arg[:1] for arg in args))
    assert {group.name for group in got.groups} == {"rest", "head[0]", "head[1]"}
    assert math.isclose(got.clip_norm, math.sqrt(0.1**2 + 2 * 0.01**2), rel_tol=1e-12)
    attention = got.tree["params"]["attention"]
    for head in range(2):
        parts = [attention[name]["kernel"][:, head] for name in ("query", "key", "value")]
        parts += [attention[name]["bias"][head] for name in ("query", "key", "value")]
        parts.append(attention["out"]["kernel"][head])
        assert 0.00999 <= common.length(parts) <= 0.01


def test_per_layer_shares_the_bound_out_equally():
    _, params, _ = common.problem("picture")
    made = clipping.per_layer(params, 0.6)
    assert len(made.names) == len(params["params"])
    assert math.isclose(made.joint(), 0.6, rel_tol=1e-12) and made.joint() <= 0.6


def test_groups_that_do_not_fit_the_parameters_are_refused():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    wrong = [
        {"a": 1.0},
        {"a": 1.0, "b": {"c": 1.0}},
        {"a": 1.0, "b": 0.0},
        {"a": 1.0, "b": math.nan},
        clipping.Groups((0,), (1.0,), ("all",)),
        clipping.Groups((np.zeros((5, 1), int), 0), (1.0,), ("all",)),
    ]
    for clip_norm in wrong:
        with pytest.raises(ValueError):
            clipping.clipped_grad(lambda p, x: x * p["b"][0], clip_norm=clip_norm)(
                params, jnp.ones(3)
            )
    for labels in ((0, 2), (0, -1), (0, 0.5)):
        with pytest.raises(ValueError, match="labels"):
            clipping.Groups(labels, (1.0, 1.0), ("a", "b"))
    with pytest.raises(ValueError, match="split alike"):
        clipping.label_groups(params, lambda path, leaf: ("head", 0), 1.0)
    with pytest.raises(ValueError, match="every group"):
        clipping.label_groups(params, lambda path, leaf: path, {"a": 1.0})


# Masks, units, aux -------------------------------------------------------------------------------


def test_masked_rows_add_exactly_nothing_whatever_they_hold():
    rows = jnp.array([[1.0, 2.0], [math.nan, 0.0], [5e5, 1e38]])
    run = jax.jit(clipping.clipped_grad(_line, clip_norm=1.0, microbatch_size=2))
    mask = jnp.array([True, False, False])
    got = run(jnp.zeros(2), rows, mask=mask)
    alone = run(jnp.zeros(2), rows.at[1:].set(0.0), mask=mask)
    assert got.tree.tolist() == alone.tree.tolist()
    assert [int(got.examples), int(got.clipped), int(got.nonfinite)] == [1, 1, 0]
    nothing = run(jnp.zeros(2), rows, mask=jnp.zeros(3, bool))
    assert nothing.tree.tolist() == [0.0, 0.0] and int(nothing.examples) == 0


def test_rows_that_are_not_finite_add_nothing_and_are_counted():
    rows = jnp.array([[1.0, 2.0], [math.nan, 0.0], [math.inf, 1.0], [3.0, -math.inf]])
    got = _sum(10.0, rows, microbatch_size=3)
    assert got.tree.tolist() == [-1.0, -2.0]
    assert [int(got.examples), int(got.nonfinite)] == [4, 3]
    everything = _sum(10.0, jnp.full((4, 2), math.nan))
    assert everything.tree.tolist() == [0.0, 0.0] and int(everything.nonfinite) == 4


def test_an_empty_batch_sums_to_zero():
    loss = lambda w, x: (_line(w, x), {"norm": jnp.sum(x), "k": jnp.int32(1)})  # noqa: E731
    cases: list[dict[str, Any]] = [dict(), dict(microbatch_size=2), dict(unit=3)]
    for options in cases:
        ids = dict(unit_ids=jnp.zeros(0, jnp.int32)) if "unit" in options else {}
        run = clipping.clipped_grad(loss, clip_norm=1.0, has_aux=True, **options)
        got, aux = jax.jit(run)(jnp.zeros(2), jnp.zeros((0, 2)), **ids)
        assert got.tree.tolist() == [0.0, 0.0] and int(got.examples) == 0
        assert aux["norm"].shape == (0,) and aux["k"].dtype == jnp.int32


def test_rows_of_one_unit_share_one_clip():
    # The last row is a unit's, and of two microbatches of 4 the last one is filled up with it.
    rows = jnp.array([[3.0, 0.0], [0.0, 4.0], [9.0, 9.0], [math.nan, 0.0], [0.0, 7.0], [0.1, 0.0]])
    ids = jnp.array([1, 1, -1, 2, 2, 0])
    for size in (None, 2, 4):
        run = clipping.clipped_grad(_line, clip_norm=1.0, unit=4, microbatch_size=size)
        got = jax.jit(run)(jnp.zeros(2), rows, unit_ids=ids)
        short = clipping.shrinkage(4)
        assert np.allclose(got.tree, [-0.6 * short - 0.1, -0.8 * short], atol=1e-6)
        assert [int(got.examples), int(got.clipped), int(got.nonfinite)] == [3, 1, 1]
        assert got.unit == "unit" and got.clip_norm == 1.0
    far = run(jnp.zeros(2), rows, unit_ids=jnp.full(6, 4), mask=jnp.ones(6, bool))
    assert far.tree.tolist() == [0.0, 0.0]


def test_contributions_leave_room_for_the_rounding_of_a_sum_as_long_as_theirs():
    many = 20_000
    rows = jnp.zeros((many, 2)).at[7].set(100.0)
    by_row = jax.jit(clipping.clipped_grad(_line, clip_norm=1.0))(jnp.zeros(2), rows)
    run = jax.jit(clipping.clipped_grad(_line, clip_norm=1.0, unit=many))
    by_unit = run(jnp.zeros(2), rows[:8], unit_ids=jnp.arange(8))
    for made in (by_row, by_unit):
        assert abs(common.length([made.tree]) - clipping.shrinkage(many)) < 2**-12
    assert clipping.shrinkage(many) < 0.99


@pytest.mark.parametrize("size", [None, 1, 2])
def test_aux_stays_with_its_row_or_is_summed_where_rows_count(size):
    rows = jnp.arange(5.0)[:, None]
    loss = lambda w, x: (_line(w, x), {"x": x[0], "two": jnp.ones(2)})  # noqa: E731
    run = clipping.clipped_grad(loss, clip_norm=1.0, has_aux=True, microbatch_size=size)
    _, aux = run(jnp.zeros(1), rows)
    assert aux["x"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0] and aux["two"].shape == (5, 2)
    run = clipping.clipped_grad(
        loss, clip_norm=1.0, has_aux=True, microbatch_size=size, per_example_aux=False
    )
    _, aux = run(jnp.zeros(1), rows, mask=jnp.array([True, True, False, True, False]))
    assert float(aux["x"]) == 4.0 and aux["two"].tolist() == [3.0, 3.0]


def test_argnums_and_batch_axes_name_arguments():
    def loss(scale, x, w, key):
        return jnp.sum(scale * w * x) + 0.0 * jax.random.normal(key)

    x = jnp.arange(6.0).reshape(2, 3)  # three examples of width 2, on axis 1
    run = clipping.clipped_grad(loss, clip_norm=100.0, argnums=(2, 0), batch_axes=(1, None))
    got = run(jnp.ones(2), x, jnp.full(2, 2.0), jax.random.key(0))
    assert [leaf.tolist() for leaf in got.tree] == [[3.0, 12.0], [6.0, 24.0]]


def test_private_releases_keep_their_own_noise_per_row():
    keys = jax.random.split(jax.random.key(0), 3)
    loss = lambda w, key: w * jax.random.normal(key)  # noqa: E731
    _, aux = clipping.clipped_grad(
        lambda w, key: (loss(w, key), jax.random.normal(key)), clip_norm=1.0, has_aux=True
    )(jnp.float32(1.0), keys)
    assert len(set(aux.tolist())) == 3


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e-16, 1e31])
def test_clip_norm_outside_its_range_is_refused(bad):
    with pytest.raises(ValueError, match="clip_norm"):
        clipping.clipped_grad(_line, clip_norm=bad)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_senseless_traced_clip_norm_poisons_the_sum(bad):
    for rows in (jnp.ones((2, 3)), jnp.zeros((2, 3))):
        run = jax.jit(lambda c, rows: _sum(c, rows))
        got = run(jnp.float32(bad), rows)
        assert np.all(np.isnan(got.tree)) and math.isnan(float(got.sensitivity(ZERO_OUT)))
    good = run(jnp.float32(1.0), jnp.ones((2, 3)))
    assert math.isclose(common.length([good.tree]), 2.0, rel_tol=1e-3)


def test_an_undeclared_batch_axis_is_an_error():
    w, x, y = jnp.zeros(2), jnp.ones((4, 2)), jnp.ones((4, 2))
    loss = lambda w, x, y: jnp.sum((w - x) ** 2 * jnp.mean(y))  # noqa: E731
    with pytest.raises(ValueError, match="undeclared batch axis"):
        clipping.clipped_grad(loss, clip_norm=1.0, batch_axes=(0, None))(w, x, y)
    with pytest.raises(ValueError, match="one batch size"):
        clipping.clipped_grad(loss, clip_norm=1.0)(w, x, y[:3])
    with pytest.raises(ValueError, match="batch axis of each"):
        clipping.clipped_grad(loss, clip_norm=1.0, batch_axes=(0,))(w, x, y)
    with pytest.raises(ValueError, match="batch_axes"):
        clipping.clipped_grad(loss, clip_norm=1.0)(w, x, jnp.float32(1.0))
    with pytest.raises(ValueError, match="one batch size"):
        clipping.clipped_grad(loss, clip_norm=1.0, batch_axes=None)(w, (), ())
    # A loss that keeps a batch axis, or has two examples where one is expected.
    with pytest.raises(ValueError, match="float scalar for one row"):
        clipping.clipped_grad(lambda w, x: (w - x) ** 2, clip_norm=1.0)(w, x)
    with pytest.raises(ValueError, match="float scalar"):
        clipping.clipped_grad(lambda w, x: jnp.int32(1), clip_norm=1.0)(w, x)


def test_arguments_of_the_wrong_kind_are_refused():
    w, x = jnp.zeros(2), jnp.ones((4, 2))
    run = clipping.clipped_grad(_line, clip_norm=1.0)
    for mask in (jnp.ones(4), jnp.ones(3, bool), jnp.ones((4, 1), bool)):
        with pytest.raises(TypeError, match="mask"):
            run(w, x, mask=mask)
    with pytest.raises(ValueError, match="unit"):
        run(w, x, unit_ids=jnp.zeros(4, jnp.int32))
    of_units = clipping.clipped_grad(_line, clip_norm=1.0, unit=2)
    with pytest.raises(ValueError, match="unit"):
        of_units(w, x)
    with pytest.raises(TypeError, match="unit_ids"):
        of_units(w, x, unit_ids=jnp.zeros(4))
    for tree in (jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.complex64)):
        with pytest.raises(TypeError, match="floating"):
            run(tree, x)
    with pytest.raises(TypeError, match=r"\(loss, aux\)"):
        clipping.clipped_grad(_line, clip_norm=1.0, has_aux=True)(w, x)
    bad: list[dict[str, Any]] = [
        dict(microbatch_size=0),
        dict(unit=0),
        dict(normalize=0.0),
        dict(normalize=math.nan),
        dict(method="fast"),
        dict(argnums=()),
        dict(argnums=(0, 0)),
    ]
    for options in bad:
        with pytest.raises(ValueError):
            clipping.clipped_grad(_line, clip_norm=1.0, **options)
    with pytest.raises(ValueError, match="argnums"):
        clipping.clipped_grad(_line, clip_norm=1.0, argnums=2)(w, x)
    partial = functools.partial(clipping.clipped_grad, _line, clip_norm=True)
    with pytest.raises(TypeError, match="bool"):
        partial()(w, x)
