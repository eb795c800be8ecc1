"""What the Hopper gradient kernel is made of: products in flight, weights, differences, sums.

Tiles lie keys first: 64 keys of a warpgroup by the queries of a tile, so that weights and score
gradients stay in the registers from which the matrix unit reads them.
"""

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from dpfa_jax.pallas import mosaic_gpu_blocks as blocks
from dpfa_jax.pallas import mosaic_gpu_products as products
from dpfa_jax.pallas import mosaic_gpu_registers as rg
from dpfa_jax.pallas import ptx
from dpfa_jax.pallas.mosaic_gpu_registers import ROWS

_BOTH = 8  # named barrier of both computing warpgroups; the next two are their own


def _tile(columns: int):
    return plgpu.ShapeDtypeStruct((ROWS, columns), jnp.float32, rg.TILE)


_ROW = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, rg.ROW)


def _run(text: str, operands, constraints: str):
    """PTX without a result, in its place among other effects."""
    constraints = constraints + "," * bool(constraints) + "~{memory}"
    rg.asm(ir.Type.parse("!llvm.void"), operands, text, constraints, effects=True)


def _words(array):
    return [llvm.bitcast(rg.i32(), register) for register in array.registers.flat]


def start(left_ref, right_ref, matrix):
    """left·rightᵀ, on its way: (64, columns) float32 that no one may read before a wait.

    Args:
      left_ref: (64, width) in shared memory.
      right_ref: (columns, width) in shared memory.
      matrix: their dtype and transforms.
    """
    columns = right_ref.shape[0]
    kind = plgpu.RefType(matrix.transforms)

    @rg.inline(arg_types=(kind, kind), return_type=_tile(columns))
    def run(_, left, right):
        one, lefts = products.step_offsets(left, matrix.swizzle, ROWS, product="left")
        two, rights = products.step_offsets(right, matrix.swizzle, columns, product="right")
        places = [((one, a), (two, b)) for a, b in zip(lefts, rights, strict=True)]
        return rg.from_numbers(_issue(None, places, matrix.half, columns), (ROWS, columns), rg.TILE)

    return run(left_ref, right_ref)


def add(total, words, right_ref, matrix):
    """total + words·right, on its way.

    Args:
      total: (64, width) float32.
      words: (64, depth) in the matrix' dtype, in registers.
      right_ref: (depth, width) in shared memory.
      matrix: its dtype and transforms.
    """
    width = right_ref.shape[1]

    @rg.inline(
        arg_types=(rg.TILE, rg.PACKED, plgpu.RefType(matrix.transforms)), return_type=_tile(width)
    )
    def run(_, total, words, right):
        base, moves = products.step_offsets(right, matrix.swizzle, width, product="values")
        given = _words(words)
        places = [(given[4 * i : 4 * i + 4], (base, move)) for i, move in enumerate(moves)]
        found = _issue(rg.numbers(total), places, matrix.half, width, across=(0, 1))
        return rg.from_numbers(found, (ROWS, width), rg.TILE)

    return run(total, words, right_ref)


def wait(in_flight: int, tiles, spent=()):
    """The tiles, once so many products are in flight; registers of `spent` are free only then."""
    shapes = [tile.shape for tile in tiles]
    count = len(tiles)

    @rg.inline(
        arg_types=(rg.TILE,) * count + (rg.PACKED,) * len(spent),
        return_type=tuple(_tile(shape[1]) for shape in shapes),
    )
    def run(_, *given):
        numbers = [rg.numbers(tile) for tile in given[:count]]
        words = [word for array in given[count:] for word in _words(array)]
        flat = products.wait_group([x for part in numbers for x in part], in_flight, words)
        found, place = [], 0
        for part, shape in zip(numbers, shapes, strict=True):
            found.append(rg.from_numbers(flat[place : place + len(part)], shape, rg.TILE))
            place += len(part)
        return tuple(found)

    return run(*tiles, *spent)


def largest_weights(offset, *, cap: float, factor: float):
    """2^(cap·factor + offset): weights of (64,) keys whose scores are at the cap or above."""
    text = (
        f"{{ .reg .f32 a; mov.b32 a, {ptx.hex_float(cap)};"
        f" fma.rn.ftz.f32 a, a, {ptx.hex_float(factor)}, $1; ex2.approx.ftz.f32 $0, a; }}"
    )

    @rg.inline(arg_types=(rg.ROW,), return_type=_ROW)
    def run(_, offset):
        found = [rg.asm(rg.f32(), [x], text, "=f,f") for x in rg.numbers(offset)]
        return rg.from_numbers(found, (ROWS,), rg.ROW)

    return run(offset)


def weights(scores, offset, first, best, inverse, *, cap, factor: float, dtype):
    """Weights of 64 keys and a tile of queries.

    Args:
      scores: (64, queries) float32.
      offset: (64,) float32, −∞ for a weight of 0.
      first: int32 scalar: query c of the tile sees key r where c − r ≥ first; None: all.
      best: (queries,) float32, the queries' references; None with a cap.
      inverse: (queries,) float32, factors of the weights, or None.
      cap: in the unit of the scores; None without.
      factor: of the scores, into units of ln 2.
      dtype: of the rounded weights.

    Returns:
      (64, queries) in float32, and rounded for the matrix unit.
    """
    shape = scores.shape
    half = rg.half_name(dtype)
    bound = "" if cap is None else f" min.ftz.f32 a, a, {ptx.hex_float(cap)};"
    text = (
        "{ .reg .f32 a; mov.b32 a, $1;"
        + bound
        + f" fma.rn.ftz.f32 a, a, {ptx.hex_float(factor)}, $2;"
        + (" sub.ftz.f32 a, a, $3;" if best is not None else "")
        + " ex2.approx.ftz.f32 $0, a; }"
    )
    constraints = "=f,f,f" + (",f" if best is not None else "")
    columns = [array for array in (best, inverse) if array is not None]
    places = [first] if first is not None else []
    kinds = (rg.TILE, rg.ROW, *[rg.SCALAR] * len(places), *[rg.COLUMN] * len(columns))

    @rg.inline(
        arg_types=kinds,
        return_type=(_tile(shape[1]), plgpu.ShapeDtypeStruct(shape, dtype, rg.PACKED)),
    )
    def run(_, scores, offset, *more):
        given, offsets = rg.numbers(scores), rg.numbers(offset)
        more = list(more)
        low = _first_columns(more.pop(0)) if first is not None else None
        references = rg.numbers(more.pop(0)) if best is not None else None
        factors = rg.numbers(more.pop(0)) if inverse is not None else None
        hidden = rg.real(-float("inf"))
        found = []
        for i, x in enumerate(given):
            row, column = i // 2 % 2, 2 * (i // 4) + i % 2
            if low is not None:
                place = rg.integer(8 * (i // 4) + i % 2)
                seen = arith.cmpi(arith.CmpIPredicate.sge, place, low[row])
                x = arith.select(seen, x, hidden)
            operands = [x, offsets[row]]
            if references is not None:
                operands.append(references[column])
            weight = rg.asm(rg.f32(), operands, text, constraints)
            if factors is not None:
                weight = arith.mulf(weight, factors[column])
            found.append(weight)
        words = _round(found, half)
        return rg.from_numbers(found, shape, rg.TILE), blocks.packed(words, shape, dtype)

    return run(scores, offset, *places, *columns)


def _first_columns(first):
    """For this thread's two rows: the first of its columns, less those before it, that sees it."""
    row, lane = rg.lane_place()
    low = arith.subi(arith.addi(rg.scalar(first), row), arith.shli(lane, rg.integer(1)))
    return low, arith.addi(low, rg.integer(8))


def _round(numbers, half: str):
    text = f"cvt.rn.{half}x2.f32 $0, $2, $1;"
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return [rg.asm(rg.i32(), list(pair), text, "=r,f,f") for pair in pairs]


def differences(products, weights, delta, inverse, limit, total, *, dtype):
    """weights·(products − delta), rounded: gradients of the scores.

    Args:
      products: (64, queries) float32: of values and cotangents.
      weights: (64, queries) float32.
      delta: (queries,) float32.
      inverse: (queries,) float32, factors that the weights have, or None.
      limit: (64,) float32: a weight this large has no gradient; None: all have one.
      total: (64,) float32, a share in each of a row's four threads.
      dtype: of the rounded gradients.

    Returns:
      The gradients, and `total` plus each row's sum of them, of large weights too.
    """
    shape = products.shape
    half = rg.half_name(dtype)
    rows = [total] if limit is None else [total, limit]
    columns = [delta] if inverse is None else [delta, inverse]

    @rg.inline(
        arg_types=(rg.TILE, rg.TILE, *[rg.COLUMN] * len(columns), *[rg.ROW] * len(rows)),
        return_type=(plgpu.ShapeDtypeStruct(shape, dtype, rg.PACKED), _ROW),
    )
    def run(_, products, weights, delta, *more):
        more, shifts = list(more), rg.numbers(delta)
        factors = rg.numbers(more.pop(0)) if inverse is not None else None
        sums = list(rg.numbers(more.pop(0)))
        limits = rg.numbers(more.pop(0)) if limit is not None else None
        zero = rg.real(0.0)
        found = []
        for i, (x, weight) in enumerate(
            zip(rg.numbers(products), rg.numbers(weights), strict=True)
        ):
            row, column = i // 2 % 2, 2 * (i // 4) + i % 2
            change = arith.mulf(weight, arith.subf(x, shifts[column]))
            sums[row] = arith.addf(sums[row], change)
            if limits is not None:
                largest = limits[row]
                if factors is not None:
                    largest = arith.mulf(largest, factors[column])
                free = arith.cmpf(arith.CmpFPredicate.OLT, weight, largest)
                change = arith.select(free, change, zero)
            found.append(change)
        words = _round(found, half)
        return blocks.packed(words, shape, dtype), rg.from_numbers(sums, (ROWS,), rg.ROW)

    return run(products, weights, *columns, *rows)


def _address(ref):
    """Address of a ref in shared memory, 32 bits."""
    return llvm.ptrtoint(rg.i32(), mgpu.utils.memref_ptr(ref))


def keep(words, ref, wg, part: int, matrix):
    """Writes a warpgroup's rows and 64 columns of a ref (128, queries) that the matrix unit reads.

    Args:
      words: (64, 64) in registers.
      ref: in shared memory, tiles of 8 rows of 128 bytes.
      wg: int32 scalar, which 64 rows.
      part: which 64 columns.
      matrix: its dtype and transforms.
    """
    across = ref.shape[1] // 64

    @rg.inline(arg_types=(rg.PACKED, plgpu.RefType(matrix.transforms), rg.SCALAR))
    def run(_, words, ref, wg):
        number = rg.thread()
        lane = arith.andi(number, rg.integer(31))
        warp = arith.shrui(number, rg.integer(5))
        # Lane l gives the address of row l mod 8 of matrix l / 8: below, then to the right.
        low = arith.andi(lane, rg.integer(7))
        below = arith.andi(arith.shrui(lane, rg.integer(3)), rg.integer(1))
        right = arith.shrui(lane, rg.integer(4))
        eights = arith.addi(arith.shli(rg.scalar(wg), rg.integer(3)), below)
        eights = arith.addi(eights, arith.shli(warp, rg.integer(1)))
        offset = arith.muli(eights, rg.integer(across * 1024))
        offset = arith.addi(offset, arith.shli(low, rg.integer(7)))
        chunk = arith.shli(arith.xori(low, right), rg.integer(4))
        base = arith.addi(arith.addi(_address(ref), offset), chunk)
        given = _words(words)
        for step in range(4):
            place = arith.xori(base, rg.integer(32 * step))
            four = given[4 * step : 4 * step + 4]
            text = (
                f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0+{1024 * part}], {{$1, $2, $3, $4}};"
            )
            _run(text, [place, *four], "r,r,r,r,r")

    run(words, ref, wg)


def meet():
    """Both computing warpgroups have written to shared memory what the matrix unit may read."""

    @rg.inline()
    def run(_):
        _run(f"fence.proxy.async.shared::cta; bar.sync {_BOTH}, {2 * rg.WARPGROUP};", [], "")

    run()


def start_transposed(left_ref, right_ref, wg, left_matrix, right_matrix):
    """leftᵀ·right, this warpgroup's half of it, on its way: (64, columns) float32.

    Args:
      left_ref: (128, queries) in shared memory; of 128 queries the warpgroup takes its 64.
      right_ref: (2, 64, width) in shared memory; for 64 queries it takes its half of the columns.
      wg: int32 scalar.
      left_matrix: dtype and transforms.
      right_matrix: likewise.
    """
    whole = left_ref.shape[1] == 2 * ROWS
    width = right_ref.shape[2]
    columns = width if whole else width // 2

    @rg.inline(
        arg_types=(
            plgpu.RefType(left_matrix.transforms),
            plgpu.RefType(right_matrix.transforms),
            rg.SCALAR,
        ),
        return_type=_tile(columns),
    )
    def run(_, left, right, wg):
        one, left_steps = products.step_offsets(left, left_matrix.swizzle, ROWS, product="values")
        right = mgpu.utils.memref_fold(right, 0, 2)
        size = max(columns, right_matrix.swizzle // 2)
        two, right_steps = products.step_offsets(
            right, right_matrix.swizzle, size, product="values"
        )
        # The next 64 columns are the next tile of 8 rows; 32 of them are half a row.
        move = 1024 if whole or columns == 64 else 2 * columns
        i64 = ir.IntegerType.get_signless(64)
        number = arith.extui(i64, rg.scalar(wg))
        moved = arith.muli(number, arith.constant(i64, ir.IntegerAttr.get(i64, move >> 4)))
        if whole:
            one = arith.addi(one, moved)
        else:
            two = arith.addi(two, moved)
        places = [((one, a), (two, b)) for a, b in zip(left_steps, right_steps, strict=True)]
        found = _issue(None, places, left_matrix.half, columns, across=(1, 1))
        return rg.from_numbers(found, (ROWS, columns), rg.TILE)

    return run(left_ref, right_ref, wg)


def _issue(total, places, half: str, columns: int, across=(0, 0)):
    """Starts a product, step by step of 16: (64, columns) numbers, plus `total` unless it is None.

    Args:
      total: numbers or None.
      places: of each step: left, four words or a descriptor and how far it moves; right, likewise.
      half: the dtype's name in PTX.
      columns: of the product.
      across: whether left, right are read across their rows.
    """
    products.pipeline("fence")
    count = columns // 2
    names = ", ".join(f"${i}" for i in range(count))
    struct = llvm.StructType.get_literal([rg.f32()] * count)
    for left, (right, right_move) in places:
        old = [] if total is None else list(total)
        place = count + len(old)
        if isinstance(left, list):
            # Moves are added here: as loop invariants they would take the registers of many tiles.
            first = "{" + ", ".join(f"${place + i}" for i in range(4)) + "}"
            given, kinds, moved, flags = left, ["r"] * 4, "", f"{across[1]}"
        else:
            first, (base, move) = "a", left
            given, kinds, flags = [base], ["l"], f"{across[0]}, {across[1]}"
            moved = f" .reg .b64 a; add.s64 a, ${place}, {move >> 4};"
        text = (
            f"{{ .reg .pred p; setp.ne.b32 p, {int(bool(old))}, 0;{moved}"
            f" .reg .b64 b; add.s64 b, ${place + len(given)}, {right_move >> 4};"
            f" wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{half}.{half}"
            f" {{{names}}}, {first}, b, p, 1, 1, {flags}; }}"
        )
        kinds = ["=f"] * count + [str(i) for i in range(len(old))] + kinds + ["l"]
        out = rg.asm(struct, [*old, *given, right], text, ",".join(kinds), effects=True)
        total = [llvm.extractvalue(rg.f32(), out, [i]) for i in range(count)]
    products.pipeline("commit_group")
    return total


def add_to_global(tile, stage_ref, ref, wg):
    """Adds a tile to float32 numbers in global memory; the warpgroup does not wait for it.

    Each thread's fours lie beside the next thread's, so that the copy engine takes the tile in one
    piece and no bank of shared memory is hit twice.

    Args:
      tile: (64, columns).
      stage_ref: (columns // 8, 128, 4) float32 in shared memory.
      ref: likewise in global memory; `in_order` says which number stands where.
      wg: int32 scalar.
    """
    columns = tile.shape[1]

    @rg.inline(arg_types=(rg.TILE, plgpu.RefType(), plgpu.RefType(), rg.SCALAR))
    def run(_, tile, stage, ref, wg):
        # One piece of PTX: what it works out from the thread's number takes no register elsewhere.
        fours = columns // 8
        place = 4 * fours
        number, source, target, which = (f"${place + i}" for i in range(4))
        meet = f" bar.sync barrier, {rg.WARPGROUP};"
        text = (
            "{ .reg .pred p; .reg .b32 place, barrier;"
            f" add.u32 barrier, {which}, {_BOTH + 1}; shl.b32 place, {number}, 4;"
            f" add.u32 place, place, {source}; setp.eq.b32 p, {number}, 0;"
            # The copy before this one has read what is written now.
            f" cp.async.bulk.wait_group.read 0;{meet}"
        )
        for four in range(fours):
            words = ", ".join(f"${4 * four + i}" for i in range(4))
            text += f" st.shared.v4.f32 [place+{2048 * four}], {{{words}}};"
        text += (
            f" fence.proxy.async.shared::cta;{meet}"
            " @p cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32"
            f" [{target}], [{source}], {256 * columns}; @p cp.async.bulk.commit_group; }}"
        )
        numbers = rg.numbers(tile)
        operands = [
            numbers[8 * pair + 2 * row + i]
            for pair in range(fours // 2)
            for row in range(2)
            for i in (0, 1, 4, 5)
        ]
        address = llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(ref))
        operands += [rg.thread(), _address(stage), address, rg.scalar(wg)]
        _run(text, operands, ",".join(["f"] * place + ["r", "r", "l", "r"]))

    run(tile, stage_ref, ref, wg)


def finish_adding():
    """No tile of this warpgroup is on its way any more."""

    @rg.inline()
    def run(_):
        _run("cp.async.bulk.wait_group 0;", [], "")

    run()


def in_order(sums, block_q: int, width: int):
    """What `add_to_global` summed, as rows of queries.

    Args:
      sums: (B, N, tiles, 2, columns // 8, 128, 4).
      block_q: queries of a tile, 64 or 128.
      width: columns of the answer.

    Returns:
      (B, tiles·block_q, N, width).
    """
    batch, heads, tiles = sums.shape[:3]
    pairs = sums.shape[4] // 2
    # halves, column pairs, row halves, warps, rows, lanes, column halves, columns
    parts = sums.reshape(batch, heads, tiles, 2, pairs, 2, 4, 8, 4, 2, 2)
    if block_q == 2 * ROWS:
        order = (0, 2, 3, 6, 5, 7, 1, 4, 9, 8, 10)
    else:
        order = (0, 2, 6, 5, 7, 1, 3, 4, 9, 8, 10)
    return parts.transpose(order).reshape(batch, tiles * block_q, heads, width)


def row_totals(share):
    """(64,) sums of the shares in a row's four threads."""

    @rg.inline(arg_types=(rg.ROW,), return_type=_ROW)
    def run(_, share):
        found = []
        for x in rg.numbers(share):
            for distance in (1, 2):
                x = arith.addf(x, mgpu.utils.shfl_bfly(x, distance))
            found.append(x)
        return rg.from_numbers(found, (ROWS,), rg.ROW)

    return run(share)
