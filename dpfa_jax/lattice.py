"""Sums over shards that do not depend on the order of their parts: integers on a public lattice.

A float32 sum over devices rounds at every step by something that all records share, which for long
memories is a tenth of what one record may do. Here each shard's sums are rounded once, to multiples
of a public power of two, and the multiples are added as integers: exactly, in any order. What that
one rounding costs is `shard_rounding`.
"""

import math

import jax
import jax.numpy as jnp

from dpfa_jax import _check
from dpfa_jax.doubleword import two_sum

SHARDS = 128
"""Most shards whose integers are added without overflow."""

_SLACK = 1.1
_COARSE_BITS = 23
_FINE_BITS = 22
_UNIT = 2.0**-24


def steps(bound: float) -> tuple[float, float]:
    """The steps (G, g) of the lattice for numbers of magnitude up to a public bound.

    Args:
      bound: on the magnitude of the exact sum of all shards, > 0.

    Returns:
      Powers of two with g = 2⁻²²G and bound·1.1 ≤ 2²³G, as little above as that allows.

    Raises:
      ValueError: if a step is no normal float32 number.

    Guarantee: F5 (lattice.md).

    Example:
      >>> steps(7.0) == (2.0**-20, 2.0**-42)
      True
    """
    bound = _check.real("bound", bound, low=0, open_low=True)
    exponent = math.frexp(bound * _SLACK)[1]
    if not -126 + _COARSE_BITS + _FINE_BITS <= exponent <= 127:
        raise ValueError(
            f"Expected sums of a size between 2**-81 and 2**127, got a bound of {bound:g} on them. "
            "Scale the values and their value_bound."
        )
    coarse = math.ldexp(1.0, exponent - _COARSE_BITS)
    return coarse, math.ldexp(coarse, -_FINE_BITS)


def to_integers(high: jax.Array, low: jax.Array, bound: float) -> jax.Array:
    """A double word as two int32 numbers, of steps G and g, on a new last axis.

    Args:
      high: float32.
      low: float32 of the same shape, at most half a unit in the last place of `high`.
      bound: as `steps` takes it.

    Returns:
      (..., 2) int32: within g of the double word, and in any case of magnitude ≤ (2²³, 2²²).

    Guarantee: F5 (lattice.md).
    """
    coarse, fine = steps(bound)
    whole = jnp.clip(jnp.round(high * (1.0 / coarse)), -(2.0**_COARSE_BITS), 2.0**_COARSE_BITS)
    rest = jnp.round((high - whole * coarse) * (1.0 / fine)) + jnp.round(low * (1.0 / fine))
    rest = jnp.clip(rest, -(2.0**_FINE_BITS), 2.0**_FINE_BITS)
    pair = jnp.stack([whole, rest], axis=-1)
    # NaN has no integer, and no bound would hold for what a device makes of it.
    return jnp.where(jnp.isnan(pair), 0.0, pair).astype(jnp.int32)


def to_words(integers: jax.Array, bound: float) -> tuple[jax.Array, jax.Array]:
    """The double word that sums of `to_integers` stand for, exactly.

    Args:
      integers: (..., 2) int32, a sum over at most `SHARDS` shards.
      bound: as `steps` takes it.

    Returns:
      (high, low), normalised, float32.

    Guarantee: F5 (lattice.md).
    """
    coarse, fine = steps(bound)
    whole, rest = integers[..., 0], integers[..., 1]
    carry = (rest + (1 << (_FINE_BITS - 1))) >> _FINE_BITS
    rest -= carry << _FINE_BITS
    return two_sum((whole + carry).astype(jnp.float32) * coarse, rest.astype(jnp.float32) * fine)


def shard_rounding(
    *,
    keys: int,
    rows: int,
    width: int,
    value_bound: float,
    denominator_weight: float,
) -> float:
    """How much farther apart two neighbours' sums may be because shards were added on the lattice.

    Args:
      keys: n, records of all shards together, ≥ 1.
      rows: queries that are answered, batch × time × heads, ≥ 1.
      width: h, columns of the numerators, ≥ 1.
      value_bound: Cv, bound on the norm of a weighted value row, > 0.
      denominator_weight: c ≥ 0, weight of the denominator column; 0 where it is not released.

    Returns:
      In the unit of the values, for one changed record; r times as much for r of them. Upper bound.

    Guarantee: F5 (lattice.md).

    Example:
      >>> shard_rounding(
      ...     keys=10**6, rows=1, width=128, value_bound=1.0, denominator_weight=0.3) < 1e-5
      True
    """
    keys = _check.integer("keys", keys, low=1)
    rows = _check.integer("rows", rows, low=1)
    width = _check.integer("width", width, low=1)
    value_bound = _check.real("value_bound", value_bound, low=0, open_low=True)
    weight = _check.real("denominator_weight", denominator_weight, low=0)
    numerator, denominator = steps(keys * value_bound)[1], steps(keys)[1]
    lattice = 2 * math.hypot(math.sqrt(width) * numerator, weight * denominator)
    word = 4 * _UNIT**2 * keys * math.hypot(value_bound, weight)
    return math.sqrt(rows) * (lattice + _SLACK * word) * (1 + 2.0**-40)


def bounds(keys: int, value_bound: float) -> tuple[float, float]:
    """What no numerator and no denominator exceeds: n·Cv and n.

    Args:
      keys: n, records of all shards together; an empty memory counts as one record.
      value_bound: Cv, bound on the norm of a weighted value row, > 0.

    Returns:
      Upper bounds on the exact sums of all shards.

    Guarantee: F5 (lattice.md).
    """
    return max(keys, 1) * value_bound, float(max(keys, 1))
