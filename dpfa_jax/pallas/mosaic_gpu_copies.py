"""Which tiles a block of the Hopper kernel's grid takes, and the warpgroup that copies them in.

While it waits for places it looks whether keys are finite: no other kernel then has to read them.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax.pallas import mosaic_gpu_rows as tile_rows
from dpfa_jax.pallas import mosaic_gpu_shares as shares
from dpfa_jax.pallas.mosaic_gpu_plan import Plan
from dpfa_jax.pallas.mosaic_gpu_registers import ROWS


def ring_slot(step, stages: int):
    """Place of a step in a ring of so many.

    Args:
      step: int32 scalar, not negative.
      stages: of the ring.
    """
    if stages & (stages - 1) == 0:
        # What is not negative needs one instruction, and products wait for their barrier's place.
        return step & (stages - 1)
    return lax.rem(step, jnp.int32(stages))


def shared_index(size: int, index):
    """The index along an axis, or 0 along one of size 1 that all share.

    Args:
      size: of the axis.
      index: int32 scalar.
    """
    return jnp.int32(0) if size == 1 else index


class Work(NamedTuple):
    """What a block of the grid computes at a time, int32 scalars.

    Attributes:
      tile: number of the query tile.
      first: the first key tile.
      count: how many.
      row: of the block's table of shares; None for a whole tile.
    """

    tile: Any
    first: Any
    count: Any
    row: Any = None


def each_whole(plan: Plan, refs, body, carry):
    """The carry after all whole tiles of this block of the grid.

    Args:
      plan: what is static.
      refs: by name.
      body: of (local number, `Work`, carry), returns the next carry.
      carry: before the first.
    """

    def step(index, carry):
        tile = tile_number(plan, refs, index)
        return body(index, Work(tile, *plan.key_range(plan.place(tile)[0])), carry)

    count = plan.whole if plan.splits else _answered(plan, refs)
    return lax.fori_loop(jnp.int32(0), count, step, carry)


def each_share(plan: Plan, refs, body, carry):
    """The carry after what this block does beside whole tiles: arguments as of `each_whole`."""
    own = _own_shares(refs)

    def step(number, carry):
        row = jnp.where(own[shares.KEPT, shares.COUNT] > 0, number, jnp.int32(shares.LAST))
        tile, first, count = (own[row, x] for x in (shares.TILE, shares.FIRST, shares.COUNT))
        return body(plan.whole + number, Work(tile, first, count, row), carry)

    count = sum((own[row, shares.COUNT] > 0).astype(jnp.int32) for row in shares.ROWS)
    return lax.fori_loop(jnp.int32(0), count, step, carry)


def others(refs, row):
    """Blocks of the grid before this one whose sums of a share's tile it adds to its own.

    Args:
      refs: by name.
      row: of `Work`.

    Returns:
      How many, int32, -1 where it leaves its sums to a later block; and where the last of them
      waits, or its own will.
    """
    own = _own_shares(refs)
    return own[row, shares.OTHERS], own[row, shares.PLACE]


def each_answer(plan: Plan, refs, body):
    """`body(local number, tile)` for all tiles that this block of the grid answers, in order."""

    def step(index, carry):
        body(index, answer_number(plan, refs, index))
        return carry

    lax.fori_loop(jnp.int32(0), _answered(plan, refs), step, jnp.int32(0))


def answer_number(plan: Plan, refs, index):
    """`tile_number`, and a tile's of which this block has the last share."""
    tile = tile_number(plan, refs, index)
    return jnp.where(index < plan.whole, tile, last_tile(refs)) if plan.splits else tile


def _own_shares(refs):
    return refs["shares"].at[lax.axis_index("program")]


def _answered(plan: Plan, refs):
    """How many tiles this block of the grid answers."""
    program = lax.axis_index("program")
    if plan.scheduled:
        return refs["schedule"].at[program][0]
    if plan.splits:
        return plan.whole + (_own_shares(refs)[shares.LAST, shares.COUNT] > 0).astype(jnp.int32)
    return lax.div(jnp.int32(plan.tiles - 1) - program, jnp.int32(plan.programs)) + 1


def tile_number(plan: Plan, refs, index):
    """The tile of that local number that this block answers.

    Some tile if it has fewer, up to a whole batch.

    Args:
      plan: what is static.
      refs: by name.
      index: int32 scalar.
    """
    program = lax.axis_index("program")
    if plan.scheduled:
        return refs["schedule"].at[program][index + 1]
    return program + index * plan.programs


def last_tile(refs):
    """The tile that this block answers after its whole ones, or some tile."""
    return _own_shares(refs)[shares.LAST, shares.TILE]


def copy_loop(plan: Plan, refs):
    """All that the memory warpgroup does.

    Args:
      plan: what is static.
      refs: by name.
    """
    size, stages = plan.shape.block_k, plan.shape.stages
    if plan.judges:
        found = refs["bad_keys"].at[lax.axis_index("program")]
        tile_rows.begin_report(refs["flags"], found, lax.axis_index("program"), plan.programs)

    def judge(step, ours):
        """The keys that this step copied in, before the next ones take their place."""
        slot = ring_slot(step, stages)
        plgpu.barrier_wait(refs["k_full"].at[slot])

        @pl.when(ours)
        def _():
            tile_rows.report_unfinite(refs["k"].at[slot], plan.matrices[0], found)

    def tile(index, work, carry):
        block, head, batch = plan.place(work.tile)
        memory = shared_index(plan.memories, batch)
        kv_head = lax.div(head, jnp.int32(plan.group))
        judging = plan.judging(block, head, batch)
        for wg in range(plan.shape.compute):
            pl.when(index > 0)(lambda wg=wg: plgpu.barrier_wait(refs["q_empty"].at[wg]))
            rows = pl.ds(block * plan.block_q + wg * ROWS, ROWS)
            given = refs["given" if plan.converts else "q"].at[wg]
            source = refs["query"].at[batch, rows, head]
            plgpu.copy_gmem_to_smem(source, given, refs["q_full"].at[wg])

        def key_tile(i, carry):
            step, ours = carry
            slot, number = ring_slot(step, stages), work.first + work.count - 1 - i
            keys = pl.ds(number * size, size)
            again = step >= stages
            pl.when(again)(lambda: plgpu.barrier_wait(refs["k_empty"].at[slot]))
            full = refs["k_full"].at[slot]
            plgpu.copy_gmem_to_smem(refs["key"].at[memory, keys, kv_head], refs["k"].at[slot], full)
            row = refs["offsets"].at[shared_index(plan.offsets, batch), kv_head, keys]
            place = ring_slot(step, plan.offset_slots)
            plgpu.copy_gmem_to_smem(row, refs["offset"].at[place], full)
            if plan.judges:
                # Places of values are free about a tile later than those of keys.
                pl.when(step > 0)(lambda: judge(step - 1, ours))
                ours = plan.judged(number, judging)
            pl.when(again)(lambda: plgpu.barrier_wait(refs["v_empty"].at[slot]))
            plgpu.copy_gmem_to_smem(
                refs["value"].at[memory, keys, kv_head], refs["v"].at[slot], refs["v_full"].at[slot]
            )
            return step + 1, ours

        return lax.fori_loop(jnp.int32(0), work.count, key_tile, carry)

    carry = each_whole(plan, refs, tile, (jnp.int32(0), jnp.bool_(False)))
    step, ours = each_share(plan, refs, tile, carry) if plan.splits else carry
    if plan.judges:
        pl.when(step > 0)(lambda: judge(step - 1, ours))
