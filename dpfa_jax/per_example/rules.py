"""Norms and sums of parameter gradients where a parameter meets the row, without the gradients.

Which statement this makes true: the cotangent that a place's probe gets is the squared norm of the
place's part of one row's gradient; the cotangent that a parameter gets is that part, in float32.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import GatherScatterMode

from dpfa_jax import _primitives

_MEMORY_WORD = 64


def _wide_dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """left · rightᵀ in float32."""
    return jax.lax.dot_general(
        left, right, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )


def product_norm(x: jax.Array, dy: jax.Array) -> jax.Array:
    """‖xᵀ·dy‖² without anything larger than it has to be: from Gram matrices, or directly.

    Args:
      x: (rows, d), what the parameter was multiplied with.
      dy: (rows, p), cotangent of the product.

    Returns:
      float32 scalar: the squared norm, plus 2⁻²⁰ of (Σ ‖x_t‖‖dy_t‖)², which covers the rounding of
      a sum that cancels.

    Guarantee: CL4 (rules.md).
    Source: Goodfellow 2015, arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679 (Gram matrices).

    Example:
      >>> x, dy = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[3.0], [1.0]])
      >>> round(float(product_norm(x, dy)), 3)  # 3² + 2²
      13.0
    """
    x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    (rows, d), p = x.shape, dy.shape[1]
    if rows == 1:
        return jnp.sum(jnp.square(x)) * jnp.sum(jnp.square(dy))
    squares = jnp.sum(jnp.square(x), axis=1) * jnp.sum(jnp.square(dy), axis=1)
    slack = 2.0**-20 * jnp.square(jnp.sum(jnp.sqrt(squares)))
    gram = rows * rows * (d + p + _MEMORY_WORD)
    if gram < d * p * (rows + _MEMORY_WORD):
        return jnp.sum(_wide_dot(x, x) * _wide_dot(dy, dy)) + slack
    return jnp.sum(jnp.square(_wide_dot(x.T, dy.T))) + slack


def look_up_norm(indices: jax.Array, dy: jax.Array) -> jax.Array:
    """Squared norm of a table's gradient: rows of `dy` with one index add up before the square.

    Args:
      indices: (rows,) integers.
      dy: (rows, d), cotangent of the rows looked up.

    Returns:
      float32 scalar, with the slack of `product_norm`.

    Guarantee: CL4 (rules.md).

    Example:
      >>> round(float(look_up_norm(jnp.array([5, 5, 2]), jnp.array([[1.0], [1.0], [3.0]]))), 3)
      13.0
    """
    dy = dy.astype(jnp.float32)
    same = indices[:, None] == indices[None, :]
    lengths = jnp.sqrt(jnp.sum(jnp.square(dy), axis=1))
    return jnp.sum(jnp.where(same, _wide_dot(dy, dy), 0.0)) + 2.0**-20 * jnp.square(
        jnp.sum(lengths)
    )


def _matrices(equation: Any, side: int, row: jax.Array, dy: jax.Array) -> tuple[Any, Any]:
    """Operand and cotangent of a product as (rows, contracted) and (rows, of the parameter)."""
    contracted = equation.params["dimension_numbers"][0]
    own, other = contracted[side], contracted[1 - side]
    free = [i for i in range(row.ndim) if i not in other]
    # The contracted axes in the order of the parameter's axes, as the tied rule wants them.
    order = [axis for _, axis in sorted(zip(own, other, strict=True))]
    count = math.prod(row.shape[i] for i in free)
    x = row.transpose(*free, *order).reshape(count, -1)
    if side == 1:
        return x, dy.reshape(count, -1)
    wide = equation.invars[side].aval.ndim - len(own)
    moved = jnp.moveaxis(dy, range(wide), range(dy.ndim - wide, dy.ndim))
    return x, moved.reshape(count, -1)


def bind(equation: Any, *operands: Any) -> Any:
    """The outputs of one equation for other operands.

    Args:
      equation: of a jaxpr.
      *operands: what stands in for its inputs.

    Returns:
      What its primitive returns: one array, or a list.

    Guarantee: CL4 (rules.md).
    """
    params = equation.primitive.get_bind_params(equation.params)
    return equation.primitive.bind(*operands, **params)


def place(equation: Any, side: int, row: Any, theta: Any) -> Any:
    """The outputs of an equation in which a parameter meets the row.

    Args:
      equation: of two operands.
      side: which of them is the parameter.
      row: the other one.
      theta: the parameter.

    Returns:
      What the equation computes.

    Guarantee: CL4 (rules.md).
    """
    return bind(equation, theta, row) if side == 0 else bind(equation, row, theta)


def product_norm_site(equation: Any, side: int) -> Callable[..., Any]:
    """A product whose probe gets the squared norm of the parameter's gradient as cotangent.

    Args:
      equation: the dot_general.
      side: which operand is the parameter.

    Returns:
      (row, parameter, probe, indices, carrier) -> product. Indices and carrier are those of
      `look_up_norm_site` for a tied embedding, else None.

    Guarantee: CL4 (rules.md).
    """

    @jax.custom_vjp
    def site(row, theta, probe, indices, carrier):
        return place(equation, side, row, theta)

    def forward(row, theta, probe, indices, carrier):
        return place(equation, side, row, theta), (row, theta, indices)

    def backward(saved, dy):
        row, theta, indices = saved
        _, pull = jax.vjp(lambda row: place(equation, side, row, theta), row)
        x, wide = _matrices(equation, side, row, dy)
        crossed = None
        if indices is not None:
            # The rows of this gradient, dYᵀ·X, that the look-up's gradient has too.
            x32, picked = x.astype(jnp.float32), wide.astype(jnp.float32)[:, indices]
            crossed = _wide_dot(picked.T, x32.T)
        return (*pull(dy), None, product_norm(x, wide), None, crossed)

    site.defvjp(forward, backward)
    return site


def look_up_norm_site(equation: Any) -> Callable[..., Any]:
    """A look-up whose probe gets the squared norm of the table's gradient as cotangent.

    The carrier is zero and goes to the product of a tied embedding, whose derivative sends back the
    rows of its own gradient that were looked up; so both are at hand where the look-up's cotangent
    is, and ‖g + h‖² = ‖g‖² + 2⟨g, h⟩ + ‖h‖² is exact.

    Args:
      equation: the gather.

    Returns:
      (starts, parameter, probe) -> (rows, carrier).

    Guarantee: CL4 (rules.md).
    """

    def both(starts, theta):
        out = bind(equation, theta, starts)
        return out, jnp.zeros((starts.size, theta.size // theta.shape[0]), jnp.float32)

    @jax.custom_vjp
    def site(starts, theta, probe):
        out, carrier = both(starts, theta)
        return out, _primitives.vary_alike(carrier, out)[0]

    def forward(starts, theta, probe):
        return site(starts, theta, probe), (starts, jnp.zeros((0, *theta.shape), jnp.bool_))

    def backward(saved, cotangents):
        starts, shape = saved
        dy, crossed = cotangents
        indices, valid = read_indices(equation, starts, shape.shape[1])
        dy = jnp.where(valid[:, None], dy.reshape(indices.size, -1).astype(jnp.float32), 0.0)
        return None, None, look_up_norm(indices, dy) + 2.0 * jnp.sum(dy * crossed)

    site.defvjp(forward, backward)
    return site


def read_indices(equation: Any, starts: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """The rows a gather reads, and which of its reads are inside the table.

    Args:
      equation: the gather.
      starts: its indices.
      length: rows of the table.

    Returns:
      int and bool arrays (reads,).

    Guarantee: CL4 (rules.md).
    """
    indices = starts.reshape(-1)
    inside = (indices >= 0) & (indices < length)
    clips = equation.params["mode"] in (
        GatherScatterMode.CLIP,
        GatherScatterMode.PROMISE_IN_BOUNDS,
    )
    return jnp.clip(indices, 0, length - 1), jnp.ones_like(inside) if clips else inside


def _float32_product(row: jax.Array, dy: jax.Array, left: list[int], right: list[int]) -> jax.Array:
    """The product contracted over these axes, every sum in float32."""

    def product(row, dy):
        return jax.lax.dot_general(
            row,
            dy,
            ((left, right), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    def widened(row, dy):
        return product(row.astype(jnp.float32), dy.astype(jnp.float32))

    if row.dtype == dy.dtype and row.dtype in (jnp.bfloat16, jnp.float16):
        # Narrow operands into a wide sum is what a GPU does, and what XLA's CPU backend lacks.
        return jax.lax.platform_dependent(row, dy, cpu=widened, default=product)
    return widened(row, dy)


def product_sum_site(equation: Any, side: int) -> Callable[..., Any]:
    """A product whose parameter gradient is summed in float32, whatever dtype it multiplies in.

    Args:
      equation: the dot_general.
      side: which operand is the parameter.

    Returns:
      (row, float32 parameter) -> product.

    Guarantee: CL4 (rules.md).
    """
    dtype = equation.invars[side].aval.dtype
    contracted = equation.params["dimension_numbers"][0]
    own, other = contracted[side], contracted[1 - side]

    @jax.custom_vjp
    def site(row, theta):
        return place(equation, side, row, theta.astype(dtype))

    def forward(row, theta):
        return site(row, theta), (row, theta)

    def backward(saved, dy):
        row, theta = saved
        _, pull = jax.vjp(lambda row: place(equation, side, row, theta.astype(dtype)), row)
        free = [i for i in range(row.ndim) if i not in other]
        wide = theta.ndim - len(own)
        first = 0 if side == 1 else wide
        grad = _float32_product(row, dy, free, [first + i for i in range(len(free))])
        # Its axes: the row's contracted ones in the row's order, then the parameter's free ones.
        ordered = [axis for _, axis in sorted(zip(other, own, strict=True))]
        ordered += [i for i in range(theta.ndim) if i not in own]
        return (*pull(dy), grad.transpose([ordered.index(i) for i in range(theta.ndim)]))

    site.defvjp(forward, backward)
    return site


def look_up_sum_site(equation: Any) -> Callable[..., Any]:
    """A look-up whose table gradient is summed in float32.

    Args:
      equation: the gather.

    Returns:
      (starts, float32 table) -> rows.

    Guarantee: CL4 (rules.md).
    """
    dtype = equation.invars[0].aval.dtype

    @jax.custom_vjp
    def site(starts, theta):
        return bind(equation, theta.astype(dtype), starts)

    def forward(starts, theta):
        return site(starts, theta), (starts, theta)

    def backward(saved, dy):
        starts, theta = saved
        indices, valid = read_indices(equation, starts, theta.shape[0])
        where = jnp.where(valid, indices, theta.shape[0])
        rows = dy.reshape(indices.size, *theta.shape[1:]).astype(jnp.float32)
        return None, jnp.zeros_like(theta).at[where].add(rows, mode="drop")

    site.defvjp(forward, backward)
    return site


def pair_norm(equation: Any, side: int, met: jax.Array, dy: jax.Array, theta: Any) -> jax.Array:
    """Squared norm of one row's parameter gradient at one place.

    Args:
      equation: the place's.
      side: which operand is the parameter.
      met: the other operand, of one row.
      dy: the place's cotangent, of one row.
      theta: the parameter, for its shape.

    Returns:
      float32 scalar, as `product_norm` or `look_up_norm`.

    Guarantee: CL4 (rules.md).
    """
    if equation.primitive.name == "gather":
        return look_up_norm(*_read(equation, met, dy, theta))
    return product_norm(*_matrices(equation, side, met, dy))


def _read(equation: Any, starts: jax.Array, dy: jax.Array, theta: Any) -> tuple[Any, jax.Array]:
    """The rows read, and their cotangents (reads, entries), 0 for reads outside the table."""
    indices, valid = read_indices(equation, starts, theta.shape[0])
    wide = dy.reshape(indices.size, -1).astype(jnp.float32)
    return indices, jnp.where(valid[:, None], wide, 0.0)


def pair_cross(
    look_up: Any,
    product: Any,
    side: int,
    first: tuple[Any, Any],
    second: tuple[Any, Any],
    table: Any,
) -> jax.Array:
    """Inner product of the two parts of one row's gradient of a tied embedding.

    Args:
      look_up: the equation of the look-up.
      product: the equation of the product.
      side: which operand of the product is the table.
      first: what the look-up read, and its cotangent, of one row.
      second: what the product multiplied, and its cotangent, of one row.
      table: the parameter as the look-up sees it, for its shape.

    Returns:
      float32 scalar.

    Guarantee: CL4 (rules.md).
    """
    indices, dy = _read(look_up, *first, table)
    x, wide = _matrices(product, side, *second)
    picked = wide.astype(jnp.float32)[:, indices]
    return jnp.sum(dy * _wide_dot(picked.T, x.astype(jnp.float32).T))


def pair_sum(
    equation: Any, side: int, met: jax.Array, dy: jax.Array, weights: jax.Array, theta: Any
) -> jax.Array:
    """The weighted sum over rows of parameter gradients at one place.

    Args:
      equation: the place's.
      side: which operand is the parameter.
      met: the other operand, (rows, ...).
      dy: the place's cotangent, (rows, ...).
      weights: float32 (rows,).
      theta: the parameter as it stands there, for its shape.

    Returns:
      float32 array of the parameter's shape there.

    Guarantee: CL4 (rules.md).
    """
    dy = dy.astype(jnp.float32) * weights.reshape(-1, *(1,) * (dy.ndim - 1))
    if equation.primitive.name == "gather":
        indices, rows = jax.vmap(lambda one, d: _read(equation, one, d, theta))(met, dy)
        total = _primitives.vary_alike(jnp.zeros(theta.shape, jnp.float32), rows)[0]
        return total.at[indices.reshape(-1)].add(rows.reshape(-1, *theta.shape[1:]))
    x, wide = jax.vmap(lambda one, d: _matrices(equation, side, one, d))(met, dy.astype(met.dtype))
    x, wide = x.reshape(-1, x.shape[-1]), wide.reshape(-1, wide.shape[-1])
    own = sorted(equation.params["dimension_numbers"][0][side])
    ordered = [*own, *(i for i in range(len(theta.shape)) if i not in own)]
    grad = _float32_product(x, wide, [0], [0]).reshape([theta.shape[i] for i in ordered])
    return grad.transpose([ordered.index(i) for i in range(len(theta.shape))])
