"""Costs inside jit: float32 sums that lose nothing, and ε that is only ever rounded up.

A float32 ε is for a progress bar and a stopping rule on the safe side; the float64 one of the host
is the number to report. XLA's own exp and log are trusted to 2⁻¹⁶ relative (U1 in upward.md).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dpfa_jax import doubleword

SMALLEST = 2.0**-80
"""A cost that is not 0 counts as this much at least, far above where float32 loses digits."""

_UP = 1.0 + 2.0**-12
_SHARES = tuple(2.0**-k for k in range(1, 12))


def at_least(values: ArrayLike) -> np.ndarray:
    """Static float64 numbers as float32 numbers that are not smaller.

    Args:
      values: numbers in [0, ∞].

    Returns:
      float32, upper bounds; 0 stays 0, and what is smaller than 2⁻⁸⁰ becomes it.

    Guarantee: U1 (upward.md).

    Example:
      >>> bool(at_least(0.1) >= 0.1)
      True
    """
    array = np.asarray(values, np.float64)
    with np.errstate(over="ignore"):
        rounded = array.astype(np.float32)
    above = np.where(rounded < array, np.nextafter(rounded, np.float32(np.inf)), rounded)
    return np.where(array > 0, np.maximum(above, np.float32(SMALLEST)), above).astype(np.float32)


def add(high: jax.Array, low: jax.Array, cost: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A double word plus a cost ≥ 0, never less than it was; ∞ where anything is not a number.

    Args:
      high: float32 leading words.
      low: float32 trailing words.
      cost: float32; 0, or at least `SMALLEST`.

    Returns:
      The leading and trailing words. One step loses at most 2⁻⁴⁶ of the sum (lower bound).

    Guarantee: U1 (upward.md).
    """
    cost = jnp.where(cost >= 0, cost, jnp.inf)
    upper, lower = doubleword.add_word(high, low, cost)
    shrunk = (upper < high) | ((upper == high) & (lower < low))
    upper, lower = jnp.where(shrunk, high, upper), jnp.where(shrunk, low, lower)
    known = jnp.isfinite(upper) & jnp.isfinite(lower) & (high >= 0)
    return jnp.where(known, upper, jnp.inf), jnp.where(known, lower, 0.0)


def tolerance(delta: float, flux: ArrayLike, log_factor: ArrayLike) -> jax.Array:
    """δ left for ideal noise after its cut-off, rounded down; below or at 0 where none is.

    Args:
      delta: static, in [0, 1).
      flux: float32, an upper bound of what the cut-off adds to δ, ≥ 0.
      log_factor: float32, an upper bound of the logarithm of what it multiplies δ by, ≥ 0.

    Returns:
      float32 lower bound of delta·e^(−log_factor) − flux, 0 where that is negative.

    Guarantee: U1 (upward.md).
    """
    start = np.nextafter(np.float32(delta), np.float32(0.0))
    log_factor = jnp.asarray(log_factor, jnp.float32)
    kept = jnp.where(log_factor > 0, jnp.exp(-log_factor * _UP) * (1.0 - 2.0**-14), 1.0)
    left = (start * kept - jnp.asarray(flux, jnp.float32)) * (1.0 - 2.0**-20)
    return jnp.where(left > 0, left, 0.0)


def epsilon(orders: np.ndarray, curve: jax.Array, left: jax.Array) -> jax.Array:
    """ε of an RDP curve at a δ, the smallest over its orders, rounded up.

    Args:
      orders: static float64, > 1.
      curve: float32, upper bounds of the RDP at them, in [0, ∞].
      left: float32, δ for ideal noise; below 2⁻¹²⁶ it costs ∞ unless the whole curve is 0.

    Returns:
      float32 scalar upper bound in [0, ∞]; ∞ for a curve with NaN.

    Guarantee: U1 (upward.md).
    """
    away = np.log1p(-1.0 / orders) - np.log(orders) / (orders - 1.0)
    slope = 1.0 / (orders - 1.0)
    normal = left >= 2.0**-126  # of a smaller δ float32 knows too little
    log_left = -jnp.log(jnp.where(normal, left, 1.0)) * _UP  # ≥ −ln δ
    share = log_left * jnp.float32(slope)
    size = curve + jnp.abs(jnp.float32(away)) + share
    each = curve + jnp.float32(away) + share + size * 2.0**-20 + 2.0**-22
    each = jnp.where(normal & (curve < jnp.inf), jnp.maximum(each, 0.0), jnp.inf)
    found = jnp.min(jnp.where(jnp.isnan(each), jnp.inf, each))
    free = jnp.all(curve == 0)
    return jnp.where(free & (left >= 0), 0.0, found)


def epsilon_beside(
    orders: np.ndarray, curve: jax.Array, delta: float, cut_off: Any, variation: Any
) -> jax.Array:
    """`epsilon` where (1 + e^ε)·variation is also paid from δ, rounded up.

    Args:
      orders: static float64, > 1.
      curve: float32, upper bounds of the RDP at them.
      delta: static, in [0, 1).
      cut_off: (log_factor, flux), float32 upper bounds.
      variation: float32, an upper bound of the total variation between what runs and is charged.

    Returns:
      float32 scalar upper bound in [0, ∞].

    Guarantee: U1 (upward.md).
    """
    log_factor, flux = cut_off
    variation = jnp.asarray(variation, jnp.float32)
    plain = epsilon(orders, curve, tolerance(delta, flux, log_factor))
    found = jnp.where(variation == 0, plain, jnp.inf)
    for share in _SHARES:
        given = tolerance(delta * (1.0 - share), flux, log_factor)
        each = epsilon(orders, curve, given)
        paid = (1.0 + jnp.exp(each)) * variation * _UP <= np.float32(delta * share * (1 - 2.0**-20))
        found = jnp.minimum(found, jnp.where(paid, each, jnp.inf))
    return found
