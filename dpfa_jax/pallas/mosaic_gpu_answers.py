"""What the Hopper kernel makes of a tile's sums: noise, ratio, projection, and marks of queries."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax.doubleword import round_after
from dpfa_jax.pallas import mosaic_gpu_noise as noise_blocks
from dpfa_jax.pallas.mosaic_gpu_plan import Plan
from dpfa_jax.pallas.mosaic_gpu_registers import PACKED


def _bounded(ratio, bound):
    """Rows of ratio·bound scaled to norm ≤ bound, and their factors; rows not finite become 0."""
    shape = ratio.shape
    square = jnp.sum(ratio * ratio, axis=1)
    factor = jnp.minimum(1.0, lax.rsqrt(jnp.maximum(square, 2.0**-120)))
    finite = square < jnp.inf
    factor = jnp.where(finite, factor, 0.0)
    wide = lax.broadcast_in_dim(factor * bound, shape, [0])
    return jnp.where(lax.broadcast_in_dim(finite, shape, [0]), ratio * wide, 0.0), factor


def answer(plan: Plan, total, mass, noise):
    """What is made of a tile's sums: noise, ratio, projection.

    Args:
      plan: what is static.
      total: (64, h) float32, sums of weights and values.
      mass: (64,) float32 and its low word, sums of weights.
      noise: (64, h) and (64,) of what the plan says that noise is added to, else None.

    Returns:
      The answer, it without noise, denominators, and factors of the projection or None.
    """
    spec = plan.spec
    shape = total.shape
    high, low = mass
    if plan.shift:
        unshift = 2.0**-plan.shift
        total, high, low = total * unshift, high * unshift, low * unshift
    if spec.noise == "sums":
        total = noise_blocks.on_grid(total + noise[0], spec)
    if noise[1] is not None:
        mass = noise_blocks.on_grid(round_after(high, low, noise[1]), spec, denominator=True)
    else:
        mass = high + low
    total = plgpu.layout_cast(total, PACKED)
    bound = spec.ball if spec.ball is not None else spec.row_clip
    unit = 1.0 if bound is None else 1.0 / bound
    if plan.released:
        inverse = unit / jnp.maximum(mass, spec.floor)
        ratio = total * lax.broadcast_in_dim(inverse, shape, [0])
    else:
        ratio = total * (unit / spec.floor)
        mass = mass * 0.0
    factor = None
    if bound is not None:
        ratio, factor = _bounded(ratio, bound)
    clean = ratio
    if spec.noise == "rows":
        ratio = noise_blocks.on_grid(ratio + plgpu.layout_cast(noise[0], PACKED), spec)
    return ratio, clean, mass, factor


def marked(answer, factor, best, lost):
    """NaN for queries that are not finite, which the gradients know by a factor of 0.

    Beside their maximum, that of no score, weights made anew would be infinite: they get one beside
    which weights are 0.

    Args:
      answer: (64, h).
      factor: (64,) of the projection, or None.
      best: (64,), the largest exponents.
      lost: (64,), NaN for such a query, else 0.

    Returns:
      The answer, the factors and the largest exponents.
    """
    known = lost == 0
    factor = jnp.where(known, 1.0 if factor is None else factor, 0.0)
    wide = lax.broadcast_in_dim(lost, answer.shape, [0])
    return answer + wide, factor, jnp.where(known, best, 3e38)
