"""Box-Muller: pairs of float32 normals from uint32 words, right to the last word.

Every backend computes these radii and angles of the same words; `random` says which words belong to
which element.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax


def normal_pair(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two float32 standard normals from two uint32 words: 40 bits of radius, 24 of angle.

    The radius is √(−2 ln u), u = (n + ½)/2⁴⁰ with n = first·2⁸ + (second >> 24), computed from the
    smaller of u and 1 − u. Otherwise float32 rounds every u > 1 − 2⁻²⁵ to 1, and with probability
    2⁻²⁵ a pair gets no noise at all.

    Args:
      first: uint32 words.
      second: uint32 words of the same shape.

    Returns:
      Two float32 arrays of that shape, within 2⁻¹⁸ of the radius of the real-valued map.

    Source: Box and Muller 1958.
    """
    upper = lax.shift_right_arithmetic(lax.bitcast_convert_type(first, jnp.int32), jnp.int32(31))
    flip = lax.bitcast_convert_type(upper, jnp.uint32)  # all ones where u > 1/2
    high = lax.bitcast_convert_type(first ^ flip, jnp.int32)
    low = lax.bitcast_convert_type((second ^ flip) >> 24, jnp.int32)
    small = (high.astype(jnp.float32) * 256.0 + (low.astype(jnp.float32) + 0.5)) * 2.0**-40
    return _polar(small, upper != 0, second << 8)


def _polar(small: jax.Array, flipped: jax.Array, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The pair at radius √(−2 ln u), u = 1 − small where flipped, and turn's top 24 bits."""
    # −ln(1 − x) by its series where log(1 − x) would lose the digits of x: x < 1/64.
    series = small * (1.0 + small * (0.5 + small * (1.0 / 3.0 + small * 0.25)))
    logarithm = -jnp.log(jnp.where(flipped, 1.0 - small, small))
    radius = jnp.sqrt(2.0 * jnp.where(flipped & (small < 1.0 / 64.0), series, logarithm))
    turn = lax.shift_right_arithmetic(lax.bitcast_convert_type(turn, jnp.int32), jnp.int32(8))
    # i + ½ with −2²³ ≤ i < 2²³ is exact in float32; an unsigned angle would round its last bit.
    angle = (turn.astype(jnp.float32) + 0.5) * (2.0 * math.pi / 2.0**24)
    return radius * jnp.cos(angle), radius * jnp.sin(angle)


def wide_pair(first: jax.Array, second: jax.Array, third: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`normal_pair` with 64 bits of radius, u = (first·2³² + second + ½)/2⁶⁴, 24 bits of angle.

    Args:
      first, second: uint32 words of the radius.
      third: uint32 words of the angle; their last 8 bits are not used.

    Returns:
      Two float32 arrays of that shape, within 2⁻¹⁸ of the radius of the real-valued map.
    """
    flip = lax.bitcast_convert_type(
        lax.shift_right_arithmetic(lax.bitcast_convert_type(first, jnp.int32), jnp.int32(31)),
        jnp.uint32,
    )
    high, low = (first ^ flip).astype(jnp.float32), (second ^ flip).astype(jnp.float32)
    return _polar(high * 2.0**-32 + (low + 0.5) * 2.0**-64, flip != 0, third)
