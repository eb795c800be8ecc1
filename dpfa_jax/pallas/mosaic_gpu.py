"""Private attention on NVIDIA Hopper GPUs: Pallas kernels through Mosaic GPU.

The same function as `reference`, with `triton`'s two kernels for the gradient.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu.core import LoweringSemantics
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax import _primitives
from dpfa_jax._typing import Operands, Spec
from dpfa_jax.pallas import mosaic_gpu_blocks as blocks
from dpfa_jax.pallas import mosaic_gpu_kernels as kernels
from dpfa_jax.pallas import triton
from dpfa_jax.pallas.mosaic_gpu_kernels import Plan

_PROGRAMS = 132


def _offsets(operands: Operands, spec: Spec, shift: int, block_k: int):
    """Masks of keys alone and record weights as exponents, (1 or B, K, S'), and what is left."""
    weights = operands.log_weights
    if operands.key_lengths is not None:
        seen = jnp.arange(operands.key.shape[1]) < operands.key_lengths[:, None, None]
        seen = jnp.swapaxes(seen, 1, 2)
        weights = jnp.where(seen, weights, -jnp.inf)
    offset = jnp.swapaxes(weights * kernels.LOG2_E + (shift - blocks.RANGE), 1, 2)
    group = operands.query.shape[2] // operands.key.shape[2]
    mask = operands.mask
    if mask is not None and mask.shape[2] == 1 and (mask.shape[1] == 1 or group == 1):
        offset = jnp.where(mask[:, :, 0, :], offset, -jnp.inf)
        mask = None
    widths = ((0, 0), (0, 0), (0, -offset.shape[2] % block_k))
    return operands._replace(mask=mask), jnp.pad(offset, widths, constant_values=-jnp.inf)


def _aligned(array):
    """Rows padded to a multiple of 8, columns to one of 16: what the copies into tiles need."""
    rows, columns = -array.shape[1] % 8, -array.shape[3] % 16
    if not rows and not columns:
        return array
    return jnp.pad(array, ((0, 0), (0, rows), (0, 0), (0, columns)))


def forward(operands: Operands, spec: Spec, **changes) -> tuple[jax.Array, tuple]:
    shift = 15 if operands.key.dtype == jnp.float16 else 0
    block_k = changes.pop("block_k", 128)
    operands, bias = _offsets(operands, spec, shift, block_k)
    query, key, value = (_aligned(x) for x in operands[:3])
    batch, heads, key_width = query.shape[0], *query.shape[2:]
    queries = operands.query.shape[1]
    plan = Plan(
        spec=spec,
        batch=batch,
        memories=key.shape[0],
        queries=queries,
        keys=operands.key.shape[1],
        heads=heads,
        group=heads // key.shape[2],
        key_width=key_width,
        value_width=value.shape[3],
        dtype=jnp.dtype(key.dtype),
        block_k=block_k,
        shift=shift,
        segments=operands.key_segments is not None,
        biases=bias.shape[0],
        **{"stages": 2, "programs": _PROGRAMS, "flush": 512 // block_k, **changes},
    )
    plan = dataclasses.replace(plan, programs=min(plan.programs, plan.tiles))
    inputs = {"query": query, "key": key, "value": value, "bias": bias}
    if plan.segments:
        widths = ((0, 0), (0, plan.query_blocks * plan.block_q - queries))
        inputs["query_segments"] = jnp.pad(operands.query_segments, widths)
        widths = ((0, 0), (0, plan.key_blocks * block_k - plan.keys))
        inputs["key_segments"] = jnp.pad(operands.key_segments, widths)
    if plan.noisy:
        inputs["noise_key"] = operands.noise_key
    out_shape = (*query.shape[:3], plan.value_width)
    rows = (batch, heads, plan.query_blocks * plan.block_q)
    bound = spec.ball if spec.ball is not None else spec.row_clip
    outputs = {"out": (out_shape, query.dtype), "mass": (rows, jnp.float32)}
    if bound is not None:
        outputs["factor"] = (rows, jnp.float32)
    if spec.noise == "rows":
        outputs["clean"] = (out_shape, query.dtype)
    if plan.keeps:
        outputs["sums"] = ((plan.programs, 2, 64 * plan.value_width), jnp.float32)
    arrays = _primitives.vary_alike(*inputs.values())
    body = partial(kernels.forward_kernel, plan, (*inputs, *outputs))

    def dpfa_mosaic_forward(*refs, **shared):
        body(*refs, **shared)

    found = plgpu.kernel(
        dpfa_mosaic_forward,
        out_type=[triton._shape(*kind, like=arrays[0]) for kind in outputs.values()],
        scratch_types=kernels.scratch(plan),
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=3 + plan.noisy,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=LoweringSemantics.Lane,
        ),
    )(*arrays)
    found = dict(zip(outputs, found, strict=True))
    out, clean = found["out"], found.get("clean", found["out"])
    width = operands.value.shape[3]
    out, clean = out[:, :queries, :, :width], clean[:, :queries, :, :width]
    mass = found["mass"][:, :, :queries]
    factor = found["factor"][:, :, :queries] if bound is not None else jnp.ones_like(mass)
    return out, (clean, mass, factor, None)
