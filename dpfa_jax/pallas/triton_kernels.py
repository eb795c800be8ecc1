"""Kernel bodies: one program computes one block of queries, or one block of keys.

Refs end in `_ref`; what is static comes as a `Plan`. Scores are kept in units of ln 2, so that a
weight is 2^x.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dpfa_jax._typing import Spec
from dpfa_jax.doubleword import add_word
from dpfa_jax.pallas import blocks, tiling
from dpfa_jax.pallas.tiling import Tile

SHIFT = 15
"""Powers of two by which float16 weights, which know few exponents, are raised."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one kernel.

    Attributes:
      spec: what is computed.
      tile: how it is cut.
      queries: T.
      keys: S.
      group: query heads of one kv head.
      heads: query heads.
      key_width: H.
      value_width: h.
      dtype: of the matrix products.
      mask: shape of the boolean mask, or None.
      segments: whether there are segment ids.
      fast: compiled (True) or interpreted.
      grouped: keys of one accumulator, or None for one accumulator over all keys.
    """

    spec: Spec
    tile: Tile
    queries: int
    keys: int
    group: int
    heads: int
    key_width: int
    value_width: int
    dtype: Any
    mask: tuple[int, ...] | None
    segments: bool
    fast: bool
    grouped: int | None = tiling.GROUP_KEYS
    flush: bool = False

    @property
    def online(self) -> bool:
        """Whether the reference is the running maximum."""
        return self.spec.score_cap is None

    @property
    def cap(self) -> float:
        """The public reference in the unit of the products of rows."""
        return min((self.spec.score_cap or 0.0) / self.spec.scale, 3e38)

    @property
    def factor(self) -> float:
        """Of the scores, into units of ln 2."""
        return self.spec.scale * blocks.LOG2_E

    @property
    def compensated(self) -> bool:
        """Whether groups are joined in a double word."""
        return self.keys > tiling.PLAIN_KEYS

    @property
    def shift(self) -> int:
        """Powers of two by which the forward kernel's weights are raised."""
        return SHIFT if self.dtype == jnp.float16 else 0

    @property
    def sides(self) -> tuple[int | None, int | None]:
        """How far before and after itself a query sees."""
        left, right = self.spec.window or (None, None)
        if self.spec.is_causal:
            right = 0 if right is None else min(right, 0)
        return left, right


def _allowed(plan: Plan, row, key, masked, refs, *, keys_first=False, member=None):
    """Boolean block of visible pairs, or None where all are; axes (query, key) or the reverse."""
    tile = plan.tile
    shape = (tile.block_k, tile.block_q) if keys_first else (tile.block_q, tile.block_k)
    rows = row + lax.broadcasted_iota(jnp.int32, shape, 1 if keys_first else 0)
    keys = key + lax.broadcasted_iota(jnp.int32, shape, 0 if keys_first else 1)
    allowed = None

    def both(new):
        return new if allowed is None else allowed & new

    left, right = plan.sides
    if masked and right is not None:
        allowed = both(keys - rows <= right)
    if masked and left is not None:
        allowed = both(rows - keys <= left)
    query_slice, key_slice = pl.ds(row, tile.block_q), pl.ds(key, tile.block_k)
    if plan.segments:
        query_ids = refs["query_segments"][query_slice]
        key_ids = refs["key_segments"][key_slice]
        if keys_first:
            allowed = both(key_ids[:, None] == query_ids[None, :])
        else:
            allowed = both(query_ids[:, None] == key_ids[None, :])
    if plan.mask is not None:
        full_rows, full_keys = plan.mask[2] != 1, plan.mask[3] != 1
        index = (
            query_slice if full_rows else pl.ds(0, 1),
            key_slice if full_keys else pl.ds(0, 1),
        )
        limit = None
        row_ok = (row + lax.broadcasted_iota(jnp.int32, (tile.block_q, 1), 0)) < plan.queries
        key_ok = (key + lax.broadcasted_iota(jnp.int32, (1, tile.block_k), 1)) < plan.keys
        if full_rows and plan.queries % tile.block_q:
            limit = row_ok
        if full_keys and plan.keys % tile.block_k:
            limit = key_ok if limit is None else limit & key_ok
        if member is not None and plan.mask[1] != 1:
            index = (member, *index)
        if limit is None:
            seen = refs["mask"][index]
        else:
            size = (tile.block_q if full_rows else 1, tile.block_k if full_keys else 1)
            limit = jnp.broadcast_to(limit, size)
            seen = plgpu.load(refs["mask"].at[index], mask=limit, other=jnp.int8(0))
        seen = seen != 0
        seen = jnp.broadcast_to(seen, (tile.block_q, tile.block_k))
        allowed = both(seen.T if keys_first else seen)
    return allowed


def _join(plan: Plan, total, part):
    if not plan.compensated:
        return tuple(a + b for a, b in zip(total, part, strict=True))
    high, low, mass_high, mass_low = total
    return (*add_word(high, low, part[0]), *add_word(mass_high, mass_low, part[1]))


def _capped_sums(plan: Plan, runs, step, shape):
    """Σ w v and Σ w in groups of keys: (N, D) or (N high, N low, D high, D low)."""
    zero = (jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:1], jnp.float32))
    if plan.grouped is None:
        return blocks.sweep(runs, step, zero)
    if plan.flush:
        size = plan.grouped // plan.tile.block_k
        total = (zero[0], zero[0], zero[1], zero[1]) if plan.compensated else zero

        def flushing(index, carry, masked):
            part, total = carry
            part = step(index, part, masked)
            return lax.cond(
                lax.rem(index, jnp.int32(size)) == size - 1,
                lambda part, total: (zero, _join(plan, total, part)),
                lambda part, total: (part, total),
                part,
                total,
            )

        part, total = blocks.sweep(runs, flushing, (zero, total))
        return _join(plan, total, part)
    size = plan.grouped // plan.tile.block_k
    edge = plan.tile.block_q + 2 * plan.tile.block_k <= plan.grouped
    total = None
    for first, end, masked in runs:
        one = isinstance(first, int) and isinstance(end, int) and end - first <= size
        if one or (masked and edge):
            part = blocks.sweep([(first, end, masked)], step, zero)
            if total is None and not plan.compensated:
                total = part
                continue
        else:
            part = None
        if total is None:
            total = (zero[0], zero[0], zero[1], zero[1]) if plan.compensated else zero
        if part is not None:
            total = _join(plan, total, part)
            continue

        def group(index, total, first=first, end=end, masked=masked):
            start = first + index * size
            stop = jnp.minimum(start + size, end)
            part = blocks.sweep([(start, stop, masked)], step, zero)
            return _join(plan, total, part)

        groups = lax.div(jnp.int32(end - first + size - 1), jnp.int32(size))
        total = lax.fori_loop(jnp.int32(0), groups, group, total)
    assert total is not None
    return total


def _bounded(ratio, bound):
    """Rows scaled to norm ≤ bound, and their factors; rows that are not finite become 0."""
    if bound is None:
        return ratio, jnp.ones(ratio.shape[:1], jnp.float32)
    largest = jnp.max(jnp.abs(ratio), axis=1)
    unit = jnp.where(largest > 2.0**60, 2.0**-100, jnp.where(largest < 2.0**-60, 2.0**100, 1.0))
    scaled = ratio * unit[:, None]
    square = jnp.maximum(jnp.sum(scaled * scaled, axis=1), 2.0**-120)
    factor = jnp.minimum(1.0, (bound * unit) / jnp.sqrt(square))
    finite = largest < jnp.inf
    factor = jnp.where(finite, factor, 0.0)
    return jnp.where(finite[:, None], ratio * factor[:, None], 0.0), factor


def forward_kernel(plan: Plan, place, names: tuple[str, ...], *all_refs):
    """One block of queries: sums, noise, ratio, projection.

    Args:
      plan: what is static.
      place: program id → (query block, head, batch).
      names: of the refs, inputs then outputs.
      all_refs: in that order.
    """
    refs = dict(zip(names, all_refs, strict=True))
    spec, tile = plan.spec, plan.tile
    index, head, batch = place(pl.program_id(0))
    start = index * tile.block_q
    key_pad, value_pad = tiling.padded(plan.key_width), tiling.padded(plan.value_width)
    tail = plan.queries if plan.queries % tile.block_q else None
    query_ok = blocks.inside(tile.block_q, start, tail, key_pad, plan.key_width)
    query = blocks.load(refs["query"], (slice(None), slice(None)), query_ok)
    left, right = plan.sides
    runs = tiling.sections(start, tile.block_q, tile.block_k, plan.keys, left, right)

    def tiles(tile_index, masked):
        key_start = tile_index * tile.block_k
        keys = pl.ds(key_start, tile.block_k)
        limit = plan.keys if masked and plan.keys % tile.block_k else None
        key_ok = blocks.inside(tile.block_k, key_start, limit, key_pad, plan.key_width)
        value_ok = blocks.inside(tile.block_k, key_start, limit, value_pad, plan.value_width)
        key = blocks.load(refs["key"], (keys, slice(None)), key_ok)
        score = blocks.dot(query, key, transpose_b=True)
        allowed = _allowed(plan, start, key_start, masked, refs)
        value = blocks.load(refs["value"], (keys, slice(None)), value_ok)
        return score, refs["bias"][keys], allowed, value

    def rounded(weights):
        if plan.shift:
            # Below the normal numbers rounding could double a weight.
            weights = jnp.where(weights < 2.0**-14, 0.0, weights)
        weights = blocks.narrow(weights, plan.dtype, plan.fast)
        return weights, jnp.sum(blocks.widen(weights, plan.fast), axis=1)

    def capped(tile_index, carry, masked):
        total, mass = carry
        score, bias, allowed, value = tiles(tile_index, masked)
        weights = blocks.bounded_exp2(score, plan.cap, plan.factor, bias[None, :], plan.fast)
        if allowed is not None:
            weights = jnp.where(allowed, weights, 0.0)
        weights, part = rounded(weights)
        return total + blocks.dot(weights, value), mass + part

    def online(tile_index, carry, masked):
        total, mass, best = carry
        score, bias, allowed, value = tiles(tile_index, masked)
        level = blocks.level(score, plan.factor, bias[None, :], plan.fast)
        if allowed is not None:
            level = jnp.where(allowed, level, blocks.LOWEST)
        new = jnp.maximum(best, jnp.max(level, axis=1))
        shrink = blocks.exp2(best - new, plan.fast)
        weights = blocks.exp2(level - (new - float(plan.shift))[:, None], plan.fast)
        weights, part = rounded(weights)
        total = total * shrink[:, None] + blocks.dot(weights, value)
        return total, mass * shrink + part, new

    shape = (tile.block_q, value_pad)
    unshift = 2.0**-plan.shift
    low = mass_low = None
    best = None
    if plan.online:
        zero = (jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:1], jnp.float32))
        total, mass, best = blocks.sweep(runs, online, (*zero, jnp.full(shape[:1], -1e30)))
    else:
        sums = _capped_sums(plan, runs, capped, shape)
        if len(sums) == 4:
            total, low, mass, mass_low = sums
            low, mass_low = low * unshift, mass_low * unshift
        else:
            total, mass = sums
    total, mass = total * unshift, mass * unshift

    released = spec.denominator_std != float("inf")
    noise_key = None
    if spec.noise != "none":
        noise_key = tuple(refs["noise_key"][word] for word in range(8))

    def unit_noise():
        return blocks.matrix_noise(
            noise_key, batch, head, start, tile.block_q, value_pad, plan.fast
        )

    if spec.noise == "sums":
        total = blocks.noisy(spec, total, low, spec.noise_std, unit_noise())
        if released:
            row = blocks.row_noise(noise_key, batch, head, start, tile.block_q, plan.fast)
            mass = blocks.noisy(spec, mass, mass_low, spec.denominator_std, row)
    elif low is not None and mass_low is not None:
        total, mass = total + low, mass + mass_low
    if released:
        ratio = total / jnp.maximum(mass, spec.floor)[:, None]
    else:
        ratio = total * (1.0 / spec.floor)
        mass = jnp.zeros_like(mass)
    bound = spec.ball if spec.ball is not None else spec.row_clip
    if bound is not None and value_pad != plan.value_width:
        # Columns beyond the width hold noise of their own.
        columns = lax.broadcasted_iota(jnp.int32, shape, 1)
        ratio = jnp.where(columns < plan.value_width, ratio, 0.0)
    out, factor = _bounded(ratio, bound)
    out_ok = blocks.inside(tile.block_q, start, tail, value_pad, plan.value_width)
    if "clean" in refs:
        blocks.store(refs["clean"], (slice(None), slice(None)), out, out_ok)
    if spec.noise == "rows":
        out = blocks.noisy(spec, out, None, spec.noise_std, unit_noise())
    blocks.store(refs["out"], (slice(None), slice(None)), out, out_ok)
    queries = start + lax.broadcasted_iota(jnp.int32, (tile.block_q,), 0)
    row_ok = None if tail is None else queries < tail
    for name, row in (("mass", mass), ("factor", factor), ("best", best)):
        if name in refs:
            blocks.store(refs[name], (slice(None),), row, row_ok)


def _pair_weights(plan: Plan, score, bias, best, allowed):
    """Weights of one block without any shift, and which scores no bound holds."""
    free = None
    if plan.online:
        level = blocks.level(score, plan.factor, bias, plan.fast)
        weights = blocks.exp2(level - best, plan.fast)
    else:
        weights = blocks.bounded_exp2(score, plan.cap, plan.factor, bias, plan.fast)
        free = score < plan.cap
    if allowed is not None:
        weights = jnp.where(allowed, weights, 0.0)
    return weights, free


def query_gradient_kernel(plan: Plan, place, names: tuple[str, ...], *all_refs):
    """One block of queries: d query; arguments as in `forward_kernel`."""
    refs = dict(zip(names, all_refs, strict=True))
    tile = plan.tile
    index, _, _ = place(pl.program_id(0))
    start = index * tile.block_q
    key_pad, value_pad = tiling.padded(plan.key_width), tiling.padded(plan.value_width)
    tail = plan.queries if plan.queries % tile.block_q else None
    everything = (slice(None), slice(None))
    query_ok = blocks.inside(tile.block_q, start, tail, key_pad, plan.key_width)
    out_ok = blocks.inside(tile.block_q, start, tail, value_pad, plan.value_width)
    query = blocks.load(refs["query"], everything, query_ok)
    cotangent = blocks.load(refs["cotangent"], everything, out_ok)
    queries = start + lax.broadcasted_iota(jnp.int32, (tile.block_q,), 0)
    row_ok = None if tail is None else queries < tail
    inverse = blocks.load(refs["inverse"], (slice(None),), row_ok)
    delta = blocks.load(refs["delta"], (slice(None),), row_ok)
    best = None
    if plan.online:
        best = blocks.load(refs["best"], (slice(None),), row_ok)[:, None]
    left, right = plan.sides
    runs = tiling.sections(start, tile.block_q, tile.block_k, plan.keys, left, right)

    def step(tile_index, total, masked):
        key_start = tile_index * tile.block_k
        keys = pl.ds(key_start, tile.block_k)
        limit = plan.keys if masked and plan.keys % tile.block_k else None
        key_ok = blocks.inside(tile.block_k, key_start, limit, key_pad, plan.key_width)
        value_ok = blocks.inside(tile.block_k, key_start, limit, value_pad, plan.value_width)
        key = blocks.load(refs["key"], (keys, slice(None)), key_ok)
        value = blocks.load(refs["value"], (keys, slice(None)), value_ok)
        score = blocks.dot(query, key, transpose_b=True)
        allowed = _allowed(plan, start, key_start, masked, refs)
        weights, free = _pair_weights(plan, score, refs["bias"][keys][None, :], best, allowed)
        d_weights = blocks.dot(cotangent, value, transpose_b=True) - delta[:, None]
        d_score = (weights * inverse[:, None]) * d_weights
        if free is not None:
            d_score = jnp.where(free, d_score, 0.0)
        return total + blocks.dot(blocks.narrow(d_score, plan.dtype, plan.fast), key)

    total = blocks.sweep(runs, step, jnp.zeros((tile.block_q, key_pad), jnp.float32))
    blocks.store(refs["d_query"], everything, total * plan.spec.scale, query_ok)


def _key_block(plan: Plan, place, refs):
    """What the kernels over keys share: place, the key block and a loader of query tiles."""
    tile = plan.tile
    index, _, _ = place(pl.program_id(0))
    start = index * tile.block_k
    key_pad = tiling.padded(plan.key_width)
    limit = plan.keys if plan.keys % tile.block_k else None
    key_ok = blocks.inside(tile.block_k, start, limit, key_pad, plan.key_width)
    key = blocks.load(refs["key"], (slice(None), slice(None)), key_ok)
    left, right = plan.sides
    runs = tiling.sections(start, tile.block_k, tile.block_q, plan.queries, right, left)
    return start, key, key_ok, runs


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
    return start, rows, tail, row_ok, query


def key_gradient_kernel(plan: Plan, place, names: tuple[str, ...], *all_refs):
    """One block of keys: d key, d value, d log-weights, summed over the heads that read it."""
    refs = dict(zip(names, all_refs, strict=True))
    tile = plan.tile
    start, key, key_ok, runs = _key_block(plan, place, refs)
    key_pad, value_pad = tiling.padded(plan.key_width), tiling.padded(plan.value_width)
    limit = plan.keys if plan.keys % tile.block_k else None
    value_ok = blocks.inside(tile.block_k, start, limit, value_pad, plan.value_width)
    value = blocks.load(refs["value"], (slice(None), slice(None)), value_ok)
    bias = refs["bias"][...][:, None]

    def step(tile_index, carry, masked, member):
        d_key, d_value, d_bias = carry
        row, rows, tail, row_ok, query = _query_tile(plan, refs, tile_index, member, masked)
        out_ok = blocks.inside(tile.block_q, row, tail, value_pad, plan.value_width)
        cotangent = blocks.load(refs["cotangent"], (rows, member, slice(None)), out_ok)
        inverse = blocks.load(refs["inverse"], (member, rows), row_ok)
        delta = blocks.load(refs["delta"], (member, rows), row_ok)
        best = None
        if plan.online:
            best = blocks.load(refs["best"], (member, rows), row_ok)[None, :]
        score = blocks.dot(key, query, transpose_b=True)
        allowed = _allowed(plan, row, start, masked, refs, keys_first=True, member=member)
        weights, free = _pair_weights(plan, score, bias, best, allowed)
        weights = weights * inverse[None, :]
        d_value += blocks.dot(blocks.narrow(weights, plan.dtype, plan.fast), cotangent)
        d_weights = blocks.dot(value, cotangent, transpose_b=True) - delta[None, :]
        d_level = weights * d_weights
        d_bias += jnp.sum(d_level, axis=1)
        if free is not None:
            d_level = jnp.where(free, d_level, 0.0)
        d_key += blocks.dot(blocks.narrow(d_level, plan.dtype, plan.fast), query)
        return d_key, d_value, d_bias

    zero = (
        jnp.zeros((tile.block_k, key_pad), jnp.float32),
        jnp.zeros((tile.block_k, value_pad), jnp.float32),
        jnp.zeros((tile.block_k,), jnp.float32),
    )

    def member_step(member, carry):
        def one(tile_index, carry, masked):
            return step(tile_index, carry, masked, member)

        return blocks.sweep(runs, one, carry)

    d_key, d_value, d_bias = lax.fori_loop(jnp.int32(0), jnp.int32(plan.group), member_step, zero)
    blocks.store(refs["d_key"], (slice(None), slice(None)), d_key * plan.spec.scale, key_ok)
    blocks.store(refs["d_value"], (slice(None), slice(None)), d_value, value_ok)
    blocks.store(refs["d_bias"], (slice(None),), d_bias, None)


def column_kernel(plan: Plan, place, names: tuple[str, ...], *all_refs):
    """One block of keys: Σ w² over the queries and heads that read it."""
    refs = dict(zip(names, all_refs, strict=True))
    tile = plan.tile
    start, key, _, runs = _key_block(plan, place, refs)
    bias = refs["bias"][...][:, None]

    def step(tile_index, total, masked, member):
        row, _, tail, _, query = _query_tile(plan, refs, tile_index, member, masked)
        score = blocks.dot(key, query, transpose_b=True)
        allowed = _allowed(plan, row, start, masked, refs, keys_first=True, member=member)
        if tail is not None:
            rows = row + lax.broadcasted_iota(jnp.int32, score.shape, 1)
            inside = rows < tail
            allowed = inside if allowed is None else allowed & inside
        weights, _ = _pair_weights(plan, score, bias, None, allowed)
        return total + jnp.sum(weights * weights, axis=1)

    def member_step(member, carry):
        def one(tile_index, carry, masked):
            return step(tile_index, carry, masked, member)

        return blocks.sweep(runs, one, carry)

    zero = jnp.zeros((tile.block_k,), jnp.float32)
    total = lax.fori_loop(jnp.int32(0), jnp.int32(plan.group), member_step, zero)
    blocks.store(refs["squares"], (slice(None),), total, None)
