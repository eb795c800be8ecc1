"""What the Hopper kernel's sums are made of: weights, and their sums by row and column."""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, scf

from dpfa_jax.pallas import mosaic_gpu_products as products
from dpfa_jax.pallas import mosaic_gpu_registers as rg
from dpfa_jax.pallas import ptx
from dpfa_jax.pallas.mosaic_gpu_registers import ROWS

_LEVEL = "min.ftz.f32 a, $1, {cap}; fma.rn.ftz.f32 a, a, {factor}, $2;"
_ONLINE = "{ .reg .f32 a; sub.ftz.f32 a, $1, $2; ex2.approx.ftz.f32 $0, a; }"


def _row_sums_of(weights, sums=None):
    """Sums of each of a thread's two rows in two chains a row, after those of earlier weights."""
    found = [[], []] if sums is None else [list(row) for row in sums]
    for i, weight in enumerate(weights):
        row, chain = found[i // 2 % 2], i % 2
        if len(row) < 2:
            row.append(weight)
        else:
            row[chain] = arith.addf(row[chain], weight)
    return found


def _joined(chains, before=None):
    """A number a row: its two chains, after what is there."""
    found = [arith.addf(*row) for row in chains]
    return found if before is None else [arith.addf(*x) for x in zip(before, found, strict=True)]


def rounded(weights, dtype):
    """Weights (64, keys) rounded to nearest, to float16 with 0 below the normal numbers.

    Where the compiler finds this, it stays: a product in flight may read the last weights, and what
    is written before that product is done would make it wait.
    """
    half = rg.half_name(dtype)
    shape = weights.shape

    @rg.inline(arg_types=(rg.TILE,), return_type=plgpu.ShapeDtypeStruct(shape, dtype, rg.PACKED))
    def run(_, weights):
        given, words = rg.numbers(weights), []
        for i in range(0, len(given), 2):
            text = f"cvt.rn.{half}x2.f32 $0, $2, $1;"
            word = rg.asm(rg.i32(), given[i : i + 2], text, "=r,f,f", effects=True)
            if half == "f16":
                # Below the normal numbers rounding could double a weight.
                one = rg.integer(0x3C003C00)
                word = rg.asm(rg.i32(), [word, one], "mul.rn.ftz.f16x2 $0, $1, $2;", "=r,r,r")
            words.append(word)
        return packed(words, shape, dtype)

    return run(weights)


def packed(words, shape, dtype):
    """The array of 16-bit numbers of which this thread holds `words`, two in each."""
    kind = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
    registers = np.empty(rg.PACKED.to_mgpu().registers_shape(shape), dtype=object)
    for index, word in enumerate(words):
        registers.flat[index] = llvm.bitcast(kind, word)
    return rg.array(registers, rg.PACKED)


def capped_weights(scores, offset, mass, *, cap: float, factor: float):
    """2^(min(score, cap)·factor + offset); a score that is NaN counts as the cap.

    Args:
      scores: (64, keys) float32.
      offset: (keys,) float32, −∞ for a weight of 0.
      mass: (64,) float32, a share in each of a row's four threads; `row_sums` adds them up.
      cap: in the unit of the scores.
      factor: of the scores, into units of ln 2, > 0.

    Returns:
      The weights, and `mass` plus their sums.
    """
    shape = scores.shape

    @rg.inline(
        arg_types=(rg.TILE, rg.COLUMN, rg.ROW),
        return_type=(
            plgpu.ShapeDtypeStruct(shape, jnp.float32, rg.TILE),
            plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, rg.ROW),
        ),
    )
    def run(_, scores, offset, mass):
        weights = _capped(rg.numbers(scores), rg.numbers(offset), cap=cap, factor=factor)
        sums = _joined(_row_sums_of(weights), rg.numbers(mass))
        return rg.from_numbers(weights, shape, rg.TILE), rg.from_numbers(sums, (ROWS,), rg.ROW)

    return run(scores, offset, mass)


def _capped(scores, offsets, *, cap: float, factor: float, last: str = "ex2.approx.ftz"):
    """Weights of a thread's scores, or their exponents where the last step is "mov"."""
    level = _LEVEL.format(cap=ptx.hex_float(cap), factor=ptx.hex_float(factor))
    text = f"{{ .reg .f32 a; {level} {last}.f32 $0, a; }}"
    return [
        rg.asm(rg.f32(), [x, offsets[2 * (i // 4) + i % 2]], text, "=f,f,f")
        for i, x in enumerate(scores)
    ]


def weights_around(scores, offset, mass, total, spent, *, early: int, turns: bool, **options):
    """`capped_weights` made on both sides of a wait for the sums in flight.

    The assembler would move the arithmetic past the wait as it likes: a kernel's speed then hangs
    on code that has nothing to do with it.

    Args:
      scores: as of `capped_weights`, like `offset`, `mass` and the other options.
      total: (64, value width) float32, in flight; see `products.finish`.
      spent: the weights that multiply values there.
      early: of a thread's weights, so many are made before the wait, a multiple of 4.
      turns: as of `products.overlapped`.

    Returns:
      As of `capped_weights`, the same bits, and the sums.
    """
    shape = scores.shape
    row = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, rg.ROW)

    @rg.inline(
        arg_types=(rg.TILE, rg.COLUMN, rg.ROW, rg.TILE, rg.PACKED),
        return_type=(
            plgpu.ShapeDtypeStruct(shape, jnp.float32, rg.TILE),
            row,
            plgpu.ShapeDtypeStruct(total.shape, jnp.float32, rg.TILE),
        ),
    )
    def run(_, scores, offset, mass, total, spent):
        given, offsets, held = rg.numbers(scores), rg.numbers(offset), rg.numbers(total)
        count = len(held)
        weights = _capped(given[:early], offsets, **options)
        chains = _row_sums_of(weights)
        first = [number for row in chains for number in row]
        # Of the others the exponents, which need the offsets no more.
        levels = _capped(given, offsets, last="mov", **options)[early:]
        found = products.landed(held + levels, spent, first, turns)
        rest = [rg.approximate("ex2", x) for x in found[count:]]
        sums = _joined(_row_sums_of(rest, chains if early else None), rg.numbers(mass))
        return (
            rg.from_numbers(weights + rest, shape, rg.TILE),
            rg.from_numbers(sums, (ROWS,), rg.ROW),
            rg.from_numbers(found[:count], total.shape, rg.TILE),
        )

    return run(scores, offset, mass, total, spent)


def online_weights(scores, offset, mass, best, *, factor: float, shift: int):
    """2^(score·factor + offset − best + shift); arguments as in `capped_weights`.

    Args:
      best: (64,) float32, the largest exponent of earlier keys.
      shift: powers of two by which weights are raised.

    Returns:
      The weights, `mass` in units of the new largest exponent plus their sums, that exponent, and
      the factor that brings earlier sums to it.
    """
    shape = scores.shape
    row = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, rg.ROW)
    level = (
        "{ .reg .f32 a; fma.rn.ftz.f32 a, $1, " + ptx.hex_float(factor) + ", $2;"
        f" max.ftz.f32 a, a, {ptx.hex_float(-3e38)}; min.ftz.f32 $0, a, {ptx.hex_float(3e38)}; }}"
    )

    @rg.inline(
        arg_types=(rg.TILE, rg.COLUMN, rg.ROW, rg.ROW),
        return_type=(plgpu.ShapeDtypeStruct(shape, jnp.float32, rg.TILE), row, row, row),
    )
    def run(_, scores, offset, mass, best):
        given, offsets, old = rg.numbers(scores), rg.numbers(offset), rg.numbers(best)
        levels = [
            rg.asm(rg.f32(), [x, offsets[2 * (i // 4) + i % 2]], level, "=f,f,f")
            for i, x in enumerate(given)
        ]
        new = list(old)
        for i, x in enumerate(levels):
            new[i // 2 % 2] = arith.maxnumf(new[i // 2 % 2], x)
        for distance in (1, 2):
            new = [arith.maxnumf(x, mgpu.utils.shfl_bfly(x, distance)) for x in new]
        raised = [arith.subf(x, rg.real(float(shift))) for x in new]
        weights = [
            rg.asm(rg.f32(), [x, raised[i // 2 % 2]], _ONLINE, "=f,f,f")
            for i, x in enumerate(levels)
        ]
        sums = _joined(_row_sums_of(weights))
        shrink = [rg.approximate("ex2", arith.subf(a, b)) for a, b in zip(old, new, strict=True)]
        sums = [rg.fma(m, f, x) for m, f, x in zip(rg.numbers(mass), shrink, sums, strict=True)]
        rows = (rg.from_numbers(x, (ROWS,), rg.ROW) for x in (sums, new, shrink))
        return rg.from_numbers(weights, shape, rg.TILE), *rows

    return run(scores, offset, mass, best)


def scaled(tile, factor):
    """Rows of a tile (64, width) times (64,) numbers."""

    @rg.inline(
        arg_types=(rg.TILE, rg.ROW),
        return_type=plgpu.ShapeDtypeStruct(tile.shape, jnp.float32, rg.TILE),
    )
    def run(_, tile, factor):
        rows = rg.numbers(factor)
        found = [arith.mulf(x, rows[i // 2 % 2]) for i, x in enumerate(rg.numbers(tile))]
        return rg.from_numbers(found, tile.shape, rg.TILE)

    return run(tile, factor)


def squares(scores, offset, total, *, cap: float, factor: float):
    """`total` plus the squares of the unrounded `capped_weights`, (64, keys)."""
    shape = scores.shape

    @rg.inline(
        arg_types=(rg.TILE, rg.COLUMN, rg.TILE),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, rg.TILE),
    )
    def run(_, scores, offset, total):
        weights = _capped(rg.numbers(scores), rg.numbers(offset), cap=cap, factor=factor)
        found = [rg.fma(x, x, old) for x, old in zip(weights, rg.numbers(total), strict=True)]
        return rg.from_numbers(found, shape, rg.TILE)

    return run(scores, offset, total)


def write_column_sums(tile, ref):
    """Sums over each warp's 16 rows of a tile (64, keys): written to ref (4, keys)."""

    @rg.inline(arg_types=(rg.TILE, plgpu.RefType()))
    def run(_, tile, ref):
        numbers = rg.numbers(tile)
        row, lane = rg.lane_place()
        warp = arith.shrui(row, rg.integer(4))
        index = ir.IndexType.get()
        first = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(row, rg.integer(15)), rg.integer(0))
        sums = []
        for pair in range(len(numbers) // 4):
            for i in (0, 1):
                value = arith.addf(numbers[4 * pair + i], numbers[4 * pair + 2 + i])
                for distance in (4, 8, 16):
                    value = arith.addf(value, mgpu.utils.shfl_bfly(value, distance))
                sums.append(value)
        branch = scf.IfOp(first)
        with ir.InsertionPoint(branch.then_block):
            for number, value in enumerate(sums):
                column = arith.addi(
                    arith.shli(lane, rg.integer(1)), rg.integer(number // 2 * 8 + number % 2)
                )
                place = [arith.index_cast(index, x) for x in (warp, column)]
                memref.store(value, ref, place)
            scf.yield_([])

    run(tile, ref)


def pieces(tile, width: int):
    """The tile's columns, so many at a time: what a thread holds is only given new names.

    Args:
      tile: (64, a multiple of width) float32, as the matrix unit leaves it.
      width: columns of a piece, a multiple of 8.
    """
    columns = tile.shape[1]
    if columns == width:
        return (tile,)
    shapes = (plgpu.ShapeDtypeStruct((ROWS, width), jnp.float32, rg.PACKED),) * (columns // width)

    @rg.inline(arg_types=(rg.PACKED,), return_type=shapes)
    def run(_, tile):
        numbers, each = rg.numbers(tile), ROWS * width // rg.WARPGROUP
        return tuple(
            rg.from_numbers(numbers[first : first + each], (ROWS, width), rg.PACKED)
            for first in range(0, len(numbers), each)
        )

    return run(tile)


def row_sums(high, low):
    """Double words over each row's four threads added up: two (64,) float32, in all four."""
    kind = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, rg.ROW)

    @rg.inline(arg_types=(rg.ROW, rg.ROW), return_type=(kind, kind))
    def run(_, high, low):
        found = []
        for a, b in zip(rg.numbers(high), rg.numbers(low), strict=True):
            for distance in (1, 2):
                rest = arith.addf(b, mgpu.utils.shfl_bfly(b, distance))
                a, error = rg.exact_sum(a, mgpu.utils.shfl_bfly(a, distance))
                b = arith.addf(rest, error)
            found.append((a, b))
        return tuple(rg.from_numbers(list(x), (ROWS,), rg.ROW) for x in zip(*found, strict=True))

    return run(high, low)
