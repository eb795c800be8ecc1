"""What both Flax tests need: small operands, mechanisms, and the question whether noise repeats."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import dpfa_jax

SEQUENCE = dpfa_jax.SequenceRelease(noise_multiplier=1.0, clip_norm=1.0)
SUMS = dpfa_jax.IndependentNoise(noise_multiplier=0.5, value_bound=1.0, score_cap=2.0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4)), jnp.float32)
MEMORY = jnp.asarray(np.random.default_rng(1).normal(size=(1, 5, 4)), jnp.float32)
RNG = dpfa_jax.random.wrap_key_data(jnp.arange(8, dtype=jnp.uint32))
OTHER_RNG = dpfa_jax.random.wrap_key_data(jnp.arange(1, 9, dtype=jnp.uint32))
KEY_SPEC = jax.ShapeDtypeStruct((), RNG.dtype)


def noise_repeats(outputs) -> bool:
    """Whether two of the outputs, made from equal operands, carry the same noise.

    Float32 noise of unit scale agrees in any one of 12 places by chance with probability < 1e-5,
    and in half of them with probability < 1e-6: that is this function's false-alarm rate.
    """
    flat = [np.asarray(output, np.float64).ravel() for output in outputs]
    assert len(flat) > 1 and flat[0].size >= 12 and all(np.all(np.isfinite(x)) for x in flat)
    return any(np.mean(np.abs(a - b) < 1e-6) > 0.5 for a, b in itertools.combinations(flat, 2))


def heads(seed: int, *shape: int) -> jax.Array:
    """Normal operands."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
