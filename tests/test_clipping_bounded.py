"""Which statement does `clipping.bounded` keep true? No gradient, however wild, adds more."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import clipping
from dpfa_jax.clipping import bounded
from tests import _clipping_common as common


def _wild(source, units, shapes):
    """Rows of every scale that float32 has, each leaf with a scale of its own."""
    leaves = []
    for shape in shapes:
        exponents = source.uniform(-44, 38, (units, *(1,) * len(shape)))
        drawn = source.normal(size=(units, *shape)) * 10.0**exponents
        leaves.append(np.clip(drawn, -3e38, 3e38).astype(np.float32))
    return leaves


def _lengths(leaves, unit, groups, count):
    totals = np.zeros(count)
    for leaf, label in zip(leaves, groups.labels, strict=True):
        square = np.asarray(leaf[unit], np.float64) ** 2
        np.add.at(totals, np.broadcast_to(label, square.shape), square)
    return np.sqrt(totals)


@pytest.mark.parametrize("normalize", [None, 0.5])
def test_contributions_never_exceed_their_bounds(normalize):
    shapes = [(3, 4), (), (700,), (0,), (2, 3, 2)]
    heads = np.reshape([1, 2, 3], (1, 3, 1))
    groups = clipping.Groups((0, 1, 0, 0, heads), (0.3, 1e-15, 2e3, 1.0), tuple("abcd"))
    leaves = _wild(np.random.default_rng(0), 400, shapes)
    shrink = clipping.shrinkage(400)

    @jax.jit
    def run(leaves, present):
        return clipping.contributions(leaves, present, groups, shrink=shrink, normalize=normalize)

    present = jnp.arange(400) % 5 != 0
    cut, over, bad = run(leaves, present)
    assert not np.any(bad)
    for unit in range(400):
        long, got = (_lengths(each, unit, groups, 4) for each in (leaves, cut))
        bounds = np.asarray(groups.clip_norms)
        assert np.all(got <= bounds)
        if not present[unit]:
            assert np.all(got == 0) and not over[unit]
        elif normalize is None:
            # A leaf without digits below 1e-38 may be flushed to zero; all others are kept.
            want = np.minimum(long, bounds * shrink)
            assert np.all((np.abs(got - want) <= 2**-13 * want) | (want < 1e-30))
            assert bool(over[unit]) == bool(np.any(long > bounds * shrink))


def test_contributions_of_long_leaves_are_bounded():
    source = np.random.default_rng(1)
    for scale in (1e-25, 1e-3, 1e30):
        leaf = jnp.asarray(source.normal(size=(2, 300_000)) * scale, jnp.float32)
        groups = clipping.Groups((0,), (1e-15,), ("all",))
        run = jax.jit(
            lambda leaf, g=groups: clipping.contributions(
                [leaf], jnp.ones(2, bool), g, shrink=clipping.shrinkage(2)
            )
        )
        cut, _, _ = run(leaf)
        long = min(1e-15, math.sqrt(3e5) * scale)
        for row in np.asarray(cut[0], np.float64):
            assert 0.995 * long <= np.linalg.norm(row) <= min(1e-15, 1.005 * long)


def test_a_huge_entry_does_not_hide_another_group():
    # Scaled by one power of two for both, the squares of ones beside 1e38 are flushed to zero.
    leaves = [jnp.full((1, 3), 1e38), jnp.ones((1, 4))]
    groups = clipping.Groups((0, 1), (1.0, 0.1), ("a", "b"))
    run = jax.jit(
        lambda leaves: clipping.contributions(leaves, jnp.ones(1, bool), groups, shrink=0.9)
    )
    cut, over, _ = run(leaves)
    assert common.length([cut[0]]) <= 1.0 and common.length([cut[1]]) <= 0.1 and bool(over[0])


def test_contributions_that_are_not_finite_are_zero():
    groups = clipping.Groups((0, 1), (10.0, 10.0), ("a", "b"))
    run = jax.jit(
        lambda leaves: clipping.contributions(leaves, jnp.ones(2, bool), groups, shrink=1.0)
    )
    for value in (math.nan, math.inf, -math.inf):
        cut, _, bad = run([jnp.ones((2, 3)), jnp.array([[1.0], [value]])])
        assert [leaf[1].tolist() for leaf in cut] == [[0.0] * 3, [0.0]]
        assert [leaf[0].tolist() for leaf in cut] == [[1.0] * 3, [1.0]]
        assert bad.tolist() == [False, True]


def _double_word(terms):
    zero = jnp.zeros(terms.shape[1:])
    return bounded.add_contributions((zero, zero), terms)


def _running(terms):
    zero = jnp.zeros(terms.shape[1:])
    return jax.lax.scan(lambda total, term: (total + term, None), zero, terms)[0], zero


def _running_blocks(terms):
    return _running(jnp.sum(terms.reshape(-1, bounded.BLOCK, terms.shape[1]), axis=1))


def test_sums_move_by_no_more_than_the_bound_where_rounding_is_worst():
    # Contributions of (nearly) one direction and full length; one of them becomes NULL.
    units, source = 40_000, np.random.default_rng(2)
    rows = source.uniform(0.5, 1.0, 16) * source.uniform(1 - 2**-8, 1.0, (units, 16))
    rows *= clipping.shrinkage(units) / np.linalg.norm(rows, axis=1, keepdims=True)
    terms = jnp.asarray(rows, jnp.float32)
    exact, gone = rows.sum(axis=0), range(0, units, 2500)
    errors = {}
    ways = {"double word": _double_word, "running sum": _running, "blocks": _running_blocks}
    for name, add in ways.items():
        run = jax.jit(add)
        pairs = [run(terms)] + [run(terms.at[i].set(0.0)) for i in gone]
        high, low = (np.asarray(each, np.float64) for each in zip(*pairs, strict=True))
        errors[name] = np.linalg.norm(high[0] + low[0] - exact)
        if name == "double word":
            assert np.max(np.linalg.norm(high[0] - high[1:], axis=1)) <= 1.0
    # Negative controls: plain sums, of rows and of blocks, are seen to err more.
    assert 30 * errors["double word"] < errors["running sum"]
    assert 3 * errors["double word"] < errors["blocks"]


def test_shrinkage_is_the_formula_of_its_note():
    for units, shards in ((0, 1), (1, 1), (3, 2), (64, 8), (5000, 8)):
        depth = min(6, math.ceil(math.log2(max(units, 1))))
        charge = 2 * (depth + 1 + shards) * units * shards * 2.0**-24
        assert clipping.shrinkage(units, shards) == (1 - 2.0**-12) / (1 + charge)
    for bad in (dict(units=-1), dict(units=1.5), dict(units=1, shards=0)):
        with pytest.raises((ValueError, TypeError)):
            clipping.shrinkage(**bad)  # type: ignore[arg-type]
