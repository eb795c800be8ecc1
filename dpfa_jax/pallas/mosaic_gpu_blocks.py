"""What the Hopper kernels are made of: weights, noise and running sums of one warpgroup's tile.

A warpgroup holds a tile of 64 rows the way the matrix unit leaves it: thread (warp w, lane l) has
rows 16w + l/4 and that + 8, columns 8j + 2(l mod 4) + {0, 1}. A block of `random` serves exactly
one row's share of 64 columns of one thread. The pieces here are written on those registers; none of
them exists in interpret mode.
"""

import dataclasses
import math
import struct
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, scf

from dpfa_jax import random
from dpfa_jax.doubleword import grid_step

ROWS = 64
"""Rows of one warpgroup's tile."""

_WARPGROUP = 128
_PACKED = plgpu.Layout.WGMMA
_COLUMN, _ROW = _PACKED.reduce(0), _PACKED.reduce(1)
# One register a number: pairs would be taken apart before every product, which then wait.
_TILE = plgpu.Layout._WGMMA_ACC_32BIT
_SCALAR = plgpu.Layout.WG_SPLAT(())
_MATRIX, _ROWS_DOMAIN = 1, 2


def _half(dtype) -> str:
    return "bf16" if dtype == jnp.bfloat16 else "f16"


def _hex(number: float) -> str:
    return "0f" + struct.pack(">f", number).hex().upper()


def _i32():
    return ir.IntegerType.get_signless(32)


def _f32():
    return ir.F32Type.get()


def _int(number: int):
    number &= 0xFFFFFFFF
    signed = number - (1 << 32) if number >= 1 << 31 else number
    return arith.constant(_i32(), ir.IntegerAttr.get(_i32(), signed))


def _float(number: float):
    return arith.constant(_f32(), ir.FloatAttr.get(_f32(), number))


def _asm(result, operands, text, constraints, *, effects=False):
    return llvm.inline_asm(result, operands, text, constraints, has_side_effects=effects)


def _element(vector, index: int):
    return llvm.extractelement(vector, _int(index))


def _vector(*elements):
    vector = llvm.mlir_undef(ir.VectorType.get((len(elements),), elements[0].type))
    for index, element in enumerate(elements):
        vector = llvm.insertelement(vector, element, _int(index))
    return vector


def _numbers(array):
    """The float32 numbers that this thread holds: column pair, then row, then column."""
    length = ir.VectorType(array.registers.flat[0].type).shape[0]
    return [_element(register, i) for register in array.registers.flat for i in range(length)]


def _from_numbers(numbers, shape, layout, *, signed=None):
    registers = np.empty(layout.to_mgpu().registers_shape(shape), dtype=object)
    length = len(numbers) // registers.size
    for index in range(registers.size):
        registers.flat[index] = _vector(*numbers[index * length : (index + 1) * length])
    return _array(registers, layout, signed=signed)


def _array(registers, layout, *, signed=None):
    return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=signed)


def _bits(value, kind):
    return arith.bitcast(kind, value)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """How a matrix of 16-bit numbers lies in shared memory.

    Attributes:
      width: columns, a multiple of 16.
      dtype: bfloat16 or float16.
    """

    width: int
    dtype: Any

    @property
    def swizzle(self) -> int:
        """In bytes, the largest that the width is a multiple of."""
        return next(size for size in (128, 64, 32) if 2 * self.width % size == 0)

    @property
    def transforms(self) -> tuple:
        """As Pallas describes them."""
        tiling = plgpu.TilingTransform((8, self.swizzle // 2))
        return (tiling, plgpu.SwizzleTransform(self.swizzle))

    @property
    def half(self) -> str:
        """The dtype's name in PTX."""
        return _half(self.dtype)


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
    kinds = _i32(), _f32(), _f32()
    words, sums = [], [[], []]
    for index, operands in enumerate(pairs):
        constraints = ",".join(["=r", "=f", "=f"] + ["f"] * len(operands))
        struct = llvm.StructType.get_literal(list(kinds))
        three = _asm(struct, operands, text, constraints)
        word, *two = (llvm.extractvalue(kind, three, [i]) for i, kind in enumerate(kinds))
        if half == "f16":
            # Below the normal numbers rounding could double a weight.
            one = _int(0x3C003C00)
            word = _asm(_i32(), [word, one], "mul.rn.ftz.f16x2 $0, $1, $2;", "=r,r,r")
        words.append(word)
        row = sums[index % 2]
        # Two chains a row.
        row[:] = two if not row else [arith.addf(a, b) for a, b in zip(row, two, strict=True)]
    return words, [arith.addf(*row) for row in sums]


def _packed(words, shape, dtype):
    kind = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
    registers = np.empty(_PACKED.to_mgpu().registers_shape(shape), dtype=object)
    for index, word in enumerate(words):
        registers.flat[index] = llvm.bitcast(kind, word)
    return _array(registers, _PACKED)


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
    half, shape = _half(dtype), scores.shape
    text = _CAPPED.format(cap=_hex(cap), factor=_hex(factor), half=half)

    @plgpu.inline_mgpu(
        arg_types=(_TILE, _COLUMN, _ROW),
        return_type=(
            plgpu.ShapeDtypeStruct(shape, dtype, _PACKED),
            plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, _ROW),
        ),
    )
    def run(_, scores, offset, mass):
        given, offsets = _numbers(scores), _numbers(offset)
        pairs = [
            [*given[2 * i :][:2], *offsets[2 * (i // 2) :][:2]] for i in range(len(given) // 2)
        ]
        words, sums = _rounded(pairs, text, half)
        sums = [arith.addf(a, b) for a, b in zip(_numbers(mass), sums, strict=True)]
        return _packed(words, shape, dtype), _from_numbers(sums, (ROWS,), _ROW)

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
    half, shape = _half(dtype), scores.shape
    text = _ONLINE.format(half=half)
    row = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, _ROW)
    level = (
        "{ .reg .f32 a; fma.rn.ftz.f32 a, $1, " + _hex(factor) + ", $2;"
        f" max.ftz.f32 a, a, {_hex(-3e38)}; min.ftz.f32 $0, a, {_hex(3e38)}; }}"
    )

    @plgpu.inline_mgpu(
        arg_types=(_TILE, _COLUMN, _ROW, _ROW),
        return_type=(plgpu.ShapeDtypeStruct(shape, dtype, _PACKED), row, row, row),
    )
    def run(_, scores, offset, mass, best):
        given, offsets, old = _numbers(scores), _numbers(offset), _numbers(best)
        levels = [
            _asm(_f32(), [x, offsets[2 * (i // 4) + i % 2]], level, "=f,f,f")
            for i, x in enumerate(given)
        ]
        new = list(old)
        for i, x in enumerate(levels):
            new[i // 2 % 2] = arith.maxnumf(new[i // 2 % 2], x)
        for distance in (1, 2):
            new = [arith.maxnumf(x, mgpu.utils.shfl_bfly(x, distance)) for x in new]
        raised = [arith.subf(x, _float(float(shift))) for x in new]
        pairs = [[*levels[2 * i :][:2], raised[i % 2]] for i in range(len(levels) // 2)]
        words, sums = _rounded(pairs, text, half)
        shrink = [
            _approximate("ex2", arith.subf(a, b)) for a, b in zip(old, new, strict=True)
        ]
        sums = [_fma(m, f, x) for m, f, x in zip(_numbers(mass), shrink, sums, strict=True)]
        rows = (_from_numbers(x, (ROWS,), _ROW) for x in (sums, new, shrink))
        return _packed(words, shape, dtype), *rows

    return run(scores, offset, mass, best)


def scaled(tile, factor):
    """Rows of a tile (64, width) times (64,) numbers."""

    @plgpu.inline_mgpu(
        arg_types=(_TILE, _ROW),
        return_type=plgpu.ShapeDtypeStruct(tile.shape, jnp.float32, _TILE),
    )
    def run(_, tile, factor):
        rows = _numbers(factor)
        found = [arith.mulf(x, rows[i // 2 % 2]) for i, x in enumerate(_numbers(tile))]
        return _from_numbers(found, tile.shape, _TILE)

    return run(tile, factor)


def squares(scores, offset, total, *, cap: float, factor: float):
    """`total` plus the squares of the unrounded `capped_weights`, (64, keys)."""
    shape = scores.shape
    text = (
        f"{{ .reg .f32 a; min.ftz.f32 a, $1, {_hex(cap)};"
        f" fma.rn.ftz.f32 a, a, {_hex(factor)}, $2; ex2.approx.ftz.f32 $0, a; }}"
    )

    @plgpu.inline_mgpu(
        arg_types=(_TILE, _COLUMN, _TILE),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, _TILE),
    )
    def run(_, scores, offset, total):
        offsets = _numbers(offset)
        found = []
        for i, (x, old) in enumerate(zip(_numbers(scores), _numbers(total), strict=True)):
            weight = _asm(_f32(), [x, offsets[2 * (i // 4) + i % 2]], text, "=f,f,f")
            found.append(_fma(weight, weight, old))
        return _from_numbers(found, shape, _TILE)

    return run(scores, offset, total)


def write_column_sums(tile, ref):
    """Sums over each warp's 16 rows of a tile (64, keys): written to ref (4, keys)."""

    @plgpu.inline_mgpu(arg_types=(_TILE, plgpu.RefType()))
    def run(_, tile, ref):
        numbers = _numbers(tile)
        row, lane = _lane_row_and_column()
        warp = arith.shrui(row, _int(4))
        index = ir.IndexType.get()
        first = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(row, _int(15)), _int(0))
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
                column = arith.addi(arith.shli(lane, _int(1)), _int(number // 2 * 8 + number % 2))
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
    kind = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, _ROW)

    @plgpu.inline_mgpu(arg_types=(_ROW, _ROW), return_type=(kind, kind))
    def run(_, high, low):
        found = []
        for a, b in zip(_numbers(high), _numbers(low), strict=True):
            for distance in (1, 2):
                rest = arith.addf(b, mgpu.utils.shfl_bfly(b, distance))
                a, error = _exact_sum(a, mgpu.utils.shfl_bfly(a, distance))
                b = arith.addf(rest, error)
            found.append((a, b))
        return tuple(_from_numbers(list(x), (ROWS,), _ROW) for x in zip(*found, strict=True))

    return run(high, low)


def _step_offsets(ref, swizzle: int, rows: int, *, product: str):
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
    struct = llvm.StructType.get_literal([_f32()] * count)
    given = [*old, *left, right, *([] if add is None else [add])]
    out = _asm(struct, given, text, ",".join(kinds), effects=True)
    return [llvm.extractvalue(_f32(), out, [i]) for i in range(count)]


def _pipeline(instruction: str):
    void = ir.Type.parse("!llvm.void")
    _asm(void, [], f"wgmma.{instruction}.sync.aligned;", "~{memory}", effects=True)


def _wait_group(numbers, in_flight: int, spent=()):
    """Waits until so many products are in flight.

    Args:
      numbers: float32 values that are not read before it.
      in_flight: the number of products.
      spent: int32 values that a product reads: their registers are not written before it.
    """
    count = len(numbers)
    struct = llvm.StructType.get_literal([_f32()] * count)
    kinds = ["=f"] * count + [str(i) for i in range(count)] + ["r"] * len(spent) + ["~{memory}"]
    text = f"wgmma.wait_group.sync.aligned {in_flight};"
    out = _asm(struct, [*numbers, *spent], text, ",".join(kinds), effects=True)
    return [llvm.extractvalue(_f32(), out, [i]) for i in range(count)]


def scores(query_ref, key_ref, matrix):
    """query·keyᵀ, waited for: (64, keys) float32.

    Args:
      query_ref: (64, width) in shared memory.
      key_ref: (keys, width) in shared memory.
      matrix: their dtype and transforms.
    """
    keys = key_ref.shape[0]
    kind = plgpu.RefType(matrix.transforms)

    @plgpu.inline_mgpu(
        arg_types=(kind, kind), return_type=plgpu.ShapeDtypeStruct((ROWS, keys), jnp.float32, _TILE)
    )
    def run(_, query, key):
        _pipeline("fence")
        found = _issue_scores(query, key, matrix, keys)
        return _from_numbers(_wait_group(found, 0), (ROWS, keys), _TILE)

    return run(query_ref, key_ref)


def _issue_scores(query, key, matrix, keys: int):
    left, left_steps = _step_offsets(query, matrix.swizzle, ROWS, product="left")
    right, right_steps = _step_offsets(key, matrix.swizzle, keys, product="right")
    total = None
    for a, b in zip(left_steps, right_steps, strict=True):
        place = [_moved(left, a)], _moved(right, b)
        total = _product(total, *place, matrix.half, keys, transposed=False)
    _pipeline("commit_group")
    return total


def _issue_sums(total, weights, value, matrix, width: int, add):
    base, steps = _step_offsets(value, matrix.swizzle, width, product="values")
    words = [llvm.bitcast(_i32(), register) for register in weights.registers.flat]
    for index, step in enumerate(steps):
        four = words[4 * index : 4 * index + 4]
        place = four, _moved(base, step)
        switch = None if index else add
        total = _product(total, *place, matrix.half, width, transposed=True, add=switch)
    _pipeline("commit_group")
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
    keys, width = value_ref.shape
    next_keys = key_ref.shape[0]
    key_kind = plgpu.RefType(key_matrix.transforms)
    value_kind = plgpu.RefType(value_matrix.transforms)
    tile = plgpu.ShapeDtypeStruct((ROWS, next_keys), jnp.float32, _TILE)
    sums = plgpu.ShapeDtypeStruct((ROWS, width), jnp.float32, _TILE)

    @plgpu.inline_mgpu(arg_types=(key_kind, key_kind), return_type=tile)
    def begin(_, query, key):
        _pipeline("fence")
        return _from_numbers(_issue_scores(query, key, key_matrix, next_keys), tile.shape, _TILE)

    @plgpu.inline_mgpu(
        arg_types=(value_kind, _PACKED, _TILE, _TILE, _SCALAR), return_type=(tile, sums)
    )
    def proceed(_, value, weights, total, found, add):
        _pipeline("fence")
        new = _issue_sums(_numbers(total), weights, value, value_matrix, width, _scalar(add))
        found = _wait_group(_numbers(found), 1)
        return _from_numbers(found, tile.shape, _TILE), _from_numbers(new, sums.shape, _TILE)

    found = begin(query_ref, key_ref)
    wait()
    return proceed(value_ref, weights, total, found, add)


def unset(width: int):
    """A tile (64, width) with nothing in it: to be added to with `add` = 0."""

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((ROWS, width), jnp.float32, _TILE))
    def run(_):
        nothing = [llvm.mlir_undef(_f32())] * (ROWS * width // _WARPGROUP)
        return _from_numbers(nothing, (ROWS, width), _TILE)

    return run()


def finish(total, spent):
    """The sums, once no product is in flight.

    Args:
      total: from `overlapped`.
      spent: the weights that were given to it: their registers are free only now.
    """

    @plgpu.inline_mgpu(
        arg_types=(_TILE, _PACKED),
        return_type=plgpu.ShapeDtypeStruct(total.shape, jnp.float32, _TILE),
    )
    def run(_, total, spent):
        words = [llvm.bitcast(_i32(), register) for register in spent.registers.flat]
        return _from_numbers(_wait_group(_numbers(total), 0, words), total.shape, _TILE)

    return run(total, spent)


def sums(value_ref, weights, total, add, matrix):
    """total + weights·value, waited for; see `overlapped`."""
    width = value_ref.shape[1]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(matrix.transforms), _PACKED, _TILE, _SCALAR),
        return_type=plgpu.ShapeDtypeStruct((ROWS, width), jnp.float32, _TILE),
    )
    def run(_, value, weights, total, add):
        _pipeline("fence")
        new = _issue_sums(_numbers(total), weights, value, matrix, width, _scalar(add))
        return _from_numbers(_wait_group(new, 0), (ROWS, width), _TILE)

    return run(value_ref, weights, total, add)


def _thread():
    """This thread's number in its warpgroup."""
    thread = arith.index_cast(_i32(), gpu.thread_id(gpu.Dimension.x))
    return arith.andi(thread, _int(_WARPGROUP - 1))


def _own(ref):
    """PTX name of the memory, address and constraint of this thread's first four numbers."""
    i64 = ir.IntegerType.get_signless(64)
    base = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))
    address = arith.addi(base, arith.extui(i64, arith.muli(_thread(), _int(16))))
    if mgpu.utils.is_smem_ref(ref):
        return "shared", arith.trunci(_i32(), address), "r"
    return "global", address, "l"


_STRIDE = 16 * _WARPGROUP


def keep(tile, ref):
    """Writes a tile (64, width) to a warpgroup's buffer, each thread its own numbers.

    The same thread of another warpgroup reads them by `kept`, after a barrier.

    Args:
      tile: float32.
      ref: (64·width,) float32, in shared or global memory.
    """

    @plgpu.inline_mgpu(arg_types=(_TILE, plgpu.RefType()))
    def run(_, tile, ref):
        space, address, kind = _own(ref)
        numbers = _numbers(tile)
        void = ir.Type.parse("!llvm.void")
        for index in range(0, len(numbers), 4):
            text = f"st.{space}.v4.f32 [$0+{index // 4 * _STRIDE}], {{$1, $2, $3, $4}};"
            four = numbers[index : index + 4]
            _asm(void, [address, *four], text, f"{kind},f,f,f,f,~{{memory}}", effects=True)

    run(tile, ref)


def _load_four(space: str, address, kind: str, offset: int):
    struct = llvm.StructType.get_literal([_f32()] * 4)
    order = ".relaxed.gpu" if space == "global" else ""
    text = f"ld{order}.{space}.v4.f32 {{$0, $1, $2, $3}}, [$4+{offset}];"
    found = _asm(struct, [address], text, f"=f,=f,=f,=f,{kind},~{{memory}}", effects=True)
    return [llvm.extractvalue(_f32(), found, [i]) for i in range(4)]


def kept(ref, width: int):
    """The tile that `keep` wrote: (64, width) float32."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((ROWS, width), jnp.float32, _TILE),
    )
    def run(_, ref):
        place = _own(ref)
        offsets = range(0, ROWS * width * 4, _STRIDE)
        found = [number for offset in offsets for number in _load_four(*place, offset)]
        return _from_numbers(found, (ROWS, width), _TILE)

    return run(ref)


def _rotate(word, bits):
    return arith.ori(arith.shli(word, _int(bits)), arith.shrui(word, _int(32 - bits)))


def _quarter(state, a, b, c, d):
    for left, right, bits in ((1, 0, 16), (3, 2, 12), (1, 0, 8), (3, 2, 7)):
        # a += b, d = (d ^ a) <<< n; then c += d, b = (b ^ c) <<< n; twice.
        if right == 0:
            state[a] = arith.addi(state[a], state[b])
            state[d] = _rotate(arith.xori(state[d], state[a]), bits)
        else:
            state[c] = arith.addi(state[c], state[d])
            state[b] = _rotate(arith.xori(state[b], state[c]), bits)


def _chacha(key, address):
    """Sixteen words of one ChaCha block, each an i32 value."""
    initial = [*(_int(word) for word in random._CONSTANTS), *key, *address]
    state = list(initial)
    for _ in range(random.ROUNDS // 2):
        for i in range(4):
            _quarter(state, i, i + 4, i + 8, i + 12)
        for i in range(4):
            _quarter(state, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return [arith.addi(a, b) for a, b in zip(state, initial, strict=True)]


def _approximate(name, x):
    return _asm(_f32(), [x], f"{name}.approx.ftz.f32 $0, $1;", "=f,f")


def _fma(a, b, c):
    return llvm.intr_fma(a, b, c)


def _normal_pair(first, second, scale: float):
    """`random.normal_pair` times `scale`, with the device's approximate functions."""
    mul = arith.mulf
    upper = arith.shrsi(first, _int(31))
    high = arith.sitofp(_f32(), arith.xori(first, upper))
    low = arith.sitofp(_f32(), arith.shrui(arith.xori(second, upper), _int(24)))
    small = _fma(low, _float(2.0**-40), _float(2.0**-41))
    small = _fma(high, _float(2.0**-32), small)
    flipped = arith.cmpi(arith.CmpIPredicate.slt, first, _int(0))
    series = _fma(small, _float(1.0 / 3.0), _float(0.5))
    series = mul(small, _fma(small, series, _float(1.0)))
    argument = arith.select(flipped, arith.subf(_float(1.0), small), small)
    logarithm = mul(_float(-math.log(2.0)), _approximate("lg2", argument))
    tiny = arith.cmpf(arith.CmpFPredicate.OLT, small, _float(1.0 / 64.0))
    square = arith.select(arith.andi(flipped, tiny), series, logarithm)
    # √2 as a second factor: no scale can make the square overflow.
    radius = mul(_approximate("sqrt", square), _float(scale * math.sqrt(2.0)))
    turn = arith.sitofp(_f32(), arith.shrsi(arith.shli(second, _int(8)), _int(8)))
    step = 2.0 * math.pi / 2.0**24
    angle = _fma(turn, _float(step), _float(step / 2))
    return mul(radius, _approximate("cos", angle)), mul(radius, _approximate("sin", angle))


def _key(ref):
    index = ir.IndexType.get()
    place = [arith.constant(index, ir.IntegerAttr.get(index, i)) for i in range(8)]
    return [memref.load(ref, [i]) for i in place]


def _lane_row_and_column():
    thread = _thread()
    warp, lane = arith.shrui(thread, _int(5)), arith.andi(thread, _int(31))
    row = arith.addi(arith.shli(warp, _int(4)), arith.shrui(lane, _int(2)))
    return row, arith.andi(lane, _int(3))


def _scalar(array):
    return array.registers.item()


def matrix_noise(key_ref, batch, head, start, chunk, width: int, noise_std: float):
    """Normals times `noise_std` of rows start..start+64, columns 64·chunk..+width: (64, width).

    Args:
      key_ref: eight uint32 in global memory.
      batch: int32 scalar, global.
      head: int32 scalar, global.
      start: int32 scalar, global row.
      chunk: int32 scalar.
      width: 16, 32, 48 or 64.
      noise_std: standard deviation.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), _SCALAR, _SCALAR, _SCALAR, _SCALAR),
        return_type=plgpu.ShapeDtypeStruct((ROWS, width), jnp.float32, _TILE),
    )
    def run(_, key_ref, batch, head, start, chunk):
        key = _key(key_ref)
        row, lane = _lane_row_and_column()
        row = arith.addi(row, _scalar(start))
        column = arith.addi(arith.shli(_scalar(chunk), _int(2)), lane)
        tagged = arith.ori(_int(_MATRIX << 24), _scalar(head))
        drawn: list[Any] = [None] * (width // 4)
        for half in range(2):
            place = arith.addi(row, _int(8 * half))
            words = _chacha(key, [place, column, _scalar(batch), tagged])
            for pair in range(width // 8):
                two = _normal_pair(words[2 * pair], words[2 * pair + 1], noise_std)
                drawn[2 * pair + half] = two
        numbers = [number for pair in drawn for number in pair]
        return _from_numbers(numbers, (ROWS, width), _TILE)

    return run(key_ref, batch, head, start, chunk)


def row_noise(key_ref, batch, head, start, rows: int, noise_std: float, out_ref):
    """Writes normals times `noise_std` of rows start..start+rows, both multiples of 16.

    One thread draws a whole block: pair j is rows 16r + j and that + 8.

    Args:
      key_ref: eight uint32 in global memory.
      batch: int32 scalar, global.
      head: int32 scalar, global.
      start: int32 scalar, global row.
      rows: their number, at most 512.
      noise_std: standard deviation.
      out_ref: (rows,) float32 in global memory.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR, _SCALAR, _SCALAR, plgpu.RefType()))
    def run(_, key_ref, batch, head, start, out_ref):
        thread = _thread()
        mine = arith.cmpi(arith.CmpIPredicate.ult, thread, _int(rows // 16))
        branch = scf.IfOp(mine)
        with ir.InsertionPoint(branch.then_block):
            block = arith.addi(arith.shrui(_scalar(start), _int(4)), thread)
            tagged = arith.ori(_int(_ROWS_DOMAIN << 24), _scalar(head))
            words = _chacha(_key(key_ref), [block, _int(0), _scalar(batch), tagged])
            first = arith.shli(thread, _int(4))
            for pair in range(8):
                drawn = _normal_pair(words[2 * pair], words[2 * pair + 1], noise_std)
                for half in range(2):
                    place = arith.addi(first, _int(pair + 8 * half))
                    place = arith.index_cast(ir.IndexType.get(), place)
                    memref.store(drawn[half], out_ref, [place])
            scf.yield_([])

    run(key_ref, batch, head, start, out_ref)


def rows_kept(ref):
    """(64,) float32 from global memory that another warpgroup wrote."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, _ROW),
    )
    def run(_, ref):
        i64 = ir.IntegerType.get_signless(64)
        row, _ = _lane_row_and_column()
        base = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))
        address = arith.addi(base, arith.extui(i64, arith.shli(row, _int(2))))
        found = []
        for half in range(2):
            text = f"ld.relaxed.gpu.global.f32 $0, [$1+{32 * half}];"
            found.append(_asm(_f32(), [address], text, "=f,l,~{memory}", effects=True))
        return _from_numbers(found, (ROWS,), _ROW)

    return run(ref)


def same(row_ids, column_ids):
    """Whether row and column have one id: (64, keys) boolean."""
    shape = (ROWS, column_ids.shape[0])

    @plgpu.inline_mgpu(
        arg_types=(_ROW, _COLUMN), return_type=plgpu.ShapeDtypeStruct(shape, jnp.bool_, _TILE)
    )
    def run(_, row_ids, column_ids):
        rows, columns = _numbers(row_ids), _numbers(column_ids)
        found = [
            arith.cmpi(arith.CmpIPredicate.eq, rows[i // 2 % 2], columns[2 * (i // 4) + i % 2])
            for i in range(2 * len(columns))
        ]
        return _from_numbers(found, shape, _TILE, signed=False)

    return run(row_ids, column_ids)


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
