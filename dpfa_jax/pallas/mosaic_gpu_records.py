"""Which records count and how much, on Hopper GPUs: `triton_records` nearer to the memory's speed.

A block of the grid reads whole records as they lie, one head after another; a warp fetches several
rows before it uses any. What is rare, rows that are not finite or too large to square, is looked
at in branches that a warp takes only then.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.core import LoweringSemantics
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from dpfa_jax import _primitives
from dpfa_jax.pallas import mosaic_gpu_registers as rg
from dpfa_jax.pallas import triton_records

_SMALLEST_BOUND = 2.0**-40
"""Squares of numbers below 2⁻⁶⁴ vanish: only rows far below the bound may have such."""

_DOWN = -100
"""Power of 2 that brings the squares of all numbers of 16 bits below ∞."""

_PASSES = 8
"""Records that each lane fetches at once, a part of 16 bytes of each row."""

_LANES = 32


def _wide(value):
    return arith.extui(ir.IntegerType.get_signless(64), value)


def _address(ref, place, size: int):
    """Of number `place` in global memory, an i32 value; `size` bytes each."""
    i64 = ir.IntegerType.get_signless(64)
    base = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))
    scale = arith.constant(i64, ir.IntegerAttr.get(i64, size))
    return arith.addi(base, arith.muli(_wide(place), scale))


def _flag(condition):
    return arith.extui(rg.i32(), condition)


def _four_words(address, inside):
    """16 bytes of global memory, or zeros where not `inside`."""
    struct = llvm.StructType.get_literal([rg.i32()] * 4)
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(4))
    text = (
        f"{{ .reg .pred p; setp.ne.b32 p, $5, 0; {zeros}"
        " @p ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4]; }"
    )
    found = rg.asm(struct, [address, inside], text, "=&r,=&r,=&r,=&r,l,r", effects=True)
    return [llvm.extractvalue(rg.i32(), found, [i]) for i in range(4)]


def _halves(word, half: str):
    """Two float32 numbers of a word of 16-bit ones."""
    if half == "bf16":
        low = arith.shli(word, rg.integer(16))
        high = arith.andi(word, rg.integer(0xFFFF0000))
        return [rg.bits(x, rg.f32()) for x in (low, high)]
    struct = llvm.StructType.get_literal([rg.f32()] * 2)
    text = "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }"
    found = rg.asm(struct, [word], text, "=f,=f,r")
    return [llvm.extractvalue(rg.f32(), found, [i]) for i in range(2)]


def _squares(words, half: str, scale: float = 1.0):
    """Σ (scale·x)² of a lane's numbers; NaN or ∞ if one of them is."""
    total = rg.real(0.0)
    for word in words:
        for x in _halves(word, half):
            x = x if scale == 1.0 else arith.mulf(x, rg.real(scale))
            total = rg.fma(x, x, total)
    return total


def _nothing(words, half: str):
    """0, or NaN if one of a lane's numbers is NaN or infinite."""
    total = rg.integer(0)
    for word in words:
        text = f"fma.rn.{half}x2 $0, $1, $2, $3;"
        total = rg.asm(rg.i32(), [word, rg.integer(0), total], text, "=r,r,r,r")
    text = f"{{ .reg .b16 a, b; mov.b32 {{a, b}}, $1; add.rn.{half} a, a, b;"
    return rg.asm(rg.f32(), [total], f"{text} cvt.f32.{half} $0, a; }}", "=f,r")


def _write_float8(address, words, half: str, inside):
    """Eight numbers rounded to nearest in float8_e4m3fn, ±448 where they are larger."""
    parts = " ".join(rg.to_float8(half, f"${1 + i}", f"h{i}") for i in range(4))
    text = (
        "{ .reg .b32 low, high, o<2>; .reg .f32 a, b; .reg .b16 h<4>; .reg .pred p;"
        f" setp.ne.b32 p, $5, 0; {parts} mov.b32 o0, {{h0, h1}}; mov.b32 o1, {{h2, h3}};"
        " @p st.global.v2.b32 [$0], {o0, o1}; }"
    )
    _write(text, [address, *words, inside], "l,r,r,r,r,r")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything static about one kernel.

    Attributes:
      length: S.
      heads: K.
      widths: of the rows that are read: keys and values, or values alone.
      half: PTX name of their numbers.
      bound: of the weighted value rows' norms, or None.
    """

    length: int
    heads: int
    widths: tuple[int, ...]
    half: str
    bound: float | None

    @property
    def share(self) -> int:
        """Lanes that share a row, 16 bytes each: a power of 2."""
        return 1 << (max(self.widths) // 8 - 1).bit_length()

    @property
    def together(self) -> int:
        """Rows that a warpgroup fetches at once."""
        return _PASSES * rg.WARPGROUP // self.share

    @property
    def records(self) -> int:
        """Of one block of the grid: their rows are whole turns of the warpgroup."""
        return self.together // math.gcd(self.together, self.heads)

    @property
    def blocks(self) -> int:
        """Of the grid, for one memory."""
        return -(-self.length // self.records)


def _log_weight(plan: _Plan, square, power: float):
    """min(0, log(bound/norm)) of a row whose numbers were scaled by 2^power before squaring."""
    if plan.bound is None:
        return rg.real(0.0)
    log_norm = arith.mulf(rg.approximate("lg2", square), rg.real(0.5 * math.log(2.0)))
    level = rg.real(math.log(plan.bound) + power * math.log(2.0))
    return arith.minnumf(arith.subf(level, log_norm), rg.real(0.0))


def _over_row(plan: _Plan, number):
    """The sum over the lanes that share a row, in all of them."""
    for distance in (1 << i for i in range(plan.share.bit_length() - 1)):
        number = arith.addf(number, mgpu.utils.shfl_bfly(number, distance))
    return number


def _rare(plan: _Plan, rows, lost, record):
    """The weight of a row whose square is not below ∞; marks records that are not finite.

    Of `rows` the last is the value's.
    """
    nothing = functools.reduce(arith.addf, [_nothing(row, plan.half) for row in rows])
    nothing = _over_row(plan, nothing)
    finite = arith.cmpf(arith.CmpFPredicate.OEQ, nothing, rg.real(0.0))
    place = arith.addi(lost, arith.shli(arith.addi(record, rg.integer(1)), rg.integer(2)))
    for address in (lost, place):
        text = "{ .reg .pred p; setp.eq.b32 p, $1, 0; @p st.shared.b32 [$0], $2; }"
        _write(text, [address, _flag(finite), rg.integer(1)], "r,r,r")
    square = _over_row(plan, _squares(rows[-1], plan.half, 2.0**_DOWN))
    return _log_weight(plan, square, _DOWN)


def _kernel(plan: _Plan, *refs):
    """One block of the grid.

    Args:
      plan: what is static.
      refs: in this order:
        (rows, H) keys of all memories, where they are read;
        (rows, h) values;
        (rows,) float32 weights, are written: memory, then head, then record;
        (blocks of all memories,) int32 flags, are written;
        (rows, H) of float8_e4m3fn, are written, or nothing;
        `records` + 1 words of shared memory: whether any record has a row that is not finite, and
        each of them.
    """
    count = len(plan.widths)
    share, heads = plan.share, plan.heads
    at_once = _LANES // share
    rows = plan.length * heads
    own = plan.records * heads
    less, equal = arith.CmpIPredicate.ult, arith.CmpIPredicate.eq

    @rg.inline(arg_types=(*[plgpu.RefType()] * len(refs), rg.SCALAR))
    def run(_, *given):
        sources, (weights, flags, *narrow, lost, program) = given[:count], given[count:]
        program = rg.scalar(program)
        i64 = ir.IntegerType.get_signless(64)
        lost = arith.trunci(rg.i32(), llvm.ptrtoint(i64, mgpu.utils.memref_ptr(lost)))
        memory = arith.divui(program, rg.integer(plan.blocks))
        begin = arith.muli(arith.remui(program, rg.integer(plan.blocks)), rg.integer(own))
        start = arith.muli(memory, rg.integer(rows))
        thread = rg.thread()
        warp, lane = arith.shrui(thread, rg.integer(5)), arith.andi(thread, rg.integer(_LANES - 1))
        part = arith.andi(lane, rg.integer(share - 1))
        first = arith.muli(warp, rg.integer(_PASSES * at_once))
        first = arith.addi(first, arith.shrui(lane, rg.integer(share.bit_length() - 1)))

        def each(count: int, body):
            """`body(number)` for the thread's numbers below `count`."""

            @mgpu.utils.fori(rg.integer(-(-count // rg.WARPGROUP)), [])
            def turns(turn, carry):
                number = arith.addi(arith.muli(turn, rg.integer(rg.WARPGROUP)), thread)
                with mgpu.utils.when(arith.cmpi(less, number, rg.integer(count))):
                    body(number)
                return carry

        def weight(row):
            """Where the weight of a row of this block's memory lies."""
            record, head = (f(row, rg.integer(heads)) for f in (arith.divui, arith.remui))
            place = arith.addi(arith.muli(head, rg.integer(plan.length)), record)
            return _address(weights, arith.addi(start, place), 4)

        def clear(number):
            place = arith.addi(lost, arith.shli(number, rg.integer(2)))
            _write("st.shared.b32 [$0], $1;", [place, rg.integer(0)], "r,r")

        each(plan.records + 1, clear)
        _write("bar.sync 0;", [], "")

        @mgpu.utils.fori(rg.integer(own // plan.together), [])
        def turns(turn, carry):
            moved = arith.addi(arith.muli(turn, rg.integer(plan.together)), first)
            fetched = []
            for number in range(_PASSES):
                mine = arith.addi(moved, rg.integer(number * at_once))
                local, words = arith.addi(begin, mine), []
                there = arith.cmpi(less, local, rg.integer(rows))
                row = arith.addi(start, local)
                for ref, width in zip(sources, plan.widths, strict=True):
                    inside = arith.cmpi(less, part, rg.integer(width // 8))
                    place = arith.addi(arith.muli(row, rg.integer(width // 8)), part)
                    inside = _flag(arith.andi(there, inside))
                    words.append(_four_words(_address(ref, place, 16), inside))
                fetched.append((mine, local, there, words))
            for mine, local, there, words in fetched:
                nothings = [_nothing(row, plan.half) for row in words[:-1]]
                square = functools.reduce(arith.addf, nothings, _squares(words[-1], plan.half))
                square = _over_row(plan, square)
                usual = arith.cmpf(arith.CmpFPredicate.OLT, square, rg.real(math.inf))
                text = "{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.all.pred p, p, 0xffffffff;"
                text += " selp.b32 $0, 1, 0, p; }"
                all_usual = rg.asm(rg.i32(), [_flag(usual)], text, "=r,r", effects=True)
                branch: Any = scf.IfOp(
                    arith.cmpi(equal, all_usual, rg.integer(1)), [rg.f32()], has_else=True
                )
                with ir.InsertionPoint(branch.then_block):
                    scf.yield_([_log_weight(plan, square, 0.0)])
                with ir.InsertionPoint(branch.else_block):
                    record = arith.divui(mine, rg.integer(heads))
                    other = _rare(plan, words, lost, record)
                    scf.yield_([arith.select(usual, _log_weight(plan, square, 0.0), other)])
                writes = _flag(arith.andi(there, arith.cmpi(equal, part, rg.integer(0))))
                text = "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.f32 [$0], $1; }"
                _write(text, [weight(local), branch.results[0], writes], "l,f,r")
                for ref in narrow:
                    parts, row = plan.widths[0] // 8, arith.addi(start, local)
                    inside = arith.andi(there, arith.cmpi(less, part, rg.integer(parts)))
                    place = arith.addi(arith.muli(row, rg.integer(parts)), part)
                    _write_float8(_address(ref, place, 8), words[0], plan.half, _flag(inside))
            return carry

        _write("bar.sync 0;", [], "")
        found = rg.asm(rg.i32(), [lost], "ld.shared.b32 $0, [$1];", "=r,r,~{memory}", effects=True)
        text = "{ .reg .pred p; setp.eq.b32 p, $2, 0; @p st.global.b32 [$0], $1; }"
        _write(text, [_address(flags, program, 4), found, thread], "l,r,r")

        def null(number):
            record = arith.addi(arith.divui(number, rg.integer(heads)), rg.integer(1))
            row = arith.addi(begin, number)
            inside = _flag(arith.cmpi(less, row, rg.integer(rows)))
            text = (
                "{ .reg .pred p, q; .reg .b32 a; ld.shared.b32 a, [$1]; setp.ne.b32 p, a, 0;"
                " setp.ne.and.b32 q, $2, 0, p; @q st.global.f32 [$0], 0fFF800000; }"
            )
            place = arith.addi(lost, arith.shli(record, rg.integer(2)))
            _write(text, [weight(row), place, inside], "l,r,r")

        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ne, found, rg.integer(0))):
            each(own, null)

    run(*refs, lax.axis_index("program"))


def _write(text: str, operands, kinds: str):
    kinds = ",".join(filter(None, (kinds, "~{memory}")))
    rg.asm(ir.Type.parse("!llvm.void"), operands, text, kinds, effects=True)


def _takes(rows: tuple[jax.Array, ...], bound: float | None) -> bool:
    """Whether the kernel does: rows of 16-bit numbers, whole parts of 16 bytes."""
    widths, dtype = [x.shape[3] for x in rows], rows[0].dtype
    large = bound is None or bound >= _SMALLEST_BOUND
    if dtype not in (jnp.bfloat16, jnp.float16) or any(x.dtype != dtype for x in rows):
        return False
    if not rows[0].size or not large:
        return False
    return max(widths) <= 256 and not any(width % 8 for width in widths)


def _run(
    rows: tuple[jax.Array, ...], bound: float | None, narrow: bool = False
) -> tuple[jax.Array, ...]:
    """Weights and flags of rows of keys and values, or of values alone; and narrow keys."""
    memories, length, heads, _ = rows[0].shape
    rows = _primitives.vary_alike(*rows)
    widths = tuple(x.shape[3] for x in rows)
    plan = _Plan(length, heads, widths, rg.half_name(rows[0].dtype), bound)

    def kernel(*refs):
        _kernel(plan, *refs)

    kernel.__name__ = "dpfa_mosaic_record_kernel"
    count = memories * length * heads
    out: list[tuple[tuple[int, ...], Any]] = [
        ((count,), jnp.float32),
        ((memories * plan.blocks,), jnp.int32),
    ]
    if narrow:
        out.append(((count, widths[0]), jnp.float8_e4m3fn))
    run: Any = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(*kind) for kind in out],
        scratch_types=[plgpu.SMEM((plan.records + 1,), jnp.int32)],
        grid=(memories * plan.blocks,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=LoweringSemantics.Lane,
        ),
    )
    found = run(*(array.reshape(-1, array.shape[3]) for array in rows))
    # They come back as if they were equal on all shards of a mesh.
    _, weights, flags, *rest = _primitives.vary_alike(rows[0], *found)
    # As the forward kernel reads them: in this order a transposition costs a small call much.
    weights = jnp.swapaxes(weights.reshape(memories, heads, length), 1, 2)
    flags = flags.reshape(memories, plan.blocks)
    return weights, flags, *(x.reshape(rows[0].shape) for x in rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _weights(
    rows: tuple[jax.Array, ...], bound: float | None, narrow: bool
) -> tuple[jax.Array, ...]:
    return _run(rows, bound, narrow)


def _forward(rows, bound, narrow):
    found = _run(rows, bound, narrow)
    return found, (rows, found[0])


def _backward(bound, narrow, saved, cotangents):
    # Eight-bit keys have no gradient of their own: those of scores are of the rows they stand for.
    (*keys, value), weights = saved
    gradient = triton_records.value_gradient(value, weights, bound, cotangents[0])
    return ((*map(jnp.zeros_like, keys), gradient),)


_weights.defvjp(_forward, _backward)


def record_log_weights(
    key: jax.Array, value: jax.Array, bound: float | None
) -> tuple[jax.Array, jax.Array]:
    """As `triton_records.record_log_weights`, by a kernel of its own where that takes the call.

    The logarithm is the device's approximate one: weights are within 2⁻¹⁵ of those, which
    `reference.WEIGHT_ERROR` covers.
    """
    if not _takes((key, value), bound):
        return triton_records.record_log_weights(key, value, bound)
    found: Any = _weights((key, value), bound, False)
    return tuple(found)


def value_log_weights(value: jax.Array, bound: float | None) -> tuple[jax.Array, jax.Array] | None:
    """`record_log_weights` as if every key were finite, without reading keys.

    Args:
      value: as of `record_log_weights`.
      bound: likewise.

    Returns:
      The same, or None where the kernel does not take the values.
    """
    if not _takes((value,), bound):
        return None
    found: Any = _weights((value,), bound, False)
    return tuple(found)


def narrow_records(
    key: jax.Array, value: jax.Array, bound: float | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """`record_log_weights` and, of the same reading, `float8.rounded` keys: None if not made.

    Args:
      key: as of `record_log_weights`.
      value: likewise.
      bound: likewise.
    """
    if not _takes((key, value), bound) or key.shape[3] % 32:
        return *record_log_weights(key, value, bound), None
    found: Any = _weights((key, value), bound, True)
    return tuple(found)
