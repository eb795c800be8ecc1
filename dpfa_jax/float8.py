"""Rows of queries and keys in eight bits, for scores alone: which number becomes which."""

import jax
import jax.numpy as jnp
from jax import lax

LARGEST = 448.0
"""The largest number of float8_e4m3fn, to which larger ones are clipped."""


def rounded(rows: jax.Array) -> jax.Array:
    """Each number clipped to ±448 and rounded to nearest even; NaN where it is not finite.

    A number becomes another by itself: no row depends on another row, and a record's scores stay a
    function of that record and the query.

    Args:
      rows: floating.

    Returns:
      The same shape in float8_e4m3fn: four bits of exponent, three of mantissa, none of infinity.

    Guarantee: F6 (float8.md).

    Example:
      >>> import jax.numpy as jnp
      >>> [float(x) for x in rounded(jnp.array([1.06, 1e3, jnp.inf]))]
      [1.0, 448.0, nan]
    """
    clipped = jnp.clip(rows, -LARGEST, LARGEST)
    return jnp.where(jnp.isfinite(rows), clipped, jnp.nan).astype(jnp.float8_e4m3fn)


@jax.custom_jvp
def through(rows: jax.Array) -> jax.Array:
    """What `rounded` makes of the rows, in their own dtype; its gradient is that of the identity.

    Args:
      rows: float32, bfloat16 or float16, all of which hold every number of float8_e4m3fn.

    Returns:
      The same shape and dtype.

    Guarantee: F6 (float8.md).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> jax.value_and_grad(lambda x: through(x) ** 2)(jnp.float32(1.06))
      (Array(1., dtype=float32), Array(2., dtype=float32))
    """
    # Two conversions in a row may be taken for none: XLA is allowed excess precision.
    return lax.optimization_barrier(rounded(rows)).astype(rows.dtype)


@through.defjvp
def _through_jvp(primals, tangents):
    return through(*primals), tangents[0]
