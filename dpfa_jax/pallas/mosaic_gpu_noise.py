"""Noise of the Hopper kernel: `random`'s blocks drawn in the registers that their numbers are for.

One block of the matrix noise serves one row's share of 64 columns of exactly one thread of a tile,
so nothing is exchanged. The special functions are the device's approximate ones: normals are within
2⁻¹⁴ of those of `random.normal_pair`, whose words they share bit for bit.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, scf

from dpfa_jax import random
from dpfa_jax.doubleword import grid_step
from dpfa_jax.pallas import mosaic_gpu_registers as rg
from dpfa_jax.pallas import ptx
from dpfa_jax.pallas.mosaic_gpu_kept import STRIDE, load_four, own_place, store_four
from dpfa_jax.pallas.mosaic_gpu_registers import ROWS

_MATRIX, _ROWS_DOMAIN = 1, 2


def _rotate(word, bits):
    return arith.ori(arith.shli(word, rg.integer(bits)), arith.shrui(word, rg.integer(32 - bits)))


def _one():
    """The number 1, as the assembler does not know: a lane's number is below 32."""
    text = "{ .reg .u32 a; mov.u32 a, %laneid; shr.u32 a, a, 5; add.u32 $0, a, 1; }"
    return rg.asm(rg.i32(), [], text, "=r", effects=True)


def _quarter(state, one, a, b, c, d):
    """a += b, d = (d ^ a) <<< n; c += d, b = (b ^ c) <<< n; twice.

    Sums are products with `one` and sums: the unit for these is idle beside the one for the rest.
    """

    def add(x, y):
        return rg.asm(rg.i32(), [y, one, x], "mad.lo.u32 $0, $1, $2, $3;", "=r,r,r,r")

    for first, second in ((16, 12), (8, 7)):
        state[a] = add(state[a], state[b])
        state[d] = _rotate(arith.xori(state[d], state[a]), first)
        state[c] = add(state[c], state[d])
        state[b] = _rotate(arith.xori(state[b], state[c]), second)


def _opaque(number: int):
    """A constant that the compiler does not know: a loop so long stays a loop."""
    return rg.asm(rg.i32(), [], f"mov.u32 $0, {number};", "=r", effects=True)


def _chacha(key, address):
    """Sixteen words of one ChaCha block, each an i32 value.

    The double rounds are a loop in the machine's code too: written out they would push the loop of
    the computing warps out of the instruction cache.
    """
    initial = [*(rg.integer(word) for word in random._CONSTANTS), *key, *address]
    one = _one()

    @mgpu.utils.fori(_opaque(random.ROUNDS // 2), initial)
    def rounds(_, state):
        state = list(state)
        for i in range(4):
            _quarter(state, one, i, i + 4, i + 8, i + 12)
        for i in range(4):
            _quarter(state, one, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
        return state

    return [arith.addi(a, b) for a, b in zip(rounds.results, initial, strict=True)]


def _normal_pair(first, second, scale: float):
    """`random.normal_pair` times `scale`, with the device's approximate functions."""
    radius = rg.asm(rg.f32(), [first, second], ptx.radius(scale), "=f,r,r")
    return [
        rg.asm(rg.f32(), [radius, second], ptx.projected(name), "=f,f,r") for name in ("cos", "sin")
    ]


def _key(ref):
    index = ir.IndexType.get()
    place = [arith.constant(index, ir.IntegerAttr.get(index, i)) for i in range(8)]
    return [memref.load(ref, [i]) for i in place]


_CHUNK = 64
"""Columns of which one block of words serves a thread's share of a row."""


def _vectors(width: int):
    """What each store of four numbers holds: (chunk, row half, first column pair), in order."""
    return [
        (chunk, half, pair)
        for chunk in range(-(-width // _CHUNK))
        for half in range(2)
        for pair in range(0, min(_CHUNK, width - chunk * _CHUNK) // 8, 2)
    ]


def _shares(key_ref, batch, head, start, noise_std: float):
    """A function that draws this thread's share of a chunk: (chunk, row half, pairs) → normals."""
    key = _key(key_ref)
    row, lane = rg.lane_place()
    row = arith.addi(row, rg.scalar(start))
    tagged = arith.ori(rg.integer(_MATRIX << 24), rg.scalar(head))

    def share(chunk, half, pairs: int):
        place = arith.addi(row, arith.shli(half, rg.integer(3)))
        column = arith.addi(arith.shli(chunk, rg.integer(2)), lane)
        words = _chacha(key, [place, column, rg.scalar(batch), tagged])
        return [
            number
            for pair in range(pairs)
            for number in _normal_pair(words[2 * pair], words[2 * pair + 1], noise_std)
        ]

    return share


def matrix_noise(key_ref, batch, head, start, width: int, noise_std: float, out_ref):
    """Writes normals times `noise_std` of rows start..start+64 and the first `width` columns.

    Each thread writes the numbers of its own places in a tile, which `noise_kept` reads.

    Args:
      key_ref: eight uint32 in global memory.
      batch: int32 scalar, global.
      head: int32 scalar, global.
      start: int32 scalar, global row.
      width: columns, a multiple of 16.
      noise_std: standard deviation.
      out_ref: (64·width,) float32, in shared or global memory.
    """

    @rg.inline(
        arg_types=(plgpu.RefType(), rg.SCALAR, rg.SCALAR, rg.SCALAR, plgpu.RefType()),
    )
    def run(_, key_ref, batch, head, start, out_ref):
        share = _shares(key_ref, batch, head, start, noise_std)
        space, address, kind = own_place(out_ref)

        def block(chunk, half, pairs, address):
            drawn = share(chunk, half, pairs)
            for first in range(0, len(drawn), 4):
                four = drawn[first : first + 4]
                store_four(space, address, kind, first // 4 * STRIDE, four)

        def moved(address, count, size):
            step = arith.muli(count, rg.integer(size))
            if space == "global":
                step = arith.extui(address.type, step)
            return arith.addi(address, step)

        whole, rest = divmod(width, _CHUNK)
        one = 4 * STRIDE  # bytes of all threads' share of one half of a chunk
        if whole:

            @mgpu.utils.fori(_opaque(2 * whole), [])
            def blocks(number, carry):
                chunk, half = arith.shrui(number, rg.integer(1)), arith.andi(number, rg.integer(1))
                block(chunk, half, _CHUNK // 8, moved(address, number, one))
                return carry

        if rest:

            @mgpu.utils.fori(_opaque(2), [])
            def tail(half, carry):
                begin = moved(address, rg.integer(1), 2 * whole * one)
                place = moved(begin, half, rest // 16 * STRIDE)
                block(rg.integer(whole), half, rest // 8, place)
                return carry

    run(key_ref, batch, head, start, out_ref)


def noise_kept(ref, width: int):
    """The noise of a tile (64, width), float32, that `matrix_noise` wrote."""

    @rg.inline(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((ROWS, width), jnp.float32, rg.TILE),
    )
    def run(_, ref):
        place = own_place(ref)
        found: list[Any] = [None] * (ROWS * width // rg.WARPGROUP)
        firsts = []
        for index, (chunk, half, pair) in enumerate(_vectors(width)):
            first_pair = chunk * _CHUNK // 8 + pair
            four = load_four(*place, index * STRIDE)
            firsts.append(four[0])
            for number, value in enumerate(four):
                found[(2 * (first_pair + number // 2) + half) * 2 + number % 2] = value
        # One number of each load. Later noise comes by ordinary stores, which a barrier orders
        # after loads; this leaves nothing to the order of loads and arrivals.
        rg.arrived(firsts)
        return rg.from_numbers(found, (ROWS, width), rg.TILE)

    return run(ref)


def row_noise(key_ref, places, rows: int, noise_std: float, out_ref):
    """Writes normals times `noise_std` of rows start..start+rows of several tiles, one for a row.

    One thread draws a whole block: pair j is rows 16r + j and that + 8.

    Args:
      key_ref: eight uint32 in global memory.
      places: of each tile the batch, head and start, int32 scalars, all global.
      rows: of one tile, a multiple of 16 like the starts; at most 2048/len(places).
      noise_std: standard deviation.
      out_ref: (len(places)·rows,) float32 in global memory.
    """
    kinds = [rg.SCALAR] * 3 * len(places)

    @rg.inline(arg_types=(plgpu.RefType(), *kinds, plgpu.RefType()))
    def run(_, key_ref, *args):
        *scalars, out_ref = args
        thread, each = rg.thread(), rows // 16
        mine = arith.cmpi(arith.CmpIPredicate.ult, thread, rg.integer(len(places) * each))
        branch = scf.IfOp(mine)
        with ir.InsertionPoint(branch.then_block):
            scalars = [rg.scalar(x) for x in scalars]
            place, block = scalars[:3], thread
            for number in range(1, len(places)):
                first = rg.integer(number * each)
                here = arith.cmpi(arith.CmpIPredicate.uge, thread, first)
                given = scalars[3 * number : 3 * number + 3]
                place = [arith.select(here, *pair) for pair in zip(given, place, strict=True)]
                block = arith.select(here, arith.subi(thread, first), block)
            batch, head, start = place
            block = arith.addi(arith.shrui(start, rg.integer(4)), block)
            tagged = arith.ori(rg.integer(_ROWS_DOMAIN << 24), head)
            words = _chacha(_key(key_ref), [block, rg.integer(0), batch, tagged])
            first = arith.shli(thread, rg.integer(4))
            for pair in range(8):
                drawn = _normal_pair(words[2 * pair], words[2 * pair + 1], noise_std)
                for half in range(2):
                    place = arith.addi(first, rg.integer(pair + 8 * half))
                    place = arith.index_cast(ir.IndexType.get(), place)
                    memref.store(drawn[half], out_ref, [place])
            scf.yield_([])

    run(key_ref, *(number for place in places for number in place), out_ref)


def rows_kept(ref):
    """(64,) float32 from global memory that another warpgroup wrote."""

    @rg.inline(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, rg.ROW),
    )
    def run(_, ref):
        i64 = ir.IntegerType.get_signless(64)
        row, _ = rg.lane_place()
        base = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))
        address = arith.addi(base, arith.extui(i64, arith.shli(row, rg.integer(2))))
        found = []
        for half in range(2):
            text = f"ld.relaxed.gpu.global.f32 $0, [$1+{32 * half}];"
            found.append(rg.asm(rg.f32(), [address], text, "=f,l,~{memory}", effects=True))
        rg.arrived(found)
        return rg.from_numbers(found, (ROWS,), rg.ROW)

    return run(ref)


def on_grid(tile, spec, *, denominator: bool = False):
    """The nearest multiple of the noise's public grid where the call asks for it.

    Beside 1.5·2²³ steps of the grid a number keeps no bits below one step; one that is larger than
    that loses bits of its own, which are post-processed away like the others.
    """
    if not spec.on_grid:
        return tile
    step = grid_step(spec.denominator_std if denominator else spec.noise_std)
    shift = 1.5 * 2.0**23 * step
    return (tile + shift) - shift
