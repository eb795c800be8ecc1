"""Kernel bodies of the gradients and of the column sums; conventions as in `triton_kernels`."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dpfa_jax.pallas import blocks, tiling
from dpfa_jax.pallas.triton_kernels import (
    LANES,
    Plan,
    allowed_pairs,
    finite,
    finite_rows,
    first_position,
    pair_weights,
    partial_sums,
)


def query_gradient_kernel(plan: Plan, place, refs):
    """One block of queries: d query; arguments as in `forward_kernel`."""
    tile = plan.tile
    start = place[0] * tile.block_q
    own = plan.own(start, tile.block_q)
    key_pad, value_pad = tiling.padded(plan.key_width), tiling.padded(plan.value_width)
    tail = plan.queries if plan.queries % tile.block_q else None
    everything = (own, slice(None))
    query_ok = blocks.inside(tile.block_q, start, tail, key_pad, plan.key_width)
    out_ok = blocks.inside(tile.block_q, start, tail, value_pad, plan.value_width)
    query = blocks.load(refs["query"], everything, query_ok)
    known = None
    if plan.repairs:
        known, query = finite_rows(query)
    cotangent = blocks.load(refs["cotangent"], everything, out_ok)
    queries = start + lax.broadcasted_iota(jnp.int32, (tile.block_q,), 0)
    row_ok = None if tail is None else queries < tail
    inverse = None
    if plan.divides:
        inverse = blocks.load(refs["inverse"], (own,), row_ok)[:, None]
    delta = blocks.load(refs["delta"], (own,), row_ok)
    best = None
    if plan.online:
        best = blocks.load(refs["best"], (own,), row_ok)[:, None]
    left, right = plan.sides
    first = start - first_position(plan, refs)
    runs = tiling.sections(first, tile.block_q, tile.block_k, plan.keys, left, right)

    def step(tile_index, total, masked):
        key_start = tile_index * tile.block_k
        keys = pl.ds(key_start, tile.block_k)
        limit = plan.keys if masked and plan.keys % tile.block_k else None
        key_ok = blocks.inside(tile.block_k, key_start, limit, key_pad, plan.key_width)
        value_ok = blocks.inside(tile.block_k, key_start, limit, value_pad, plan.value_width)
        key = blocks.load(refs["key"], (keys, slice(None)), key_ok)
        value = blocks.load(refs["value"], (keys, slice(None)), value_ok)
        if plan.repairs:
            key, value = finite(key), finite(value)
        score = blocks.dot(query, key, transpose_b=True)
        allowed = allowed_pairs(plan, start, key_start, masked, refs)
        weights, free = pair_weights(plan, score, refs["bias"][keys][None, :], best, allowed)
        d_weights = blocks.dot(cotangent, value, transpose_b=True) - delta[:, None]
        d_score = (weights if inverse is None else weights * inverse) * d_weights
        if free is not None:
            d_score = jnp.where(free, d_score, 0.0)
        return total + blocks.dot(blocks.narrow(d_score, plan.dtype, plan.fast), key)

    total = blocks.sweep(runs, step, jnp.zeros((tile.block_q, key_pad), jnp.float32))
    if known is not None:
        total = jnp.where(known[:, None], total, 0.0)
    blocks.store(refs["d_query"], everything, total * plan.spec.scale, query_ok)


def _key_block(plan: Plan, place, refs):
    """What the kernels over keys share: place, key block, log-weights and tiles of queries."""
    tile = plan.tile
    start = place[0] * tile.block_k
    own = plan.own(start, tile.block_k)
    key_pad = tiling.padded(plan.key_width)
    limit = plan.keys if plan.keys % tile.block_k else None
    key_ok = blocks.inside(tile.block_k, start, limit, key_pad, plan.key_width)
    key = blocks.load(refs["key"], (own, slice(None)), key_ok)
    key = finite(key) if plan.repairs else key
    left, right = plan.sides
    first = start + first_position(plan, refs)
    runs = tiling.sections(first, tile.block_k, tile.block_q, plan.queries, right, left)
    bias = refs["bias"][own][:, None]
    return start, own, key, key_ok, bias, runs


def _query_tile(plan: Plan, refs, tile_index, member, masked):
    tile = plan.tile
    start = tile_index * tile.block_q
    rows = pl.ds(start, tile.block_q)
    tail = plan.queries if masked and plan.queries % tile.block_q else None
    width = tiling.padded(plan.key_width)
    query_ok = blocks.inside(tile.block_q, start, tail, width, plan.key_width)
    row_ok = None
    if tail is not None:
        row_ok = (start + lax.broadcasted_iota(jnp.int32, (tile.block_q,), 0)) < tail
    query = blocks.load(refs["query"], (rows, member, slice(None)), query_ok)
    query = finite_rows(query)[1] if plan.repairs else query
    return start, rows, tail, row_ok, query


def key_gradient_kernel(plan: Plan, place, refs):
    """One block of keys: d key, d value, d log-weights, summed over the heads that read it."""
    tile = plan.tile
    start, own, key, key_ok, bias, runs = _key_block(plan, place, refs)
    key_pad, value_pad = tiling.padded(plan.key_width), tiling.padded(plan.value_width)
    limit = plan.keys if plan.keys % tile.block_k else None
    value_ok = blocks.inside(tile.block_k, start, limit, value_pad, plan.value_width)
    value = blocks.load(refs["value"], (own, slice(None)), value_ok)
    value = finite(value) if plan.repairs else value

    def step(tile_index, carry, masked, member):
        d_key, d_value, d_bias = carry
        row, rows, tail, row_ok, query = _query_tile(plan, refs, tile_index, member, masked)
        out_ok = blocks.inside(tile.block_q, row, tail, value_pad, plan.value_width)
        cotangent = blocks.load(refs["cotangent"], (rows, member, slice(None)), out_ok)
        delta = blocks.load(refs["delta"], (member, rows), row_ok)
        best = None
        if plan.online:
            best = blocks.load(refs["best"], (member, rows), row_ok)[None, :]
        score = blocks.dot(key, query, transpose_b=True)
        allowed = allowed_pairs(plan, row, start, masked, refs, keys_first=True, member=member)
        weights, free = pair_weights(plan, score, bias, best, allowed)
        if plan.divides:
            weights *= blocks.load(refs["inverse"], (member, rows), row_ok)[None, :]
        d_value += blocks.dot(blocks.narrow(weights, plan.dtype, plan.fast), cotangent)
        d_weights = blocks.dot(value, cotangent, transpose_b=True) - delta[None, :]
        d_level = weights * d_weights
        d_bias += partial_sums(d_level)
        if free is not None:
            d_level = jnp.where(free, d_level, 0.0)
        d_key += blocks.dot(blocks.narrow(d_level, plan.dtype, plan.fast), query)
        return d_key, d_value, d_bias

    zero = (
        jnp.zeros((tile.block_k, key_pad), jnp.float32),
        jnp.zeros((tile.block_k, value_pad), jnp.float32),
        jnp.zeros((tile.block_k, LANES), jnp.float32),
    )

    def member_step(member, carry):
        def one(tile_index, carry, masked):
            return step(tile_index, carry, masked, member)

        return blocks.sweep(runs, one, carry)

    d_key, d_value, d_bias = lax.fori_loop(jnp.int32(0), jnp.int32(plan.group), member_step, zero)
    blocks.store(refs["d_key"], (own, slice(None)), d_key * plan.spec.scale, key_ok)
    blocks.store(refs["d_value"], (own, slice(None)), d_value, value_ok)
    blocks.store(refs["d_bias"], (own,), jnp.sum(d_bias, axis=1), None)


def column_kernel(plan: Plan, place, refs):
    """One block of keys: Σ w² over the queries and heads that read it."""
    tile = plan.tile
    start, own, key, _, bias, runs = _key_block(plan, place, refs)

    def step(tile_index, total, masked, member):
        row, _, tail, _, query = _query_tile(plan, refs, tile_index, member, masked)
        score = blocks.dot(key, query, transpose_b=True)
        allowed = allowed_pairs(plan, row, start, masked, refs, keys_first=True, member=member)
        if tail is not None:
            rows = row + lax.broadcasted_iota(jnp.int32, score.shape, 1)
            inside = rows < tail
            allowed = inside if allowed is None else allowed & inside
        weights, _ = pair_weights(plan, score, bias, None, allowed)
        return total + jnp.sum(weights * weights, axis=1)

    def member_step(member, carry):
        def one(tile_index, carry, masked):
            return step(tile_index, carry, masked, member)

        return blocks.sweep(runs, one, carry)

    zero = jnp.zeros((tile.block_k,), jnp.float32)
    total = lax.fori_loop(jnp.int32(0), jnp.int32(plan.group), member_step, zero)
    blocks.store(refs["squares"], (own,), total, None)
