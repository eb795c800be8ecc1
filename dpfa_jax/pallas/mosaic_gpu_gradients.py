"""Gradients on NVIDIA Hopper GPUs: one kernel with five matrix products.

Scores and weights are made anew from the public reference. The gradients of keys, values and
log-weights stay in one block of the grid; those of the queries are summed in float32 over the
blocks by the copy engine, in the order in which they come.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.core import LoweringSemantics
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax import _primitives, float8
from dpfa_jax._typing import Operands, Spec
from dpfa_jax.pallas import mosaic_gpu_gradient_blocks as steps
from dpfa_jax.pallas import mosaic_gpu_gradient_kernels as kernels
from dpfa_jax.pallas import triton
from dpfa_jax.pallas.mosaic_gpu_gradient_kernels import BLOCK_K, Plan


def _width(operands: Operands) -> int:
    return max(operands.query.shape[3], operands.value.shape[3])


def lacking(operands: Operands, spec: Spec) -> str | None:
    """Why these gradients have no kernel here, though Triton has two; or None.

    Args:
      operands: the call's arrays, or their shapes.
      spec: the static description.
    """
    if _width(operands) > 128:
        return "rows wider than 128 leave no room for the sums"
    if operands.query_segments is not None or spec.window is not None:
        return "windows and segments have no kernel"
    if operands.key_offset is not None:
        return "keys that are part of a longer memory have no kernel"
    mask = operands.mask
    group = operands.query.shape[2] // operands.key.shape[2]
    if mask is not None and (mask.shape[2] != 1 or (mask.shape[1] != 1 and group != 1)):
        return "masks by query have no kernel"
    if operands.key.shape[0] != operands.query.shape[0]:
        return "the gradients of a shared memory are summed in float32"
    return None


def faster(queries: int, keys: int, width: int) -> bool:
    """Whether the kernel is faster than Triton's two, on an H200.

    Args:
      queries: T.
      keys: S.
      width: of the rows. Copies padded to 64 or 128 columns pay from 2048 keys on (reckoned; at 256
        keys of width 80 the call took 1.4 times as long, without copies at 512 0.9 times).
    """
    return min(queries, keys) >= (512 if width in (64, 128) else 2048)


def _padded(array, width: int):
    """Rows padded to a multiple of 8, which is what the copies into tiles need; columns to one."""
    widths = ((0, 0), (0, -array.shape[1] % 8), (0, 0), (0, width - array.shape[3]))
    return jnp.pad(array, widths) if any(after for _, after in widths) else array


def _launch(plan: Plan, inputs: dict) -> tuple:
    """Runs the kernel: d query (float32), d key, d value, d log-weights.

    Under `vmap` the examples join the batch.
    """

    @jax.custom_batching.custom_vmap
    def run(*arrays):
        return _run(plan, dict(zip(inputs, arrays, strict=True)))

    @run.def_vmap
    def _(size, batched, *arrays):
        folded, offsets = {}, plan.offsets
        for (name, array), own in zip(zip(inputs, arrays, strict=True), batched, strict=True):
            if name == "offsets":
                if not own and offsets == 1:
                    folded[name] = array
                    continue
                shape = array.shape[own:]
                array = jnp.broadcast_to(array, (size, plan.batch, *shape[1:]))
                offsets = size * plan.batch
            elif not own:
                array = jnp.broadcast_to(array, (size, *array.shape))
            folded[name] = array.reshape(-1, *array.shape[2:])
        wider = dataclasses.replace(plan, batch=size * plan.batch, offsets=offsets)
        found = _launch(wider, folded)
        found = tuple(x.reshape(size, plan.batch, *x.shape[1:]) for x in found)
        return found, (True,) * len(found)

    return run(*inputs.values())


def _run(plan: Plan, inputs: dict) -> tuple:
    inputs = dict(zip(inputs, _primitives.vary_alike(*inputs.values()), strict=True))
    names = (*inputs, "sums", "d_key", "d_value", "d_bias")
    key = inputs["key"]

    def body(*refs):
        def kernel(**shared):
            kernels.gradient_kernel(plan, names, *refs, **shared)

        pl.run_scoped(kernel, collective_axes="warpgroup", **kernels.scratch(plan))

    def output(shape, dtype):
        manual = jax.typeof(key).manual_axis_type
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=manual)

    padded = plan.key_blocks * BLOCK_K
    outputs = [
        output(key.shape, key.dtype),
        output(key.shape, key.dtype),
        output((plan.batch, plan.heads // plan.group, padded), jnp.float32),
    ]
    sums = jax.new_ref(jnp.zeros(plan.sums, jnp.float32))
    name = "dpfa_mosaic_gradient_kernel" + "_repair" * plan.repairs
    run: Any = pl.kernel(
        body,
        out_type=outputs,
        mesh=plgpu.Mesh(
            grid=(plan.programs,),
            grid_names=("program",),
            num_threads=3,
            thread_name="warpgroup",
        ),
        name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=LoweringSemantics.Lane,
        ),
    )
    found = run(*inputs.values(), sums)
    # Inside `shard_map` a ref cannot be marked as different on every shard, what it holds can.
    held, _ = _primitives.vary_alike(jax.freeze(sums), key)
    return steps.in_order(held, plan.block_q, plan.width) * plan.spec.scale, *found


def backward(operands: Operands, spec: Spec, residuals: tuple, cotangent: jax.Array) -> tuple:
    """Gradients of the answer in query, key, value and log_weights, the noise held fixed.

    Not a release. By Triton's kernels where `spec.deterministic` asks for the same bits on every
    run, where `lacking` has a reason, and for lengths at which they are faster; else by `fused`.

    Args:
      operands: as in `forward`.
      spec: as in `forward`.
      residuals: what `forward` returned.
      cotangent: (B, T, N, h).

    Returns:
      (d query, d key, d value, d log_weights, None) in the operands' shapes, in the operands' dtype
      where a kernel writes the whole sum, else in float32.
    """
    residuals, judged = residuals[:4], residuals[4:]
    if judged:
        operands = operands._replace(log_weights=judged[0], flags=judged[1])
    if spec.float8_scores:
        rows = float8.through(operands.query), float8.through(operands.key)
        operands = operands._replace(query=rows[0], key=rows[1])
    lengths = operands.query.shape[1], operands.key.shape[1]
    slower = lacking(operands, spec) is not None or not faster(*lengths, _width(operands))
    run = triton.backward if spec.deterministic or slower else fused
    return run(operands, spec, residuals, cotangent)


def fused(operands: Operands, spec: Spec, residuals: tuple, cotangent: jax.Array) -> tuple:
    """Gradients by the kernel of this module, whose sums of d query have no fixed order.

    Args:
      operands: as in `forward`, of which `lacking` says None.
      spec: as in `forward`.
      residuals: what `forward` returned.
      cotangent: (B, T, N, h).

    Returns:
      (d query, d key, d value, d log_weights, None) in the operands' shapes and dtypes.
    """
    if operands.flags is None:
        return _backward(operands, spec, residuals, cotangent)
    factor = residuals[2]
    lost = jnp.any(operands.flags != 0) | jnp.any(factor <= 0)

    def repaired(operands):
        found = _backward(operands, spec, residuals, cotangent, repairs=True)
        d_query, *others = found[:4]
        known = jnp.swapaxes(factor, 1, 2)[..., None] > 0
        return jnp.where(known, d_query, 0.0).astype(d_query.dtype), *others

    def plain(operands):
        return _backward(operands, spec, residuals, cotangent)[:4]

    return *lax.cond(lost, repaired, plain, operands), None


def _backward(
    operands: Operands,
    spec: Spec,
    residuals: tuple,
    cotangent: jax.Array,
    *,
    repairs: bool = False,
) -> tuple:
    given = operands
    operands, bias = triton.fold_masks(operands, spec)
    clean, mass, factor, best = residuals
    d_ratio, inverse, delta = triton.gradient_coefficients(spec, clean, mass, factor, cotangent)
    rows = {"delta": delta, "inverse": inverse}
    if given.key.dtype != jnp.float16:
        # The cotangents carry the division, which could overflow in float16.
        d_ratio = d_ratio * jnp.swapaxes(inverse, 1, 2)[..., None]
        rows = {"delta": delta * inverse}
    if spec.score_cap is None:
        rows["best"] = best
    batch, queries, heads, _ = given.query.shape
    keys, kv_heads = given.key.shape[1:3]
    width = 64 if _width(given) <= 64 else 128
    plan = Plan(
        spec=spec,
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        group=heads // kv_heads,
        width=width,
        dtype=jnp.dtype(given.key.dtype),
        offsets=bias.shape[0],
        rows=tuple(rows),
        repairs=repairs,
        block_q=128 if width == 64 else 64,
    )
    tail = ((0, 0), (0, 0), (0, plan.query_blocks * plan.block_q - queries))
    # A query that is not there has no weights.
    padded = [jnp.pad(x, tail, constant_values=3e38 * (n == "best")) for n, x in rows.items()]
    tail = ((0, 0), (0, 0), (0, -keys % BLOCK_K))
    inputs = {
        "query": _padded(given.query, width),
        "key": _padded(given.key, width),
        "value": _padded(triton.towards_zero(given.value, plan.dtype), width),
        "cotangent": _padded(d_ratio.astype(plan.dtype), width),
        "offsets": jnp.pad(bias, tail, constant_values=-jnp.inf),
        "rows": jnp.stack(padded, axis=2),
    }
    d_query, d_key, d_value, d_bias = _launch(plan, inputs)
    d_query = d_query[:, :queries, :, : given.query.shape[3]].astype(given.query.dtype)
    d_key = d_key[:, :keys, :, : given.key.shape[3]]
    d_value = d_value[:, :keys, :, : given.value.shape[3]]
    return d_query, d_key, d_value, jnp.swapaxes(d_bias[:, :, :keys], 1, 2), None
