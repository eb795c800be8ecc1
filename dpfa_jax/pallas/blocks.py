"""What the kernels are made of: weights, noise and sums of one block, in Triton's vocabulary.

Compiled, the special functions are the device's approximate ones (`fast`): exp2 within 2 ulp, and
normals within 2⁻¹⁴ of those of `random.normal_pair`, whose words they share bit for bit. The
interpreter takes the exact ones.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from dpfa_jax import random
from dpfa_jax.doubleword import grid_step, round_after, to_grid
from dpfa_jax.pallas import ptx

LOG2_E = math.log2(math.e)
LOWEST = -3e38
"""Stands for −∞ where −∞ − (−∞) would be NaN."""

_MATRIX, _ROW = 1, 2
"""Domains of `random`'s block addresses."""


def _approximate(instruction, x):
    (result,) = plgpu.elementwise_inline_asm(
        f"{instruction}.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result


def exp2(x, fast):
    """2^x, float32."""
    return _approximate("ex2", x) if fast else jnp.exp2(x)


def _fused(x, factor, offset):
    """x·factor + offset, rounded once; compiled only."""
    args = [x, *(jnp.broadcast_to(jnp.float32(y), x.shape) for y in (factor, offset))]
    (result,) = plgpu.elementwise_inline_asm(
        "fma.rn.ftz.f32 $0, $1, $2, $3;",
        args=args,
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result


def bounded_exp2(score, cap, factor, offset, fast):
    """2^(min(score, cap)·factor + offset); a score that is NaN counts as the cap.

    Args:
      score: float32 block.
      cap: Python float, in the unit of the scores.
      factor: Python float > 0.
      offset: float32, broadcasts; −∞ gives 0.
      fast: whether this is compiled for a GPU.
    """
    if not fast:
        return jnp.exp2(jnp.where(score < cap, score, cap) * factor + offset)
    (result,) = plgpu.elementwise_inline_asm(
        "{ .reg .f32 level;"
        f" min.ftz.f32 level, $1, {ptx.hex_float(cap)};"
        f" fma.rn.ftz.f32 level, level, {ptx.hex_float(factor)}, $2;"
        " ex2.approx.ftz.f32 $0, level; }",
        args=[score, jnp.broadcast_to(offset, score.shape)],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(score.shape, jnp.float32)],
    )
    return result


def narrow(x, dtype, fast):
    """x rounded to nearest in `dtype`, two at a time: one at a time costs as much as an exp2."""
    if not fast or dtype == jnp.float32:
        return x.astype(dtype)
    (result,) = plgpu.elementwise_inline_asm(
        f"cvt.rn.{'bf16x2' if dtype == jnp.bfloat16 else 'f16x2'}.f32 $0, $2, $1;",
        args=[x],
        constraints="=r,f,f",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, dtype)],
    )
    return result


def widen(x, fast):
    """x in float32, exactly."""
    if not fast or x.dtype != jnp.bfloat16:
        return x.astype(jnp.float32)
    (result,) = plgpu.elementwise_inline_asm(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
        args=[x],
        constraints="=&f,=f,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result


def level(score, factor, offset, fast):
    """score·factor + offset kept within ±3e38, the lowest where the score is NaN."""
    x = score * factor + offset
    if not fast:
        x = jnp.where(jnp.isnan(x), LOWEST, x)
    # On the device a maximum with a NaN is the other operand.
    return jnp.minimum(jnp.maximum(x, LOWEST), -LOWEST)


def normal_pair(first, second, fast):
    """`random.normal_pair`, with the device's approximate functions when compiled."""
    if not fast:
        return random.normal_pair(first, second)

    def made(text, kind, *args):
        (result,) = plgpu.elementwise_inline_asm(
            text,
            args=args,
            constraints=f"=f,{kind},r",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(first.shape, jnp.float32)],
        )
        return result

    radius = made(ptx.radius(), "r", first, second)
    return tuple(made(ptx.projected(name), "f", radius, second) for name in ("cos", "sin"))


def _block(key, first, second, batch, domain, head, fast):
    tagged = jnp.uint32(domain << 24) | head.astype(jnp.uint32)
    address = (first, second, batch.astype(jnp.uint32), tagged)
    return random.chacha_block(key, address, unroll=fast)


def _joined(parts):
    """Arrays stacked on a new last axis, in order; their number is a power of two."""
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [
            jnp.stack([low, high], axis=-1)
            for low, high in zip(parts[:half], parts[half:], strict=True)
        ]
    return parts[0]


def matrix_noise(key, batch, head, start, rows, width, fast):
    """Normals of rows start..start+rows, columns 0..width: float32 (rows, width).

    Args:
      key: eight uint32 scalars.
      batch: int32 scalar, global.
      head: int32 scalar, global.
      start: int32 scalar, global row.
      rows: a power of two.
      width: a power of two ≥ 16.
      fast: whether this is compiled for a GPU.
    """
    chunks = max(1, width // 64)
    pairs = min(8, width // 8)
    row = (start + lax.broadcasted_iota(jnp.int32, (rows, 4 * chunks), 0)).astype(jnp.uint32)
    block = lax.broadcasted_iota(jnp.int32, (rows, 4 * chunks), 1).astype(jnp.uint32)
    words = _block(key, row, block, batch, _MATRIX, head, fast)
    drawn = [normal_pair(words[2 * j], words[2 * j + 1], fast) for j in range(pairs)]
    noise = _joined([jnp.stack(pair, axis=-1) for pair in drawn])
    noise = noise.reshape(rows, chunks, 4, 2, pairs)
    return noise.transpose(0, 1, 4, 2, 3).reshape(rows, width)


def row_noise(key, batch, head, start, rows, fast):
    """One normal for each of the rows start..start+rows.

    Sixteen rows share a block. Every thread computes one whichever way it is asked for; chosen by
    row before they become normals, its words need one pair of these where there are eight.
    """
    row = start + lax.broadcasted_iota(jnp.int32, (rows,), 0)
    block = lax.shift_right_logical(row, jnp.int32(4)).astype(jnp.uint32)
    words = _block(key, block, jnp.uint32(0), batch, _ROW, head, fast)
    pair = row & 7
    first, second = words[:2]
    for j in range(1, 8):
        first = jnp.where(pair == j, words[2 * j], first)
        second = jnp.where(pair == j, words[2 * j + 1], second)
    even, odd = normal_pair(first, second, fast)
    return jnp.where((row & 8) == 0, even, odd)


def dot(a, b, *, transpose_a=False, transpose_b=False):
    """Matrix product with a float32 sum; float32 operands are not rounded to a narrower format."""
    return plgpu.dot(
        a, b, trans_a=transpose_a, trans_b=transpose_b, precision=lax.Precision.HIGHEST
    )


def same(x, fast):
    """x, by an instruction that no compiler looks through."""
    if not fast:
        return x
    (result,) = plgpu.elementwise_inline_asm(
        "mov.b32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result


def in_registers(rows):
    """The block, exactly, as a matrix product: a result that the compiler leaves in registers."""
    width = rows.shape[1]
    square = (width, width)
    diagonal = lax.broadcasted_iota(jnp.int32, square, 0) == lax.broadcasted_iota(
        jnp.int32, square, 1
    )
    return narrow(dot(rows, diagonal.astype(rows.dtype)), rows.dtype, True)


def load(ref, index, allowed=None):
    """`ref[index]`, 0 where `allowed` (broadcasts) is False; None allows everything."""
    if allowed is None:
        return plgpu.load(ref.at[index])
    return plgpu.load(ref.at[index], mask=allowed, other=jnp.zeros((), ref.dtype))


def inside(rows, first_row, limit, columns, width):
    """Mask (rows, columns) of positions < limit and columns < width; None if all are."""
    mask = None
    if limit is not None:
        row = first_row + lax.broadcasted_iota(jnp.int32, (rows, columns), 0)
        mask = row < limit
    if columns != width:
        narrow = lax.broadcasted_iota(jnp.int32, (rows, columns), 1) < width
        mask = narrow if mask is None else mask & narrow
    return mask


def sweep(runs, step, carry):
    """`step(tile, carry, *options)` over the tiles of the runs (first, end, *options), in order."""
    for first, end, *options in runs:

        def body(tile, carry, options=options):
            return step(tile, carry, *options)

        carry = lax.fori_loop(jnp.int32(first), jnp.int32(end), body, carry)
    return carry


def store(ref, index, value, allowed):
    """Write where allowed, in the dtype of the output."""
    plgpu.store(ref.at[index], value.astype(ref.dtype), mask=allowed)


def on_grid(x, step, fast):
    """x as the nearest multiple of `step`, a power of two, as `doubleword.to_grid` has it.

    Compiled, by adding and subtracting 2²³ steps of its sign: halves go to the even multiple, and
    what lies beyond keeps 23 digits. No conversion to integers, which are slow.
    """
    if not fast or not 2.0**-100 < step < 2.0**100:
        return to_grid(x, step)
    shift = "0x" + ptx.hex_float(2.0**23 * step).removeprefix("0f")
    (result,) = plgpu.elementwise_inline_asm(
        "{ .reg .b32 shift;"
        f" and.b32 shift, $1, 0x80000000; or.b32 shift, shift, {shift};"
        " add.rn.f32 $0, $1, shift; sub.rn.f32 $0, $0, shift; }",
        args=[x],
        constraints="=&f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result


def quotient(rows, divisor, fast):
    """Rows divided by one number each; compiled, multiplied by its inverse: both within 2 ulp."""
    if not fast:
        return rows / divisor[:, None]
    return rows * (1.0 / divisor)[:, None]


def noisy(spec, high, low, noise_std, unit, fast):
    """One word or a double word plus noise, on the public grid where the call asks for it."""
    if low is not None:
        noisy = round_after(high, low, noise_std * unit)
    else:
        noisy = _fused(unit, noise_std, high) if fast else high + noise_std * unit
    return on_grid(noisy, grid_step(noise_std), fast) if spec.on_grid else noisy
