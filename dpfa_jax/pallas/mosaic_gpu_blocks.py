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
from jaxlib.mlir.dialects import arith, gpu, llvm, memref

from dpfa_jax import random
from dpfa_jax.doubleword import grid_step

ROWS = 64
"""Rows of one warpgroup's tile."""

RANGE = 128.0
"""A weight below 2⁻¹²⁸ is 0."""

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


def _from_numbers(numbers, shape, layout):
    registers = np.empty(layout.to_mgpu().registers_shape(shape), dtype=object)
    length = len(numbers) // registers.size
    for index in range(registers.size):
        registers.flat[index] = _vector(*numbers[index * length : (index + 1) * length])
    return _array(registers, layout)


def _array(registers, layout):
    return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)


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


@dataclasses.dataclass(frozen=True)
class Weights:
    """How scores become weights: 2^(min(score, cap)·factor + offset), NaN giving 0.

    Attributes:
      cap: in the unit of the scores.
      factor: of the scores, into units of ln 2, > 0.
      dtype: of the rounded weights.
    """

    cap: float
    factor: float
    dtype: Any

    def __call__(self, scores, offset, mass):
        """Rounded weights, and `mass` plus each thread's share of their sums.

        The multiply-add saturates to [0, 1], which is the cap, and the floor of the exponent.

        Args:
          scores: (64, keys) float32.
          offset: (keys,) float32: that of the formula above, less cap·factor and `RANGE`.
          mass: (64,) float32, a different share in each thread; `row_sum` adds them up.
        """
        slope = self.factor / RANGE
        rise = 1.0 - self.cap * slope
        half = _half(self.dtype)
        text = (
            "{ .reg .f32 a, b;"
            f" fma.rn.sat.ftz.f32 a, $1, {_hex(slope)}, {_hex(rise)};"
            f" fma.rn.sat.ftz.f32 b, $2, {_hex(slope)}, {_hex(rise)};"
            f" fma.rn.ftz.f32 a, a, {_hex(RANGE)}, $3;"
            f" fma.rn.ftz.f32 b, b, {_hex(RANGE)}, $4;"
            " ex2.approx.ftz.f32 a, a; ex2.approx.ftz.f32 b, b;"
            f" cvt.rn.{half}x2.f32 $0, b, a; }}"
        )
        shape = scores.shape

        @plgpu.inline_mgpu(
            arg_types=(_TILE, _COLUMN, _ROW),
            return_type=(
                plgpu.ShapeDtypeStruct(shape, self.dtype, _PACKED),
                plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, _ROW),
            ),
        )
        def run(_, scores, offset, mass):
            kind = ir.BF16Type.get() if half == "bf16" else ir.F16Type.get()
            packed = ir.VectorType.get((2,), kind)
            given, offsets = _numbers(scores), _numbers(offset)
            rounded = []
            sums: list[list[Any]] = [[None, None], [None, None]]
            for index in range(len(given) // 2):
                column, row = divmod(index, 2)
                pair = slice(2 * index, 2 * index + 2)
                shift = offsets[2 * column : 2 * column + 2]
                word = _asm(_i32(), [*given[pair], *shift], text, "=r,f,f,f,f")
                if half == "bf16":
                    first = _bits(arith.shli(word, _int(16)), _f32())
                    second = _bits(arith.andi(word, _int(0xFFFF0000)), _f32())
                else:
                    # Below the normal numbers rounding could double a weight.
                    word = _asm(_i32(), [word, _int(0x3C003C00)], "mul.rn.ftz.f16x2 $0, $1, $2;", "=r,r,r")
                    vector = llvm.bitcast(packed, word)
                    first = arith.extf(_f32(), _element(vector, 0))
                    second = arith.extf(_f32(), _element(vector, 1))
                rounded.append(llvm.bitcast(packed, word))
                for i, x in enumerate((first, second)):
                    known = sums[row][i]
                    sums[row][i] = x if known is None else arith.addf(known, x)
            registers = np.empty(_PACKED.to_mgpu().registers_shape(shape), dtype=object)
            for index, register in enumerate(rounded):
                registers.flat[index] = register
            total = [
                arith.addf(old, arith.addf(*parts))
                for old, parts in zip(_numbers(mass), sums, strict=True)
            ]
            return _array(registers, _PACKED), _from_numbers(total, (ROWS,), _ROW)

        return run(scores, offset, mass)


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


def finish(total, weights):
    """The sums, once no product is in flight.

    Args:
      total: from `overlapped`.
      weights: what was given to it.
    """

    @plgpu.inline_mgpu(
        arg_types=(_TILE, _PACKED),
        return_type=plgpu.ShapeDtypeStruct(total.shape, jnp.float32, _TILE),
    )
    def run(_, total, weights):
        spent = [llvm.bitcast(_i32(), register) for register in weights.registers.flat]
        return _from_numbers(_wait_group(_numbers(total), 0, spent), total.shape, _TILE)

    return run(total, weights)


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


def row_sum(shares):
    """The sums over each row's four threads of what they hold, in all four."""

    @plgpu.inline_mgpu(
        arg_types=(_ROW,), return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, _ROW)
    )
    def run(_, shares):
        sums = _numbers(shares)
        for distance in (1, 2):
            sums = [arith.addf(x, mgpu.utils.shfl_bfly(x, distance)) for x in sums]
        return _from_numbers(sums, (ROWS,), _ROW)

    return run(shares)


def _thread():
    """This thread's number in its warpgroup."""
    thread = arith.index_cast(_i32(), gpu.thread_id(gpu.Dimension.x))
    return arith.andi(thread, _int(_WARPGROUP - 1))


def _lane_address(ref, vector_bytes: int):
    """Address of this thread's first vector in a global buffer of vectors, thread fastest."""
    i64 = ir.IntegerType.get_signless(64)
    thread = _thread()
    offset = arith.extui(i64, arith.muli(thread, _int(vector_bytes)))
    base = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))
    return arith.addi(base, offset)


def keep(tile, ref, *, add: bool):
    """Writes a tile to this warpgroup's own global buffer, or adds it there, thread by thread.

    No thread reads or writes what another does, so program order is all the order there is.

    Args:
      tile: (64, width) float32.
      ref: (64·width,) float32.
      add: whether to add.
    """
    verb = "red.relaxed.gpu.global.add.v4.f32" if add else "st.global.v4.f32"

    @plgpu.inline_mgpu(arg_types=(_TILE, plgpu.RefType()))
    def run(_, tile, ref):
        address = _lane_address(ref, 16)
        words = _numbers(tile)
        for index in range(0, len(words), 4):
            offset = index // 4 * 16 * _WARPGROUP
            _asm(
                ir.Type.parse("!llvm.void"),
                [address, *words[index : index + 4]],
                f"{verb} [$0+{offset}], {{$1, $2, $3, $4}};",
                "l,f,f,f,f,~{memory}",
                effects=True,
            )
        return None

    run(tile, ref)


def kept(ref, width: int):
    """The tile that `keep` has summed up: (64, width) float32."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((ROWS, width), jnp.float32, _TILE),
    )
    def run(_, ref):
        address = _lane_address(ref, 16)
        kind = llvm.StructType.get_literal([_f32()] * 4)
        found = []
        for offset in range(0, ROWS * width * 4, 16 * _WARPGROUP):
            four = _asm(
                kind,
                [address],
                f"ld.relaxed.gpu.global.v4.f32 {{$0, $1, $2, $3}}, [$4+{offset}];",
                "=f,=f,=f,=f,l,~{memory}",
                effects=True,
            )
            found += [llvm.extractvalue(_f32(), four, [i]) for i in range(4)]
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


def _normal_pair(first, second, scale: float):
    """`random.normal_pair` times `scale`, with the device's approximate functions."""
    mul, add = arith.mulf, arith.addf
    upper = arith.shrsi(first, _int(31))
    high = arith.sitofp(_f32(), arith.xori(first, upper))
    low = arith.sitofp(_f32(), arith.shrui(arith.xori(second, upper), _int(24)))
    small = mul(
        add(mul(high, _float(256.0)), add(low, _float(0.5))), _float(2.0**-40)
    )
    flipped = arith.cmpi(arith.CmpIPredicate.ne, upper, _int(0))
    inner = add(_float(1.0 / 3.0), mul(small, _float(0.25)))
    inner = add(_float(0.5), mul(small, inner))
    series = mul(small, add(_float(1.0), mul(small, inner)))
    argument = arith.select(flipped, arith.subf(_float(1.0), small), small)
    logarithm = mul(_float(-math.log(2.0)), _approximate("lg2", argument))
    tiny = arith.cmpf(arith.CmpFPredicate.OLT, small, _float(1.0 / 64.0))
    square = arith.select(arith.andi(flipped, tiny), series, logarithm)
    radius = mul(_approximate("sqrt", mul(_float(2.0), square)), _float(scale))
    turn = arith.shrsi(arith.shli(second, _int(8)), _int(8))
    turn = add(arith.sitofp(_f32(), turn), _float(0.5))
    angle = mul(turn, _float(2.0 * math.pi / 2.0**24))
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
        return_type=plgpu.ShapeDtypeStruct((ROWS, width), jnp.float32, _PACKED),
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
        return _from_numbers(numbers, (ROWS, width), _PACKED)

    return run(key_ref, batch, head, start, chunk)


def row_noise(key_ref, batch, head, start, noise_std: float, out_ref):
    """Writes normals times `noise_std` of rows start..start+128, start a multiple of 128.

    Rows r and r + 8 of a group of 16 are one pair of one block. Of the four threads of a row, the
    first serves the first 64 rows and the second the others.

    Args:
      key_ref: eight uint32 in global memory.
      batch: int32 scalar, global.
      head: int32 scalar, global.
      start: int32 scalar, global row.
      noise_std: standard deviation.
      out_ref: (128,) float32 in shared memory.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR, _SCALAR, _SCALAR, plgpu.RefType()))
    def run(_, key_ref, batch, head, start, out_ref):
        key = _key(key_ref)
        row, lane = _lane_row_and_column()
        row = arith.addi(row, arith.shli(arith.andi(lane, _int(1)), _int(6)))
        block = arith.shrui(arith.addi(row, _scalar(start)), _int(4))
        tagged = arith.ori(_int(_ROWS_DOMAIN << 24), _scalar(head))
        words = _chacha(key, [block, _int(0), _scalar(batch), tagged])
        within = arith.andi(row, _int(7))
        first, second = words[0], words[1]
        for pair in range(1, 8):
            here = arith.cmpi(arith.CmpIPredicate.eq, within, _int(pair))
            first = arith.select(here, words[2 * pair], first)
            second = arith.select(here, words[2 * pair + 1], second)
        drawn = _normal_pair(first, second, noise_std)
        index = ir.IndexType.get()
        # Threads 2 and 3 of a row write what 0 and 1 do.
        for half in range(2):
            place = arith.index_cast(index, arith.addi(row, _int(8 * half)))
            memref.store(drawn[half], out_ref, [place])
        return None

    run(key_ref, batch, head, start, out_ref)


def on_grid(tile, spec, *, denominator: bool = False):
    """The nearest multiple of the noise's public grid where the call asks for it.

    1.5·2²³ steps of the grid leave no bits below one step; a number of 2²² steps or more is kept.
    """
    if not spec.on_grid:
        return tile
    step = grid_step(spec.denominator_std if denominator else spec.noise_std)
    shift = 1.5 * 2.0**23 * step
    rounded = (tile + shift) - shift
    return jnp.where(jnp.abs(tile) < 2.0**22 * step, rounded, tile)
