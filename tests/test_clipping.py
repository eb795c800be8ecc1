import math

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax import clipping

# Clipping ----------------------------------------------------------------------------------------


def test_clip_rows_holds_for_every_finite_row():
    source = np.random.default_rng(0)
    rows = source.normal(size=(500, 33)) * 10.0 ** source.uniform(-44, 38, (500, 1))
    rows = np.clip(rows, -3e38, 3e38).astype(np.float32)
    for run in (clipping.clip_rows, jax.jit(clipping.clip_rows, static_argnums=1)):
        clipped = np.asarray(run(jnp.asarray(rows), 0.7), np.float64)
        assert np.all(np.isfinite(clipped))
        assert np.max(np.linalg.norm(clipped, axis=1)) <= 0.7 * (1 + 2**-13)


def test_log_row_norms_of_huge_rows_are_not_flushed_to_zero():
    # 1/3e38 is a denormal number, which XLA flushes: a norm by rows/max came out as 0.
    rows = jnp.array([[3e38, 3e38], [0.0, 1e38], [1e-37, 0.0]])
    want = [math.log(3e38) + math.log(2) / 2, math.log(1e38), math.log(1e-37)]
    assert np.allclose(clipping.log_row_norms(rows), want, atol=1e-4)


def test_stable_sum_is_accurate_for_a_million_terms():
    values = np.random.default_rng(0).random(1_000_003, np.float32)
    exact = values.astype(np.float64).sum()
    assert abs(float(clipping.stable_sum(jnp.asarray(values))) / exact - 1) < 2**-13


def test_log_row_norms_counts_what_lies_below_the_largest_entry():
    # The squares of numbers below 2⁻⁶³ are no normal float32 numbers.
    for exponent in (-59, -55, -51, -49, 49, 51, 59):
        rows = jnp.full((1, 256), 2.0 ** (exponent - 6)).at[0, 0].set(2.0**exponent)
        want = math.log(2.0) * exponent + 0.5 * math.log(1 + 255 * 2.0**-12)
        assert abs(float(clipping.log_row_norms(rows)[0]) - want) < 2.0**-13
