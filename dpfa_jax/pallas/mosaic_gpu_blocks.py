"""What the Hopper kernel's sums are made of: weights, their sums by row and column, rows."""

from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, scf

from dpfa_jax.pallas import mosaic_gpu_products as products
from dpfa_jax.pallas import mosaic_gpu_registers as rg
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
    level = _LEVEL.format(cap=rg.hex_float(cap), factor=rg.hex_float(factor))
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
        "{ .reg .f32 a; fma.rn.ftz.f32 a, $1, " + rg.hex_float(factor) + ", $2;"
        f" max.ftz.f32 a, a, {rg.hex_float(-3e38)}; min.ftz.f32 $0, a, {rg.hex_float(3e38)}; }}"
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


def _exact_sum(a, b):
    """The rounded sum and its exact error (Knuth)."""
    total = arith.addf(a, b)
    other = arith.subf(total, a)
    left = arith.subf(a, arith.subf(total, other))
    return total, arith.addf(left, arith.subf(b, other))


def row_sums(high, low):
    """Double words over each row's four threads added up: two (64,) float32, in all four."""
    kind = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, rg.ROW)

    @rg.inline(arg_types=(rg.ROW, rg.ROW), return_type=(kind, kind))
    def run(_, high, low):
        found = []
        for a, b in zip(rg.numbers(high), rg.numbers(low), strict=True):
            for distance in (1, 2):
                rest = arith.addf(b, mgpu.utils.shfl_bfly(b, distance))
                a, error = _exact_sum(a, mgpu.utils.shfl_bfly(a, distance))
                b = arith.addf(rest, error)
            found.append((a, b))
        return tuple(rg.from_numbers(list(x), (ROWS,), rg.ROW) for x in zip(*found, strict=True))

    return run(high, low)


def _chunk(base, row, number, matrix):
    """Address of 16 bytes of a row of a tile in shared memory: where the swizzle puts them.

    Args:
      base: of the tile.
      row: its row.
      number: of the 16 bytes in the row.
      matrix: how the tile lies.
    """
    per_tile = matrix.swizzle // 16
    tiles = matrix.width * matrix.bytes // matrix.swizzle
    tile, inside = (
        (arith.shrui(number, rg.integer(per_tile.bit_length() - 1))),
        arith.andi(number, rg.integer(per_tile - 1)),
    )
    block = arith.addi(_times(arith.shrui(row, rg.integer(3)), tiles), tile)
    address = arith.addi(base, _times(block, 8 * matrix.swizzle))
    rest = arith.addi(_times(arith.andi(row, rg.integer(7)), matrix.swizzle), _times(inside, 16))
    address = arith.addi(address, rest)
    moved = arith.andi(arith.shrui(address, rg.integer(7)), rg.integer(per_tile - 1))
    return arith.xori(address, arith.shli(moved, rg.integer(4)))


def write_float8(source, target, given, matrix):
    """Writes a tile of queries rounded to nearest in float8_e4m3fn, ±448 where they are larger.

    Each warp writes the rows that its products read; others see them after a barrier.

    Args:
      source: (64, width) of bfloat16 or float16 in shared memory.
      target: (64, width) of float8_e4m3fn in shared memory.
      given: how the source lies.
      matrix: how the target lies.
    """
    half, parts = rg.half_name(given.dtype), []
    for i in range(4):
        pair = (rg.to_float8(half, f"w{2 * i + j}", f"h{j}") for j in range(2))
        parts += [*pair, f"mov.b32 o{i}, {{h0, h1}};"]
    text = (
        "{ .reg .b32 w<8>, o<4>, low, high; .reg .f32 a, b; .reg .b16 h<2>;"
        " ld.shared.v4.b32 {w0, w1, w2, w3}, [$0]; ld.shared.v4.b32 {w4, w5, w6, w7}, [$1]; "
        + " ".join(parts)
        + " st.shared.v4.b32 [$2], {o0, o1, o2, o3}; }"
    )

    @rg.inline(
        arg_types=(plgpu.RefType(given.transforms), plgpu.RefType(matrix.transforms)),
    )
    def run(_, source, target):
        bases = [_base(ref) for ref in (source, target)]
        row = arith.shrui(rg.thread(), rg.integer(1))
        odd = arith.andi(rg.thread(), rg.integer(1))
        for number in range(matrix.width // 32):
            chunk = arith.addi(odd, rg.integer(2 * number))
            twice = _times(chunk, 2)
            places = [
                _chunk(bases[0], row, twice, given),
                _chunk(bases[0], row, arith.addi(twice, rg.integer(1)), given),
                _chunk(bases[1], row, chunk, matrix),
            ]
            void = ir.Type.parse("!llvm.void")
            rg.asm(void, places, text, "r,r,r,~{memory}", effects=True)

    run(source, target)


def _base(ref):
    """Address of a ref in shared memory, 32 bits."""
    i64 = ir.IntegerType.get_signless(64)
    return arith.trunci(rg.i32(), llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref)))


def _row_words(ref, matrix):
    """Address, and offsets of this thread's words of both of its rows of a tile (64, width).

    Chunks of a row are swizzled within it: which word is which is not said.
    """
    first, lane = rg.lane_place()
    tiles = matrix.width * matrix.bytes // matrix.swizzle
    block = _times(arith.shrui(first, rg.integer(3)), tiles * 8 * matrix.swizzle)
    inside = _times(arith.andi(first, rg.integer(7)), matrix.swizzle)
    start = arith.addi(arith.addi(_base(ref), block), arith.addi(inside, _times(lane, 4)))
    places = [divmod(16 * i, matrix.swizzle) for i in range(matrix.width * matrix.bytes // 16)]
    offsets = [8 * matrix.swizzle * tile + byte for tile, byte in places]
    return start, (offsets, [8 * matrix.swizzle * tiles + offset for offset in offsets])


# By bytes of a number: a word w of shared memory times 0 plus what was there, t.
_UNFINITE = MappingProxyType(
    {
        1: " mov.b32 {{a, b}}, {w}; cvt.rn.f16x2.e4m3x2 x, a; fma.rn.f16x2 {t}, x, $2, {t};"
        " cvt.rn.f16x2.e4m3x2 x, b; fma.rn.f16x2 {t}, x, $2, {t};",
        2: " fma.rn.{half}x2 {t}, {w}, $2, {t};",
    }
)


def unfinite(ref, matrix):
    """NaN for each row of a tile in shared memory with a NaN or an infinity, else 0: (64,) float32.

    Args:
      ref: (64, width).
      matrix: its dtype and transforms.
    """
    half = "f16" if matrix.bytes == 1 else rg.half_name(matrix.dtype)
    # The four threads of a row read all of 32, 64 or half of 128 bytes of it at a time.
    count = min(4, matrix.swizzle // 16)
    words = [f"w{i}" for i in range(count)]
    steps = "".join(_UNFINITE[matrix.bytes].format(w=word, t="t", half=half) for word in words)

    def text(offset):
        return (
            f"{{ .reg .b32 x, t, {', '.join(words)}; .reg .b16 a, b; mov.b32 t, $3;"
            f" ld.shared.v{count}.b32 {{{', '.join(words)}}}, [$1+{offset}];"
            f"{steps} mov.b32 $0, t; }}"
        )

    @rg.inline(
        arg_types=(plgpu.RefType(matrix.transforms),),
        return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, rg.ROW),
    )
    def run(_, ref):
        first, lane = rg.lane_place()
        tiles = matrix.width * matrix.bytes // matrix.swizzle
        block = _times(arith.shrui(first, rg.integer(3)), tiles * 8 * matrix.swizzle)
        inside = _times(arith.andi(first, rg.integer(7)), matrix.swizzle)
        start = arith.addi(_base(ref), arith.addi(block, inside))
        starts = [arith.addi(start, _times(lane, 4 * count))]
        if matrix.swizzle == 128:
            # Neighbouring rows start with different halves: 32 threads read 32 banks.
            odd = _times(arith.andi(first, rg.integer(1)), 64)
            starts = [arith.addi(starts[0], odd)]
            starts.append(arith.xori(starts[0], rg.integer(64)))
        found = []
        for below in range(2):
            total = rg.integer(0)
            for tile in range(tiles):
                for place in starts:
                    offset = 8 * matrix.swizzle * (tile + below * tiles)
                    given = [place, rg.integer(0), total]
                    kinds = "=r,r,r,r,~{memory}"
                    total = rg.asm(rg.i32(), given, text(offset), kinds, effects=True)
            both = f"{{ .reg .b16 a, b; mov.b32 {{a, b}}, $1; add.rn.{half} a, a, b;"
            both += f" cvt.f32.{half} $0, a; }}"
            value = rg.asm(rg.f32(), [total], both, "=f,r")
            for distance in (1, 2):
                value = arith.addf(value, mgpu.utils.shfl_bfly(value, distance))
            found.append(value)
        return rg.from_numbers(found, (ROWS,), rg.ROW)

    return run(ref)


def clear_rows(ref, lost, matrix):
    """Writes zeros to the rows of a tile in shared memory that `unfinite` found.

    The matrix unit may read it then.

    Args:
      ref: (64, width).
      lost: (64,) float32, NaN or 0.
      matrix: its dtype and transforms.
    """

    @rg.inline(arg_types=(plgpu.RefType(matrix.transforms), rg.ROW))
    def run(_, ref, lost):
        start, rows = _row_words(ref, matrix)
        for offsets, row in zip(rows, rg.numbers(lost), strict=True):
            stores = " ".join(f"@p st.shared.b32 [$0+{offset}], $2;" for offset in offsets)
            text = f"{{ .reg .pred p; setp.nan.f32 p, $1, $1; {stores} }}"
            given = [start, row, rg.integer(0)]
            rg.asm(ir.Type.parse("!llvm.void"), given, text, "r,f,r,~{memory}", effects=True)

    run(ref, lost)
    plgpu.commit_smem()


# By dtype: bits of the exponents of the two numbers in a word, and one in the last place of each.
_EXPONENTS = MappingProxyType({"bf16": (0x7F807F80, 0x00800080), "f16": (0x7C007C00, 0x04000400)})


def clear_unfinite(ref, matrix):
    """Writes zeros over the NaN and infinities of a tile in shared memory.

    The matrix unit may read it then. Two warpgroups may do it at once: both write the same.

    Args:
      ref: (a multiple of 32, width) of bfloat16 or float16.
      matrix: its dtype and transforms.
    """
    exponents, one = _EXPONENTS[rg.half_name(matrix.dtype)]
    size = 8 * rg.WARPGROUP  # bytes of all threads at a time, two words each
    count = ref.shape[0] * matrix.width * matrix.bytes // size

    @rg.inline(arg_types=(plgpu.RefType(matrix.transforms),))
    def run(_, ref):
        start = arith.addi(_base(ref), _times(rg.thread(), 8))

        @mgpu.utils.fori(rg.integer(count), [])
        def clear(number, carry):
            place = arith.addi(start, _times(number, size))
            pair = llvm.StructType.get_literal([rg.i32()] * 2)
            text = "ld.shared.v2.b32 {$0, $1}, [$2];"
            words = rg.asm(pair, [place], text, "=r,=r,r,~{memory}", effects=True)
            found = []
            for i in range(2):
                word = llvm.extractvalue(rg.i32(), words, [i])
                # One more in the last place of an exponent that is all ones fills the sign's place.
                raised = arith.addi(arith.andi(word, rg.integer(exponents)), rg.integer(one))
                signs = arith.andi(raised, rg.integer(0x80008000))
                lost = _times(arith.shrui(signs, rg.integer(15)), 0xFFFF)
                found.append(arith.andi(word, arith.xori(lost, rg.integer(-1))))
            void, text = ir.Type.parse("!llvm.void"), "st.shared.v2.b32 [$0], {$1, $2};"
            rg.asm(void, [place, *found], text, "r,r,r,~{memory}", effects=True)
            return carry

    run(ref)
    plgpu.commit_smem()


def _times(value, number: int):
    return arith.muli(value, rg.integer(number))
