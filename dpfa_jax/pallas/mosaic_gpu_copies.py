"""Which tiles a block of the Hopper kernel's grid takes, and the warpgroup that copies them in.

While it waits for places it looks whether keys are finite: no other kernel then has to read them.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax.pallas import mosaic_gpu_rows as tile_rows
from dpfa_jax.pallas.mosaic_gpu_plan import Plan
from dpfa_jax.pallas.mosaic_gpu_registers import ROWS


def ring_slot(step, stages: int):
    """Place of a step in a ring of so many.

    Args:
      step: int32 scalar.
      stages: of the ring.
    """
    return lax.rem(step, jnp.int32(stages))


def shared_index(size: int, index):
    """The index along an axis, or 0 along one of size 1 that all share.

    Args:
      size: of the axis.
      index: int32 scalar.
    """
    return jnp.int32(0) if size == 1 else index


def each_tile(plan: Plan, refs, body, carry):
    """The carry after all tiles of this block of the grid.

    Args:
      plan: what is static.
      refs: by name.
      body: of (local number, tile, carry), returns the next carry.
      carry: before the first.
    """
    program = lax.axis_index("program")
    if plan.scheduled:
        mine = refs["schedule"].at[program][0]
    else:
        mine = lax.div(jnp.int32(plan.tiles - 1) - program, jnp.int32(plan.programs)) + 1

    def step(index, carry):
        return body(index, tile_number(plan, refs, index), carry)

    return lax.fori_loop(jnp.int32(0), mine, step, carry)


def tile_number(plan: Plan, refs, index):
    """This block's tile of that local number; some tile if it has fewer, up to a whole batch.

    Args:
      plan: what is static.
      refs: by name.
      index: int32 scalar.
    """
    program = lax.axis_index("program")
    if plan.scheduled:
        return refs["schedule"].at[program][index + 1]
    return program + index * plan.programs


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

    def tile(index, number, carry):
        block, head, batch = plan.place(number)
        low, count = plan.key_range(block)
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
            slot, number = ring_slot(step, stages), low + count - 1 - i
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

        return lax.fori_loop(jnp.int32(0), count, key_tile, carry)

    step, ours = each_tile(plan, refs, tile, (jnp.int32(0), jnp.bool_(False)))
    if plan.judges:
        pl.when(step > 0)(lambda: judge(step - 1, ours))
