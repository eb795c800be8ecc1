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

LANES = 8
"""Columns of partial sums of a block's rows; a thread adds up its own without asking others."""


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
      offset: whether the keys begin at a position that is known at run time only.
      moved: whether the queries' noise begins at a row that is known at run time only.
      fast: compiled (True) or interpreted.
      grouped: keys of one accumulator, a power of two.
      hopper: whether the matrix unit takes its first operand from registers or shared memory.
      repairs: whether rows that are not finite are replaced, tile by tile; the kernel then runs on
        whole arrays, once for each head and batch.
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
    offset: bool = False
    moved: bool = False
    grouped: int = tiling.GROUP_KEYS
    hopper: bool = False
    repairs: bool = False

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
        """Whether there are several runs of keys, which are joined in a double word."""
        return self.keys > tiling.PLAIN_KEYS

    def own(self, start, size):
        """Where the block start..start+size lies in the refs that are cut into blocks."""
        return pl.ds(start, size) if self.repairs else pl.ds(0, size)

    @property
    def in_registers(self) -> bool:
        """Whether queries stay in registers: the matrix unit then reads less shared memory."""
        widest = max(tiling.padded(self.key_width), tiling.padded(self.value_width))
        narrow = self.dtype != jnp.float32 and widest <= 128
        return self.fast and self.hopper and narrow

    @property
    def divides(self) -> bool:
        """Whether gradients divide by the denominators in float32, weight by weight.

        Else the answer's cotangents carry the division: in float16 those could overflow.
        """
        return self.dtype == jnp.float16

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


def first_position(plan: Plan, refs):
    """Where the keys begin among the positions that queries count from."""
    return refs["key_offset"][0] if plan.offset else 0


def allowed_pairs(plan: Plan, row, key, masked, refs, *, keys_first=False, member=None):
    """Boolean block of visible pairs, or None where all are; axes (query, key) or the reverse."""
    tile = plan.tile
    shape = (tile.block_k, tile.block_q) if keys_first else (tile.block_q, tile.block_k)
    rows = row - first_position(plan, refs)
    rows = rows + lax.broadcasted_iota(jnp.int32, shape, 1 if keys_first else 0)
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


def partial_sums(block):
    """Sums along the rows of a block in `LANES` columns."""
    return jnp.sum(block.reshape(block.shape[0], -1, LANES), axis=1)


def finite(rows):
    """The block with 0 in place of NaN and infinities."""
    return jnp.where(jnp.abs(rows) < float("inf"), rows, jnp.zeros((), rows.dtype))


def finite_rows(rows):
    """Which rows are finite, and the block with zeros in place of the others."""
    bad = jnp.where(jnp.abs(rows.astype(jnp.float32)) < float("inf"), 0, 1)
    known = jnp.max(bad, axis=1) == 0
    return known, jnp.where(known[:, None], rows, jnp.zeros((), rows.dtype))


def _total(shape):
    return jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:1], jnp.float32)


def _part(shape):
    return jnp.zeros(shape, jnp.float32), jnp.zeros((shape[0], LANES), jnp.float32)


def _join(total, part):
    """A group of keys enters the outer sum."""
    return total[0] + part[0], total[1] + jnp.sum(part[1], axis=1)


def _by_runs(plan: Plan, runs, step, shape):
    """Sums and their low words, over runs of keys at fixed positions.

    The double word is not touched while a run is summed: it may leave the registers.
    """
    size = tiling.PLAIN_KEYS // plan.tile.block_k

    def one(index, words, first, end, masked):
        start = jnp.maximum(jnp.int32(first), index * size)
        stop = jnp.minimum(jnp.int32(end), (index + 1) * size)
        part, total = blocks.sweep([(start, stop, masked)], step, (_part(shape), _total(shape)))
        joined = _join(total, part)
        return tuple(
            add_word(high, low, more) for (high, low), more in zip(words, joined, strict=True)
        )

    spans = [
        (tiling.tiles(first, size), tiling.tiles(end + size - 1, size), first, end, masked)
        for first, end, masked in runs
    ]
    numerator, mass = _total(shape)
    words = blocks.sweep(spans, one, ((numerator, numerator), (mass, mass)))
    return tuple(zip(*words, strict=True))


def _flush(plan: Plan, tile_index, score, part, total):
    """Before the first tile of a group the group before it joins the outer sum.

    On the way out the scores are written anew: a branch that does not need them would be moved in
    front of their product, and the product of weights and values before it could not run on.
    """
    size = plan.grouped // plan.tile.block_k

    def join(score, part, total):
        return blocks.same(score, plan.fast), _part(part[0].shape), _join(total, part)

    def keep(score, part, total):
        return score, part, total

    return lax.cond((tile_index & (size - 1)) == 0, join, keep, score, part, total)


def _bounded(ratio, bound):
    """Rows scaled to norm ≤ bound, and their factors; rows that are not finite become 0."""
    if bound is None:
        return ratio, jnp.ones(ratio.shape[:1], jnp.float32)
    largest = jnp.max(jnp.abs(ratio), axis=1)
    unit = jnp.where(largest > 2.0**50, 2.0**-100, jnp.where(largest < 2.0**-50, 2.0**100, 1.0))
    scaled = ratio * unit[:, None]
    square = jnp.maximum(jnp.sum(scaled * scaled, axis=1), 2.0**-120)
    factor = jnp.minimum(1.0, (bound * unit) / jnp.sqrt(square))
    finite = largest < jnp.inf
    factor = jnp.where(finite, factor, 0.0)
    return jnp.where(finite[:, None], ratio * factor[:, None], 0.0), factor


def forward_kernel(plan: Plan, place, refs):
    """One block of queries: sums, noise, ratio, projection; or the sums alone, where they go out.

    Args:
      plan: what is static.
      place: (query block, head, batch).
      refs: inputs and outputs by name.
    """
    spec, tile = plan.spec, plan.tile
    index, head, batch = place
    start = index * tile.block_q
    own = plan.own(start, tile.block_q)
    key_pad, value_pad = tiling.padded(plan.key_width), tiling.padded(plan.value_width)
    tail = plan.queries if plan.queries % tile.block_q else None
    query_ok = blocks.inside(tile.block_q, start, tail, key_pad, plan.key_width)
    query = blocks.load(refs["query"], (own, slice(None)), query_ok)
    known, query = finite_rows(query)
    if plan.in_registers:
        query = blocks.in_registers(query)
    left, right = plan.sides
    first = start - first_position(plan, refs)
    runs = tiling.sections(first, tile.block_q, tile.block_k, plan.keys, left, right)

    def tiles(tile_index, masked):
        key_start = tile_index * tile.block_k
        keys = pl.ds(key_start, tile.block_k)
        limit = plan.keys if masked and plan.keys % tile.block_k else None
        key_ok = blocks.inside(tile.block_k, key_start, limit, key_pad, plan.key_width)
        value_ok = blocks.inside(tile.block_k, key_start, limit, value_pad, plan.value_width)
        key = blocks.load(refs["key"], (keys, slice(None)), key_ok)
        score = blocks.dot(query, key, transpose_b=True)
        allowed = allowed_pairs(plan, start, key_start, masked, refs)
        value = blocks.load(refs["value"], (keys, slice(None)), value_ok)
        value = finite(value) if plan.repairs else value
        return score, refs["bias"][keys], allowed, value

    def rounded(weights):
        if plan.shift:
            # Below the normal numbers rounding could double a weight.
            weights = jnp.where(weights < 2.0**-14, 0.0, weights)
        weights = blocks.narrow(weights, plan.dtype, plan.fast)
        return weights, partial_sums(blocks.widen(weights, plan.fast))

    def capped(tile_index, carry, masked):
        part, total = carry
        score, bias, allowed, value = tiles(tile_index, masked)
        if total is not None:
            score, part, total = _flush(plan, tile_index, score, part, total)
        weights = blocks.bounded_exp2(score, plan.cap, plan.factor, bias[None, :], plan.fast)
        if allowed is not None:
            weights = jnp.where(allowed, weights, 0.0)
        weights, mass = rounded(weights)
        return (part[0] + blocks.dot(weights, value), part[1] + mass), total

    def online(tile_index, carry, masked):
        total, mass, best = carry
        score, bias, allowed, value = tiles(tile_index, masked)
        level = blocks.level(score, plan.factor, bias[None, :], plan.fast)
        if allowed is not None:
            level = jnp.where(allowed, level, blocks.LOWEST)
        new = jnp.maximum(best, jnp.max(level, axis=1))
        shrink = blocks.exp2(best - new, plan.fast)[:, None]
        weights = blocks.exp2(level - (new - float(plan.shift))[:, None], plan.fast)
        weights, part = rounded(weights)
        return total * shrink + blocks.dot(weights, value), mass * shrink + part, new

    shape = (tile.block_q, value_pad)
    unshift = 2.0**-plan.shift
    low = mass_low = None
    best = None
    if plan.online:
        total, mass, best = blocks.sweep(runs, online, (*_part(shape), jnp.full(shape[:1], -1e30)))
        mass = jnp.sum(mass, axis=1)
    else:
        if plan.compensated:
            (total, mass), (low, mass_low) = _by_runs(plan, runs, capped, shape)
            low, mass_low = low * unshift, mass_low * unshift
        else:
            one = plan.keys <= plan.grouped
            part, total = blocks.sweep(runs, capped, (_part(shape), None if one else _total(shape)))
            total, mass = (part[0], jnp.sum(part[1], axis=1)) if one else _join(total, part)
    total, mass = total * unshift, mass * unshift
    queries = start + lax.broadcasted_iota(jnp.int32, (tile.block_q,), 0)
    row_ok = None if tail is None else queries < tail
    out_ok = blocks.inside(tile.block_q, start, tail, value_pad, plan.value_width)
    if "numerator" in refs:
        for name, word in (("numerator", total), ("numerator_low", low)):
            if name in refs:
                blocks.store(refs[name], (own, slice(None)), word, out_ok)
        for name, row in (("denominator", mass), ("denominator_low", mass_low)):
            if name in refs:
                blocks.store(refs[name], (own,), row, row_ok)
        return

    released = spec.denominator_std != float("inf")
    noise_key = None
    if spec.noise != "none":
        noise_key = tuple(refs["noise_key"][word] for word in range(8))
    noise_start = start + refs["noise_row"][0] if plan.moved else start

    def unit_noise():
        return blocks.matrix_noise(
            noise_key, batch, head, noise_start, tile.block_q, value_pad, plan.fast
        )

    if spec.noise == "sums":
        total = blocks.noisy(spec, total, low, spec.noise_std, unit_noise(), plan.fast)
        if released:
            row = blocks.row_noise(noise_key, batch, head, noise_start, tile.block_q, plan.fast)
            mass = blocks.noisy(spec, mass, mass_low, spec.denominator_std, row, plan.fast)
    elif low is not None and mass_low is not None:
        total, mass = total + low, mass + mass_low
    if released:
        ratio = blocks.quotient(total, jnp.maximum(mass, spec.floor), plan.fast)
    else:
        ratio = total * (1.0 / spec.floor)
        mass = jnp.zeros_like(mass)
    bound = spec.ball if spec.ball is not None else spec.row_clip
    if bound is not None and value_pad != plan.value_width:
        # Columns beyond the width hold noise of their own.
        columns = lax.broadcasted_iota(jnp.int32, shape, 1)
        ratio = jnp.where(columns < plan.value_width, ratio, 0.0)
    out, factor = _bounded(ratio, bound)
    # A query that is not finite is known to the gradients by this sign.
    factor = jnp.where(known, factor, 0.0 if spec.mark_queries else -factor)
    if "clean" in refs:
        blocks.store(refs["clean"], (own, slice(None)), out, out_ok)
    if spec.noise == "rows":
        out = blocks.noisy(spec, out, None, spec.noise_std, unit_noise(), plan.fast)
    if spec.mark_queries:
        out = jnp.where(known[:, None], out, float("nan"))
    blocks.store(refs["out"], (own, slice(None)), out, out_ok)
    for name, row in (("mass", mass), ("factor", factor), ("best", best)):
        if name in refs:
            blocks.store(refs[name], (own,), row, row_ok)


def pair_weights(plan: Plan, score, bias, best, allowed):
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
