"""The Hopper kernel's body: two warpgroups compute, one copies, others draw noise and run ahead.

A block of the grid lives as long as the call and takes one tile of 128 queries of one head after
another, at last perhaps a share of one (`mosaic_gpu_shares`). While the matrix unit multiplies
weights and values of one key tile, the special-function unit makes the weights of the next. Keys
are read from the last tile that a query tile sees to the first, so that the tile on the diagonal
comes before the loop.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax.doubleword import add_word
from dpfa_jax.pallas import mosaic_gpu_answers as answers
from dpfa_jax.pallas import mosaic_gpu_blocks as blocks
from dpfa_jax.pallas import mosaic_gpu_copies as copies
from dpfa_jax.pallas import mosaic_gpu_kept as kept
from dpfa_jax.pallas import mosaic_gpu_masks as masks
from dpfa_jax.pallas import mosaic_gpu_noise as noise_blocks
from dpfa_jax.pallas import mosaic_gpu_products as products
from dpfa_jax.pallas import mosaic_gpu_rows as tile_rows
from dpfa_jax.pallas.accumulators import RUN_GROUPS
from dpfa_jax.pallas.mosaic_gpu_plan import ROW_BATCH, Plan
from dpfa_jax.pallas.mosaic_gpu_registers import COLUMN, ROW, ROWS, TILE, uniform


def _noise_buffer(plan: Plan, refs, slot, wg):
    noise = refs["noise"]
    if plan.shape.noise == "global":
        noise = noise.at[lax.axis_index("program")]
    return noise.at[slot, wg]


def _row_places(plan: Plan, refs, wg, index, count: int = 1):
    """Where the denominators' noise waits: of `wg` and those drawn with it, `count` tiles on."""
    drawing, rows = lax.div(wg, jnp.int32(plan.served)), plan.served * ROWS
    first = lax.rem(index, jnp.int32(plan.row_ring)) * rows
    if count == 1:
        rows = ROWS
        first += lax.rem(wg, jnp.int32(plan.served)) * ROWS
    return refs["row_noise"].at[lax.axis_index("program"), drawing, pl.ds(first, count * rows)]


def _noise_loop(plan: Plan, refs, first):
    """A noise warpgroup: draws for later tiles while this one's sums are made.

    Args:
      plan: what is static.
      refs: by name.
      first: the first computing warpgroup of those that it draws for.
    """
    spec, key, slots, compute = plan.spec, refs["noise_key"], plan.shape.slots, plan.shape.compute
    moved = refs["noise_row"][0] if plan.moved else 0

    def rows(index):
        """Noise of the denominators of this tile and the ones after it."""
        places = []
        for later in range(ROW_BATCH):
            block, head, batch = plan.place(copies.answer_number(plan, refs, index + later))
            places.append((batch, head, moved + block * plan.block_q + first * ROWS))
        out = _row_places(plan, refs, first, index, ROW_BATCH)
        noise_blocks.row_noise(key, places, plan.served * ROWS, spec.denominator_std, out)

    def tile(index, number):
        block, head, batch = plan.place(number)
        start = moved + block * plan.block_q
        slot = copies.ring_slot(index, slots)
        pl.when(index >= slots)(lambda: plgpu.barrier_wait(refs["noise_empty"].at[slot]))
        if plan.row_noisy:
            # One warp draws for several tiles in the time that it would draw for one.
            pl.when(lax.rem(index, jnp.int32(ROW_BATCH)) == 0)(lambda: rows(index))

        def half(wg, carry):
            place = batch, head, start + wg * ROWS
            buffer = _noise_buffer(plan, refs, slot, wg)
            noise_blocks.matrix_noise(key, *place, plan.value_width, spec.noise_std, buffer)
            plgpu.barrier_arrive(refs["noise_full"].at[slot * compute + wg])
            return carry

        if plan.served == 1:
            half(first, jnp.int32(0))
        else:
            lax.fori_loop(first, first + plan.served, half, jnp.int32(0))

    copies.each_answer(plan, refs, tile)


def visible(plan: Plan, start, key_start, refs, batch, query_ids) -> Any:
    """Boolean (64, block_k): pairs that may meet, or None if all may.

    Args:
      plan: what is static.
      start: of the queries' rows.
      key_start: of the keys' rows.
      refs: by name.
      batch: of the queries.
      query_ids: (64,) segments of the queries, where there are such.
    """
    size = plan.shape.block_k
    left, right = plan.sides
    allowed = None
    if plan.sides != (None, None):
        # Positions by row and by column: the layout's own place of every number costs far more.
        rows = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW) + start
        keys = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=COLUMN) + key_start
        allowed = masks.seen(rows, keys, left, right)
    if plan.segments:
        memory = copies.shared_index(plan.memories, batch)
        source = refs["key_segments"].at[memory, pl.ds(key_start, size)]
        same = masks.same(query_ids, plgpu.load(source, layout=COLUMN, optimized=False))
        allowed = same if allowed is None else allowed & same
    return allowed


def zeros(*shape):
    """Zeros as a warpgroup holds sums: (64,) or (64, columns) float32."""
    zeros = jnp.zeros(shape, jnp.float32)
    return plgpu.layout_cast(zeros, ROW if len(shape) == 1 else TILE)


def _sums(plan: Plan, refs, wg, work: copies.Work, step):
    """One warpgroup's sums over all keys that its tile sees, or over a share of them.

    Returns:
      (64, h), (64,) and its low word, running maxima, NaN where the query is not finite or None,
      next step.
    """
    block, _, batch = plan.place(work.tile)
    step = uniform(step)
    low, count = work.first, work.count
    if work.row is not None:
        count = uniform(count)
    start = block * plan.block_q + wg * ROWS
    stages, flush = plan.shape.stages, plan.shape.flush
    query_ids = None
    if plan.segments:
        source = refs["query_segments"].at[batch, pl.ds(start, ROWS)]
        query_ids = plgpu.load(source, layout=ROW, optimized=False)

    def wait(name, slot):
        plgpu.barrier_wait(refs[name].at[slot])

    def arrive(name, slot):
        plgpu.barrier_arrive(refs[name].at[slot])

    def wait_values(slot):
        wait("v_full", slot)
        if plan.repairs:
            # Keys may stay as they are: a weight of 0 is 0 whatever the score.
            tile_rows.clear_unfinite(refs["v"].at[slot], matrices[1])

    def seen(i, scores, masked):
        """Scores of pairs that may meet, and the keys' offsets."""
        if masked:
            key_start = (low + count - 1 - i) * plan.shape.block_k
            allowed = visible(plan, start, key_start, refs, batch, query_ids)
            scores = jnp.where(allowed, scores, -jnp.inf)
        place = copies.ring_slot(step + i, plan.offset_slots)
        return scores, plgpu.load(refs["offset"].at[place], layout=COLUMN, optimized=False)

    def weigh(i, slot, scores, mass, best, masked):
        scores, offset = seen(i, scores, masked)
        shrink = None
        if plan.online:
            weights, mass, best, shrink = blocks.online_weights(
                scores, offset, mass, best, factor=plan.factor, shift=plan.shift
            )
        else:
            weights, mass = blocks.capped_weights(scores, offset, mass, **plan.weighing)
        arrive("k_empty", slot)
        return weights, mass, best, shrink

    matrices = plan.matrices
    query = refs["q"].at[wg]
    slot = copies.ring_slot(step, stages)
    plgpu.barrier_wait(refs["q_full"].at[wg])
    given = query
    if plan.converts:
        given = refs["given"].at[wg]
        tile_rows.write_float8(given, query, plan.given, matrices[0])
        plgpu.commit_smem()
    if plan.repairs and not plan.marks:
        tile_rows.clear_rows(query, tile_rows.unfinite(given, plan.given), matrices[0])
    wait("k_full", slot)
    scores = products.scores(query, refs["k"].at[slot], matrices[0])
    on_diagonal = plan.masked or plan.sides[1] is not None
    none = zeros(ROWS)
    best = none - 1e30
    weights, mass, best, _ = weigh(jnp.int32(0), slot, scores, none, best, on_diagonal)
    rounded = blocks.rounded(weights, plan.dtype)

    def one(i, carry, opening: Any = 0, masked=plan.masked):
        """Sums of key tile i-1, weights of key tile i; `opening` is the accumulator's first one."""
        rounded, total, outer, mass, best = carry
        slot, before = copies.ring_slot(step + i, stages), copies.ring_slot(step + i - 1, stages)
        wait("k_full", slot)
        places = (query, refs["k"].at[slot], refs["v"].at[before])
        scores, summed = products.overlapped(
            *places,
            rounded,
            total,
            (i - 1 > opening).astype(jnp.int32),
            *matrices,
            lambda: wait_values(before),
            plan.shape.turns,
        )
        early, turns = plan.shape.early, plan.shape.turns
        if plan.online or early is None:
            weights, part, best, shrink = weigh(i, slot, scores, mass[0], best, masked)
            summed = products.finish(summed, rounded, None if early is None else part, turns)
        else:
            scores, offset = seen(i, scores, masked)
            arrive("k_empty", slot)
            given, shrink = (scores, offset, mass[0], summed, rounded), None
            weights, part, summed = blocks.weights_around(
                *given, early=early, turns=turns, **plan.weighing
            )
        new = blocks.rounded(weights, plan.dtype)
        arrive("v_empty", before)
        if shrink is not None:
            summed = blocks.scaled(summed, shrink)
        return new, summed, outer, (part, *mass[1:]), best

    outer = outside = None
    if plan.outside:
        outside = refs["outer"].at[lax.axis_index("program"), wg]
    elif plan.joins:
        outer = zeros(ROWS, plan.value_width)
    far = refs["far"].at[lax.axis_index("program"), wg] if plan.regroups else None
    mass = (mass, none, none) if plan.joins else (mass,)
    carry = (rounded, products.unset(plan.value_width), outer, mass, best)
    first = 1
    if plan.edge > 1 and plan.key_blocks > 1:
        carry = one(jnp.int32(1), carry, masked=True)
        first = 2
    begin, opening, done = jnp.int32(first), jnp.int32(0), jnp.int32(0)
    if plan.joins:

        def group(g, carry):
            opening = g * flush
            body, after = functools.partial(one, opening=opening), opening + flush + 1
            carry = lax.fori_loop(jnp.maximum(opening + 1, first), after, body, carry)
            rounded, total, outer, (part, high, low), best = carry
            mass = (none, *add_word(high, low, part))
            # The accumulator is only read: one that a thread writes holds up the matrix unit.
            if outside is None:
                return rounded, total, outer + total, mass, best
            kept.gather(total, outside, in_run(g) > 0)
            return rounded, total, outer, mass, best

        def in_run(g):
            """How many groups the outer sum holds once so many have ended."""
            return lax.rem(g, jnp.int32(RUN_GROUPS)) if plan.regroups else g

        whole = lax.div(count - 1, jnp.int32(flush))
        if plan.regroups:

            def run(number, carry):
                start = number * RUN_GROUPS
                carry = lax.fori_loop(start, start + RUN_GROUPS, group, carry)
                if outside is not None:
                    options = {"width": plan.value_width, "paired": plan.paired}
                    kept.pass_on(outside, far, number > 0, **options)
                elif plan.paired:
                    kept.keep_pair(carry[2], far, number > 0)
                else:
                    kept.keep(kept.joined(carry[2], far, number > 0), far)
                return (*carry[:2], outer, *carry[3:])

            runs = lax.div(whole, jnp.int32(RUN_GROUPS))
            carry = lax.fori_loop(jnp.int32(0), runs, run, carry)
            done = runs * RUN_GROUPS
        carry = lax.fori_loop(done, whole, group, carry)
        opening = whole * flush
        begin = jnp.maximum(opening + 1, first)
    carry = lax.fori_loop(begin, count, functools.partial(one, opening=opening), carry)
    rounded, total, outer, mass, best = carry
    slot = copies.ring_slot(step + count - 1, stages)
    wait_values(slot)
    adds = (count - 1 > opening).astype(jnp.int32)
    total = products.started(refs["v"].at[slot], rounded, total, adds, matrices[1])
    # Read beside the last products, which take as long.
    lost = tile_rows.unfinite(given, plan.given) if plan.marks else None
    # What is read has arrived before the next queries may take its place.
    total = products.finish(total, rounded, lost, False)
    arrive("q_empty", wg)
    arrive("v_empty", slot)
    if plan.joins:
        if outside is None:
            total = outer + total
        else:
            total = kept.joined(total, outside, in_run(whole) > 0)
        if plan.regroups:
            join = kept.joined_pair if plan.paired else kept.joined
            total = join(total, far, done > 0)
        mass = add_word(mass[1], mass[2], mass[0])
    else:
        mass = mass[0], none
    return total, blocks.row_sums(*mass), best, lost, step + count


def _noise(plan: Plan, refs, wg, index):
    """This warpgroup's noise of sums and of denominators, waited for; None where there is none."""
    if not plan.noisy:
        return None, None
    slot = copies.ring_slot(index, plan.shape.slots)
    plgpu.barrier_wait(refs["noise_full"].at[slot * plan.shape.compute + wg])
    noise = noise_blocks.noise_kept(_noise_buffer(plan, refs, slot, wg), plan.value_width)
    row = None
    if plan.row_noisy:
        row = noise_blocks.rows_kept(_row_places(plan, refs, wg, index))
    return noise, row


def _joined(plan: Plan, refs, wg, others, place, total, mass):
    """A share's sums plus those of so many blocks of the grid, up to those that wait at `place`."""

    def join(number, sums):
        total, high, low = sums
        kept.await_share(refs["counters"].at[place - number, wg])
        return kept.joined_share(total, high, low, refs[plan.part].at[place - number, wg])

    total, high, low = lax.fori_loop(jnp.int32(0), others, join, (total, *mass))
    return total, (high, low)


def _keep(plan: Plan, refs, wg, place, total, mass):
    """Leaves a share's sums to a later block of the grid."""
    high, low = mass
    kept.keep_share(total, high, low, refs[plan.part].at[place, wg])
    kept.announce(refs["counters"].at[place, wg])


def _compute_loop(plan: Plan, refs, wg):
    """One of the computing warpgroups."""
    staging = refs["stage"]

    def whole(index, work, step):
        total, mass, best, lost, step = _sums(plan, refs, wg, work, step)
        # Worked out again: kept over the sums it would take a register.
        answer(index, copies.tile_number(plan, refs, index), total, mass, best, lost)
        return step

    def share(index, work, step):
        total, mass, best, lost, step = _sums(plan, refs, wg, work, step)
        # Read again: kept over the sums they would take registers.
        others, place = copies.others(refs, work.row)
        total, mass = _joined(plan, refs, wg, others, place, total, mass)
        pl.when(others < 0)(lambda: _keep(plan, refs, wg, place, total, mass))
        index, tile = jnp.int32(plan.whole), copies.last_tile(refs)
        pl.when(others >= 0)(lambda: answer(index, tile, total, mass, best, lost))
        return step

    def answer(index, tile, total, mass, best, lost):
        block, head, batch = plan.place(tile)
        if plan.sums:
            found = answers.sums(plan, total, mass)
        else:
            noise = _noise(plan, refs, wg, index)
            if plan.noisy:
                slot = copies.ring_slot(index, plan.shape.slots)
                plgpu.barrier_arrive(refs["noise_empty"].at[slot])
            found = answers.answer(plan, total, mass, noise, lost, best)
        rows = pl.ds(block * plan.block_q + wg * ROWS, ROWS)

        def write(name, array):
            for number, part in enumerate(blocks.pieces(array, plan.piece)):
                # No thread writes over what another has still to read.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                staging[wg] = part.astype(plan.staged.dtype)
                plgpu.commit_smem()
                columns = pl.ds(number * plan.piece, plan.piece)
                plgpu.copy_smem_to_gmem(staging.at[wg], refs[name].at[batch, rows, head, columns])

        for name, array in found.items():
            if name not in refs:
                continue
            if len(array.shape) == 1:
                refs[name][batch, head, rows] = array
            else:
                write(name, array)

    step = copies.each_whole(plan, refs, whole, jnp.int32(0))
    if plan.splits:
        # Code of its own: how many key tiles a whole tile has is known when that is compiled.
        copies.each_share(plan, refs, share, step)
    plgpu.wait_smem_to_gmem(0)


def forward_kernel(plan: Plan, names: tuple[str, ...], *args, **shared):
    """The whole kernel.

    Args:
      plan: what is static.
      names: of the refs in global memory, inputs then outputs.
      args: those refs.
      shared: what `scratch` describes.
    """
    refs = dict(zip(names, args, strict=True)) | shared
    thread = lax.axis_index("warpgroup")
    compute = plan.shape.compute
    registers = plan.shape.registers
    if plan.splits:
        kind = plgpu.SemaphoreType.REGULAR((plan.places, compute))
        refs["counters"] = pl.get_global(kind)

    @pl.when(thread < compute)
    def _():
        plgpu.set_max_registers(registers[0], action="increase")
        if plan.shape.turns:
            products.first_turn()
        _compute_loop(plan, refs, thread)

    @pl.when(thread == compute)
    def _():
        plgpu.set_max_registers(registers[1], action="decrease")
        copies.copy_loop(plan, refs)

    if plan.noisy:

        @pl.when(thread > compute)
        def _():
            plgpu.set_max_registers(registers[2], action="decrease")
            _noise_loop(plan, refs, (thread - compute - 1) * plan.served)
