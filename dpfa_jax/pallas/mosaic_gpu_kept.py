"""Numbers of the Hopper kernel that wait in memory: each thread's own, 16 bytes at a time.

Sums of a block's own only the thread that wrote them reads: nothing has to be waited for. Noise
lies in the same order, behind a barrier; so do sums of a share, which the same thread of another
block reads once a counter says that they are there.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from dpfa_jax.pallas import mosaic_gpu_registers as rg


def own_place(ref):
    """PTX name of the memory, address and constraint of this thread's first four numbers."""
    i64 = ir.IntegerType.get_signless(64)
    base = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))
    address = arith.addi(base, arith.extui(i64, arith.muli(rg.thread(), rg.integer(16))))
    if mgpu.utils.is_smem_ref(ref):
        return "shared", arith.trunci(rg.i32(), address), "r"
    return "global", address, "l"


STRIDE = 16 * rg.WARPGROUP
"""Bytes from a thread's four numbers to its next four."""


def keep(tile, ref):
    """Writes a tile (64, width) to a warpgroup's buffer, each thread its own numbers.

    The same thread reads them again by `joined`.

    Args:
      tile: float32.
      ref: (64·width,) float32, in shared or global memory.
    """

    @rg.inline(arg_types=(rg.TILE, plgpu.RefType()))
    def run(_, tile, ref):
        place, numbers = own_place(ref), rg.numbers(tile)
        for first in range(0, len(numbers), 4):
            store_four(*place, first // 4 * STRIDE, numbers[first : first + 4])

    run(tile, ref)


def gather(tile, ref, written):
    """Adds a tile to what is in a warpgroup's buffer, or writes it while nothing is.

    Memory adds, each sum rounded to nearest: nobody waits for what is there.

    Args:
      tile: (64, width) float32.
      ref: as of `keep`, in global memory.
      written: boolean scalar, the same in all threads: whether anything is there.
    """

    @rg.inline(arg_types=(rg.TILE, plgpu.RefType(), rg.SCALAR))
    def run(_, tile, ref, written):
        (_, address, _), numbers = own_place(ref), rg.numbers(tile)
        void = ir.Type.parse("!llvm.void")
        adds = arith.extui(rg.i32(), rg.scalar(written))
        for first in range(0, len(numbers), 4):
            at = f"[$0+{first // 4 * STRIDE}], {{$1, $2, $3, $4}};"
            text = (
                "{ .reg .pred p; setp.ne.b32 p, $5, 0; "
                f"@p red.relaxed.gpu.global.add.v4.f32 {at} "
                f"@!p st.relaxed.gpu.global.v4.f32 {at} }}"
            )
            given = [address, *numbers[first : first + 4], adds]
            rg.asm(void, given, text, "l,f,f,f,f,r,~{memory}", effects=True)

    run(tile, ref, written)


def store_four(space: str, address, kind: str, offset: int, numbers):
    """Writes four numbers at `own_place` and so many bytes more."""
    text = f"st.{space}.v4.f32 [$0+{offset}], {{$1, $2, $3, $4}};"
    void, kinds = ir.Type.parse("!llvm.void"), f"{kind},f,f,f,f,~{{memory}}"
    rg.asm(void, [address, *numbers], text, kinds, effects=True)


def load_four(space: str, address, kind: str, offset: int):
    """Four numbers at `own_place` and so many bytes more."""
    struct = llvm.StructType.get_literal([rg.f32()] * 4)
    order = ".relaxed.gpu" if space == "global" else ""
    text = f"ld{order}.{space}.v4.f32 {{$0, $1, $2, $3}}, [$4+{offset}];"
    found = rg.asm(struct, [address], text, f"=f,=f,=f,=f,{kind},~{{memory}}", effects=True)
    return [llvm.extractvalue(rg.f32(), found, [i]) for i in range(4)]


def _unless(written, four):
    """Zeros while nothing is written: what was never written may be NaN."""
    return [arith.select(rg.scalar(written), x, rg.real(0.0)) for x in four]


def joined(tile, ref, written):
    """A tile plus what `keep` wrote, or the tile alone while nothing is.

    Args:
      tile: (64, width) float32.
      ref: as of `keep`.
      written: boolean scalar, the same in all threads.
    """

    @rg.inline(
        arg_types=(rg.TILE, plgpu.RefType(), rg.SCALAR),
        return_type=plgpu.ShapeDtypeStruct(tile.shape, jnp.float32, rg.TILE),
    )
    def run(_, tile, ref, written):
        place, numbers = own_place(ref), rg.numbers(tile)
        found = []
        for first in range(0, len(numbers), 4):
            four = load_four(*place, first // 4 * STRIDE)
            old = _unless(written, four)
            found += [arith.addf(*x) for x in zip(numbers[first : first + 4], old, strict=True)]
        return rg.from_numbers(found, tile.shape, rg.TILE)

    return run(tile, ref, written)


def _pairs(place: tuple[str, Any, str], count: int, written):
    """High and low words that `keep_pair` wrote, four of each at a time; zeros while nothing is."""
    low = count // 4 * STRIDE
    for offset in range(0, low, STRIDE):
        yield offset, *(_unless(written, load_four(*place, offset + first)) for first in (0, low))


def _add_to_pair(place: tuple[str, Any, str], old, mine, low_offset: int, offset: int):
    """Adds four numbers to the double words at an offset, whose errors stay in the low words."""
    high, low = old
    sums = [rg.exact_sum(a, b) for a, b in zip(high, mine, strict=True)]
    lows = [arith.addf(a, error) for a, (_, error) in zip(low, sums, strict=True)]
    store_four(*place, offset, [x for x, _ in sums])
    store_four(*place, low_offset + offset, lows)


def keep_pair(tile, ref, written):
    """Adds a tile to the double words of a warpgroup's buffer, without an error that counts.

    Args:
      tile: (64, width) float32.
      ref: (2·64·width,) float32, as of `keep`: the high words, then the low ones.
      written: boolean scalar, the same in all threads: whether anything is there.
    """

    @rg.inline(arg_types=(rg.TILE, plgpu.RefType(), rg.SCALAR))
    def run(_, tile, ref, written):
        place, numbers = own_place(ref), rg.numbers(tile)
        count = len(numbers)
        for offset, *old in _pairs(place, count, written):
            mine = numbers[offset // STRIDE * 4 :][:4]
            _add_to_pair(place, old, mine, count // 4 * STRIDE, offset)

    run(tile, ref, written)


def pass_on(source, ref, written, *, width: int, paired: bool):
    """Adds what one buffer holds to another, as `keep` of `joined` or `keep_pair` would.

    Through few registers: those of a tile so wide are all in use.

    Args:
      source: (64·width,) float32 in global memory, as of `keep`.
      ref: as `source`, or twice as long where it holds double words.
      written: boolean scalar, the same in all threads: whether anything is there.
      width: columns.
      paired: whether `ref` holds double words.
    """
    count = rg.ROWS * width // rg.WARPGROUP

    @rg.inline(arg_types=(plgpu.RefType(), plgpu.RefType(), rg.SCALAR))
    def run(_, source, ref, written):
        given, place = own_place(source), own_place(ref)
        if paired:
            for offset, *old in _pairs(place, count, written):
                mine = load_four(*given, offset)
                _add_to_pair(place, old, mine, count // 4 * STRIDE, offset)
            return
        for offset in range(0, count // 4 * STRIDE, STRIDE):
            old = _unless(written, load_four(*place, offset))
            mine = load_four(*given, offset)
            store_four(*place, offset, [arith.addf(*x) for x in zip(mine, old, strict=True)])

    run(source, ref, written)


def joined_pair(tile, ref, written):
    """A tile plus the double words that `keep_pair` wrote, rounded once to float32.

    Args:
      tile: as of `keep_pair`, like the others.
      ref: its buffer.
      written: whether anything is there.
    """

    @rg.inline(
        arg_types=(rg.TILE, plgpu.RefType(), rg.SCALAR),
        return_type=plgpu.ShapeDtypeStruct(tile.shape, jnp.float32, rg.TILE),
    )
    def run(_, tile, ref, written):
        numbers, found = rg.numbers(tile), []
        for offset, high, low in _pairs(own_place(ref), len(numbers), written):
            mine = numbers[offset // STRIDE * 4 :][:4]
            for old, rest, new in zip(high, low, mine, strict=True):
                total, error = rg.exact_sum(old, new)
                found.append(arith.addf(total, arith.addf(rest, error)))
        return rg.from_numbers(found, tile.shape, rg.TILE)

    return run(tile, ref, written)


SHARE_WORDS = 2 * rg.ROWS
"""Numbers of a share's denominators: both words of each row."""


def _row_place(ref, width: int):
    """Address of the word of this thread's first row behind a tile in a warpgroup's buffer."""
    row, _ = rg.lane_place()
    i64 = ir.IntegerType.get_signless(64)
    base = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))
    place = arith.addi(row, rg.integer(rg.ROWS * width))
    return arith.addi(base, arith.extui(i64, arith.shli(place, rg.integer(2))))


_ROW_OFFSETS = tuple(4 * (rg.ROWS * word + 8 * half) for word in range(2) for half in range(2))
"""In bytes, from there: the high words of both rows of a thread, then the low ones."""


def keep_share(total, high, low, ref):
    """Writes a share's sums, which `joined_share` reads in another block of the grid.

    Args:
      total: (64, width) float32.
      high: (64,) float32, of the sums of weights, the same in a row's four threads.
      low: as `high`, the other words.
      ref: (64·width + `SHARE_WORDS`,) float32 in global memory.
    """

    @rg.inline(arg_types=(rg.TILE, rg.ROW, rg.ROW, plgpu.RefType()))
    def run(_, total, high, low, ref):
        place, numbers = own_place(ref), rg.numbers(total)
        for first in range(0, len(numbers), 4):
            store_four(*place, first // 4 * STRIDE, numbers[first : first + 4])
        rows, void = _row_place(ref, total.shape[1]), ir.Type.parse("!llvm.void")
        words = rg.numbers(high) + rg.numbers(low)
        for offset, word in zip(_ROW_OFFSETS, words, strict=True):
            # All four threads of a row write the same.
            text = f"st.relaxed.gpu.global.f32 [$0+{offset}], $1;"
            rg.asm(void, [rows, word], text, "l,f,~{memory}", effects=True)

    run(total, high, low, ref)


def joined_share(total, high, low, ref):
    """A share's sums plus those that `keep_share` wrote.

    Args:
      total: as of `keep_share`, like the others.
      high: of the sums of weights.
      low: the other words.
      ref: its buffer.

    Returns:
      `total`, and both words of the sums of weights.
    """
    row = plgpu.ShapeDtypeStruct((rg.ROWS,), jnp.float32, rg.ROW)

    @rg.inline(
        arg_types=(rg.TILE, rg.ROW, rg.ROW, plgpu.RefType()),
        return_type=(plgpu.ShapeDtypeStruct(total.shape, jnp.float32, rg.TILE), row, row),
    )
    def run(_, total, high, low, ref):
        place, numbers, found = own_place(ref), rg.numbers(total), []
        for first in range(0, len(numbers), 4):
            four = load_four(*place, first // 4 * STRIDE)
            found += [arith.addf(*x) for x in zip(numbers[first : first + 4], four, strict=True)]
        rows, kind = _row_place(ref, total.shape[1]), "=f,l,~{memory}"
        words = [
            rg.asm(rg.f32(), [rows], f"ld.relaxed.gpu.global.f32 $0, [$1+{x}];", kind, effects=True)
            for x in _ROW_OFFSETS
        ]
        sums = [rg.exact_sum(*x) for x in zip(rg.numbers(high), words[:2], strict=True)]
        rest = [arith.addf(*x) for x in zip(rg.numbers(low), words[2:], strict=True)]
        rest = [arith.addf(a, error) for a, (_, error) in zip(rest, sums, strict=True)]
        return (
            rg.from_numbers(found, total.shape, rg.TILE),
            rg.from_numbers([x for x, _ in sums], (rg.ROWS,), rg.ROW),
            rg.from_numbers(rest, (rg.ROWS,), rg.ROW),
        )

    return run(total, high, low, ref)


def announce(counter):
    """Says that a share's sums are written: each thread of its own.

    Args:
      counter: int32 in global memory, 0 when the kernel starts.
    """

    @rg.inline(arg_types=(plgpu.RefType(),))
    def run(_, counter):
        # Of a release that adds, the assembler gives one lane of a warp the fence for all.
        text = "fence.acq_rel.gpu; red.relaxed.gpu.global.add.u32 [$0], 1;"
        void = ir.Type.parse("!llvm.void")
        rg.asm(void, [_word(counter)], text, "l,~{memory}", effects=True)

    run(counter)


def await_share(counter):
    """Waits until all threads have announced a share's sums, which may be read then."""

    @rg.inline(arg_types=(plgpu.RefType(),))
    def run(_, counter):
        text = (
            "{ .reg .pred p; .reg .b32 a; again_${:uid}: ld.acquire.gpu.global.u32 a, [$0];"
            f" setp.lo.u32 p, a, {rg.WARPGROUP}; @p bra again_${{:uid}}; }}"
        )
        rg.asm(ir.Type.parse("!llvm.void"), [_word(counter)], text, "l,~{memory}", effects=True)

    run(counter)


def _word(ref):
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(ref))
