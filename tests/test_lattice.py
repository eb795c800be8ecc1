"""Which statement is kept true? Sums over shards err by one public step, in whatever order (F5)."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import lattice

BOUND = 1000.0
_to_integers = jax.jit(lattice.to_integers, static_argnums=2)


def _pairs(count, bound=BOUND, seed=0):
    """Normalised double words of all sizes up to a bound."""
    source = np.random.default_rng(seed)
    size = bound * 2.0 ** -source.uniform(0, 40, count)
    high = (size * source.choice([-1, 1], count)).astype(np.float32)
    low = np.spacing(np.abs(high)) * source.uniform(-0.5, 0.5, count).astype(np.float32)
    high[:3], low[:3] = (bound, -bound, 0), (0, 0, 0)
    return high, low


def _exact(high, low):
    return [Fraction(float(a)) + Fraction(float(b)) for a, b in zip(high, low, strict=True)]


def test_to_integers_errs_by_at_most_one_fine_step():
    high, low = _pairs(2000)
    integers = np.asarray(_to_integers(jnp.asarray(high), jnp.asarray(low), BOUND))
    coarse, fine = lattice.steps(BOUND)
    worst = 0.0
    for exact, (whole, rest) in zip(_exact(high, low), integers, strict=True):
        error = int(whole) * Fraction(coarse) + int(rest) * Fraction(fine) - exact
        worst = max(worst, abs(float(error / Fraction(fine))))
    assert 0.6 < worst <= 1


def test_to_words_is_exact_and_normalised():
    source = np.random.default_rng(1)
    integers = np.stack(
        [source.integers(-(2**23), 2**23, 2000), source.integers(-(2**29), 2**29, 2000)], -1
    )
    high, low = jax.jit(lattice.to_words, static_argnums=1)(jnp.asarray(integers, jnp.int32), BOUND)
    coarse, fine = lattice.steps(BOUND)
    want = [int(a) * Fraction(coarse) + int(b) * Fraction(fine) for a, b in integers]
    assert _exact(np.asarray(high), np.asarray(low)) == want
    assert np.all(np.abs(low) <= np.spacing(np.abs(high)) / 2)


def test_sums_of_integers_do_not_depend_on_their_order():
    high, low = (x.reshape(64, -1) for x in _pairs(64 * 50, BOUND / 64))
    integers = np.asarray(_to_integers(jnp.asarray(high), jnp.asarray(low), BOUND))
    sums = [
        lattice.to_words(jnp.asarray(integers[order].sum(0, dtype=np.int32)), BOUND)
        for order in (slice(None), slice(None, None, -1), np.random.default_rng(0).permutation(64))
    ]
    for other in sums[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(sums[0], other, strict=True))
    # Negative control: float32 sums of the same words do.
    forward = np.add.accumulate(high, axis=0)[-1]
    backward = np.add.accumulate(high[::-1], axis=0)[-1]
    assert not np.array_equal(forward, backward)


def _moved(keys, rows, width, seed, summed):
    """How much farther two neighbours' sums over 8 shards are apart than the exact ones are."""
    source = np.random.default_rng(seed)
    shape = 8, rows, width
    high = (source.uniform(-1, 1, shape) * keys / 8).astype(np.float32)

    def rest():
        return (np.spacing(np.abs(high)) * source.uniform(-0.5, 0.5, shape)).astype(np.float32)

    sides = [(high, rest()), (high.copy(), rest())]
    sides[1][0][0] += source.uniform(-1, 1, shape[1:]).astype(np.float32)
    sides[1][1][1:] = sides[0][1][1:]
    found = [summed(*side, lattice.bounds(keys, 1.0)[0]) for side in sides]
    exact = [side[0].astype(np.float64) + side[1] for side in sides]
    return np.linalg.norm(found[1] - found[0] - (exact[1] - exact[0]).sum(0))


def _on_the_lattice(high, low, bound):
    integers = np.asarray(_to_integers(jnp.asarray(high), jnp.asarray(low), bound))
    integers = integers.sum(0, dtype=np.int64)
    coarse, fine = lattice.steps(bound)
    return integers[..., 0] * coarse + integers[..., 1] * fine


def _in_float32(high, low, bound):
    del low, bound
    return np.add.accumulate(high, axis=0)[-1].astype(np.float64)


@pytest.mark.parametrize("keys", [512, 2**17])
def test_shard_rounding_is_nearly_reached_and_not_exceeded(keys):
    rows, width = 40, 64
    allowed = lattice.shard_rounding(
        keys=keys, rows=rows, width=width, value_bound=1.0, denominator_weight=0.0
    )
    found = max(_moved(keys, rows, width, seed, _on_the_lattice) for seed in range(5))
    # Uniform errors of two roundings have a fifth of the norm of what two could err by.
    assert 0.15 * allowed < found <= allowed
    # A bound that forgot how many queries there are would be exceeded.
    assert found > lattice.shard_rounding(
        keys=keys, rows=1, width=width, value_bound=1.0, denominator_weight=0.0
    )


def test_shard_rounding_catches_a_float32_sum_over_shards():
    # Negative control, and why there is a lattice at all.
    keys = 2**17
    allowed = lattice.shard_rounding(
        keys=keys, rows=40, width=64, value_bound=1.0, denominator_weight=0.0
    )
    assert _moved(keys, 40, 64, 0, _in_float32) > 1000 * allowed


def test_shard_rounding_grows_with_rows_columns_and_the_denominator():
    common = {"keys": 10**5, "value_bound": 2.0}
    one = lattice.shard_rounding(rows=1, width=16, denominator_weight=0.0, **common)
    assert lattice.shard_rounding(rows=4, width=16, denominator_weight=0.0, **common) == 2 * one
    assert lattice.shard_rounding(rows=1, width=64, denominator_weight=0.0, **common) > 1.9 * one
    assert lattice.shard_rounding(rows=1, width=16, denominator_weight=9.0, **common) > one
    assert lattice.shard_rounding(rows=10**6, width=128, denominator_weight=1.0, **common) < 0.01


@pytest.mark.parametrize("worst", [np.inf, -np.inf, np.nan, 3e38])
def test_no_shard_makes_the_integers_overflow(worst):
    words = jnp.full((3,), worst, jnp.float32), jnp.full((3,), worst, jnp.float32)
    integers = np.asarray(lattice.to_integers(*words, BOUND)).astype(np.int64)
    assert np.all(np.abs(integers) <= [2**23, 2**22])
    total = lattice.SHARDS * integers
    assert np.array_equal(total, total.astype(np.int32))
    high, low = lattice.to_words(jnp.asarray(total, jnp.int32), BOUND)
    assert np.all(np.isfinite(high)) and np.all(np.isfinite(low))


def test_steps_hold_the_bound_with_a_tenth_to_spare():
    for bound in (1e-20, 0.9, 1.0, 7.0, 1e6, 1e36):
        coarse, fine = lattice.steps(bound)
        assert 1.1 * bound <= 2.0**23 * coarse <= 2.2 * bound
        assert math.frexp(coarse)[0] == math.frexp(fine)[0] == 0.5
    for bound in (1e-26, 2e38):
        with pytest.raises(ValueError, match="Scale the values"):
            lattice.steps(bound)
    with pytest.raises(ValueError, match="bound"):
        lattice.steps(math.nan)
