"""Private attention on NVIDIA Hopper GPUs: Pallas kernels through Mosaic GPU.

The same function as `reference`; gradients in `mosaic_gpu_gradients`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu.core import LoweringSemantics
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax import _primitives, float8
from dpfa_jax._typing import Operands, Spec
from dpfa_jax.doubleword import two_sum
from dpfa_jax.pallas import mosaic_gpu_columns as columns
from dpfa_jax.pallas import mosaic_gpu_kernels as kernels
from dpfa_jax.pallas import triton
from dpfa_jax.pallas.accumulators import GROUP_KEYS, LONGEST
from dpfa_jax.pallas.accumulators import rounding as rounding
from dpfa_jax.pallas.mosaic_gpu_gradients import backward as backward
from dpfa_jax.pallas.mosaic_gpu_memory import buffers, scratch
from dpfa_jax.pallas.mosaic_gpu_plan import LOG2_E, Plan, Shape
from dpfa_jax.pallas.mosaic_gpu_records import narrow_records as narrow_records
from dpfa_jax.pallas.mosaic_gpu_records import record_log_weights as record_log_weights
from dpfa_jax.pallas.mosaic_gpu_records import value_log_weights as value_log_weights
from dpfa_jax.pallas.triton import finish as finish

READS_ANY_ROWS = True
"""Rows that are not finite are left out, given `record_log_weights` or, where `Spec.judge_keys`,
`value_log_weights`: a call with such rows is answered again, by a kernel that clears them in shared
memory."""

FLOAT8_SCORES = True
"""Rows of query and key are rounded to float8_e4m3fn here, where the call asks for it."""

_FASTER_FROM = 256  # keys

_SHORT = 2048
"""Keys up to which causal rows are so short that balance matters more than the cache."""

_PROGRAMS = 132
"""Multiprocessors of an H100 or H200; on fewer, blocks of the grid wait their turn."""


def supports(operands: Operands, spec: Spec) -> str | None:
    """Why this backend cannot take the call, or None.

    Args:
      operands: the call's arrays, or their shapes.
      spec: the static description, of which the noise need not be set yet.
    """
    if not _has_hopper():
        return "it needs a GPU of compute capability 9.0 and is not interpreted elsewhere"
    return triton.supports(operands, spec) or lacking(operands, spec)


def lacking(operands: Operands, spec: Spec) -> str | None:
    """What there is no kernel for on any device, though Triton has one; or None."""
    query, key, value, mask = operands.query, operands.key, operands.value, operands.mask
    if query.dtype not in (jnp.bfloat16, jnp.float16) or value.dtype != key.dtype:
        return f"rows must be bfloat16 or float16, got {query.dtype} and values {value.dtype}"
    if mask is not None:
        group = query.shape[2] // key.shape[2]
        if mask.shape[2] != 1 or (mask.shape[1] != 1 and group != 1):
            return f"masks by query have no kernel, got {mask.shape}"
    if operands.key_offset is not None:
        return "keys at positions of a longer memory have no kernel"
    if spec.score_cap is not None and key.shape[1] > LONGEST:
        return f"sums over more than {LONGEST} keys round by more than is charged"
    return None


def preferred(keys: int) -> bool:
    """Whether these kernels run on the default device, and faster than Triton's.

    Args:
      keys: rows of one memory. On an H200 (experiments/attention_speed.py) these were faster at
        256 of them, the fewest that were measured, and at all more.
    """
    return _has_hopper() and keys >= _FASTER_FROM


def _has_hopper() -> bool:
    if jax.default_backend() != "gpu":
        return False
    return getattr(jax.devices()[0], "compute_capability", "") == "9.0"


def _offsets(operands: Operands, spec: Spec, shift: int, block_k: int):
    """Masks of keys alone, record weights and the cap as exponents, (1 or B, K, S'), and the rest.

    S' is S rounded up to whole tiles, whose last keys weigh nothing.
    """
    weights = operands.log_weights
    if operands.key_lengths is not None:
        seen = jnp.arange(operands.key.shape[1]) < operands.key_lengths[:, None, None]
        seen = jnp.swapaxes(seen, 1, 2)
        weights = jnp.where(seen, weights, -jnp.inf)
    if spec.score_cap is None:
        shift = 0
    level = jnp.swapaxes(weights * LOG2_E + shift, 1, 2)
    group = operands.query.shape[2] // operands.key.shape[2]
    mask = operands.mask
    if mask is not None and mask.shape[2] == 1 and (mask.shape[1] == 1 or group == 1):
        level = jnp.where(mask[:, :, 0, :], level, -jnp.inf)
        mask = None
    if spec.score_cap is not None:
        level = level - spec.score_cap * LOG2_E
    widths = ((0, 0), (0, 0), (0, -level.shape[2] % block_k))
    return operands._replace(mask=mask), jnp.pad(level, widths, constant_values=-jnp.inf)


def _aligned(array, width: int | None = None):
    """Rows padded to a multiple of 8, columns to 32 bytes or `width`: what copies to tiles need."""
    rows = -array.shape[1] % 8
    columns = -array.shape[3] % (32 // array.dtype.itemsize)
    if width is not None:
        columns = width - array.shape[3]
    if not rows and not columns:
        return array
    return jnp.pad(array, ((0, 0), (0, rows), (0, 0), (0, columns)))


def cut(operands: Operands, spec: Spec, *, summed: bool = False) -> Shape:
    """How the forward kernel is cut: what was fastest on an H100 or H200, or fits.

    Args:
      operands: the call's arrays, or their shapes.
      spec: the static description.
      summed: whether the sums go out as they are.
    """
    width = max(operands.query.shape[3], operands.value.shape[3])
    keys = operands.key.shape[1]
    masked = spec.window is not None or operands.key_segments is not None
    whole = spec.window is None and not spec.is_causal
    # All blocks read the keys of as few heads as there can be, at the same time, which costs the
    # cache least. Where queries see more keys or fewer, few heads leave them more unequal work.
    near = 0 if whole else 24 << 20
    if spec.is_causal and spec.window is None and keys > _SHORT:
        near = 8 << 20
    shape = Shape(nearby=near, turns=whole and spec.score_cap is None, shares=True)

    def but(**changes) -> Shape:
        return dataclasses.replace(shape, **changes)

    if width > 128:
        registers = (240, 24, 24) if spec.noise == "none" else (224, 24, 40)
        return but(block_k=64, flush=8, slots=1, registers=registers, turns=False)
    if spec.noise == "none":
        shape = but(registers=(240, 24, 24))
        if not summed or keys <= GROUP_KEYS or width <= 64:
            return shape
        # As below: the sums are those that noise would be added to.
        return but(block_k=64, flush=8, stages=3) if masked else but(block_k=96, flush=5, early=40)
    if width <= 64 and masked:
        return but(block_k=64, flush=8, stages=3, noise="shared", slots=1)
    if spec.noise == "sums" and keys > GROUP_KEYS and width > 64:
        # Two accumulators leave no room for 128 keys.
        shape = but(noise="shared", slots=1, registers=(224, 24, 40))
        if masked or (spec.is_causal and keys <= _SHORT and not spec.float8_scores):
            return but(block_k=64, flush=8, stages=3, early=32 if masked else None)
        return but(block_k=96, flush=5, early=40)
    if width <= 64:
        # In turns more than two tiles of keys were not measured; of short calls two are faster.
        stages = 2 if shape.turns or keys <= GROUP_KEYS else 3
        return but(stages=stages, noise="shared", slots=2 if keys <= GROUP_KEYS else 1)
    if spec.noise == "sums" and width <= 80:
        # Their noise takes longer than their sums: of the last columns a block of words serves few.
        return but(noise="shared", drawing=2, registers=(184, 24, 40))
    return but(noise="shared" if width <= 80 else "global")


def _plan(
    operands: Operands, spec: Spec, shape: Shape, *, converts: bool = False, summed: bool = False
) -> tuple[Plan, dict]:
    """What is static, and the arrays that a kernel reads, by name; it may round queries itself."""
    shift = 15 if operands.key.dtype == jnp.float16 else 0
    operands, offsets = _offsets(operands, spec, shift, shape.block_k)
    query, key, value = operands[:3]
    dtype = jnp.dtype(key.dtype)
    # Rows that were scaled to a bound come in float32.
    value = triton.towards_zero(value, dtype)
    converts = converts and spec.float8_scores
    if spec.float8_scores:
        query = query if converts else float8.rounded(query)
        key = float8.rounded(key) if operands.narrow_key is None else operands.narrow_key
    key, value = _aligned(key), _aligned(value)
    query = _aligned(query, key.shape[3])
    batch, heads, key_width = query.shape[0], *query.shape[2:]
    plan = Plan(
        spec=spec,
        shape=shape,
        batch=batch,
        memories=key.shape[0],
        queries=operands.query.shape[1],
        keys=operands.key.shape[1],
        heads=heads,
        group=heads // key.shape[2],
        key_width=key_width,
        value_width=value.shape[3],
        dtype=dtype,
        programs=_PROGRAMS,
        shift=shift,
        segments=operands.key_segments is not None,
        offsets=offsets.shape[0],
        key_dtype=jnp.dtype(key.dtype),
        converts=converts,
        marks=spec.mark_queries and operands.flags is not None and not summed,
        sums=summed,
        moved=operands.noise_row is not None,
    )
    if plan.dealt() is None:
        plan = dataclasses.replace(plan, programs=min(plan.programs, plan.tiles))
    else:
        plan = dataclasses.replace(plan, splits=True)
    inputs = {"query": query, "key": key, "value": value, "offsets": offsets}
    if plan.segments:
        widths = ((0, 0), (0, plan.query_blocks * plan.block_q - plan.queries))
        inputs["query_segments"] = jnp.pad(operands.query_segments, widths)
        widths = ((0, 0), (0, plan.key_blocks * shape.block_k - plan.keys))
        inputs["key_segments"] = jnp.pad(operands.key_segments, widths)
    return plan, inputs


def _run(body, plan: Plan, inputs: dict, outputs: dict, scratch: dict, programs: int, threads: int):
    """Runs a kernel: outputs by name, from their shapes and dtypes."""
    arrays = _primitives.vary_alike(*inputs.values())
    names = (*inputs, *outputs)

    def kernel(*refs, **shared):
        body(plan, names, *refs, **shared)

    kernel.__name__ = f"dpfa_mosaic_{body.__name__}" + "_repair" * plan.repairs
    found = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(*kind) for kind in outputs.values()],
        scratch_types=scratch,
        grid=(programs,),
        grid_names=("program",),
        num_threads=threads,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=LoweringSemantics.Lane,
        ),
    )(*arrays)
    # They come back as if they were equal on all shards, which would then be one release.
    _, *found = _primitives.vary_alike(arrays[0], *found)
    return dict(zip(outputs, found, strict=True))


def _launch(plan: Plan, inputs: dict, outputs: dict) -> dict:
    """Runs the forward kernel: outputs by name, and whether `bad_keys` were found if it judges."""
    if not plan.splits:
        return _launched(plan, inputs, outputs)

    @jax.custom_batching.custom_vmap
    def run(inputs):
        return _launched(plan, inputs, outputs)

    @run.def_vmap
    def batched(size, is_batched, inputs):
        # Examples of a batch would count in the same counters.
        whole = dataclasses.replace(plan, splits=False, programs=min(plan.programs, plan.tiles))
        axes = tuple(jax.tree.map(lambda batched: 0 if batched else None, is_batched))
        each = jax.vmap(lambda inputs: _launched(whole, inputs, outputs), axes, axis_size=size)
        found = each(inputs)
        return found, jax.tree.map(lambda _: True, found)

    return run(inputs)


def _launched(plan: Plan, inputs: dict, outputs: dict) -> dict:
    inputs, names = dict(inputs), list(outputs)
    if plan.scheduled:
        inputs["schedule"] = jnp.asarray(plan.schedule())
    if plan.splits:
        inputs["shares"] = jnp.asarray(plan.dealt())
    if plan.judges:
        outputs = {**outputs, "bad_keys": ((plan.programs, 4), jnp.int32)}
    outputs = outputs | {name: (size, jnp.float32) for name, size in buffers(plan).items()}
    threads = plan.shape.compute + 1 + plan.noisy * plan.shape.drawing
    memory = scratch(plan)
    found = _run(kernels.forward_kernel, plan, inputs, outputs, memory, plan.programs, threads)
    kept = {name: found[name] for name in names}
    if plan.judges:
        kept["bad_keys"] = jnp.any(found["bad_keys"] != 0)
    return kept


def forward(
    operands: Operands, spec: Spec, *, shape: Shape | None = None
) -> tuple[jax.Array, tuple]:
    """The answer (B, T, N, h) in the query's dtype, and the residuals that `backward` wants.

    Args:
      operands: the call's arrays; `noise_key` is needed unless `spec.noise` is "none".
      spec: the static description.
      shape: how to cut the kernel, by default from the width.

    Returns:
      The answer, the noise added in float32 before the cast; and the clean answer, denominators,
      factors of the projection, running maxima and, where `spec.judge_keys`, `log_weights` and
      `flags` with what was found in the keys.
    """
    shape = cut(operands, spec) if shape is None else shape
    if operands.flags is None:
        return _forward(operands, spec, shape)[:2]
    out, residuals, found = _forward(operands, spec, shape)
    # The kernel that judges keys reports the flags as well.
    lost = jnp.any(operands.flags != 0) if found is None else found
    known = None if spec.mark_queries else _known(operands)

    # The clean answer is the answer but for "rows": what comes twice would be copied.
    apart = spec.noise == "rows"

    def repair(weights):
        # The same sums in the same order: a record that is not finite changes no other's.
        if found is not None:
            whole = jnp.all(jnp.isfinite(operands.key), axis=(2, 3))
            weights = jnp.where(whole[..., None], weights, -jnp.inf)
        given = operands._replace(log_weights=weights)
        out, (clean, mass, factor, best), _ = _forward(given, spec, shape, repairs=True)
        if known is not None:
            # As in the Triton kernels: gradients know such queries by this sign.
            factor = jnp.where(known, factor, -factor)
        return out, clean if apart else None, (mass, factor, best), weights

    clean, *rows = residuals
    first = out, clean if apart else None, tuple(rows), operands.log_weights
    if known is not None:
        lost |= ~jnp.all(known)
    repaired = _again(lost, first, lambda carried: repair(carried[3]), operands)
    out, clean, rows, weights = repaired
    residuals = clean if apart else out, *rows
    if found is not None:
        residuals += (weights, lost.astype(jnp.int32).reshape(1, 1))
    return out, residuals


def _known(operands: Operands) -> jax.Array:
    """Queries that are finite: (B, N, T)."""
    return jnp.swapaxes(jnp.all(jnp.isfinite(operands.query), axis=-1), 1, 2)


def _again(lost: jax.Array, found: Any, repair: Any, operands: Operands) -> Any:
    """What was found, or what `repair` makes of it where something is lost."""

    def carry(lost, found):
        leaves, tree = jax.tree.flatten((lost, found))
        return tree.unflatten(_primitives.vary_alike(*leaves, *operands)[: len(leaves)])

    # A loop of one turn or none: what it carries stays in place, a branch would copy all of it.
    def turn(carried):
        return carry(jnp.bool_(False), repair(carried[1]))

    return lax.while_loop(lambda carried: carried[0], turn, carry(lost, found))[1]


def sums(operands: Operands, spec: Spec, *, shape: Shape | None = None) -> tuple[tuple, tuple]:
    """N = Σ_j w_ij v_j and D = Σ_j w_ij against a public reference, as `forward` has them.

    Not a release: they have no noise and never leave the trusted side.

    Args:
      operands: the call's arrays; a query that is not finite counts as a row of zeros.
      spec: scale, cap and masks; its noise is not used.
      shape: how to cut the kernel, by default from the width.

    Returns:
      ((N, zeros), (D high, D low)), float32 of shapes (B, T, N, h) and (B, T, N).
    """
    spec = dataclasses.replace(spec, noise="none")
    shape = cut(operands, spec, summed=True) if shape is None else shape
    found = _sums(operands, spec, shape)
    if operands.flags is not None:
        lost = jnp.any(operands.flags != 0) | ~jnp.all(_known(operands))

        def repair(_):
            return _sums(operands, spec, shape, repairs=True)

        found = _again(lost, found, repair, operands)
    numerator, *rows = found
    high, low = (jnp.swapaxes(x, 1, 2) for x in rows)
    # Four threads' words were added up: the low one may be longer than a double word's.
    return (numerator, jnp.zeros_like(numerator)), two_sum(high, low)


def _sums(operands: Operands, spec: Spec, shape: Shape, *, repairs: bool = False) -> tuple:
    """The numerators (B, T, N, h), and both words of the denominators (B, N, T)."""
    converts = operands.flags is not None
    plan, inputs = _plan(operands, spec, shape, converts=converts, summed=True)
    plan = dataclasses.replace(plan, repairs=repairs)
    rows = (plan.batch, plan.heads, plan.query_blocks * plan.block_q)
    answer = (*inputs["query"].shape[:3], plan.value_width)
    outputs = {"out": answer, "mass": rows, "mass_low": rows}
    found = _launch(plan, inputs, {name: (size, jnp.float32) for name, size in outputs.items()})
    numerator = found["out"][:, : plan.queries, :, : operands.value.shape[3]]
    return numerator, *(found[name][:, :, : plan.queries] for name in ("mass", "mass_low"))


def _forward(
    operands: Operands, spec: Spec, shape: Shape, *, repairs: bool = False
) -> tuple[jax.Array, tuple, jax.Array | None]:
    """The answer, residuals, and whether a record is not finite, where the kernel judges keys."""
    # Without flags contributions may be clipped by `column_squares`, whose scores have to be these
    # bit for bit: both then get queries that were rounded once, outside.
    plan, inputs = _plan(operands, spec, shape, converts=operands.flags is not None)
    # Whoever repairs knows of the keys.
    flags = operands.flags if spec.judge_keys and not repairs else None
    plan = dataclasses.replace(plan, repairs=repairs, judges=flags is not None)
    if plan.noisy:
        inputs["noise_key"] = operands.noise_key
        if plan.moved:
            inputs["noise_row"] = jnp.reshape(operands.noise_row, (1,)).astype(jnp.int32)
    rows = (plan.batch, plan.heads, plan.query_blocks * plan.block_q)
    bound = spec.ball if spec.ball is not None else spec.row_clip
    answer = (*inputs["query"].shape[:3], plan.value_width)
    outputs: dict = {"out": (answer, operands.query.dtype), "mass": (rows, jnp.float32)}
    if bound is not None or plan.marks:
        outputs["factor"] = (rows, jnp.float32)
    if plan.online:
        outputs["best"] = (rows, jnp.float32)
    if spec.noise == "rows":
        outputs["clean"] = outputs["out"]
    if flags is not None:
        inputs["flags"] = flags.reshape(-1)
    found = _launch(plan, inputs, outputs)
    queries, width = plan.queries, operands.value.shape[3]
    out, clean = (
        found[name][:, :queries, :, :width]
        for name in ("out", "clean" if "clean" in found else "out")
    )
    mass, factor, best = (
        found[name][:, :, :queries] if name in found else None
        for name in ("mass", "factor", "best")
    )
    factor = jnp.ones((plan.batch, plan.heads, queries)) if factor is None else factor
    return out, (clean, mass, factor, best), found.get("bad_keys")


def column_squares(operands: Operands, spec: Spec) -> jax.Array:
    """Σ_i w_ij² over the queries and heads that read key j: (B, S, K) float32.

    With the scores of `forward`, bit for bit: a weight that were larger there than here would
    exceed the norm that a record's contribution is clipped to.
    """
    plan, inputs = _plan(operands, spec, Shape())
    # Weights of float16 are raised in `forward` only.
    inputs["offsets"] = inputs["offsets"] - plan.shift
    del inputs["value"]
    kv_heads = plan.heads // plan.group
    padded = plan.key_blocks * plan.shape.block_k
    outputs = {"squares": ((plan.batch, kv_heads, 8, padded), jnp.float32)}
    programs = plan.key_blocks * kv_heads * plan.batch
    memory = columns.column_scratch(plan)
    found = _run(columns.column_kernel, plan, inputs, outputs, memory, programs, 2)
    squares = jnp.sum(found["squares"], axis=2)[:, :, : plan.keys]
    return jnp.swapaxes(squares, 1, 2)
