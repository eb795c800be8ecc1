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

_ROWS = 16
_TOGETHER = (4, 2, 1)
"""Heads whose rows are fetched at once, the first that divides their number."""


_INFINITE = 0x7F800000


def _largest(rows: jax.Array) -> jax.Array:
    """The bits of each row's largest magnitude; `_INFINITE` or more if it is not finite."""
    magnitude = lax.bitcast_convert_type(rows, jnp.int32) & jnp.int32(0x7FFFFFFF)
    return jnp.max(magnitude, axis=1)


def _log_norms(rows: jax.Array, largest: jax.Array) -> jax.Array:
    """Logarithms of the norms, −∞ for a row of zeros.

    Scaled by powers of two, so that no square leaves the range of float32, as in
    `clipping.log_row_norms`.
    """
    size = lax.bitcast_convert_type(largest, jnp.float32)
    power = jnp.where(size > 2.0**50, -100.0, jnp.where(size < 2.0**-50, 100.0, 0.0))
    unit = jnp.where(power < 0, 2.0**-100, jnp.where(power > 0, 2.0**100, 1.0))
    scaled = rows * unit[:, None]
    square = jnp.sum(scaled * scaled, axis=1)
    log_norm = 0.5 * jnp.log(jnp.where(largest > 0, square, 1.0)) - power * math.log(2.0)
    return jnp.where(largest > 0, log_norm, -jnp.inf)


def _kernel(rows, length, heads, widths, log_bound, program, key, value, weights, flags):
    """Rows of one memory, all heads: a record is NULL if any head's row of it is not finite."""
    start = program(pl.program_id(0))[0] * rows
    position = start + lax.broadcasted_iota(jnp.int32, (rows,), 0)
    inside = None if length % rows == 0 else position < length
    limit = None if inside is None else length
    together = next(count for count in _TOGETHER if heads % count == 0)

    def fetch(ref, head, width):
        allowed = blocks.inside(rows, start, limit, tiling.padded(width), width)
        return blocks.load(ref, (slice(None), head, slice(None)), allowed)

    def step(group, worst):
        at = [group * together + index for index in range(together)]
        # All loads before any use of one: they are in flight together.
        found = [(fetch(key, head, widths[0]), fetch(value, head, widths[1])) for head in at]
        for head, pair in zip(at, found, strict=True):
            key_rows, value_rows = (block.astype(jnp.float32) for block in pair)
            largest = _largest(value_rows)
            worst = jnp.maximum(worst, jnp.maximum(_largest(key_rows), largest))
            log_weight = jnp.zeros((rows,), jnp.float32)
            if log_bound is not None:
                log_weight = jnp.minimum(0.0, log_bound - _log_norms(value_rows, largest))
            blocks.store(weights, (head, slice(None)), log_weight, inside)
        return worst

    groups, none = jnp.int32(heads // together), jnp.zeros((rows,), jnp.int32)
    null = lax.fori_loop(jnp.int32(0), groups, step, none) >= _INFINITE
    flag = jnp.max(jnp.where(null, 1, 0))
    plgpu.store(flags.at[pl.ds(0, 1)], jnp.broadcast_to(flag, (1,)))

    def null_step(head, carry):
        lost = null if inside is None else null & inside
        blocks.store(weights, (head, slice(None)), jnp.full((rows,), -jnp.inf), lost)
        return carry

    lax.fori_loop(jnp.int32(0), flag * heads, null_step, jnp.int32(0))


def _run(key: jax.Array, value: jax.Array, bound: float | None) -> tuple[jax.Array, jax.Array]:
    memories, length, heads, _ = key.shape
    rows, count = _ROWS, -(-length // _ROWS)
    key, value = _primitives.vary_alike(key, value)

    def program(index):
        return lax.rem(index, jnp.int32(count)), lax.div(index, jnp.int32(count))

    def place(*order):
        """Block indices, from those of (block, memory)."""

        def found(index):
            at = (*program(index), 0)
            return tuple(at[i] for i in order)

        return found

    def call(fast, key, value):
        manual = jax.typeof(key).manual_axis_type

        def shape(*sizes: int, dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sizes, dtype, manual_axis_type=manual)

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
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
            interpret=not fast,
            name=kernel.__name__,
        )(key, value)

    def interpreted(key, value):
        return _primitives.closed(partial(call, False), key, value)

    weights, flags = lax.platform_dependent(
        key, value, cuda=partial(call, True), default=interpreted
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
    return jnp.zeros_like(key), value_gradient(value, weights, bound, cotangents[0])


def value_gradient(
    value: jax.Array, weights: jax.Array, bound: float | None, cotangent: jax.Array
) -> jax.Array:
    """Gradient of the weights' logarithms in the values.

    Args:
      value: (M, S, K, h).
      weights: (M, S, K), the logarithms.
      bound: of the weighted value rows' norms, or None.
      cotangent: of the logarithms.
    """
    if bound is None:
        return jnp.zeros_like(value)
    # d log(bound/‖v‖) = −v/‖v‖², and ‖v‖ is the bound over the weight.
    clipped = (weights < 0) & (weights > -jnp.inf)
    slope = jnp.where(clipped, cotangent * jnp.exp(2 * weights), 0.0) / -(bound * bound)
    kept = jnp.where(clipped[..., None], value.astype(jnp.float32), 0.0)
    return (slope[..., None] * kept).astype(value.dtype)


record_log_weights.defvjp(_forward, _backward)
