"""Which statement does this file keep true? Noise that float32 does not hold is an error.

Flushed to zero it would be less noise than is charged, and infinite it would be no answer.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpfa_jax
from dpfa_jax import doubleword, mechanisms

SUMS = (dpfa_jax.IndependentNoise, dpfa_jax.ClippedContributions)
KEY = dpfa_jax.random.wrap_key_data(jnp.arange(8, dtype=jnp.uint32))


def _mechanism(kind, bound):
    if kind is dpfa_jax.SequenceRelease:
        return kind(1.0, clip_norm=bound)
    more = {"clip_norm": bound} if kind is dpfa_jax.ClippedContributions else {}
    return kind(1.0, value_bound=bound, score_cap=2.0, **more)


def _answer(mechanism, scale, backend="xla"):
    rows = jnp.full((1, 8, 1, 16), scale, jnp.float32)
    query = jnp.ones((1, 8, 1, 16))
    return dpfa_jax.private_attention(
        query, rows / scale, rows, mechanism=mechanism, rng=KEY, queries="public", backend=backend
    )


@pytest.mark.parametrize("backend", ("xla", "triton"))
@pytest.mark.parametrize("bound", (1e-37, 1e-34, 1e35))
@pytest.mark.parametrize("kind", (*SUMS, dpfa_jax.SequenceRelease))
def test_noise_that_float32_does_not_hold_is_refused(kind, bound, backend):
    with pytest.raises(ValueError, match="so that float32 holds the noise"):
        _answer(_mechanism(kind, bound), bound, backend)


@pytest.mark.parametrize("bound", (1e-25, 1.0, 1e25))
@pytest.mark.parametrize("kind", (*SUMS, dpfa_jax.SequenceRelease))
def test_answers_scale_with_values_and_bound_within_the_range(kind, bound):
    # A power of two scales every operation exactly; this one nearly so.
    power = 2.0 ** round(np.log2(bound))
    found, wanted = _answer(_mechanism(kind, power), power), _answer(_mechanism(kind, 1.0), 1.0)
    np.testing.assert_allclose(found / power, wanted, rtol=1e-4, atol=1e-4)
    assert np.max(np.abs(found / power)) > 0.1


@pytest.mark.parametrize("bad", (0.0, -1.0, 1e-31, 1e31, np.inf, np.nan))
def test_samplers_and_grids_refuse_what_is_out_of_range(bad):
    with pytest.raises(ValueError, match="noise"):
        mechanisms.gaussian(jax.random.key(0), jnp.zeros(3), noise_std=bad)
    with pytest.raises(ValueError, match="noise"):
        doubleword.grid_step(bad)
