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


def _report(found, thread):
    """Where a thread's warp reports: address of its number of (4,) int32; and the thread's lane."""
    address = llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(found))
    warp = arith.extui(address.type, arith.shrui(thread, rg.integer(5)))
    four = arith.constant(address.type, ir.IntegerAttr.get(address.type, 4))
    return arith.addi(address, arith.muli(warp, four)), arith.andi(thread, rg.integer(31))


def begin_report(flags, found, program, programs: int):
    """Writes where `report_unfinite` reports: 1 if a flag of this block's share is not 0, else 0.

    Args:
      flags: (n,) int32 in global memory.
      found: (4,) int32 in global memory, one for each warp.
      program: which block of the grid this is.
      programs: so many share the flags.
    """
    count = flags.shape[0]

    @rg.inline(arg_types=(plgpu.RefType(), plgpu.RefType(), rg.SCALAR))
    def run(_, flags, found, program):
        i64 = ir.IntegerType.get_signless(64)
        address = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(flags))
        first = arith.addi(_times(rg.scalar(program), rg.WARPGROUP), rg.thread())
        turns = -(-count // (programs * rg.WARPGROUP))

        @mgpu.utils.fori(rg.integer(turns), [rg.integer(0)])
        def read(turn, carry):
            place = arith.addi(first, _times(turn, programs * rg.WARPGROUP))
            text = (
                "{ .reg .pred p; .reg .b64 a; setp.lt.u32 p, $2, $3; mul.wide.u32 a, $2, 4;"
                " add.s64 a, a, $1; mov.b32 $0, 0; @p ld.global.b32 $0, [a]; }"
            )
            given = [address, place, rg.integer(count)]
            value = rg.asm(rg.i32(), given, text, "=&r,l,r,r,~{memory}", effects=True)
            return [arith.ori(carry[0], value)]

        text = (
            "{ .reg .pred p, q; .reg .b32 a; setp.ne.b32 p, $2, 0;"
            " vote.sync.any.pred q, p, 0xffffffff; selp.b32 a, 1, 0, q;"
            " setp.eq.b32 p, $1, 0; @p st.global.b32 [$0], a; }"
        )
        void = ir.Type.parse("!llvm.void")
        given = [*_report(found, rg.thread()), read.results[0]]
        rg.asm(void, given, text, "l,r,r,~{memory}", effects=True)

    run(flags, found, program)


_COPYING = 12
"""Named barrier of the warpgroup that copies."""


def report_unfinite(ref, matrix, found):
    """Writes 1 to a warp's number if one of its rows has a NaN or an infinity.

    Called by all warps of the one warpgroup that reports, which wait for each other.

    Args:
      ref: (rows, width) of bfloat16 or float16 in shared memory, at most 128 rows.
      matrix: its dtype and transforms.
      found: (4,) int32 in global memory; what is there stays otherwise.
    """
    half, rows = rg.half_name(matrix.dtype), ref.shape[0]
    # A row a thread, or half a row: the swizzle has eight threads read all banks at a time.
    share = 2 if 2 * rows <= rg.WARPGROUP else 1
    per_tile, block = matrix.swizzle // 16, matrix.width * matrix.bytes * 8
    steps = "".join(_UNFINITE[2].format(w=f"w{i}", t=f"t{i}", half=half) for i in range(4))
    text = "{ .reg .b32 a, w<4>, t<4>; .reg .b16 low, high; .reg .f32 x;"
    text += "".join(f" mov.b32 t{i}, 0;" for i in range(4))
    for number in range(per_tile // share):
        text += f" xor.b32 a, $1, {16 * number};"
        for offset in range(0, block, 8 * matrix.swizzle):
            text += f" ld.shared.v4.b32 {{w0, w1, w2, w3}}, [a+{offset}];{steps}"
    for one, other in ((0, 1), (2, 3), (0, 2)):
        text += f" add.rn.{half}x2 t{one}, t{one}, t{other};"
    text += f" mov.b32 {{low, high}}, t0; add.rn.{half} low, low, high; cvt.f32.{half} $0, low; }}"
    report = (
        "{ .reg .pred p, q; setp.nan.f32 p, $2, $2; vote.sync.any.pred q, p, 0xffffffff;"
        " setp.eq.and.b32 p, $1, 0, q; @p st.global.b32 [$0], 1;"
        f" bar.sync {_COPYING}, {rg.WARPGROUP}; }}"
    )

    @rg.inline(arg_types=(plgpu.RefType(matrix.transforms), plgpu.RefType()))
    def run(_, ref, found):
        # Read here, so that addresses are not computed before the loop and kept: this warpgroup has
        # few registers.
        number = f"mov.u32 $0, %tid.x; and.b32 $0, $0, {rg.WARPGROUP - 1};"
        thread = rg.asm(rg.i32(), [], number, "=r", effects=True)
        # Threads for which there is no row read the last.
        row = arith.divui(thread, rg.integer(share))
        row = arith.minui(row, rg.integer(rows - 1))
        part = _times(arith.andi(thread, rg.integer(share - 1)), per_tile // share)
        start = _chunk(_base(ref), row, part, matrix)
        total = rg.asm(rg.f32(), [start, rg.integer(0)], text, "=f,r,r,~{memory}", effects=True)
        given = [*_report(found, thread), total]
        rg.asm(ir.Type.parse("!llvm.void"), given, report, "l,r,f,~{memory}", effects=True)

    run(ref, found)


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
