"""Wide normals: 64 bits of radius, in a domain of their own, for noise by the trillion."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpfa_jax import random
from dpfa_jax.accounting import event, gdp


def _oracle(first: int, second: int, third: int) -> tuple[float, float]:
    n = (first << 32) | second
    k = third >> 8
    k = k - (1 << 24) if k >= 1 << 23 else k
    if n < 1 << 63:
        log = math.log(2 * n + 1) - 65 * math.log(2)
    else:
        log = math.log1p(-(2 * (2**64 - 1 - n) + 1) / 2**65)
    radius, angle = math.sqrt(-2 * log), 2 * math.pi * (k + 0.5) / 2**24
    return radius * math.cos(angle), radius * math.sin(angle)


def test_wide_pair_equals_box_muller_at_the_edges_and_inside():
    edges = [0, 1, 2**31 - 1, 2**31, 2**32 - 2**25, 2**32 - 2, 2**32 - 1]
    grid = [(a, b, c) for a in edges for b in edges for c in (0, 2**31 - 1, 2**31, 2**32 - 1)]
    inside = np.random.default_rng(0).integers(0, 2**32, (2000, 3)).tolist()
    words = np.array(grid + inside, np.uint32)
    got = np.stack(random.wide_pair(*jnp.asarray(words.T)), 1)
    want = np.array([_oracle(*(int(x) for x in row)) for row in words])
    radius = np.hypot(*want.T)[:, None]
    assert np.all(np.isfinite(got))
    assert np.max(np.abs(got - want) / radius) < 2**-20 + 10 * 2**-24


def test_wide_pair_ends_at_the_stated_radius_and_never_at_zero():
    ends = jnp.array([0, 2**32 - 1], jnp.uint32)
    x, y = (np.asarray(each, np.float64) for each in random.wide_pair(ends, ends, ends[::-1]))
    # n = 0 is u = 2**-65, half a step beyond the 64 bits; the other end is u = 1 - 2**-65.
    assert math.isclose(math.hypot(x[0], y[0]), math.sqrt(2 * 65 * math.log(2)), rel_tol=1e-6)
    assert math.isclose(math.hypot(x[1], y[1]), math.sqrt(2.0**-64), rel_tol=1e-6)
    assert event.RADIUS_BITS == gdp.RADIUS_BITS == random.RADIUS_BITS
    bits = random.WIDE_RADIUS_BITS
    assert math.isclose(math.sqrt(2 * bits * math.log(2)), 9.42, abs_tol=5e-3)


def test_wide_normals_stand_where_the_address_says_and_apart_from_all_others():
    key = jax.random.key(4)
    data = random.key_data(key)
    index = 10 * 7 + 2 * 3 + 1
    words = random.chacha_block(
        tuple(data[i] for i in range(8)), tuple(jnp.uint32(a) for a in (7, 0, 0, 9 << 24))
    )
    wide = np.asarray(random.normal(key, (9, 11), radius_bits=64))
    assert float(wide.reshape(-1)[index]) == float(random.wide_pair(*words[9:12])[1])
    # Shorter arrays are the beginning of longer ones, as flat arrays.
    assert np.array_equal(random.normal(key, (33,), radius_bits=64), wide.reshape(-1)[:33])
    narrow = np.asarray(random.normal(key, (9, 11)))
    assert len(np.unique(np.concatenate([wide, narrow]))) == 2 * wide.size


def test_wide_normals_are_normal_and_a_wrong_std_is_not():
    """Two KS tests, each false with probability 1e-6 / 2; a 1 % wrong std must fail."""
    wide = np.asarray(random.normal(jax.random.key(7), (1_000_000,), radius_bits=64), np.float64)
    assert stats.kstest(wide, "norm").pvalue > 5e-7
    assert stats.kstest(1.01 * wide, "norm").pvalue < 5e-7
    pairs = wide.reshape(-1, 2)
    assert stats.kstest((pairs**2).sum(1), "chi2", args=(2,)).pvalue > 5e-7
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 4.9 / math.sqrt(len(pairs))


def test_normal_takes_no_other_number_of_radius_bits():
    for bits in (0, 32, 63, 128):
        with pytest.raises(ValueError, match="radius_bits"):
            random.normal(jax.random.key(0), (2,), radius_bits=bits)
    with pytest.raises(ValueError, match="wide normals"):
        random.normal(jax.random.key(0), (2**16, 2**16), radius_bits=64)
    assert random.normal(jax.random.key(0), (0, 3), radius_bits=64).shape == (0, 3)
    assert random.normal(jax.random.key(0), (), jnp.bfloat16, radius_bits=64).dtype == jnp.bfloat16
