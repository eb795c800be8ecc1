"""Which statement does this file keep true? The Hopper kernel answers alike however it is cut.

Cuts that would round by more than is charged, or wait for ever, are refused.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.pallas import accumulators, mosaic_gpu, mosaic_gpu_plan
from tests._mosaic_gpu_common import CASES, NOISY, ROWS
from tests._mosaic_gpu_common import make_operands as _operands
from tests._mosaic_gpu_common import make_spec as _spec


@pytest.mark.parametrize("block_k", (64, 128, 160))
def test_groups_that_are_not_charged_for_are_refused(block_k):
    # Five tiles of 96 keys are; more keys in one accumulator would round by more than F4 says.
    shape = mosaic_gpu.Shape(block_k=block_k, flush=5)
    operands = _operands(keys=1100, width=128)
    with pytest.raises(ValueError, match="480 to 512 keys"):
        mosaic_gpu.forward(operands, _spec(NOISY), shape=shape)


def test_turns_of_one_or_three_warpgroups_are_refused():
    for compute in (1, 3):
        shape = mosaic_gpu.Shape(compute=compute, turns=True)
        with pytest.raises(ValueError, match="two computing warpgroups"):
            mosaic_gpu.forward(_operands(), _spec(NOISY), shape=shape)


@pytest.mark.parametrize("early", (-4, 6, 68))
def test_weights_that_no_thread_has_are_not_made_early(early):
    shape = mosaic_gpu.Shape(early=early)
    with pytest.raises(ValueError, match="multiple of 4 up to 64"):
        mosaic_gpu.forward(_operands(), _spec(NOISY), shape=shape)


@pytest.mark.parametrize("drawing", (-1, 0, 3))
def test_warpgroups_that_draw_for_none_are_refused(drawing):
    # With none nothing would be drawn, and the others wait for it for ever.
    shape = mosaic_gpu.Shape(drawing=drawing, registers=(152, 24, 40))
    with pytest.raises(ValueError, match="drawing to divide the 2 computing"):
        mosaic_gpu.forward(_operands(), _spec(NOISY), shape=shape)


@pytest.mark.parametrize("name", ("noise_std", "denominator_std"))
@pytest.mark.parametrize("std", (1e-39, 3e38))
def test_noise_that_float32_does_not_hold_is_refused(name, std):
    operands, spec = _operands(), _spec({**NOISY, name: std})
    run = jax.jit(lambda operands: mosaic_gpu.forward(operands, spec)[0])
    with pytest.raises(ValueError, match="standard deviation that float32 holds"):
        run.trace(operands).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("registers", "drawing", "noise"),
    [((216, 24, 64), 1, NOISY), ((192, 24, 40), 2, NOISY), ((232, 56, 24), 1, {"score_cap": 4.0})],
)
def test_more_registers_than_there_are_are_refused(registers, drawing, noise):
    # A thread that waits for registers that no other gives up waits for ever.
    shape = mosaic_gpu.Shape(registers=registers, drawing=drawing)
    with pytest.raises(ValueError, match="add up to at most"):
        mosaic_gpu.forward(_operands(), _spec(noise), shape=shape)


def test_values_that_memory_would_flush_to_zero_are_refused():
    operands = _operands(keys=1100, width=256)
    run = jax.jit(lambda o: mosaic_gpu.forward(o, _spec({**NOISY, "ball": 2.0**-91}))[0])
    with pytest.raises(ValueError, match="Scale the values"):
        run.trace(operands)


@pytest.mark.parametrize(("block_k", "flush"), [(160, 3), (192, 2), (224, 2)])
def test_causal_tiles_that_lie_on_one_key_tile_or_two_are_refused(block_k, flush):
    # Two are waited for where any query tile may see two: of one that sees one, the next one's.
    operands, spec = _operands(queries=700, keys=700), _spec({"is_causal": True, "score_cap": 4.0})
    shape = mosaic_gpu.Shape(block_k=block_k, flush=flush, registers=(240, 24, 24))
    with pytest.raises(ValueError, match="a block_k up to 128"):
        mosaic_gpu.forward(operands, spec, shape=shape)
    run = jax.jit(lambda o: mosaic_gpu.forward(o, spec)[0])
    assert run.trace(operands)


@pytest.mark.parametrize("changes", ({"stages": 1}, {"block_k": 160, "flush": 3}))
def test_keys_that_no_thread_would_look_at_are_not_judged(changes):
    shape = mosaic_gpu.Shape(**changes)
    operands = _operands(flags=jnp.zeros((2, 1), jnp.int32))
    with pytest.raises(ValueError, match="Pass stages=2 and a block_k of 128"):
        mosaic_gpu.forward(operands, _spec({**NOISY, "judge_keys": True}), shape=shape)


@pytest.mark.parametrize(
    ("width", "keys", "drawing"), [(80, 300, 2), (80, 700, 1), (64, 300, 1), (96, 300, 1)]
)
def test_two_warpgroups_draw_the_noise_of_short_calls_of_80_columns(width, keys, drawing):
    operands = _operands(width=width, keys=keys)
    assert mosaic_gpu.cut(operands, _spec(NOISY)).drawing == drawing
    assert mosaic_gpu.cut(operands, _spec(ROWS)).drawing == 1


def test_every_cut_of_the_kernel_is_one_that_is_charged_for():
    masks = ({}, {"is_causal": True}, {"window": (60, 30)})
    for width, keys, mask in itertools.product((16, 64, 80, 128, 256), (300, 700, 9000), masks):
        spec = _spec({**NOISY, **mask})
        operands = jax.eval_shape(lambda w=width, k=keys: _operands(keys=k, width=w, queries=8))
        bare = dataclasses.replace(spec, noise="none")
        for cut in (mosaic_gpu.cut(operands, spec), mosaic_gpu.cut(operands, bare, summed=True)):
            group = cut.block_k * cut.flush
            assert accumulators.SHORTEST_GROUP <= group <= accumulators.GROUP_KEYS
            # What a thread adds to a denominator before it joins the double word, at most (F4).
            assert (cut.flush + 1) * cut.block_k // 4 <= 160


def _tile_plan(queries, width, **changes):
    spec, plans = _spec({**NOISY, **changes}), []

    def trace():
        operands = _operands(queries=queries, keys=queries, heads=32, kv_heads=16, width=width)
        plans.append(mosaic_gpu._plan(operands, spec, mosaic_gpu.cut(operands, spec))[0])

    jax.eval_shape(trace)
    return plans[0]


@pytest.mark.parametrize(
    ("flagged", "changes", "contained"),
    [
        *[(True, {}, True), (False, {}, False), (True, {"mark_queries": False}, False)],
        *[(True, {"ball": 1e14}, False), (True, {"noise_std": 1e15}, False)],
        *[(True, {"floor": 1e-14}, False), (True, {"ball": None}, False)],
        *[(True, {"denominator_std": math.inf}, False), (True, ROWS, False)],
        (True, {"noise": "none", "noise_std": 0.0, "denominator_std": 0.0}, False),
    ],
)
def test_answers_skip_what_no_sum_can_be_only_where_none_can(flagged, changes, contained):
    spec, plans = _spec({**NOISY, "mark_queries": True, **changes}), []

    def trace():
        operands = _operands()
        if flagged:
            operands = operands._replace(flags=jnp.zeros((2, 1), jnp.int32))
        plans.append(mosaic_gpu._plan(operands, spec, mosaic_gpu.cut(operands, spec))[0])

    jax.eval_shape(trace)
    assert plans[0].contained == contained


@pytest.mark.parametrize("slots", (1, 2, 4, 5))
def test_noise_of_rows_waits_where_no_later_batch_is_drawn(slots):
    plan = _tile_plan(2048, 64)
    plan = dataclasses.replace(plan, shape=dataclasses.replace(plan.shape, slots=slots))
    batch, ring = mosaic_gpu_plan.ROW_BATCH, plan.row_ring
    for first in range(0, 40, batch):
        # A batch is drawn once its first tile's slot is free: all tiles before these are done.
        unused = range(max(first - slots + 1, 0), first)
        drawn = {tile % ring for tile in range(first, first + batch)}
        assert len(drawn) == batch and not drawn & {tile % ring for tile in unused}
    assert ring <= slots - 1 + 2 * batch - 1


_SIDES = ({}, {"is_causal": True}, {"window": (150, 0)}, {"window": (0, 300)}, {"window": (9, 9)})
_SIDES += ({"window": (200, 100), "is_causal": True},)


@pytest.mark.parametrize("changes", _SIDES)
@pytest.mark.parametrize("memories", (1, 2))
@pytest.mark.parametrize(("queries", "keys"), [(700, 700), (300, 1300), (1300, 300), (5, 900)])
def test_every_key_tile_that_a_query_sees_is_judged_once(queries, keys, memories, changes):
    plan = dataclasses.replace(
        _tile_plan(queries, 64, **changes), keys=keys, memories=memories, heads=4, group=2
    )
    seen, judged = set(), []
    for tile in range(plan.tiles):
        block, head, batch = (int(x) for x in plan.place(tile, np))
        low, count = (int(x) for x in plan.key_range(jnp.int32(block)))
        for number in range(low, low + count):
            place = (batch if memories > 1 else 0, head // 2, number)
            seen.add(place)
            judging = plan.judging(jnp.int32(block), jnp.int32(head), jnp.int32(batch))
            if plan.judged(jnp.int32(number), judging):
                judged.append(place)
    assert len(seen) >= 2 * memories and sorted(seen) == sorted(judged)


@pytest.mark.parametrize("changes", ({"is_causal": True}, {"window": (500, 0)}))
@pytest.mark.parametrize(("queries", "width"), [(300, 64), (2048, 128), (4096, 128)])
def test_schedule_has_every_tile_once_and_gives_all_blocks_as_much_to_do(queries, width, changes):
    plan = _tile_plan(queries, width, **changes)
    assert plan.scheduled
    table = plan.schedule()
    assert table.shape[1] % mosaic_gpu_plan.ROW_BATCH == 1 and (table >= 0).all()
    mine = [row[1 : 1 + row[0]] for row in table]
    np.testing.assert_array_equal(np.sort(np.concatenate(mine)), np.arange(plan.tiles))
    # Tile by tile as the kernel places them, not by the table's own costs.
    block, *_ = jax.vmap(plan.place)(jnp.arange(plan.tiles, dtype=jnp.int32))
    costs = np.asarray(jax.vmap(plan.key_range)(block)[1]) + 3
    loads = np.array([costs[tiles].sum() for tiles in mine])
    assert loads.sum() == costs.sum()
    # A block that begins last cannot be later than the mean by more than its last tile.
    assert loads.max() <= loads.mean() + costs.max()
    every = np.array([costs[first :: plan.programs].sum() for first in range(plan.programs)])
    assert loads.max() <= every.max()
    # What the table is for: the formula gives some blocks of the grid the longest rows throughout.
    assert "window" in changes or queries < 2048 or loads.max() < 0.95 * every.max()


def test_key_ranges_are_the_same_in_both_arithmetics():
    for changes in ({"is_causal": True}, {"window": (70, 30)}, {"window": (0, 0)}, {}):
        plan = _tile_plan(700, 64, **changes)
        blocks = np.arange(plan.query_blocks, dtype=np.int32)
        ours = plan.key_range(blocks, np)
        kernels = jax.vmap(plan.key_range)(jnp.asarray(blocks))
        for a, b in zip(ours, kernels, strict=True):
            np.testing.assert_array_equal(np.broadcast_to(a, blocks.shape), b)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("causal", "several groups", "several groups, causal", "width 80"))
def test_answers_are_the_same_bits_however_the_kernel_is_cut(name):
    shapes, changes = CASES[name]
    operands, spec = _operands(**shapes), _spec({**changes, "on_grid": True})
    # Which tiles are shared hangs on their order, and their rounding on that.
    shape = dataclasses.replace(mosaic_gpu.cut(operands, spec), shares=False)
    changes = [{"nearby": 0}, {"nearby": 1 << 30}, {"turns": True}]
    changes += [{"early": early} for early in (None, 0, 4, 20, shape.block_k // 2)]
    if operands.value.shape[3] > 64:
        changes += [{"drawing": 3 - shape.drawing, "registers": (184, 24, 40)}]

    def run(change):
        shaped = dataclasses.replace(shape, **change)
        return jax.jit(lambda o: mosaic_gpu.forward(o, spec, shape=shaped))(operands)

    wanted = run({})
    for change in changes:
        for ours, theirs in zip(jax.tree.leaves(run(change)), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (ours, theirs)))


@pytest.mark.gpu
@pytest.mark.parametrize("programs", (1, 3))
@pytest.mark.parametrize(
    "name",
    [
        *("several groups, causal", "several groups, narrow", "width 80", "rows", "wide"),
        *("wide, several groups, causal", "wide, several runs"),
    ],
)
def test_answers_are_the_same_bits_however_many_tiles_a_block_takes(name, programs, monkeypatch):
    shapes, changes = CASES[name]
    operands, spec = _operands(**shapes), _spec({**changes, "on_grid": True})
    shape = dataclasses.replace(mosaic_gpu.cut(operands, spec), shares=False)

    def run():
        run = jax.jit(lambda o: mosaic_gpu.forward(o, spec, shape=shape))
        return jax.tree.leaves(run(operands))

    wanted = run()
    monkeypatch.setattr(mosaic_gpu, "_PROGRAMS", programs)
    for ours, theirs in zip(run(), wanted, strict=True):
        np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (ours, theirs)))
