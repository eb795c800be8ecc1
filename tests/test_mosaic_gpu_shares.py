"""Tiles whose keys several blocks of the Hopper kernel's grid share."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import admission, reference
from dpfa_jax.clipping._batch import inner_jaxprs
from dpfa_jax.pallas import accumulators, mosaic_gpu, mosaic_gpu_memory
from dpfa_jax.pallas import mosaic_gpu_shares as shares
from tests._mosaic_gpu_common import NOISY, make_operands, make_spec, relative

_PROGRAMS = 132
_LEFT = (1, 4, 28, 68, 100, 131)
_KEYS = (1024, 2048, 4096, 7700, 9000, 16384, 32768)
_USUAL = shares.Costs()
_TILES = ((96, None), (128, None), (96, 80), (64, 128))


def _dealt(left, keys, block_k, alone, first=0, costs=_USUAL):
    size = -(-keys // block_k)
    end = first + left
    return shares.dealt(first, end, _PROGRAMS, size, keys, block_k, alone, costs)


def _of_tile(table, tile):
    """(block, first, count) of a tile's shares, the last one first."""
    (last,) = np.flatnonzero((table[:, shares.LAST, shares.TILE] == tile) & _used(table)[:, 1])
    others = table[last, shares.LAST, shares.OTHERS]
    rows = [(last, shares.LAST), *((last - 1 - i, shares.KEPT) for i in range(others))]
    assert all(table[row][shares.TILE] == tile for row in rows)
    place = table[last, shares.LAST, shares.PLACE]
    assert [table[row][shares.PLACE] for row in rows[1:]] == [place - i for i in range(others)]
    return [(block, *table[block, row, [shares.FIRST, shares.COUNT]]) for block, row in rows]


def _used(table):
    return table[:, :, shares.COUNT] > 0


@pytest.mark.parametrize(("block_k", "alone"), _TILES)
@pytest.mark.parametrize("costs", (_USUAL, shares.WIDE))
def test_every_key_tile_is_one_blocks_and_the_next_ones_add_it_up(block_k, alone, costs):
    split = 0
    for left, keys in itertools.product(_LEFT, _KEYS):
        table = _dealt(left, keys, block_k, alone, first=7, costs=costs)
        if table is None:
            continue
        split += 1
        size = -(-keys // block_k)
        used, count = _used(table), 0
        for tile in range(7, 7 + left):
            found = _of_tile(table, tile)
            count += len(found)
            ends = np.cumsum([number for _, _, number in reversed(found)])
            firsts = [first for _, first, _ in reversed(found)]
            np.testing.assert_array_equal(firsts, [0, *ends[:-1]])
            assert ends[-1] == size
        # Each kept sum has a place of its own.
        places = table[:, shares.KEPT, shares.PLACE][used[:, 0]]
        assert len(set(places)) == used[:, 0].sum()
        assert not len(places) or (0 <= places.min() and places.max() < shares.places(table))
        # No other shares than these; sums that are kept are added up by one later block.
        assert count == used.sum()
        assert (table[:, shares.KEPT, shares.OTHERS][used[:, 0]] == -1).all()
        loads = (table[:, :, shares.COUNT] + costs.tile * used).sum(1)
        assert loads.max() <= size + costs.tile - 2
        if alone is not None:
            # After a last share that needs the memory of runs nothing may wait there.
            assert not (used[:, 0] & (table[:, shares.LAST, shares.COUNT] > alone)).any()
    assert split > 5


@pytest.mark.parametrize(("block_k", "alone"), _TILES)
def test_shares_round_by_no_more_than_is_charged(block_k, alone):
    # As for whole sums: every step, join of groups, of runs and of shares errs against us.
    size = accumulators.GROUP_KEYS // block_k * block_k
    run, split = accumulators.RUN_GROUPS * size, 0
    for left, keys in itertools.product(_LEFT, _KEYS):
        table = _dealt(left, keys, block_k, alone)
        if table is None:
            continue
        split += 1
        for tile in range(left):
            counts = [count * block_k for *_, count in _of_tile(table, tile)]
            counts[0] -= -(-keys // block_k) * block_k - keys
            joins = sum(itertools.accumulate(counts)) - counts[0]
            for mine in counts:
                # The changed record stands in the first group of this share.
                inside = np.minimum(np.arange(16, size + 16, 16), min(size, mine))
                error = 5.5 * 2.0**-23 * inside[: -(-min(size, mine) // 16)].sum()
                groups = [min(end, mine) for end in range(size, mine + size, size)]
                error += 2.0**-24 * sum(mass for mass in groups[1:] if mass <= run)
                error += 2.0**-24 * sum(range(run, mine, run)) + 2.0**-24 * mine
                error += 2.0**-24 * joins
                assert 2 * error <= accumulators.sums_rounding(keys)
    assert split > 5


def test_more_shares_than_are_charged_are_none():
    assert accumulators.split_is_charged([2048, 2048])
    assert accumulators.split_is_charged([4096])
    assert not accumulators.split_is_charged([96] * 43)
    # All joins after the first are of all keys here, of few there.
    assert accumulators.split_is_charged([256] * 8 + [2048])
    assert not accumulators.split_is_charged([2048] + [256] * 8)
    # The last key tile is not full: there are no 32,769 keys.
    assert _dealt(68, 32768, 96, 80) is not None
    assert not accumulators.split_is_charged([16384, 16385])


def _shared(operands, spec, *, summed=False, **changes):
    shape = mosaic_gpu.cut(operands, spec, summed=summed)
    return dataclasses.replace(shape, **{"shares": True, **changes})


def _plan(operands, spec, **changes):
    plans = []

    def trace(operands):
        shape = _shared(operands, spec, **changes)
        plans.append(mosaic_gpu._plan(operands, spec, shape)[0])

    jax.eval_shape(trace, operands)
    return plans[0]


def _ids(length):
    return np.broadcast_to(np.arange(length, dtype=np.int32) * 4 // length, (2, length))


# Tiles that are left after whole ones, or none but such: batch 2, heads, queries, keys, width.
CALLS = {
    "after whole tiles": ({"heads": 16, "kv_heads": 4, "queries": 640, "keys": 1100}, {}),
    "wider": ({"heads": 16, "kv_heads": 16, "queries": 640, "keys": 2100, "width": 128}, {}),
    "runs": ({"heads": 12, "queries": 800, "keys": 16500, "width": 96}, {}),
    "float16": ({"keys": 4000, "width": 128, "dtype": "float16"}, {}),
    "one query": ({"queries": 1, "keys": 9000, "width": 80}, {}),
    "widest": ({"queries": 70, "keys": 9000, "width": 256}, {}),
    "float8 scores": ({"keys": 4000, "width": 128}, {"float8_scores": True}),
    "no denominator": (
        {"keys": 4000, "width": 128},
        {"denominator_std": float("inf"), "floor": 50.0},
    ),
    "rows": ({"keys": 4000, "width": 64}, {"noise": "rows", "row_clip": 0.1, "ball": None}),
    # Blocks that keep sums and end another tile; shares longer than a run.
    "both": ({"heads": 14, "kv_heads": 14, "queries": 384, "keys": 2100, "width": 128}, {}),
    "long shares": ({"heads": 38, "kv_heads": 38, "queries": 300, "keys": 16500, "width": 96}, {}),
    "segments": (
        {"keys": 4000, "width": 128, "query_segments": _ids(200), "key_segments": _ids(4000)},
        {},
    ),
    "judged": (
        {"keys": 4000, "width": 128, "flags": np.zeros((2, 1), np.int32)},
        {"mark_queries": True, "judge_keys": True},
    ),
    "judged, float8 scores": (
        {"keys": 4000, "width": 128, "flags": np.zeros((2, 1), np.int32)},
        {"mark_queries": True, "float8_scores": True},
    ),
}


def _call(name):
    given, changes = CALLS[name]
    changes = {**NOISY, "noise_std": 1.0, "floor": 1.0, "on_grid": True, **changes}
    return make_operands(**given), make_spec(changes)


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_share_tiles_lower_for_cuda_without_a_gpu(name):
    operands, spec = _call(name)
    plan = _plan(operands, spec)
    assert plan.splits and (plan.whole > 0) == (plan.tiles > _PROGRAMS)
    shape = _shared(operands, spec)
    run = jax.jit(lambda operands: mosaic_gpu.forward(operands, spec, shape=shape))
    text = run.trace(operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "dpfa_mosaic_forward_kernel" in text


def test_calls_have_shares_of_every_kind():
    tables = {name: _plan(*_call(name)) for name in ("both", "long shares")}
    for plan in tables.values():
        table = plan.dealt()
        assert (_used(table).sum(1) == 2).sum() >= 40
        assert plan.part == ("far" if plan.regroups else "part")
    plan = tables["long shares"]
    alone, counts = 16 * plan.shape.flush, plan.dealt()[:, :, shares.COUNT]
    assert plan.regroups and (counts > alone).any(0).all()
    both = _used(plan.dealt()).all(1)
    assert counts[both, shares.LAST].max() <= alone < counts[both, shares.KEPT].max()


@pytest.mark.parametrize("name", CALLS)
def test_sums_have_room_where_they_wait(name):
    plan = _plan(*_call(name))
    places, compute, size = mosaic_gpu_memory.buffers(plan)[plan.part]
    assert places >= plan.places and compute == plan.shape.compute
    assert size >= 64 * plan.value_width + 2 * 64
    # Copies write over offsets that were used, not over those that are being read.
    assert plan.offset_slots > plan.shape.stages


def test_tiles_are_shared_where_their_sums_may_be_added():
    operands, spec = _call("wider")
    assert _plan(operands, spec).splits
    assert not _plan(operands, spec, shares=False).splits
    for change in ({"is_causal": True}, {"window": (300, 0)}, {"score_cap": None, "ball": None}):
        other = dataclasses.replace(spec, noise="none", **change)
        assert not _plan(operands, other).splits
    # 128 tiles of which each block has one, or none.
    few = make_operands(heads=16, queries=512, keys=2100, width=128)
    plan = _plan(few, spec)
    assert plan.programs == plan.tiles == 128 and not plan.splits


def _names(jaxpr):
    for line in jaxpr.eqns:
        yield line.primitive.name
        for inner in inner_jaxprs(line):
            yield from _names(inner)


def test_examples_of_a_batch_do_not_share_counters():
    operands, spec = _call("wider")

    shape = _shared(operands, spec)

    def run(operands):
        return mosaic_gpu.forward(operands, spec, shape=shape)[0]

    assert "get_global" in set(_names(jax.make_jaxpr(run)(operands).jaxpr))
    two = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), operands)
    assert "get_global" not in set(_names(jax.make_jaxpr(jax.vmap(run))(two).jaxpr))

    # Nor where all but the noise is the same for all.
    def noised(key):
        return run(operands._replace(noise_key=key))

    keys = jnp.stack([operands.noise_key] * 3)
    assert jax.eval_shape(jax.vmap(noised), keys).shape == (3, *operands.query.shape)
    assert "get_global" not in set(_names(jax.make_jaxpr(jax.vmap(noised))(keys).jaxpr))


@jax.jit
def _differences(one, other):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return sum(jnp.sum(a != b) for a, b in leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_answers_of_shared_tiles_are_those_of_whole_ones(name):
    operands, spec = _call(name)
    shape = _shared(operands, spec)
    assert _plan(operands, spec).splits

    def run(shape):
        return jax.jit(lambda o: mosaic_gpu.forward(o, spec, shape=shape))

    run_shared = run(shape)
    out, found = run_shared(operands)
    other, wanted = run(dataclasses.replace(shape, shares=False))(operands)
    scored = admission.as_scored(reference, operands, spec)
    truth, _ = jax.jit(lambda operands: reference.forward(operands, spec))(scored)
    assert relative(out, truth) < 2.0**-8 and relative(out, other) < 2.0**-10
    for mine, whole in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert relative(mine, whole) < 2.0**-10 or not np.any(whole)
    # Whoever waits, the same sums are added in the same order.
    again = [_differences((out, found), run_shared(operands)) for _ in range(300)]
    assert int(sum(again)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("after whole tiles", "wider", "runs", "one query", "widest"))
def test_sums_of_shared_tiles_are_those_of_whole_ones(name):
    operands, spec = _call(name)
    shape = _shared(operands, spec, summed=True)
    (found, _), mass = mosaic_gpu.sums(operands, spec, shape=shape)
    whole = dataclasses.replace(shape, shares=False)
    (wanted, _), other = mosaic_gpu.sums(operands, spec, shape=whole)
    assert relative(found, wanted) < 1e-6 and relative(mass[0], other[0]) < 1e-6
    # Where nothing is shared every bit is the same: some tiles were.
    assert not np.array_equal(found, wanted)


@pytest.mark.gpu
def test_shared_tiles_under_vmap_are_whole_ones():
    operands, spec = _call("wider")
    other = operands._replace(noise_key=operands.noise_key + 1)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), operands, other)
    shape = _shared(operands, spec)
    found = jax.jit(jax.vmap(lambda o: mosaic_gpu.forward(o, spec, shape=shape)[0]))(both)
    whole = jax.jit(lambda o: mosaic_gpu.forward(o, spec)[0])
    for mine, one in zip(found, (operands, other), strict=True):
        wanted = whole(one)
        np.testing.assert_array_equal(np.asarray(mine, np.float32), np.asarray(wanted, np.float32))
