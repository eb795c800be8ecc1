"""What the Hopper kernel makes of a tile's sums: noise, ratio, projection, and marks of queries."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax.doubleword import round_after
from dpfa_jax.pallas import mosaic_gpu_noise as noise_blocks
from dpfa_jax.pallas.mosaic_gpu_plan import Plan
from dpfa_jax.pallas.mosaic_gpu_registers import PACKED


def _factors(ratio):
    """What brings rows to norm ≤ 1, and where their squares are finite: (64,) each."""
    square = jnp.sum(ratio * ratio, axis=1)
    return jnp.minimum(1.0, lax.rsqrt(jnp.maximum(square, 2.0**-120))), square < jnp.inf


def _wide(row, shape):
    return lax.broadcast_in_dim(row, shape, [0])


def _unshifted(plan: Plan, *sums):
    """Sums of weights as they are, not as they were raised."""
    if not plan.shift:
        return sums
    unshift = 2.0**-plan.shift
    return tuple(x * unshift for x in sums)


def sums(plan: Plan, total, mass) -> dict:
    """A tile's sums as they are, by the names of the arrays that they go to.

    Args:
      plan: what is static.
      total: as of `answer`.
      mass: as of `answer`.
    """
    total, high, low = _unshifted(plan, total, *mass)
    return {"out": plgpu.layout_cast(total, PACKED), "mass": high, "mass_low": low}


def answer(plan: Plan, total, mass, noise, lost, best) -> dict:
    """What is made of a tile's sums: noise, ratio, projection.

    Args:
      plan: what is static.
      total: (64, h) float32, sums of weights and values.
      mass: (64,) float32 and its low word, sums of weights.
      noise: (64, h) and (64,) of what the plan says that noise is added to, else None.
      lost: (64,), NaN for a query that is not finite, else 0; or None.
      best: (64,), the largest exponents.

    Returns:
      By the names of the arrays that they go to, if there are such: the answer, NaN where the query
      is lost, it without noise, denominators, factors of the projection, and the largest exponents.
    """
    spec = plan.spec
    shape = total.shape
    total, high, low = _unshifted(plan, total, *mass)
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
        ratio = total * _wide(inverse, shape)
    else:
        ratio = total * (unit / spec.floor)
        mass = mass * 0.0
    factor = None
    if bound is not None:
        factor, finite = _factors(ratio)
        if plan.contained:
            ratio = ratio * _wide(factor * bound + lost, shape)
        else:
            factor = jnp.where(finite, factor, 0.0)
            ratio = jnp.where(_wide(finite, shape), ratio * _wide(factor * bound, shape), 0.0)
    clean = ratio
    if spec.noise == "rows":
        ratio = noise_blocks.on_grid(ratio + plgpu.layout_cast(noise[0], PACKED), spec)
    if lost is not None and not plan.contained:
        ratio = ratio + _wide(lost, shape)
    if lost is not None:
        factor, best = _marked(factor, best, lost)
    return {"out": ratio, "clean": clean, "mass": mass, "factor": factor, "best": best}


def _marked(factor, best, lost):
    """Marks of queries that are not finite, which the gradients know by a factor of 0.

    Beside their maximum, that of no score, weights made anew would be infinite: they get one beside
    which weights are 0.

    Args:
      factor: (64,) of the projection, or None.
      best: (64,), the largest exponents.
      lost: (64,), NaN for such a query, else 0.

    Returns:
      The factors and the largest exponents.
    """
    known = lost == 0
    factor = jnp.where(known, 1.0 if factor is None else factor, 0.0)
    return factor, jnp.where(known, best, 3e38)
