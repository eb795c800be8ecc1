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
from dpfa_jax.per_example.norms import look_up_norm, product_norm, wide_product


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
            crossed = wide_product(wide[:, indices], x, [0], [0])
        return (*pull(dy), None, product_norm(x, wide), None, crossed)

    site.defvjp(forward, backward)
    return site


def pair_site(equation: Any, side: int) -> Callable[..., Any]:
    """A product whose taps get what the parameter's gradient is made of as cotangents.

    Args:
      equation: the dot_general.
      side: which operand is the parameter.

    Returns:
      (row, parameter, tap like the row, tap like the product) -> product. So inside jax.checkpoint
      the row is the one that is computed again, and none is kept from the forward pass.

    Guarantee: CL4 (rules.md).
    """

    @jax.custom_vjp
    def site(row, theta, met, out):
        return place(equation, side, row, theta)

    def forward(row, theta, met, out):
        return place(equation, side, row, theta), (row, theta)

    def backward(saved, dy):
        row, theta = saved
        _, pull = jax.vjp(lambda row: place(equation, side, row, theta), row)
        return (*pull(dy), None, row, dy)

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
        dy = jnp.where(valid[:, None], dy.reshape(indices.size, -1), 0)
        both = jnp.sum(dy.astype(jnp.float32) * crossed)
        return None, None, look_up_norm(indices, dy) + 2.0 * both

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
        grad = wide_product(row, dy, free, [first + i for i in range(len(free))])
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
    return indices, jnp.where(valid[:, None], dy.reshape(indices.size, -1), 0)


def pair_product(equation: Any, side: int, met: jax.Array, dy: jax.Array) -> jax.Array:
    """One row's parameter gradient at a product, rounded to the dtype that it is computed in.

    Args:
      equation: the product.
      side: which operand is the parameter.
      met: the other operand, of one row.
      dy: its cotangent, of one row.

    Returns:
      (entries of the free axes, entries of the contracted axes).

    Guarantee: CL4 (rules.md).
    """
    x, wide = _matrices(equation, side, met, dy)
    return wide_product(wide, x, [0], [0]).astype(dy.dtype)


def pair_cross(
    look_up: Any,
    product: Any,
    side: int,
    first: tuple[Any, Any],
    second: tuple[Any, Any],
    table: Any,
    made: jax.Array | None = None,
) -> jax.Array:
    """Inner product of the two parts of one row's gradient of a tied embedding.

    Args:
      look_up: the equation of the look-up.
      product: the equation of the product.
      side: which operand of the product is the table.
      first: what the look-up read, and its cotangent, of one row.
      second: what the product multiplied, and its cotangent, of one row.
      table: the parameter as the look-up sees it, for its shape.
      made: the row's `pair_product` at the product, where it is at hand.

    Returns:
      float32 scalar.

    Guarantee: CL4 (rules.md).
    """
    indices, dy = _read(look_up, *first, table)
    if made is not None:
        picked = made[indices].astype(jnp.float32)
    else:
        x, wide = _matrices(product, side, *second)
        picked = wide_product(wide[:, indices], x, [0], [0])
    return jnp.sum(dy.astype(jnp.float32) * picked)


def _ordered(equation: Any, side: int, theta: Any, is_contracted_first: bool) -> Any:
    """A function from a place's gradient as a matrix to one of the parameter's shape there."""
    own = sorted(equation.params["dimension_numbers"][0][side])
    free = [i for i in range(len(theta.shape)) if i not in own]
    axes = [*own, *free] if is_contracted_first else [*free, *own]

    def order(matrix):
        grad = matrix.reshape([theta.shape[i] for i in axes])
        return grad.transpose([axes.index(i) for i in range(len(theta.shape))])

    return order


def _times(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Each row times its weight, 0 for the weight 0, in the dtype of the rows."""
    along = weights.reshape(-1, *(1,) * (rows.ndim - 1))
    return jnp.where(along == 0, 0.0, rows.astype(jnp.float32) * along).astype(rows.dtype)


def pair_sum(
    equation: Any, side: int, met: jax.Array, dy: jax.Array, weights: jax.Array, theta: Any
) -> jax.Array:
    """The weighted sum over rows of parameter gradients at one place.

    Args:
      equation: the place's.
      side: which operand is the parameter.
      met: the other operand, (rows, ...); finite, also where the weight is 0.
      dy: the place's cotangent, (rows, ...); likewise.
      weights: float32 (rows,).
      theta: the parameter as it stands there, for its shape.

    Returns:
      float32 array of the parameter's shape there.

    Guarantee: CL4 (rules.md).
    """
    if equation.primitive.name == "gather":
        dy = _times(dy.astype(jnp.float32), weights)
        indices, rows = jax.vmap(lambda one, d: _read(equation, one, d, theta))(met, dy)
        total = _primitives.vary_alike(jnp.zeros(theta.shape, jnp.float32), rows)[0]
        return total.at[indices.reshape(-1)].add(rows.reshape(-1, *theta.shape[1:]))
    x, wide = jax.vmap(lambda one, d: _matrices(equation, side, one, d))(met, dy)
    # The narrower of the two carries the weights: fewer bytes.
    if x.shape[-1] <= wide.shape[-1]:
        x = _times(x, weights)
    else:
        wide = _times(wide, weights)
    x, wide = x.reshape(-1, x.shape[-1]), wide.reshape(-1, wide.shape[-1])
    return _ordered(equation, side, theta, True)(wide_product(x, wide, [0], [0]))


def product_sum(
    equation: Any, side: int, products: jax.Array, weights: jax.Array, theta: Any
) -> jax.Array:
    """The weighted sum over rows of what `pair_product` made of them.

    Args:
      equation: the product.
      side: which operand is the parameter.
      products: (rows, free, contracted), anything in rows of weight 0.
      weights: float32 (rows,).
      theta: the parameter as it stands there, for its shape.

    Returns:
      float32 array of the parameter's shape there.

    Guarantee: CL4 (rules.md).
    """
    total = jnp.sum(_times(products.astype(jnp.float32), weights), axis=0)
    return _ordered(equation, side, theta, False)(total)
