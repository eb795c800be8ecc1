"""Rows in shared memory as the Hopper kernels find, round, judge and clear them."""

from types import MappingProxyType

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from dpfa_jax.pallas import mosaic_gpu_registers as rg
from dpfa_jax.pallas.mosaic_gpu_registers import ROWS


def _base(ref):
    """Address of a ref in shared memory, 32 bits."""
    i64 = ir.IntegerType.get_signless(64)
    return arith.trunci(rg.i32(), llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref)))


def _times(value, number: int):
    return arith.muli(value, rg.integer(number))


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


def _first_row(ref, matrix):
    """Address of this thread's first row of a tile (64, width), and bytes to its second."""
    row, _ = rg.lane_place()
    below = matrix.width * matrix.bytes * 8
    block = _times(arith.shrui(row, rg.integer(3)), below)
    inside = _times(arith.andi(row, rg.integer(7)), matrix.swizzle)
    return arith.addi(_base(ref), arith.addi(block, inside)), below


def _row_words(ref, matrix):
    """Address, and offsets of this thread's words of both of its rows of a tile (64, width).

    Chunks of a row are swizzled within it: which word is which is not said.
    """
    _, lane = rg.lane_place()
    start, below = _first_row(ref, matrix)
    places = [divmod(16 * i, matrix.swizzle) for i in range(matrix.width * matrix.bytes // 16)]
    offsets = [8 * matrix.swizzle * tile + byte for tile, byte in places]
    return arith.addi(start, _times(lane, 4)), (offsets, [below + offset for offset in offsets])


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
        row, lane = rg.lane_place()
        start, below = _first_row(ref, matrix)
        starts = [arith.addi(start, _times(lane, 4 * count))]
        if matrix.swizzle == 128:
            # Neighbouring rows start with different halves: 32 threads read 32 banks.
            odd = _times(arith.andi(row, rg.integer(1)), 64)
            starts = [arith.addi(starts[0], odd)]
            starts.append(arith.xori(starts[0], rg.integer(64)))
        found = []
        for first in (0, below):
            total = rg.integer(0)
            for offset in range(first, first + below, 8 * matrix.swizzle):
                for place in starts:
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
