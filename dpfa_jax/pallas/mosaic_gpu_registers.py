"""A warpgroup's registers in MLIR: what a thread of a Hopper kernel holds of a tile.

A warpgroup holds a tile of 64 rows the way the matrix unit leaves it: thread (warp w, lane l) has
rows 16w + l/4 and that + 8, columns 8j + 2(l mod 4) + {0, 1}. Nothing of this exists in interpret
mode.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

ROWS = 64
"""Rows of one warpgroup's tile."""

WARPGROUP = 128
"""Threads of a warpgroup."""

PACKED = plgpu.Layout.WGMMA
COLUMN, ROW = PACKED.reduce(0), PACKED.reduce(1)
# One register a number: pairs would be taken apart before every product, which then wait.
TILE = plgpu.Layout._WGMMA_ACC_32BIT
SCALAR = plgpu.Layout.WG_SPLAT(())


def inline(*, arg_types: tuple = (), return_type: Any = None) -> Any:
    """`plgpu.inline_mgpu`, whose decorated functions take fewer arguments than they declare."""
    return plgpu.inline_mgpu(arg_types=arg_types, return_type=return_type)


def half_name(dtype) -> str:
    """PTX name of bfloat16 or float16."""
    names = {"bfloat16": "bf16", "float16": "f16"}
    name = jnp.dtype(dtype).name
    if name not in names:
        raise TypeError(f"Expected bfloat16 or float16, got {name}; the kernels read no other.")
    return names[name]


def to_float8(half: str, word: str, out: str) -> str:
    """PTX that rounds two numbers to nearest in float8_e4m3fn, ±448 where they are larger.

    Args:
      half: "bf16" or "f16", of the numbers.
      word: name of the 32 bits that hold them.
      out: name of 16 bits. `low` and `high` of 32 bits, `a` and `b` of float32 are used up.
    """
    if half == "f16":
        return f"cvt.rn.satfinite.e4m3x2.f16x2 {out}, {word};"
    return (
        f"shl.b32 low, {word}, 16; and.b32 high, {word}, 0xFFFF0000;"
        f" mov.b32 a, low; mov.b32 b, high; cvt.rn.satfinite.e4m3x2.f32 {out}, b, a;"
    )


def i32():
    """The type of 32 bits."""
    return ir.IntegerType.get_signless(32)


def f32():
    """The type of float32."""
    return ir.F32Type.get()


def integer(number: int):
    """A constant of 32 bits, modulo 2³²."""
    number &= 0xFFFFFFFF
    signed = number - (1 << 32) if number >= 1 << 31 else number
    return arith.constant(i32(), ir.IntegerAttr.get(i32(), signed))


def real(number: float):
    """A float32 constant."""
    return arith.constant(f32(), ir.FloatAttr.get(f32(), number))


def exact_sum(a, b):
    """The rounded sum of two float32 values and its exact error (Knuth)."""
    total = arith.addf(a, b)
    other = arith.subf(total, a)
    left = arith.subf(a, arith.subf(total, other))
    return total, arith.addf(left, arith.subf(b, other))


def asm(result, operands, text, constraints, *, effects=False):
    """Inline PTX; with `effects` it is neither moved past others nor dropped."""
    return llvm.inline_asm(result, operands, text, constraints, has_side_effects=effects)


def element(vector, index: int):
    """One element of a vector value."""
    return llvm.extractelement(vector, integer(index))


def vector(*elements):
    """A vector value of scalar ones."""
    filled = llvm.mlir_undef(ir.VectorType.get((len(elements),), elements[0].type))
    for index, element in enumerate(elements):
        filled = llvm.insertelement(filled, element, integer(index))
    return filled


def numbers(array):
    """The float32 numbers that this thread holds: column pair, then row, then column."""
    length = ir.VectorType(array.registers.flat[0].type).shape[0]
    return [element(register, i) for register in array.registers.flat for i in range(length)]


def from_numbers(numbers, shape, layout, *, signed=None):
    """The array of which this thread holds `numbers`, in the order of `numbers`."""
    registers = np.empty(layout.to_mgpu().registers_shape(shape), dtype=object)
    length = len(numbers) // registers.size
    for index in range(registers.size):
        registers.flat[index] = vector(*numbers[index * length : (index + 1) * length])
    return array(registers, layout, signed=signed)


def array(registers, layout, *, signed=None):
    """An array from its registers."""
    return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=signed)


def bits(value, kind):
    """The same bits as another type."""
    return arith.bitcast(kind, value)


def thread():
    """This thread's number in its warpgroup."""
    number = arith.index_cast(i32(), gpu.thread_id(gpu.Dimension.x))
    return arith.andi(number, integer(WARPGROUP - 1))


def lane_place():
    """This thread's first row of a tile, and its number among the four of that row."""
    number = thread()
    warp, lane = arith.shrui(number, integer(5)), arith.andi(number, integer(31))
    row = arith.addi(arith.shli(warp, integer(4)), arith.shrui(lane, integer(2)))
    return row, arith.andi(lane, integer(3))


def scalar(array):
    """The value of an array without axes."""
    return array.registers.item()


def uniform(number):
    """An int32 scalar, the same in all threads of a warp, of which the assembler then knows that.

    Carried through loops that wait for barriers it is taken to differ between threads: addresses
    then leave the registers of the warp, of which each product wants four.
    """

    @inline(arg_types=(SCALAR,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR))
    def run(_, number):
        text = "shfl.sync.idx.b32 $0, $1, 0, 31, -1;"
        found = asm(i32(), [scalar(number)], text, "=r,r", effects=True)
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return run(number)


def approximate(name, x):
    """The device's approximate function of that name in PTX."""
    return asm(f32(), [x], f"{name}.approx.ftz.f32 $0, $1;", "=f,f")


def arrived(numbers):
    """Waits for finite float32 values that were loaded: arriving at a barrier does not.

    Loads from shared memory wait while the matrix unit reads there, and a copy that a barrier lets
    in may come before them. The store, of what cannot be, never happens, but it wants the numbers,
    and the assembler leaves it before what comes after.
    """
    text = "{ .reg .pred p; .reg .f32 t; .reg .b32 a; mov.f32 t, $0;"
    text += "".join(f" max.f32 t, t, ${i};" for i in range(1, len(numbers)))
    text += " setp.gt.f32 p, t, 0f7F7FFFFF; mov.b32 a, 0; @p st.shared.f32 [a], t; }"
    kinds = ",".join(["f"] * len(numbers) + ["~{memory}"])
    asm(ir.Type.parse("!llvm.void"), list(numbers), text, kinds, effects=True)


def fma(a, b, c):
    """a·b + c, rounded once."""
    return llvm.intr_fma(a, b, c)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """How a matrix lies in shared memory.

    Attributes:
      width: columns, a multiple of 32 bytes of them.
      dtype: bfloat16, float16 or float8_e4m3fn; float32 of what is not multiplied.
    """

    width: int
    dtype: Any

    @property
    def bytes(self) -> int:
        """Of one number."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def step(self) -> int:
        """Columns of one step of the matrix unit: 32 bytes."""
        return 32 // self.bytes

    @property
    def swizzle(self) -> int:
        """In bytes, the largest that the width is a multiple of."""
        return next(size for size in (128, 64, 32) if self.bytes * self.width % size == 0)

    @property
    def transforms(self) -> tuple:
        """As Pallas describes them."""
        tiling: Any = plgpu.TilingTransform
        swizzle: Any = plgpu.SwizzleTransform
        return (tiling((8, self.swizzle // self.bytes)), swizzle(self.swizzle))

    @property
    def half(self) -> str:
        """The numbers' name in PTX."""
        return "e4m3" if self.bytes == 1 else half_name(self.dtype)
