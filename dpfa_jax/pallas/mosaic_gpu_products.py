"""Products of the matrix unit in the Hopper kernels: issued, waited for, one beside another."""

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

from dpfa_jax.pallas import mosaic_gpu_registers as rg
from dpfa_jax.pallas import ptx
from dpfa_jax.pallas.mosaic_gpu_registers import ROWS


def step_offsets(ref, swizzle: int, rows: int, *, product: str, step: int = 16):
    """Descriptor of a matrix in shared memory, and how far each step moves it, in bytes.

    Args:
      ref: its tiled form.
      swizzle: in bytes.
      rows: rows or columns of the answer that it makes.
      product: "left", (rows, depth); "right", the transpose of that; or "values", (depth, rows).
      step: numbers of the depth in one step, 32 bytes of them.
    """
    width = swizzle * step // 32
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
    inner = depth // step
    offsets = [
        (i // inner) * group_stride + (i % inner) * strides[-1] for i in range(total // step)
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
    """One asynchronous step of 32 bytes: (64, columns) numbers, plus `total` unless that is None.

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
    depth = 16
    if half == "e4m3":
        flags, depth = "1, 1", 32
    text = (
        f"{{ .reg .pred p; setp.ne.b32 p, {switch}, 0;"
        f" wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{half}.{half}"
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


def wait_group(numbers, in_flight: int, spent=(), first=()):
    """Waits until so many products are in flight.

    Args:
      numbers: float32 values that are not read before it.
      in_flight: the number of products.
      spent: int32 values that a product reads: their registers are not written before it.
      first: float32 values ≥ 0 or NaN that are computed before it. The assembler moves arithmetic
        past a wait as it likes, but no wait past a store that depends on the arithmetic. The
        store is of what cannot be, and never happens.
    """
    count, place = len(numbers), 2 * len(numbers) + len(spent)
    struct = llvm.StructType.get_literal([rg.f32()] * count)
    kinds = ["=f"] * count + [str(i) for i in range(count)] + ["r"] * len(spent)
    kinds += ["f"] * len(first) + ["~{memory}"]
    pins = ""
    if first:
        pins = f".reg .f32 t; .reg .b32 a; mov.f32 t, ${place};"
        pins += "".join(f" add.f32 t, t, ${place + i};" for i in range(1, len(first)))
        pins += f" setp.lt.f32 p, t, {ptx.hex_float(-1.0)}; mov.b32 a, 0; @p st.shared.f32 [a], t;"
    text = f"{{ .reg .pred p;{pins} wgmma.wait_group.sync.aligned {in_flight}; }}"
    given = [*numbers, *spent, *first]
    out = rg.asm(struct, given, text, ",".join(kinds), effects=True)
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
    size = matrix.swizzle
    left, left_steps = step_offsets(query, size, ROWS, product="left", step=matrix.step)
    right, right_steps = step_offsets(key, size, keys, product="right", step=matrix.step)
    total = None
    for a, b in zip(left_steps, right_steps, strict=True):
        place = [_moved(left, a)], _moved(right, b)
        total = _product(total, *place, matrix.half, keys, transposed=False)
    pipeline("commit_group")
    return total


_WIDEST = 128
"""Columns of one product of weights and values: 256 want more registers than ptxas has to give in a
kernel of four warpgroups, whatever they take from each other later."""


def _issue_sums(total, weights, value, matrix, width: int, add):
    group = matrix.swizzle // matrix.bytes  # columns that lie together
    parts = []
    for first in range(0, width, _WIDEST // group * group):
        columns = min(_WIDEST // group * group, width - first)
        base, steps = step_offsets(value, matrix.swizzle, columns, product="values")
        strides, _ = ir.MemRefType(value.type).get_strides_and_offset()
        offset = first // group * strides[1] * matrix.bytes
        numbers = slice(first // 2, (first + columns) // 2)
        parts.append((columns, numbers, base, [offset + step for step in steps]))
    words = [llvm.bitcast(rg.i32(), register) for register in weights.registers.flat]
    total = list(total)
    for index in range(len(words) // 4):
        four = words[4 * index : 4 * index + 4]
        switch = None if index else add
        for columns, numbers, base, steps in parts:
            place = four, _moved(base, steps[index])
            options = {"transposed": True, "add": switch}
            total[numbers] = _product(total[numbers], *place, matrix.half, columns, **options)
    pipeline("commit_group")
    return total


_FIRST_BARRIER = 10
"""Of the two named barriers by which turns are passed on; Pallas takes them from the other end."""


def _turn(kind: str, other: int):
    number = arith.addi(arith.xori(_warpgroup(), rg.integer(other)), rg.integer(_FIRST_BARRIER))
    void = ir.Type.parse("!llvm.void")
    rg.asm(void, [number], f"bar.{kind} $0, {2 * rg.WARPGROUP};", "r,~{memory}", effects=True)


def _warpgroup():
    """0 or 1: which of two computing warpgroups this is."""
    number = arith.index_cast(rg.i32(), gpu.thread_id(gpu.Dimension.x))
    return arith.shrui(number, rg.integer(rg.WARPGROUP.bit_length() - 1))


def first_turn():
    """Gives the first turn to the first of two warpgroups: called once by both."""

    @rg.inline()
    def run(_):
        text = f"{{ .reg .pred p; setp.eq.s32 p, $0, 1; @p bar.arrive $1, {2 * rg.WARPGROUP}; }}"
        given = [_warpgroup(), rg.integer(_FIRST_BARRIER)]
        rg.asm(ir.Type.parse("!llvm.void"), given, text, "r,r,~{memory}", effects=True)

    run()


def overlapped(
    query_ref, key_ref, value_ref, weights, total, add, key_matrix, value_matrix, wait, turns
):
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
      turns: whether two warpgroups start products in turn; `finish` passes the turn on.

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
        if turns:
            _turn("sync", 0)
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


def finish(total, spent, mass, turns: bool):
    """The sums, once no product is in flight.

    Args:
      total: from `overlapped` or `started`.
      spent: the weights that were given to it: their registers are free only now.
      mass: sums of the next weights, which are then made before the wait; None leaves it to the
        assembler.
      turns: as of `overlapped`.
    """
    masses = () if mass is None else (mass,)

    @rg.inline(
        arg_types=(rg.TILE, rg.PACKED, *[rg.ROW] * len(masses)),
        return_type=plgpu.ShapeDtypeStruct(total.shape, jnp.float32, rg.TILE),
    )
    def run(_, total, spent, *masses):
        first = [number for mass in masses for number in rg.numbers(mass)]
        found = landed(rg.numbers(total), spent, first, turns)
        return rg.from_numbers(found, total.shape, rg.TILE)

    return run(total, spent, *masses)


def landed(numbers, spent, first, turns: bool):
    """Numbers once no product is in flight; inside an `inline` function.

    Args:
      numbers: float32 values that are not read before it.
      spent: the array of weights that the product in flight reads.
      first: as of `wait_group`.
      turns: as of `overlapped`.
    """
    words = [llvm.bitcast(rg.i32(), register) for register in spent.registers.flat]
    found = wait_group(numbers, 0, words, first)
    if turns:
        _turn("arrive", 1)
    return found


def started(value_ref, weights, total, add, matrix):
    """total + weights·value, on its way: no one may read it before `finish`; see `overlapped`."""
    width = value_ref.shape[1]

    @rg.inline(
        arg_types=(plgpu.RefType(matrix.transforms), rg.PACKED, rg.TILE, rg.SCALAR),
        return_type=plgpu.ShapeDtypeStruct((ROWS, width), jnp.float32, rg.TILE),
    )
    def run(_, value, weights, total, add):
        pipeline("fence")
        new = _issue_sums(rg.numbers(total), weights, value, matrix, width, rg.scalar(add))
        return rg.from_numbers(new, (ROWS, width), rg.TILE)

    return run(value_ref, weights, total, add)
