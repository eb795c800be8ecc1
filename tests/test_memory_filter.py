"""Which statement does this file keep true? No path of queries takes more than C of a record."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpfa_jax
from dpfa_jax.memory import FilteredMemory, filtered

KEY = jax.random.key(7)
step = jax.jit(filtered.spend, static_argnames="clip_norm")


def spend_all(squares, clip_norm, start=0):
    """Σ u²‖φ‖² over steps of one record, each next square chosen by what was spent so far."""
    spent, total, charged = jnp.full(1, start, jnp.uint32), 0.0, []
    present = jnp.ones(1, bool)
    for square in squares:
        square = square(int(spent[0])) if callable(square) else square
        log_square = jnp.log(jnp.float32(square))[None]
        log_weight, after = step(spent, log_square, present, clip_norm=clip_norm)
        total += np.exp(2 * float(log_weight[0]) + np.float64(log_square[0]))
        charged.append(int(after[0]) - int(spent[0]))
        spent = after
    return total, charged


@pytest.mark.parametrize("clip_norm", [1.0, 3.7, 1e-3])
def test_spend_never_passes_the_bound_on_any_path_and_reaches_it(clip_norm):
    rng = np.random.default_rng(0)
    bound = clip_norm**2
    left = lambda factor: lambda spent: bound * factor * (1 - spent / 2**31) + 1e-30  # noqa: E731
    paths = {
        "small": np.full(300, bound / 290),
        "random": bound * 10 ** rng.uniform(-9, 1, 200),
        "just what is left": [left(1 + 1e-7)] * 50,
        "half of what is left": [left(0.5)] * 60 + [bound],
        "huge": [bound * 1e9, bound],
        "nothing, then all": [1e-30] * 20 + [bound] * 3,
    }
    for name, squares in paths.items():
        total, charged = spend_all(squares, clip_norm)
        assert total <= bound * (1 + filtered.FILTER_ERROR) ** 2, name
        assert sum(charged) <= 2**31 and min(charged) >= 0, name
        assert total >= 0.99 * bound, name


def test_spend_is_not_free_for_queries_that_float32_would_forget():
    # Half of the budget first, then 2⁻²⁶ of it at a time: in float32 .5 + 2⁻²⁶ = .5 for ever.
    half = np.float32(0.5)
    assert half + np.float32(2.0**-26) == half
    _, charged = spend_all([0.5] + [2.0**-26] * 100, 1.0)
    assert min(charged[1:]) >= 2**5
    spent = jnp.full(1, 2**31 - 10 * 32, jnp.uint32)
    log_weights = []
    for _ in range(12):
        arguments = spent, jnp.log(jnp.full(1, 2.0**-26)), jnp.ones(1, bool)
        log_weight, spent = step(*arguments, clip_norm=1.0)
        log_weights.append(float(log_weight[0]))
    assert log_weights[0] == 0 and log_weights[-1] == -np.inf and int(spent[0]) == 2**31


def test_spend_charges_a_unit_for_what_underflows_and_nothing_for_null():
    none = jnp.full(2, -jnp.inf)
    _, spent = step(jnp.zeros(2, jnp.uint32), none, jnp.array([True, False]), clip_norm=1.0)
    assert spent.tolist() == [1, 0]
    used_up = jnp.full(2, 2**31, jnp.uint32)
    log_weights, spent = step(used_up, none, jnp.array([True, False]), clip_norm=1.0)
    assert np.isneginf(log_weights).all() and spent.tolist() == [2**31, 2**31]


@functools.cache
def life():
    """A run of six steps of two queries on a memory with next to no noise."""
    noise = dpfa_jax.ClippedContributions(
        noise_multiplier=1e-6,
        value_bound=1.0,
        score_cap=1.0,
        clip_norm=1.5,
        denominator_weight=0.0,
        floor=10.0,
    )

    @jax.jit
    def run(key, value, queries, rng):
        memory = FilteredMemory.create(key, value, mechanism=noise, rng=rng, capacity=12, scale=1.0)

        def attend(memory, query):
            answer, memory = memory.attend(query)
            return memory, answer

        memory, answers = jax.lax.scan(attend, memory, queries)
        return 10 * answers, memory.state.private_spent

    return functools.partial(run, rng=KEY)


def test_filtered_memory_moves_by_at_most_the_clip_norm_over_all_its_answers():
    # Without noise to speak of, with and without record 0: what is left is what it contributed.
    rng = np.random.default_rng(1)
    key, value = jnp.asarray(rng.normal(size=(3, 1, 2)), jnp.float32), jnp.ones((3, 1, 1)) * 0.3
    key = key.at[0].set(jnp.array([1.0, 0.0]))
    value = value.at[0].set(1.0)
    run = life()
    paths = {
        "all at the cap": np.full((6, 2), 1.0),
        "one, then small": np.array([[1.0, 1.0]] + [[-2.0, -1.0]] * 5),
        "random": rng.uniform(-3, 2, (6, 2)),
    }
    totals = {}
    for name, scores in paths.items():
        queries = jnp.asarray(scores, jnp.float32).reshape(6, 2, 1, 1)
        queries = jnp.concatenate([queries, jnp.zeros_like(queries)], -1)
        there, spent = run(key, value, queries)
        here, absent = run(key.at[0, 0, 0].set(jnp.nan), value, queries)
        moved = np.asarray(there, np.float64) - np.asarray(here, np.float64)
        # What the noise of 1.5e-6 leaves in the last bits of float32 answers below 4.
        totals[name] = np.sqrt((moved**2).sum()) - np.sqrt(12) * 10 * 2.0**-25
        assert totals[name] <= 1.5 * (1 + filtered.FILTER_ERROR), name
        assert int(absent[0]) == 0 and 0 < int(spent[0]) <= 2**31
        np.testing.assert_array_equal(absent[1:], spent[1:])
    assert totals["all at the cap"] >= 1.5 * 0.999


def test_filtered_memory_is_one_step_for_a_batch():
    rows = jnp.ones((1, 1, 1)), jnp.ones((1, 1, 1))
    noise = dpfa_jax.ClippedContributions(
        noise_multiplier=1e-6,
        value_bound=1.0,
        score_cap=1.0,
        clip_norm=1.0,
        denominator_weight=0.0,
        floor=1.0,
    )
    memory = FilteredMemory.create(*rows, mechanism=noise, rng=KEY, capacity=18, scale=1.0)
    query = jnp.ones((9, 1, 1))
    answer, memory = memory.attend(query)
    np.testing.assert_allclose(answer, 1 / 3, rtol=filtered.FILTER_ERROR)
    assert int(memory.state.private_spent[0]) >= 2**31 * (1 - filtered.FILTER_ERROR)
    # The record is silent from then on.
    assert np.abs(memory.attend(query)[0]).max() < 1e-4


def test_filtered_memory_has_the_noise_of_its_adjacency():
    kinds = (dpfa_jax.REPLACE_ONE, dpfa_jax.GROUP(3))
    noisy = {}
    for kind in kinds:
        noise = dpfa_jax.ClippedContributions(
            noise_multiplier=1e-3,
            value_bound=1.0,
            score_cap=1.0,
            clip_norm=1.0,
            denominator_weight=0.0,
            floor=1.0,
            adjacency=kind,
        )
        nothing = jnp.zeros((0, 1, 1)), jnp.zeros((0, 1, 1))
        memory = FilteredMemory.create(*nothing, mechanism=noise, rng=KEY, capacity=4)
        noisy[kind.kind] = np.asarray(memory.attend(jnp.ones((4, 1, 1)))[0], np.float64)
        assert memory.event == dpfa_jax.accounting.Gaussian(1e-3, 4)
    # 2C (values may oppose where no denominator is released) and 3C, under the same unit noise.
    np.testing.assert_allclose(2 * noisy["GROUP"], 3 * noisy["REPLACE_ONE"], rtol=2.0**-20)
    # Six deviations of 3e-3, and no less than a sixth of one among four.
    assert 5e-4 < np.abs(noisy["GROUP"]).max() < 18e-3
    pairs = itertools.pairwise(noisy["GROUP"].reshape(-1))
    assert all(abs(first - second) > 1e-6 for first, second in pairs)
