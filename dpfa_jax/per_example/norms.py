"""Squared norms of gradients that are products, XᵀdY, or sums of looked-up rows.

Which statement this makes true: no norm is smaller than the gradient's by more than the slack that
is added covers, and none needs the gradient where that is dearer than Gram matrices.
"""

import importlib
from types import ModuleType

import jax
import jax.numpy as jnp

_MEMORY_WORD = 64
_NARROW = (jnp.bfloat16, jnp.float16)
_SLACK = 2.0**-20
_WIDEST_OF_TWO_TILES = 8192
"""With two tiles of rows three programs a row of the batch leave much of an H200 idle: .82 ms, and
.67 by XLA, for 64 rows of a vocabulary; elsewhere the kernels were as fast or faster."""


def wide_product(
    first: jax.Array, second: jax.Array, left: list[int], right: list[int]
) -> jax.Array:
    """The product contracted over these axes, every sum in float32.

    Args:
      first: one operand.
      second: the other; two of one 16-bit dtype are multiplied as they are, which is exact.
      left: axes of the first.
      right: axes of the second, in the same order.

    Returns:
      float32 array, the first one's other axes before the second one's.

    Guarantee: CL11 (norms.md).
    """

    def product(first, second):
        return jax.lax.dot_general(
            first,
            second,
            ((left, right), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    def widened(first, second):
        return product(first.astype(jnp.float32), second.astype(jnp.float32))

    if first.dtype == second.dtype and first.dtype in _NARROW:
        # Narrow operands into a wide sum is what a GPU does, and what XLA's CPU backend lacks.
        return jax.lax.platform_dependent(first, second, cpu=widened, default=product)
    return widened(first, second)


def not_below_0(terms: jax.Array) -> jax.Array:
    """max(0, terms), and NaN where they are: XLA's CPU backend fuses a maximum that loses a NaN.

    Args:
      terms: float32.

    Returns:
      float32 array of that shape.

    Guarantee: CL11 (norms.md).
    """
    return jnp.where(terms < 0, 0.0, terms)


def sum_of_squares(array: jax.Array) -> jax.Array:
    """Σ a² in float32, within a relative 2⁻¹¹ whatever order XLA adds in.

    Args:
      array: any shape, any float dtype; NaN and infinity give NaN or infinity.

    Returns:
      float32 scalar.

    Guarantee: CL11 (norms.md).

    Example:
      >>> float(sum_of_squares(jnp.array([[3.0], [4.0]])))
      25.0
    """
    terms = jnp.square(array.astype(jnp.float32)).reshape(-1)
    while terms.size > 1024:
        terms = jnp.pad(terms, (0, -terms.size % 1024))
        # Between the sums, so that XLA does not make one long sum of the short ones.
        terms = not_below_0(jnp.sum(terms.reshape(-1, 1024), axis=1))
    return jnp.sum(terms)


def _kernels(x: jax.Array, dy: jax.Array) -> ModuleType | None:
    """The module with the kernels if the default device runs them on these operands, and faster."""
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    if not isinstance(capability, str) or float(capability) < 8:
        return None
    if 128 < x.shape[0] <= 256 and x.shape[1] + dy.shape[1] > _WIDEST_OF_TWO_TILES:
        return None
    kernels = importlib.import_module("dpfa_jax.pallas.norms")
    return None if kernels.supports(x, dy) else kernels


def _gram_norm(first: jax.Array, second: jax.Array) -> jax.Array:
    """Σ_st A_st·B_st of two Gram matrices, with the slack."""
    own = jnp.eye(first.shape[0], dtype=jnp.bool_)
    lengths = jnp.sum(jnp.where(own, jnp.sqrt(first * second), 0.0))
    return jnp.sum(jnp.sum(first * second, axis=1)) + _SLACK * jnp.square(lengths)


def _plain_product_norm(x: jax.Array, dy: jax.Array) -> jax.Array:
    (rows, d), p = x.shape, dy.shape[1]
    if rows == 1:
        return sum_of_squares(x) * sum_of_squares(dy)
    gram = rows * rows * (d + p + _MEMORY_WORD)
    if gram < d * p * (rows + _MEMORY_WORD):
        return _gram_norm(wide_product(x, x, [1], [1]), wide_product(dy, dy, [1], [1]))
    lengths = [jnp.sum(jnp.square(each.astype(jnp.float32)), axis=1) for each in (x, dy)]
    slack = _SLACK * jnp.square(jnp.sum(jnp.sqrt(lengths[0] * lengths[1])))
    return sum_of_squares(wide_product(x, dy, [0], [0])) + slack


def product_norm(x: jax.Array, dy: jax.Array) -> jax.Array:
    """‖xᵀ·dy‖² without anything larger than it has to be: from Gram matrices, or directly.

    Args:
      x: (rows, d), what the parameter was multiplied with.
      dy: (rows, p), cotangent of the product.

    Returns:
      float32 scalar: the squared norm, plus 2⁻²⁰ of (Σ ‖x_t‖‖dy_t‖)², which covers the rounding of
      a sum that cancels; plus what covers the kernels' rounding where those compute it (CUDA, both
      in one 16-bit dtype), who hold nothing of rows × rows or d × p in memory.

    Guarantee: CL11 (norms.md).
    Source: Goodfellow 2015, arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679 (Gram matrices).

    Example:
      >>> x, dy = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[3.0], [1.0]])
      >>> round(float(product_norm(x, dy)), 3)  # 3² + 2²
      13.0
    """
    kernels = _kernels(x, dy)
    if kernels is None:
        return _plain_product_norm(x, dy)
    return jax.lax.platform_dependent(x, dy, cuda=kernels.product_norm, default=_plain_product_norm)


def look_up_norm(indices: jax.Array, dy: jax.Array) -> jax.Array:
    """Squared norm of a table's gradient: rows of `dy` with one index add up before the square.

    Args:
      indices: (rows,) integers.
      dy: (rows, d), cotangent of the rows looked up.

    Returns:
      float32 scalar, with the slack of `product_norm`.

    Guarantee: CL11 (norms.md).

    Example:
      >>> round(float(look_up_norm(jnp.array([5, 5, 2]), jnp.array([[1.0], [1.0], [3.0]]))), 3)
      13.0
    """
    same = indices[:, None] == indices[None, :]
    gram = wide_product(dy, dy, [1], [1])
    # Where indices differ a NaN must stay out, and on the diagonal none does.
    return _gram_norm(same.astype(jnp.float32), jnp.where(same, gram, 0.0))
