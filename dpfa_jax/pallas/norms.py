"""Kernels for the squared norm of a product XᵀdY, on NVIDIA GPUs from compute capability 8.0 on.

Which statement this makes true: the result is no smaller than the norm of the exact product of the
operands as they are. From tiles of Gram matrices, ‖XᵀdY‖² = Σ_st (XXᵀ)_st (dYdYᵀ)_st, those below
the diagonal counted twice; or from tiles of XᵀdY itself, squared where they are made. Either way
nothing of rows × rows or d × p is held, and a tile is one program's.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dpfa_jax import _primitives
from dpfa_jax.pallas import blocks

_TILE = 128
"""Sides of a tile of the result."""
_DEPTH = 128
"""Products that one sum of the matrix units runs over before float32 registers take it."""
_WARPS, _STAGES = 8, 3
_MOST_TILES = 64
"""Tiles along the rows for Gram matrices: the place of a pair is found by so many comparisons."""
_MATRIX_ADD = 2.0**-23
"""Relative error of an addition in the matrix units, which may truncate (Fasi et al. 2021)."""


def supports(x: Any, dy: Any) -> str | None:
    """Why the kernels cannot take the call, or None.

    Args:
      x: (rows, d), or its shape.
      dy: (rows, p), or its shape.
    """
    if x.dtype != dy.dtype or x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"operands must have one 16-bit dtype, got {x.dtype} and {dy.dtype}"
    if x.shape[1] % 8 or dy.shape[1] % 8:
        return f"widths must be multiples of 8, got {x.shape[1]} and {dy.shape[1]}"
    if x.shape[0] < 64 or min(x.shape[1], dy.shape[1]) < 64:
        return f"sides below 64 leave its tiles empty, got {x.shape} and {dy.shape}"
    return None


def is_gram(rows: int, d: int, p: int) -> bool:
    """Whether Gram tiles multiply less than tiles of the product.

    Args:
      rows: of both operands.
      d: width of the first.
      p: width of the second.

    Guarantee: CL12 (norms.md), whichever it is.
    """
    count = pl.cdiv(rows, _TILE)
    pairs = count * (count + 1) // 2
    return count <= _MOST_TILES and pairs * _TILE**2 * (d + p) < rows * d * p


def _entry_error(length: int) -> float:
    """Bound on the error of one entry of a tile, over Σ |a|·|b| of the products it sums."""
    return (min(length, _DEPTH) + pl.cdiv(length, _DEPTH)) * _MATRIX_ADD


def gram_error(rows: int, d: int, p: int) -> float:
    """Bound on the error of the sum from Gram tiles, over (Σ_t ‖x_t‖‖dy_t‖)².

    Args:
      rows: of both operands.
      d: width of the first.
      p: width of the second.

    Returns:
      Upper bound: (1 + e_d)(1 + e_p)(1 + r) − 1, e of the entries of the two Gram matrices and r of
      summing their products; and what the diagonal, from which the bound is taken, errs by.

    Guarantee: CL12 (norms.md).
    """
    count = pl.cdiv(rows, _TILE)
    summed = (2 * _TILE + 8 + count * (count + 1) // 2) * 2.0**-24
    error = (1 + _entry_error(d)) * (1 + _entry_error(p)) * (1 + summed) - 1
    return error * (1 + 4 * error)


def direct_error(rows: int, d: int, p: int) -> tuple[float, float]:
    """Bounds on the errors of the sum from tiles of the product.

    Args:
      rows: of both operands.
      d: width of the first.
      p: width of the second.

    Returns:
      Upper bounds: of the norm of the entries' errors, over Σ_t ‖x_t‖‖dy_t‖; and of the relative
      error of summing their squares.

    Guarantee: CL12 (norms.md).
    """
    tiles = pl.cdiv(d, _TILE) * pl.cdiv(p, _TILE)
    # The sum over tiles is halved until 1024 terms are left.
    return _entry_error(rows), (2 * _TILE + 2 + min(tiles, 1024) + 32) * 2.0**-24


def _part(ref: Any, row: Any, column: Any, rows: int | None, columns: int | None) -> jax.Array:
    """A tile from (row, column) on, 0 outside the first `rows` and `columns`; None: all inside."""
    allowed = None
    for axis, start, limit in ((0, row, rows), (1, column, columns)):
        if limit is not None:
            inside = start + lax.broadcasted_iota(jnp.int32, (_TILE, _DEPTH), axis) < limit
            allowed = inside if allowed is None else allowed & inside
    return blocks.load(ref, (pl.ds(row, _TILE), pl.ds(column, _DEPTH)), allowed)


def _sum_of_steps(length: int, step: Any) -> jax.Array:
    """Σ of step(start, limit) over starts; only the last step may pass the end, and has a limit."""
    whole = length // _DEPTH

    def add(number, total):
        return total + step(number * _DEPTH, None)

    total = jnp.zeros((_TILE, _TILE), jnp.float32)
    total = lax.fori_loop(jnp.int32(0), jnp.int32(whole), add, total)
    return total + step(jnp.int32(whole * _DEPTH), length) if length % _DEPTH else total


def _gram_kernel(shape: tuple[int, int, int], fast: bool, x: Any, dy: Any, out: Any) -> None:
    """One pair of row tiles: its part of the sum, and of Σ_t ‖x_t‖‖dy_t‖ on the diagonal."""
    rows, d, p = shape
    number, first = pl.program_id(0), jnp.int32(0)
    for row in range(1, pl.cdiv(rows, _TILE)):
        first += (number >= jnp.int32(row * (row + 1) // 2)).astype(jnp.int32)
    second = number - lax.div(first * (first + 1), jnp.int32(2))
    limit = rows if rows % _TILE else None

    def products(ref, width):
        def step(start, end):
            left, right = (_part(ref, tile * _TILE, start, limit, end) for tile in (first, second))
            return blocks.same(blocks.dot(left, right, transpose_b=True), fast)

        return _sum_of_steps(width, step)

    product = products(x, d) * products(dy, p)
    own = lax.broadcasted_iota(jnp.int32, product.shape, 0) == lax.broadcasted_iota(
        jnp.int32, product.shape, 1
    )
    is_diagonal = first == second
    lengths = jnp.sum(jnp.sqrt(jnp.where(own & is_diagonal, product, 0.0)))
    times = 2.0 - is_diagonal.astype(jnp.float32)
    _store(out, times * jnp.sum(jnp.sum(product, axis=1)), lengths)


def _direct_kernel(shape: tuple[int, int, int], fast: bool, x: Any, dy: Any, out: Any) -> None:
    """One tile of XᵀdY: the sum of its squares."""
    rows, d, p = shape
    across = jnp.int32(pl.cdiv(p, _TILE))
    number = pl.program_id(0)
    first, second = lax.div(number, across), lax.rem(number, across)

    def step(start, end):
        left = _part(x, start, first * _TILE, end, d if d % _TILE else None)
        right = _part(dy, start, second * _TILE, end, p if p % _TILE else None)
        return blocks.same(blocks.dot(left, right, transpose_a=True), fast)

    tile = _sum_of_steps(rows, step)
    total = jnp.sum(jnp.sum(tile * tile, axis=1))
    _store(out, total, total)


def _store(out: Any, *numbers: jax.Array) -> None:
    place = lax.broadcasted_iota(jnp.int32, (len(numbers),), 0)
    values = jnp.where(place == 0, *numbers)
    plgpu.store(out.at[pl.ds(0, len(numbers))], values)


def _launch(body: Any, programs: int, fast: bool, x: jax.Array, dy: jax.Array) -> jax.Array:
    (rows, d), p = x.shape, dy.shape[1]
    manual = jax.typeof(x).manual_axis_type

    def kernel(*refs):
        body((rows, d, p), fast, *refs)

    kernel.__name__ = f"dpfa{body.__name__}"
    return pl.pallas_call(
        kernel,
        grid=(programs,),
        out_specs=pl.BlockSpec((None, 2), lambda number: (number, 0)),
        out_shape=jax.ShapeDtypeStruct((programs, 2), jnp.float32, manual_axis_type=manual),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=not fast,
        name=kernel.__name__,
    )(x, dy)


def _halved(terms: jax.Array) -> jax.Array:
    """The sum of terms that are not negative, by halves until 1024 are left."""
    while terms.size > 1024:
        terms = jnp.pad(terms, (0, terms.size % 2)).reshape(2, -1)
        total = terms[0] + terms[1]
        terms = jnp.where(total < 0, 0.0, total)  # between sums, which XLA would join
    return jnp.sum(terms)


def product_norm(x: jax.Array, dy: jax.Array, fast: bool = True) -> jax.Array:
    """‖xᵀ·dy‖², from Gram tiles or from tiles of the product, whichever multiply less.

    Args:
      x: (rows, d), as `supports` takes it.
      dy: (rows, p).
      fast: whether this is compiled for a GPU; else it is interpreted.

    Returns:
      float32 scalar, an upper bound on the squared norm of the exact product: what is computed, and
      what its rounding may have lost. Under `vmap` each row of the batch has programs of its own.

    Guarantee: CL12 (norms.md).
    Source: Goodfellow 2015, arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679 (Gram matrices);
      Fasi, Higham, Mikaitis and Pranesh 2021, doi:10.7717/peerj-cs.330 (sums in matrix units).
    """
    (rows, d), p = x.shape, dy.shape[1]
    x, dy = _primitives.vary_alike(x, dy)
    if is_gram(rows, d, p):
        count = pl.cdiv(rows, _TILE)
        parts = _launch(_gram_kernel, count * (count + 1) // 2, fast, x, dy)
        lengths = jnp.sum(parts[:, 1])
        return jnp.sum(parts[:, 0]) + gram_error(rows, d, p) * jnp.square(lengths)
    parts = _launch(_direct_kernel, pl.cdiv(d, _TILE) * pl.cdiv(p, _TILE), fast, x, dy)
    squares = [jnp.sum(jnp.square(each.astype(jnp.float32)), axis=1) for each in (x, dy)]
    lengths = jnp.sum(jnp.sqrt(squares[0] * squares[1]))
    lost, summed = direct_error(rows, d, p)
    norm = jnp.sqrt(_halved(parts[:, 0]) * (1 + 2 * summed))
    return jnp.square(norm + 1.01 * lost * lengths) * (1 + 2.0**-20)
