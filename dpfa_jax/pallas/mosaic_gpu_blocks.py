"""What the Hopper kernel's sums are made of: weights, products of the matrix unit, row sums."""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, scf

from dpfa_jax.pallas import mosaic_gpu_registers as rg
from dpfa_jax.pallas.mosaic_gpu_registers import ROWS

_CAPPED = (
    "{{ .reg .f32 a, b; min.ftz.f32 a, $3, {cap}; min.ftz.f32 b, $4, {cap};"
    " fma.rn.ftz.f32 a, a, {factor}, $5; fma.rn.ftz.f32 b, b, {factor}, $6;"
    " ex2.approx.ftz.f32 $1, a; ex2.approx.ftz.f32 $2, b;"
    " cvt.rn.{half}x2.f32 $0, $2, $1; }}"
)
_ONLINE = (
    "{{ .reg .f32 a, b; sub.ftz.f32 a, $3, $5; sub.ftz.f32 b, $4, $5;"
    " ex2.approx.ftz.f32 $1, a; ex2.approx.ftz.f32 $2, b;"
    " cvt.rn.{half}x2.f32 $0, $2, $1; }}"
)


def _rounded(pairs, text: str, half: str):
    """Words of two rounded weights, and the sums of each row's weights before they are rounded."""
    kinds = rg.i32(), rg.f32(), rg.f32()
    words, sums = [], [[], []]
    for index, operands in enumerate(pairs):
        constraints = ",".join(["=r", "=f", "=f"] + ["f"] * len(operands))
        struct = llvm.StructType.get_literal(list(kinds))
        three = rg.asm(struct, operands, text, constraints)
        word, *two = (llvm.extractvalue(kind, three, [i]) for i, kind in enumerate(kinds))
        if half == "f16":
            # Below the normal numbers rounding could double a weight.
            one = rg.integer(0x3C003C00)
            word = rg.asm(rg.i32(), [word, one], "mul.rn.ftz.f16x2 $0, $1, $2;", "=r,r,r")
        words.append(word)
        row = sums[index % 2]
        # Two chains a row.
        row[:] = two if not row else [arith.addf(a, b) for a, b in zip(row, two, strict=True)]
    return words, [arith.addf(*row) for row in sums]


def packed(words, shape, dtype):
    """The array of 16-bit numbers of which this thread holds `words`, two in each."""
    kind = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
    registers = np.empty(rg.PACKED.to_mgpu().registers_shape(shape), dtype=object)
    for index, word in enumerate(words):
        registers.flat[index] = llvm.bitcast(kind, word)
    return rg.array(registers, rg.PACKED)


def capped_weights(scores, offset, mass, *, cap: float, factor: float, dtype):
    """2^(min(score, cap)·factor + offset), rounded; a score that is NaN counts as the cap.

    Args:
      scores: (64, keys) float32.
      offset: (keys,) float32, −∞ for a weight of 0.
      mass: (64,) float32, a share in each of a row's four threads; `row_sums` adds them up.
      cap: in the unit of the scores.
      factor: of the scores, into units of ln 2, > 0.
      dtype: of the rounded weights.

    Returns:
      The weights, and `mass` plus what they were before they were rounded.
    """
    half, shape = rg.half_name(dtype), scores.shape
    text = _CAPPED.format(cap=rg.hex_float(cap), factor=rg.hex_float(factor), half=half)

    @rg.inline(
        arg_types=(rg.TILE, rg.COLUMN, rg.ROW),
        return_type=(
            plgpu.ShapeDtypeStruct(shape, dtype, rg.PACKED),
            plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, rg.ROW),
        ),
    )
    def run(_, scores, offset, mass):
        given, offsets = rg.numbers(scores), rg.numbers(offset)
        pairs = [
            [*given[2 * i :][:2], *offsets[2 * (i // 2) :][:2]] for i in range(len(given) // 2)
        ]
        words, sums = _rounded(pairs, text, half)
        sums = [arith.addf(a, b) for a, b in zip(rg.numbers(mass), sums, strict=True)]
        return packed(words, shape, dtype), rg.from_numbers(sums, (ROWS,), rg.ROW)

    return run(scores, offset, mass)


def online_weights(scores, offset, mass, best, *, factor: float, shift: int, dtype):
    """2^(score·factor + offset − best + shift), rounded; arguments as in `capped_weights`.

    Args:
      best: (64,) float32, the largest exponent of earlier keys.
      shift: powers of two by which weights are raised.

    Returns:
      The weights, `mass` in units of the new largest exponent plus their sums, that exponent, and
      the factor that brings earlier sums to it.
    """
    half, shape = rg.half_name(dtype), scores.shape
    text = _ONLINE.format(half=half)
    row = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, rg.ROW)
    level = (
        "{ .reg .f32 a; fma.rn.ftz.f32 a, $1, " + rg.hex_float(factor) + ", $2;"
        f" max.ftz.f32 a, a, {rg.hex_float(-3e38)}; min.ftz.f32 $0, a, {rg.hex_float(3e38)}; }}"
    )

    @rg.inline(
        arg_types=(rg.TILE, rg.COLUMN, rg.ROW, rg.ROW),
        return_type=(plgpu.ShapeDtypeStruct(shape, dtype, rg.PACKED), row, row, row),
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
        pairs = [[*levels[2 * i :][:2], raised[i % 2]] for i in range(len(levels) // 2)]
        words, sums = _rounded(pairs, text, half)
        shrink = [rg.approximate("ex2", arith.subf(a, b)) for a, b in zip(old, new, strict=True)]
        sums = [rg.fma(m, f, x) for m, f, x in zip(rg.numbers(mass), shrink, sums, strict=True)]
        rows = (rg.from_numbers(x, (ROWS,), rg.ROW) for x in (sums, new, shrink))
        return packed(words, shape, dtype), *rows

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
    text = (
        f"{{ .reg .f32 a; min.ftz.f32 a, $1, {rg.hex_float(cap)};"
        f" fma.rn.ftz.f32 a, a, {rg.hex_float(factor)}, $2; ex2.approx.ftz.f32 $0, a; }}"
    )

    @rg.inline(
        arg_types=(rg.TILE, rg.COLUMN, rg.TILE),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, rg.TILE),
    )
    def run(_, scores, offset, total):
        offsets = rg.numbers(offset)
        found = []
        for i, (x, old) in enumerate(zip(rg.numbers(scores), rg.numbers(total), strict=True)):
            weight = rg.asm(rg.f32(), [x, offsets[2 * (i // 4) + i % 2]], text, "=f,f,f")
            found.append(rg.fma(weight, weight, old))
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


def step_offsets(ref, swizzle: int, rows: int, *, product: str):
    """Descriptor of a matrix in shared memory, and how far each step of 16 moves it, in bytes.

    Args:
      ref: its tiled form.
      swizzle: in bytes.
      rows: rows or columns of the answer that it makes.
      product: "left", (rows, depth); "right", the transpose of that; or "values", (depth, rows).
    """
    width = swizzle // 2
    depth = width
    if product == "right":
        ref = mgpu.memref_transpose(ref, (1, 0, 3, 2))
    if product == "values":
        depth = 16
    group = (rows, depth) if product == "left" else (depth, rows)
    found = mma_utils.create_descriptor(
        ref, swizzle=swizzle, group_size=group, logical_k_major=product != "left"
    )
    (base, (_, strides)), (_, group_stride), _ = found
    tiles = ref.type.shape
    total = tiles[1] * tiles[3] if product == "left" else tiles[0] * tiles[2]
    inner = depth // 16
    offsets = [
        (step // inner) * group_stride + (step % inner) * strides[-1] for step in range(total // 16)
    ]
    return base, offsets


def _moved(base, offset: int):
    i64 = ir.IntegerType.get_signless(64)
    if not offset:
        return base
    return llvm.add(
        base,
        arith.constant(i64, ir.IntegerAttr.get(i64, mma_utils.encode_addr(offset))),
        overflow_flags=llvm.IntegerOverflowFlags.none,
    )


def _product(total, left, right, half: str, columns: int, *, transposed: bool, add=None):
    """One asynchronous step of 16: (64, columns) numbers, plus `total` unless that is None.

    `add` is an int32 value: whether `total` counts, True if it is None.
    """
    count = columns // 2
    old = [] if total is None else list(total)
    names = [f"${i}" for i in range(count)]
    place = count + len(old)
    lefts = [f"${place + i}" for i in range(len(left))]
    registers = len(left) > 1
    first = f"{{{', '.join(lefts)}}}" if registers else lefts[0]
    switch = int(bool(old)) if add is None else f"${place + len(left) + 1}"
    flags = f"1, 1, {int(transposed)}" if registers else f"1, 1, 0, {int(transposed)}"
    text = (
        f"{{ .reg .pred p; setp.ne.b32 p, {switch}, 0;"
        f" wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{half}.{half}"
        f" {{{', '.join(names)}}}, {first}, ${place + len(left)}, p, {flags}; }}"
    )
    kinds = ["=f"] * count + [str(i) for i in range(len(old))]
    kinds += ["r" if registers else "l"] * len(left) + ["l"] + ["r"] * (add is not None)
    struct = llvm.StructType.get_literal([rg.f32()] * count)
    given = [*old, *left, right, *([] if add is None else [add])]
    out = rg.asm(struct, given, text, ",".join(kinds), effects=True)
    return [llvm.extractvalue(rg.f32(), out, [i]) for i in range(count)]


def pipeline(instruction: str):
    """One of `wgmma`'s instructions without operands: "fence" or "commit_group"."""
    void = ir.Type.parse("!llvm.void")
    rg.asm(void, [], f"wgmma.{instruction}.sync.aligned;", "~{memory}", effects=True)


def wait_group(numbers, in_flight: int, spent=()):
    """Waits until so many products are in flight.

    Args:
      numbers: float32 values that are not read before it.
      in_flight: the number of products.
      spent: int32 values that a product reads: their registers are not written before it.
    """
    count = len(numbers)
    struct = llvm.StructType.get_literal([rg.f32()] * count)
    kinds = ["=f"] * count + [str(i) for i in range(count)] + ["r"] * len(spent) + ["~{memory}"]
    text = f"wgmma.wait_group.sync.aligned {in_flight};"
    out = rg.asm(struct, [*numbers, *spent], text, ",".join(kinds), effects=True)
    return [llvm.extractvalue(rg.f32(), out, [i]) for i in range(count)]


def scores(query_ref, key_ref, matrix):
    """query·keyᵀ, waited for: (64, keys) float32.

    Args:
      query_ref: (64, width) in shared memory.
      key_ref: (keys, width) in shared memory.
      matrix: their dtype and transforms.
    """
    keys = key_ref.shape[0]
    kind = plgpu.RefType(matrix.transforms)

    @rg.inline(
        arg_types=(kind, kind),
        return_type=plgpu.ShapeDtypeStruct((ROWS, keys), jnp.float32, rg.TILE),
    )
    def run(_, query, key):
        pipeline("fence")
        found = _issue_scores(query, key, matrix, keys)
        return rg.from_numbers(wait_group(found, 0), (ROWS, keys), rg.TILE)

    return run(query_ref, key_ref)


def _issue_scores(query, key, matrix, keys: int):
    left, left_steps = step_offsets(query, matrix.swizzle, ROWS, product="left")
    right, right_steps = step_offsets(key, matrix.swizzle, keys, product="right")
    total = None
    for a, b in zip(left_steps, right_steps, strict=True):
        place = [_moved(left, a)], _moved(right, b)
        total = _product(total, *place, matrix.half, keys, transposed=False)
    pipeline("commit_group")
    return total


def _issue_sums(total, weights, value, matrix, width: int, add):
    base, steps = step_offsets(value, matrix.swizzle, width, product="values")
    words = [llvm.bitcast(rg.i32(), register) for register in weights.registers.flat]
    for index, step in enumerate(steps):
        four = words[4 * index : 4 * index + 4]
        place = four, _moved(base, step)
        switch = None if index else add
        total = _product(total, *place, matrix.half, width, transposed=True, add=switch)
    pipeline("commit_group")
    return total


def overlapped(query_ref, key_ref, value_ref, weights, total, add, key_matrix, value_matrix, wait):
    """Starts the next scores and these sums, and waits for the scores alone.

    Args:
      query_ref: (64, width).
      key_ref: (keys, width), the next tile.
      value_ref: (keys, value width), of the tile that `weights` are for.
      weights: (64, keys).
      total: (64, value width) float32, what is added to.
      add: int32 scalar, 0 if nothing is added to.
      key_matrix: of query and key.
      value_matrix: of value.
      wait: called between the two products: waits for the values.

    Returns:
      Scores, and sums that no one may read before `finish`.
    """
    width = value_ref.shape[1]
    next_keys = key_ref.shape[0]
    key_kind = plgpu.RefType(key_matrix.transforms)
    value_kind = plgpu.RefType(value_matrix.transforms)
    tile = plgpu.ShapeDtypeStruct((ROWS, next_keys), jnp.float32, rg.TILE)
    sums = plgpu.ShapeDtypeStruct((ROWS, width), jnp.float32, rg.TILE)

    @rg.inline(arg_types=(key_kind, key_kind), return_type=tile)
    def begin(_, query, key):
        pipeline("fence")
        return rg.from_numbers(
            _issue_scores(query, key, key_matrix, next_keys), tile.shape, rg.TILE
        )

    @rg.inline(
        arg_types=(value_kind, rg.PACKED, rg.TILE, rg.TILE, rg.SCALAR), return_type=(tile, sums)
    )
    def proceed(_, value, weights, total, found, add):
        pipeline("fence")
        new = _issue_sums(rg.numbers(total), weights, value, value_matrix, width, rg.scalar(add))
        found = wait_group(rg.numbers(found), 1)
        return rg.from_numbers(found, tile.shape, rg.TILE), rg.from_numbers(
            new, sums.shape, rg.TILE
        )

    found = begin(query_ref, key_ref)
    wait()
    return proceed(value_ref, weights, total, found, add)


def unset(width: int):
    """A tile (64, width) with nothing in it: to be added to with `add` = 0."""

    @rg.inline(return_type=plgpu.ShapeDtypeStruct((ROWS, width), jnp.float32, rg.TILE))
    def run(_):
        nothing = [llvm.mlir_undef(rg.f32())] * (ROWS * width // rg.WARPGROUP)
        return rg.from_numbers(nothing, (ROWS, width), rg.TILE)

    return run()


def finish(total, spent):
    """The sums, once no product is in flight.

    Args:
      total: from `overlapped`.
      spent: the weights that were given to it: their registers are free only now.
    """

    @rg.inline(
        arg_types=(rg.TILE, rg.PACKED),
        return_type=plgpu.ShapeDtypeStruct(total.shape, jnp.float32, rg.TILE),
    )
    def run(_, total, spent):
        words = [llvm.bitcast(rg.i32(), register) for register in spent.registers.flat]
        return rg.from_numbers(wait_group(rg.numbers(total), 0, words), total.shape, rg.TILE)

    return run(total, spent)


def sums(value_ref, weights, total, add, matrix):
    """total + weights·value, waited for; see `overlapped`."""
    width = value_ref.shape[1]

    @rg.inline(
        arg_types=(plgpu.RefType(matrix.transforms), rg.PACKED, rg.TILE, rg.SCALAR),
        return_type=plgpu.ShapeDtypeStruct((ROWS, width), jnp.float32, rg.TILE),
    )
    def run(_, value, weights, total, add):
        pipeline("fence")
        new = _issue_sums(rg.numbers(total), weights, value, matrix, width, rg.scalar(add))
        return rg.from_numbers(wait_group(new, 0), (ROWS, width), rg.TILE)

    return run(value_ref, weights, total, add)


def same(row_ids, column_ids):
    """Whether row and column have one id: (64, keys) boolean."""
    shape = (ROWS, column_ids.shape[0])

    @rg.inline(
        arg_types=(rg.ROW, rg.COLUMN), return_type=plgpu.ShapeDtypeStruct(shape, jnp.bool_, rg.TILE)
    )
    def run(_, row_ids, column_ids):
        rows, columns = rg.numbers(row_ids), rg.numbers(column_ids)
        found = [
            arith.cmpi(arith.CmpIPredicate.eq, rows[i // 2 % 2], columns[2 * (i // 4) + i % 2])
            for i in range(2 * len(columns))
        ]
        return rg.from_numbers(found, shape, rg.TILE, signed=False)

    return run(row_ids, column_ids)
