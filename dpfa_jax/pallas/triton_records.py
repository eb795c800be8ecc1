"""Which records count and how much: one reading of the keys and values of a memory."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dpfa_jax import _primitives
from dpfa_jax.pallas import blocks, tiling

_WARPS = 4


def _inspect(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which rows are finite, and the logarithm of their norms, −∞ for a row of zeros."""
    rows = rows.astype(jnp.float32)
    sizes = jnp.abs(rows)
    finite = jnp.max(jnp.where(sizes < jnp.inf, 0, 1), axis=1) == 0
    largest = jnp.max(sizes, axis=1)
    # Powers of two, so that no square leaves the range of float32; as in `clipping.log_row_norms`.
    power = jnp.where(largest > 2.0**60, -100.0, jnp.where(largest < 2.0**-60, 100.0, 0.0))
    unit = jnp.where(power < 0, 2.0**-100, jnp.where(power > 0, 2.0**100, 1.0))
    scaled = rows * unit[:, None]
    square = jnp.sum(scaled * scaled, axis=1)
    used = largest > 0
    log_norm = 0.5 * jnp.log(jnp.where(used, square, 1.0)) - power * math.log(2.0)
    return finite, jnp.where(used, log_norm, -jnp.inf)


def _kernel(rows, length, heads, widths, log_bound, program, key, value, weights, flags):
    """Rows of one memory, all heads: a record is NULL if any head's row of it is not finite."""
    start = program(pl.program_id(0))[0] * rows
    position = start + lax.broadcasted_iota(jnp.int32, (rows,), 0)
    inside = None if length % rows == 0 else position < length
    limit = None if inside is None else length

    def head_step(head, bad):
        finite = []
        log_weight = jnp.zeros((rows,), jnp.float32)
        for ref, width in ((key, widths[0]), (value, widths[1])):
            allowed = blocks.inside(rows, start, limit, tiling.padded(width), width)
            block = blocks.load(ref, (slice(None), head, slice(None)), allowed)
            known, log_norm = _inspect(block)
            finite.append(known)
            if ref is value and log_bound is not None:
                log_weight = jnp.minimum(0.0, log_bound - log_norm)
        blocks.store(weights, (head, slice(None)), log_weight, inside)
        return bad | jnp.where(finite[0] & finite[1], 0, 1)

    bad = lax.fori_loop(jnp.int32(0), jnp.int32(heads), head_step, jnp.zeros((rows,), jnp.int32))
    plgpu.store(flags.at[pl.ds(0, 1)], jnp.broadcast_to(jnp.max(bad), (1,)))

    def null_step(head, carry):
        lost = bad != 0 if inside is None else (bad != 0) & inside
        blocks.store(weights, (head, slice(None)), jnp.full((rows,), -jnp.inf), lost)
        return carry

    count = jnp.where(jnp.max(bad) != 0, jnp.int32(heads), jnp.int32(0))
    lax.fori_loop(jnp.int32(0), count, null_step, jnp.int32(0))


def _run(key: jax.Array, value: jax.Array, bound: float | None) -> tuple[jax.Array, jax.Array]:
    memories, length, heads, _ = key.shape
    rows = 32 if memories * length >= 1 << 14 else 16
    count = -(-length // rows)
    key, value = _primitives.vary_alike(key, value)
    manual = jax.typeof(key).manual_axis_type

    def program(index):
        return lax.rem(index, jnp.int32(count)), lax.div(index, jnp.int32(count))

    def place(*order):
        """Block indices, from those of (block, memory)."""

        def found(index):
            at = (*program(index), 0)
            return tuple(at[i] for i in order)

        return found

    def shape(*sizes: int, dtype: Any) -> jax.ShapeDtypeStruct:
        alike = None if manual.empty else manual
        return jax.ShapeDtypeStruct(sizes, dtype, manual_axis_type=alike)

    def call(fast, key, value):
        widths = (key.shape[3], value.shape[3])
        log_bound = None if bound is None else math.log(bound)
        body = partial(_kernel, rows, length, heads, widths, log_bound, program)

        def kernel(*refs):
            body(*refs)

        kernel.__name__ = "dpfa_record_kernel"
        return pl.pallas_call(
            kernel,
            grid=(memories * count,),
            in_specs=[
                pl.BlockSpec((None, rows, heads, tiling.padded(width)), place(1, 0, 2, 2))
                for width in widths
            ],
            out_specs=[
                pl.BlockSpec((None, heads, rows), place(1, 2, 0)),
                pl.BlockSpec((None, 1), place(1, 0)),
            ],
            out_shape=[
                shape(memories, heads, length, dtype=jnp.float32),
                shape(memories, count, dtype=jnp.int32),
            ],
            compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
            interpret=not fast,
            name=kernel.__name__,
        )(key, value)

    weights, flags = lax.platform_dependent(
        key, value, cuda=partial(call, True), default=partial(call, False)
    )
    return jnp.swapaxes(weights, 1, 2), flags


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def record_log_weights(
    key: jax.Array, value: jax.Array, bound: float | None
) -> tuple[jax.Array, jax.Array]:
    """Logarithms of the record weights min(1, bound/‖value row‖), and where rows are not finite.

    Args:
      key: (M, S, K, H).
      value: (M, S, K, h).
      bound: of the weighted value rows' norms, > 0; None gives every record the weight 1.

    Returns:
      (M, S, K) float32 ≤ 0, −∞ for a record with a NaN or an infinity in any head; and (M, blocks)
      int32, not 0 where a block of keys has such a record. The gradient is that of the weights in
      the value.
    """
    return _run(key, value, bound)


def _forward(key, value, bound):
    weights, flags = _run(key, value, bound)
    return (weights, flags), (key, value, weights)


def _backward(bound, saved, cotangents):
    key, value, weights = saved
    none = jnp.zeros_like(key)
    if bound is None:
        return none, jnp.zeros_like(value)
    # d log(bound/‖v‖) = −v/‖v‖², and ‖v‖ is the bound over the weight.
    clipped = (weights < 0) & (weights > -jnp.inf)
    slope = jnp.where(clipped, cotangents[0] * jnp.exp(2 * weights), 0.0) / -(bound * bound)
    kept = jnp.where(clipped[..., None], value.astype(jnp.float32), 0.0)
    return none, (slope[..., None] * kept).astype(value.dtype)


record_log_weights.defvjp(_forward, _backward)
