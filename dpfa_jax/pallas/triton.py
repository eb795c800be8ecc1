"""Private attention on NVIDIA GPUs from compute capability 8.0 on: Pallas kernels through Triton.

The same function as `reference`, one kernel forward and two backward: weights against a public
reference, sums of rounded weights, noise drawn inside the kernel from `random`'s blocks, ratio and
projection. Nothing of size T×S, no noise array and no clipped copy is held. Lowered for a CPU the
kernels are interpreted: right and very slow, for tests.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from dpfa_jax._typing import Operands, Spec
from dpfa_jax.clipping.rows import log_row_weights
from dpfa_jax.pallas import blocks, tiling, triton_calls, triton_gradients, triton_kernels
from dpfa_jax.pallas.tiling import rounding as rounding
from dpfa_jax.pallas.triton_kernels import Plan
from dpfa_jax.pallas.triton_records import record_log_weights as record_log_weights

READS_ANY_ROWS = True
"""Rows that are not finite are left out inside the kernels, given `record_log_weights`."""

_WIDEST = 256
_LARGEST_CAP = 1000.0
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def supports(operands: Operands, spec: Spec) -> str | None:
    """Why this backend cannot take the call, or None.

    Args:
      operands: the call's arrays, or their shapes.
      spec: the static description.
    """
    query, key, value = operands.query, operands.key, operands.value
    if key.shape[1] < 1:
        return "the key axis is empty"
    if max(query.shape[3], value.shape[3]) > _WIDEST:
        return (
            f"rows wider than {_WIDEST} do not fit its tiles, got {query.shape} and {value.shape}"
        )
    if query.dtype != key.dtype or query.dtype not in _DTYPES:
        return f"query and key must have one dtype, got {query.dtype} and {key.dtype}"
    if value.dtype not in (key.dtype, jnp.float32):
        return f"values in {value.dtype} beside keys in {key.dtype} have no kernel"
    if not spec.scale > 0:
        return f"the scale of the scores must be positive, got {spec.scale}"
    if spec.score_cap is not None and abs(spec.score_cap) > _LARGEST_CAP:
        return f"weights against a reference beyond ±{_LARGEST_CAP} round by more than is charged"
    if spec.score_low is not None:
        return "scores bounded from below (SoftmaxNoise) have no kernel"
    if operands.query_reference is not None:
        return "references per query have no kernel"
    if max(math.prod(array.shape) for array in (query, key, value)) >= 1 << 31:
        return "an array of 2**31 numbers or more needs 64-bit offsets"
    return None


def _capability() -> int:
    """Compute capability of the device that is lowered for, 90 for Hopper; 80 if it is unknown."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if abstract is None else abstract.platform
    if platform != "gpu":
        return 80
    return int(plgpu.get_gpu_info().compute_capability)


def preferred(keys: int) -> bool:
    """Whether the default device is an NVIDIA GPU that these kernels run on.

    Args:
      keys: rows of one memory; any number.
    """
    del keys
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    # ROCm devices name an architecture here.
    return capability.replace(".", "").isdigit() and float(capability) >= 8.0


def _plan(operands: Operands, spec: Spec, pick: Callable, tile: Any) -> Plan:
    query, key, value = operands.query, operands.key, operands.value
    widest = max(tiling.padded(query.shape[3]), tiling.padded(value.shape[3]))
    if tile is None:
        tile = pick(
            capability=_capability(),
            width=widest,
            item_bytes=key.dtype.itemsize,
            causal=spec.is_causal,
            keys=key.shape[1],
        )
    return Plan(
        spec=spec,
        tile=tile,
        queries=query.shape[1],
        keys=key.shape[1],
        group=query.shape[2] // key.shape[2],
        heads=query.shape[2],
        key_width=query.shape[3],
        value_width=value.shape[3],
        dtype=key.dtype,
        mask=None if operands.mask is None else operands.mask.shape,
        segments=operands.key_segments is not None,
        fast=True,
        offset=operands.key_offset is not None and (spec.is_causal or spec.window is not None),
        moved=operands.noise_row is not None,
        hopper=_capability() >= 90,
    )


def fold_masks(operands: Operands, spec: Spec, shift: int = 0) -> tuple[Operands, jax.Array]:
    """Masks of keys alone and the reference become weights, in units of ln 2.

    Returns:
      Operands without those masks, and what is added to the scores, (1 or B, K, S).
    """
    constant = 0.0 if spec.score_cap is None else shift - spec.score_cap * blocks.LOG2_E
    bias = jnp.swapaxes(operands.log_weights * blocks.LOG2_E + constant, 1, 2)
    keys, group = operands.key.shape[1], operands.query.shape[2] // operands.key.shape[2]
    mask = operands.mask
    if operands.key_lengths is not None:
        first = 0 if operands.key_offset is None else operands.key_offset
        seen = first + jnp.arange(keys) < operands.key_lengths[:, None, None]
        bias = jnp.where(seen, bias, -jnp.inf)
    if mask is not None and mask.shape[2] == 1 and (mask.shape[1] == 1 or group == 1):
        bias = jnp.where(mask[:, :, 0, :], bias, -jnp.inf)
        mask = None
    return operands._replace(mask=mask, key_lengths=None), bias


def towards_zero(rows: jax.Array, dtype: Any) -> jax.Array:
    """The rows in a narrower dtype, no number larger than it was: a bound on their norm holds.

    Args:
      rows: any array of floating numbers.
      dtype: as wide or narrower.
    """
    if rows.dtype == dtype:
        return rows
    rounded = rows.astype(dtype)
    above = jnp.abs(rounded.astype(rows.dtype)) > jnp.abs(rows)
    return jnp.where(above, lax.nextafter(rounded, jnp.zeros_like(rounded)), rounded)


def _arguments(
    plan: Plan, operands: Operands, bias: jax.Array, by_key: bool
) -> list[triton_calls.Argument]:
    """The inputs that every kernel has, as blocks of queries or of keys."""
    tile, group = plan.tile, plan.group
    memories = operands.key.shape[0]
    bias = triton_calls.pad(bias, 2, tile.block_k, -jnp.inf)
    padded_keys = triton_calls.round_up(plan.keys, tile.block_k)
    padded_queries = triton_calls.round_up(plan.queries, tile.block_q)
    key_pad, value_pad = tiling.padded(plan.key_width), tiling.padded(plan.value_width)
    value = towards_zero(operands.value, plan.dtype)

    def kv_head(head):
        return head if by_key else lax.div(head, jnp.int32(group))

    def memory(batch):
        return triton_calls.shared(memories, batch)

    keys = tile.block_k if by_key else padded_keys
    found = [
        triton_calls.Argument(
            "query",
            operands.query,
            (None, padded_queries, group, key_pad)
            if by_key
            else (None, tile.block_q, None, key_pad),
            (lambda i, h, b: (b, 0, h, 0)) if by_key else (lambda i, h, b: (b, i, h, 0)),
            cut=None if by_key else 1,
        ),
        triton_calls.Argument(
            "key",
            operands.key,
            (None, keys, None, key_pad),
            lambda i, h, b: (memory(b), i if by_key else 0, kv_head(h), 0),
            cut=1 if by_key else None,
        ),
        triton_calls.Argument(
            "value",
            value,
            (None, keys, None, value_pad),
            lambda i, h, b: (memory(b), i if by_key else 0, kv_head(h), 0),
            cut=1 if by_key else None,
        ),
        triton_calls.Argument(
            "bias",
            bias,
            (None, None, keys),
            lambda i, h, b: (triton_calls.shared(bias.shape[0], b), kv_head(h), i if by_key else 0),
            cut=2 if by_key else None,
        ),
    ]
    if plan.offset:
        first = jnp.reshape(operands.key_offset, (1,)).astype(jnp.int32)
        found.append(triton_calls.Argument("key_offset", first, (1,), lambda i, h, b: (0,)))
    if plan.segments:
        query_ids = triton_calls.pad(operands.query_segments, 1, tile.block_q, 0)
        key_ids = triton_calls.pad(operands.key_segments, 1, tile.block_k, 0)
        found += [
            triton_calls.Argument(
                "query_segments", query_ids, (None, padded_queries), lambda i, h, b: (b, 0)
            ),
            triton_calls.Argument(
                "key_segments", key_ids, (None, padded_keys), lambda i, h, b: (memory(b), 0)
            ),
        ]
    if plan.mask is not None:
        sizes = plan.mask
        full = (
            padded_queries if sizes[2] != 1 else 1,
            padded_keys if sizes[3] != 1 else 1,
        )
        members = group if by_key and sizes[1] != 1 else None
        found.append(
            triton_calls.Argument(
                "mask",
                operands.mask.astype(jnp.int8),
                (None, members, *full),
                lambda i, h, b: (
                    triton_calls.shared(sizes[0], b),
                    triton_calls.shared(sizes[1], h),
                    0,
                    0,
                ),
            )
        )
    return found


def _rows(
    name: str, plan: Plan, shape: tuple[int, int, int], array: Any = None
) -> triton_calls.Argument:
    """One float32 for each (batch, head, query), as a block of queries."""
    given = (shape, jnp.float32) if array is None else array
    return triton_calls.Argument(
        name, given, (None, None, plan.tile.block_q), lambda i, h, b: (b, h, i), cut=2
    )


def forward(
    operands: Operands, spec: Spec, *, tile: tiling.Tile | None = None
) -> tuple[jax.Array, tuple]:
    """The answer (B, T, N, h) in the query's dtype, and the residuals that `backward` wants.

    Args:
      operands: the call's arrays; `noise_key` is needed unless `spec.noise` is "none".
      spec: the static description.
      tile: how to cut the kernel, by default from the device and the width.

    Returns:
      The answer, the noise added in float32 before the cast; and the clean answer, denominators,
      factors of the projection and running maxima.
    """
    shift = triton_kernels.SHIFT if operands.key.dtype == jnp.float16 else 0
    operands, bias = fold_masks(operands, spec, shift)
    plan = _plan(operands, spec, tiling.forward_tile, tile)
    batch, queries, heads, _ = operands.query.shape
    inputs = _arguments(plan, operands, bias, by_key=False)
    if spec.noise != "none":
        words = [("noise_key", operands.noise_key)]
        words += [("noise_row", jnp.reshape(operands.noise_row, (1,)))] if plan.moved else []
        inputs += [triton_calls.Argument(n, x, x.shape, lambda i, h, b: (0,)) for n, x in words]
    out_shape = (batch, queries, heads, plan.value_width)
    value_pad = tiling.padded(plan.value_width)

    def answer(name):
        block = (None, plan.tile.block_q, None, value_pad)
        described = (out_shape, operands.query.dtype)
        return triton_calls.Argument(name, described, block, lambda i, h, b: (b, i, h, 0), cut=1)

    row_shape = (batch, heads, queries)
    outputs = [answer("out"), _rows("mass", plan, row_shape), _rows("factor", plan, row_shape)]
    if plan.online:
        outputs.append(_rows("best", plan, row_shape))
    if spec.noise == "rows":
        outputs.append(answer("clean"))
    grid = (-(-queries // plan.tile.block_q), heads, batch)
    found = triton_calls.call(
        triton_kernels.forward_kernel, plan, grid, inputs, outputs, operands.flags
    )
    clean = found.get("clean", found["out"])
    return found["out"], (clean, found["mass"], found["factor"], found.get("best"))


def sums(operands: Operands, spec: Spec, *, tile: tiling.Tile | None = None) -> tuple[tuple, tuple]:
    """N = Σ_j w_ij v_j and D = Σ_j w_ij against a public reference, as `forward` has them.

    Not a release: they have no noise and never leave the trusted side.

    Args:
      operands: the call's arrays; a query that is not finite counts as a row of zeros.
      spec: scale, cap and masks; its noise is not used.
      tile: how to cut the kernel.

    Returns:
      ((N high, N low), (D high, D low)), float32 of shapes (B, T, N, h) and (B, T, N).
    """
    shift = triton_kernels.SHIFT if operands.key.dtype == jnp.float16 else 0
    operands, bias = fold_masks(operands, spec, shift)
    plan = _plan(operands, spec, tiling.forward_tile, tile)
    batch, queries, heads, _ = operands.query.shape
    inputs = _arguments(plan, operands, bias, by_key=False)
    block = (None, plan.tile.block_q, None, tiling.padded(plan.value_width))
    wide = ((batch, queries, heads, plan.value_width), jnp.float32)
    outputs = []
    for low in ("", "_low") if plan.compensated else ("",):
        outputs.append(
            triton_calls.Argument(
                f"numerator{low}", wide, block, lambda i, h, b: (b, i, h, 0), cut=1
            )
        )
        outputs.append(_rows(f"denominator{low}", plan, (batch, heads, queries)))
    grid = (-(-queries // plan.tile.block_q), heads, batch)
    kernel = triton_kernels.forward_kernel
    found = triton_calls.call(kernel, plan, grid, inputs, outputs, operands.flags)
    zero = {name: jnp.zeros_like(found[name]) for name in ("numerator", "denominator")}

    def words(name):
        return found[name], found.get(f"{name}_low", zero[name])

    return words("numerator"), tuple(jnp.swapaxes(x, 1, 2) for x in words("denominator"))


def finish(spec: Spec, numerator: jax.Array, denominator: jax.Array) -> tuple[jax.Array, tuple]:
    """The answer (B, T, N, h) in float32 made of noisy sums, and the residuals of `backward`.

    Args:
      spec: of the call.
      numerator: (B, T, N, h).
      denominator: (B, T, N).
    """
    if spec.denominator_std == math.inf:
        ratio = numerator / spec.floor
    else:
        ratio = numerator / jnp.maximum(denominator, spec.floor)[..., None]
    factor = jnp.ones(ratio.shape[:-1], jnp.float32)
    if spec.ball is not None:
        factor = jnp.exp(log_row_weights(ratio, spec.ball))
    clean = jnp.where(factor[..., None] > 0, ratio, 0.0) * factor[..., None]
    by_head = jnp.swapaxes(denominator, 1, 2), jnp.swapaxes(factor, 1, 2)
    return clean, (clean, *by_head, None)


def backward(
    operands: Operands,
    spec: Spec,
    residuals: tuple,
    cotangent: jax.Array,
    *,
    tile: tiling.Tile | None = None,
) -> tuple:
    """Gradients of the answer in query, key, value and log_weights, the noise held fixed.

    Every sum has a fixed order: the same bits on every run. Not a release.

    Args:
      operands: as in `forward`.
      spec: as in `forward`.
      residuals: what `forward` returned.
      cotangent: (B, T, N, h).
      tile: how to cut the kernels.

    Returns:
      (d query, d key, d value, d log_weights, None) in the operands' shapes, in the operands' dtype
      where a kernel writes the whole sum, else in float32.
    """
    given = operands
    operands, bias = fold_masks(operands, spec)
    plan = _plan(operands, spec, tiling.backward_tile, tile)
    clean, mass, factor, best = residuals
    flags = operands.flags
    if flags is not None:
        # Forward gives a factor of 0 or below to queries that are not finite.
        dead = jnp.any(factor <= 0, axis=(1, 2)).astype(jnp.int32)[:, None]
        flags = jnp.broadcast_to(flags, (dead.shape[0], flags.shape[1]))
        flags = jnp.concatenate([flags, dead], axis=1)
    d_ratio, inverse, delta = gradient_coefficients(spec, clean, mass, factor, cotangent)
    rows = [("delta", delta)]
    if plan.divides:
        rows.append(("inverse", inverse))
    else:
        d_ratio = d_ratio * jnp.swapaxes(inverse, 1, 2)[..., None]
        rows = [("delta", delta * inverse)]
    d_ratio = d_ratio.astype(plan.dtype)
    rows += [("best", best)] if plan.online else []
    batch, queries, heads, _ = operands.query.shape
    keys, kv_heads = operands.key.shape[1:3]
    row_shape = (batch, heads, queries)
    value_pad, key_pad = tiling.padded(plan.value_width), tiling.padded(plan.key_width)

    inputs = _arguments(plan, operands, bias, by_key=False)
    block = (None, plan.tile.block_q, None, value_pad)
    inputs.append(
        triton_calls.Argument("cotangent", d_ratio, block, lambda i, h, b: (b, i, h, 0), cut=1)
    )
    inputs += [_rows(name, plan, row_shape, array) for name, array in rows]
    shape = (operands.query.shape, operands.query.dtype)
    block = (None, plan.tile.block_q, None, key_pad)
    outputs = [triton_calls.Argument("d_query", shape, block, lambda i, h, b: (b, i, h, 0), cut=1)]
    grid = (-(-queries // plan.tile.block_q), heads, batch)
    kernel = triton_gradients.query_gradient_kernel
    found = triton_calls.call(kernel, plan, grid, inputs, outputs, flags)

    padded_queries = triton_calls.round_up(queries, plan.tile.block_q)
    inputs = _arguments(plan, operands, bias, by_key=True)
    block = (None, padded_queries, plan.group, value_pad)
    inputs.append(triton_calls.Argument("cotangent", d_ratio, block, lambda i, h, b: (b, 0, h, 0)))
    inputs += [
        triton_calls.Argument(
            name, array, (None, plan.group, padded_queries), lambda i, h, b: (b, h, 0)
        )
        for name, array in rows
    ]
    outputs = _key_outputs(plan, batch, keys, kv_heads, ("d_key", "d_value", "d_bias"))
    if given.key.shape[0] == batch:
        kinds = (given.key.dtype, given.value.dtype, jnp.float32)
        outputs = [
            dataclasses.replace(output, array=(output.array[0], kind))
            for output, kind in zip(outputs, kinds, strict=True)
        ]
    grid = (-(-keys // plan.tile.block_k), kv_heads, batch)
    found |= triton_calls.call(
        triton_gradients.key_gradient_kernel, plan, grid, inputs, outputs, flags
    )

    def joined(array):
        return array if given.key.shape[0] == batch else jnp.sum(array, axis=0, keepdims=True)

    d_log_weights = jnp.swapaxes(found["d_bias"][:, :, :keys], 1, 2)
    parts = (found["d_key"], found["d_value"], d_log_weights)
    return (found["d_query"], *map(joined, parts), None)


def _key_outputs(plan: Plan, batch, keys, kv_heads, names) -> list[triton_calls.Argument]:
    padded_keys = triton_calls.round_up(keys, plan.tile.block_k)
    widths = {"d_key": plan.key_width, "d_value": plan.value_width}
    outputs = []
    for name in names:
        if name in widths:
            shape = (batch, keys, kv_heads, widths[name])
            block = (None, plan.tile.block_k, None, tiling.padded(widths[name]))
            place, cut = lambda i, h, b: (b, i, h, 0), 1
        else:
            shape = (batch, kv_heads, padded_keys)
            block = (None, None, plan.tile.block_k)
            place, cut = lambda i, h, b: (b, h, i), 2
        outputs.append(triton_calls.Argument(name, (shape, jnp.float32), block, place, cut))
    return outputs


def gradient_coefficients(spec: Spec, clean, mass, factor, cotangent) -> tuple:
    """d ratio (B, T, N, h), 1/D and δ = d ratio·ratio (B, N, T): what the answer's gradient needs.

    The ratio is projected by `factor` to the clean answer. Where that is below 1 the cotangent
    loses its part along the answer, and nothing flows through the denominator.
    """
    per_row = jnp.abs(jnp.swapaxes(factor, 1, 2))
    cotangent = jnp.where(per_row[..., None] > 0, cotangent.astype(jnp.float32), 0.0)
    clean = jnp.where(per_row[..., None] > 0, clean.astype(jnp.float32), 0.0)
    along = jnp.sum(cotangent * clean, axis=-1)
    square = jnp.maximum(jnp.sum(jnp.square(clean), axis=-1), 1e-37)
    projected = cotangent - clean * (along / square)[..., None]
    clipped = per_row < 1
    d_ratio = jnp.where(clipped[..., None], per_row[..., None] * projected, cotangent)
    if spec.denominator_std == math.inf:
        inverse = jnp.full_like(mass, 1.0 / spec.floor)
        return d_ratio, inverse, jnp.zeros_like(mass)
    flows = ~clipped & (jnp.swapaxes(mass, 1, 2) > spec.floor)
    delta = jnp.swapaxes(jnp.where(flows, along, 0.0), 1, 2)
    inverse = 1.0 / jnp.maximum(mass, spec.floor)
    if spec.noise != "sums":
        inverse = jnp.where(mass > 0, inverse, 0.0)
    return d_ratio, inverse, delta


def column_squares(operands: Operands, spec: Spec, *, tile: tiling.Tile | None = None) -> jax.Array:
    """Σ_i w_ij² over the queries and heads that read key j: (B, S, K) float32.

    With the scores of `forward`, bit for bit: a weight that were larger there than here would
    exceed the norm that a record's contribution is clipped to.
    """
    operands, bias = fold_masks(operands, spec)
    plan = _plan(operands, spec, tiling.backward_tile, tile)
    batch, keys, kv_heads = operands.query.shape[0], *operands.key.shape[1:3]
    inputs = _arguments(plan, operands, bias, by_key=True)
    outputs = _key_outputs(plan, batch, keys, kv_heads, ("squares",))
    grid = (-(-keys // plan.tile.block_k), kv_heads, batch)
    found = triton_calls.call(triton_gradients.column_kernel, plan, grid, inputs, outputs)
    return jnp.swapaxes(found["squares"][:, :, :keys], 1, 2)
