"""Sums kept as an unevaluated pair of words, so that rounding costs no privacy.

A record's effect on a plain float32 chain over 10⁶ keys may be amplified a hundred times by
rounding; over a double word it is not (F1 in sensitivity.md).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from dpfa_jax import _check

GRID_BITS = 10
"""A released value is a multiple of 2⁻¹⁰ of the power of two at or below its noise's std."""


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rounded sum and its exact error.

    Source: Knuth 1969; Møller 1965.
    """
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


def add_word(high: jax.Array, low: jax.Array, word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The double word (high, low) plus one word, as a double word.

    Source: Joldes, Muller, Popescu 2017, doi:10.1145/3121432, Algorithm 4.
    """
    total, error = two_sum(high, word)
    error = error + low
    high = total + error
    return high, error - (high - total)


def round_after(high: jax.Array, low: jax.Array, noise: jax.Array) -> jax.Array:
    """high + low + noise as one word, the only rounding to one word coming after the noise."""
    total, error = two_sum(high, noise)
    return total + (error + low)


def grid_step(noise_std: float) -> float:
    """The public grid of a value released with this noise: a power of two, ≤ 2⁻¹⁰·noise_std.

    Args:
      noise_std: standard deviation of the noise, between 2⁻¹⁰⁰ and 2¹⁰⁰.

    Raises:
      ValueError: for noise that float32 would not hold.

    Example:
      >>> grid_step(3.0) == 2**-9
      True
    """
    noise_std = _check.noise_std("the noise's standard deviation", noise_std)
    return math.ldexp(1.0, math.frexp(noise_std)[1] - 1 - GRID_BITS)


def to_grid(value: jax.Array, step: Any) -> jax.Array:
    """The nearest multiple of `step`, halves away from 0, for float32 values below 2²³·step.

    A larger value keeps the digits that float32 has for it. Rounding a release is post-processing:
    it costs no privacy. It hides the last bits of value + noise, from which one pair of normals
    would otherwise tell two known values apart (N1 in mechanisms.md).

    Args:
      value: float32.
      step: a power of two, or one for each column.
    """
    # By way of int32: a kernel has no round(), and XLA folds (value + shift) - shift to value.
    steps = value * (1.0 / step)
    whole = (steps + jnp.where(steps >= 0, 0.5, -0.5)).astype(jnp.int32).astype(jnp.float32)
    return jnp.where(jnp.abs(steps) < 2.0**23, whole * step, value)
