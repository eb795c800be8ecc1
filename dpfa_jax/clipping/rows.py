"""Rows with a bounded norm.

Norms are taken in float32 through their logarithm, so that no finite row overflows, and a row with
a NaN or an infinity is NULL: weight 0, and still there.
"""

import math

import jax
import jax.numpy as jnp

from dpfa_jax import _check


def finite_rows(rows: jax.Array) -> jax.Array:
    """Which rows hold only finite numbers.

    Args:
      rows: array of shape (..., d).

    Returns:
      Boolean array of shape (...).
    """
    return jnp.all(jnp.isfinite(rows), axis=-1)


def stable_sum(array: jax.Array, axis: int = -1) -> jax.Array:
    """The sum over one axis with a relative error under 2⁻¹³ for non-negative float32 terms.

    Long axes are halved until 1024 terms are left, so that the error stays under (1024 + 22)·2⁻²⁴
    for up to 2³² terms, whatever order XLA sums the rest in.

    Args:
      array: non-negative floating-point array.
      axis: which axis to sum.

    Returns:
      The array without that axis.
    """
    array = jnp.moveaxis(array, axis, -1)
    while array.shape[-1] > 1024:
        half = -(-array.shape[-1] // 2)
        widths = [(0, 0)] * (array.ndim - 1) + [(0, 2 * half - array.shape[-1])]
        padded = jnp.pad(array, widths)
        array = padded[..., :half] + padded[..., half:]
    return jnp.sum(array, axis=-1)


def log_row_norms(rows: jax.Array) -> jax.Array:
    """Natural logarithm of the L2 norm of each row (last axis), −∞ for a zero row.

    Args:
      rows: finite floating-point array; integers are not taken.

    Returns:
      float32 (float64 for float64 input) array without the last axis. No finite row overflows.
    """
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    rows = rows.astype(dtype)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(rows), axis=-1, initial=0.0))
    zero = largest == 0
    # Powers of two, not 1/largest: XLA divides by multiplying with a reciprocal, which for 3e38 is
    # a denormal number that it flushes to zero, and the norm of a huge row would come out as 0.
    power = jnp.where(largest > 2.0**50, -100, jnp.where(largest < 2.0**-50, 100, 0))
    unit = jnp.where(power < 0, 2.0**-100, jnp.where(power > 0, 2.0**100, 1.0)).astype(dtype)
    square = stable_sum(jnp.square(rows * unit[..., None]))
    log_norm = 0.5 * jnp.log(jnp.where(zero, 1.0, square)) - power.astype(dtype) * math.log(2.0)
    return jnp.where(zero, -jnp.inf, log_norm)


def log_row_weights(rows: jax.Array, bound: float) -> jax.Array:
    """Logarithm of the record weights min(1, bound/‖row‖) that bound every row's norm.

    Args:
      rows: array of shape (..., d).
      bound: the norm that the weighted rows keep to, > 0, in the unit of the data.

    Returns:
      float32 array of shape (...), ≤ 0; −∞ for a row that is not finite.

    Raises:
      ValueError: if bound is not a positive finite number.
    """
    bound = _check.real("bound", bound, low=0, open_low=True)
    finite = finite_rows(rows)
    safe = jnp.where(finite[..., None], rows, jnp.zeros((), rows.dtype))
    weights = jnp.minimum(0.0, jnp.log(bound) - log_row_norms(safe))
    return jnp.where(finite, weights, -jnp.inf).astype(jnp.float32)


def clip_rows(rows: jax.Array, bound: float) -> jax.Array:
    """The rows scaled down to norm ≤ bound, in float32; rows that are not finite become zero.

    Args:
      rows: array of shape (..., d).
      bound: largest norm of a row of the result, > 0, up to a relative 2⁻¹⁴ of rounding.

    Returns:
      float32 array of the same shape.

    Raises:
      ValueError: if bound is not a positive finite number.

    Example:
      >>> clip_rows(jnp.array([[3.0, 4.0], [0.3, 0.4]]), 1.0).round(3).tolist()
      [[0.6000000238418579, 0.800000011920929], [0.30000001192092896, 0.4000000059604645]]
    """
    log_weights = log_row_weights(rows, bound)
    finite = finite_rows(rows)
    safe = jnp.where(finite[..., None], rows, jnp.zeros((), rows.dtype)).astype(jnp.float32)
    return safe * jnp.exp(log_weights)[..., None]
