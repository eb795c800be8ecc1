"""Which statement does this file keep true? A memory computes what its note says, and fails closed.

Answers are held against float64 NumPy; every way to use a memory wrongly that can be seen is tried.
"""

import dataclasses
import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpfa_jax
from dpfa_jax import accounting, reference
from dpfa_jax.memory import (
    FilteredMemory,
    GaussianProcessMemory,
    RandomFeatureMemory,
    RandomFeatures,
)
from tests import oracles

NOISE_ENDS = np.sqrt(2 * 40 * np.log(2))
GAUSSIAN_PROCESS = dpfa_jax.GaussianProcessNoise(
    noise_multiplier=0.5, value_bound=1.0, key_bound=1.0, key_scale=1.25, jitter=1e-3
)
CLIPPED = dpfa_jax.ClippedContributions(
    noise_multiplier=0.5, value_bound=1.0, score_cap=1.0, clip_norm=2.0
)
FEATURES = RandomFeatures(noise_multiplier=1.0, value_bound=1.0, key_bound=1.0, features=6)
CAPACITY = 6
KEY = jax.random.key(7)

gaussian_process = functools.partial(
    GaussianProcessMemory.create, mechanism=GAUSSIAN_PROCESS, capacity=CAPACITY
)
filtered = functools.partial(FilteredMemory.create, mechanism=CLIPPED, capacity=CAPACITY)
both = pytest.mark.parametrize("create", [gaussian_process, filtered], ids=["process", "filtered"])


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


ROWS = draw(5, 2, 3), draw(5, 2, 2, seed=1)
QUERY = draw(1, 4, 3, seed=2)
OTHER = draw(1, 4, 3, seed=3)


def leaves(memory):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(memory)]


def copied(memory):
    """The memory in buffers of its own."""
    return jax.tree.map(jnp.copy, memory)


def attend(memory, query):
    """One attend that leaves the memory as it was: a fork, where a user would get an error."""
    return copied(memory).attend(query)


def ratio_of(numerator, denominator, floor, bound):
    ratio = numerator / np.maximum(denominator, floor)[..., None]
    return oracles.into_ball(ratio, bound)


def test_noisy_sums_are_answered_as_noisy(monkeypatch):
    # Without noise a denominator of 0 means that nothing was seen; with noise it means nothing.
    seen, answer = [], reference.answer

    def recorded(spec, *sums):
        seen.append(spec.noise)
        return answer(spec, *sums)

    monkeypatch.setattr(reference, "answer", recorded)
    jax.clear_caches()
    rows = [row[None] for row in (QUERY, *ROWS)]
    options = {"mechanism": GAUSSIAN_PROCESS, "rng": KEY, "queries": "public"}
    dpfa_jax.private_attention(*rows, **options)
    gaussian_process(*ROWS, rng=KEY).attend(QUERY)
    memory = RandomFeatureMemory.release(
        *ROWS, mechanism=FEATURES, rng=KEY, feature_rng=jax.random.key(1)
    )
    memory.attend(QUERY)
    assert len(seen) == 3 and set(seen) == {"sums"}


def test_gaussian_process_memory_answers_sums_plus_a_batch_factor_times_its_noise():
    # Three attends, the third asking the first again, against one float64 factor of all rows.
    key, value = ROWS
    memory = gaussian_process(key, value, rng=KEY)
    process = memory.settings.mechanism.process(memory.settings.call, gamma=memory.settings.scale)
    asked = np.concatenate([QUERY, OTHER, QUERY]).astype(np.float64)
    answers = []
    for query in (QUERY, OTHER, QUERY):
        answer, memory = attend(memory, query)
        answers.append(answer[0])
    answers = np.array(answers, np.float64)
    noise = np.asarray(memory.state.secret_noise, np.float64)
    count = asked.shape[0] * 2
    assert int(memory.state.count) == count
    # Given the first answer the repeated one is apart by a variance of at most 2λ in each sum.
    spread = NOISE_ENDS * np.sqrt(4 * process.jitter) * process.noise_std
    spread *= (1 + 1 / process.denominator_weight) / process.floor
    # The released sums lie on a grid of at most 2**-10 of their noise's std.
    grid = 2.0**-10 * process.noise_std * (1 + 1 / process.denominator_weight) / process.floor
    assert np.abs(answers[0] - answers[2]).max() <= spread + grid
    assert np.abs(answers[0] - answers[1]).max() > spread + grid
    clip, weight, gamma = process.clip_norm, process.denominator_weight, process.gamma
    radius = gamma * (process.key_scale * process.key_bound) ** 2
    for head in range(2):
        rows = asked[:, 2 * head : 2 * head + 2].reshape(count, 3) / process.key_scale
        keys = np.asarray(key, np.float64)[:, head] * process.key_scale
        sums = oracles.kernel_sums(
            rows,
            keys,
            np.asarray(value, np.float64)[:, head],
            np.ones(len(keys)),
            gamma=gamma,
            denominator_weight=weight,
            clip_norm=clip * np.exp(radius / 2),
        )
        sums = sums * np.exp(-gamma * (rows**2).sum(1)[:, None] / 2 - radius / 2)
        distance = ((rows[:, None] - rows[None]) ** 2).sum(-1)
        gram = np.exp(-gamma * distance / 2)
        lower = np.linalg.cholesky(gram + process.jitter * np.eye(count))
        noisy = sums + process.noise_std * (lower @ noise[head, :count])
        expected = ratio_of(noisy[:, :-1], noisy[:, -1] / weight, process.floor, 1.0)
        got = answers[:, 2 * head : 2 * head + 2].reshape(count, 2)
        # Backward error of either factor: E ≤ count²·u of a matrix of norm ≤ 2·count, conditioned
        # by 2·count/λ; then one rounding of each of N and D to float32, and of the ratio.
        scale = np.abs(noisy).max() / process.floor
        factor = count**2 * 2.0**-53 * 2 * count / process.jitter * NOISE_ENDS * process.noise_std
        # The quotient and the projection: eight roundings more.
        assert np.abs(got - expected).max() <= grid + scale * (12 * 2.0**-24 + factor)


def test_gaussian_process_memory_without_a_certificate_answers_nan_and_stays_as_it_was():
    hopeless = dataclasses.replace(GAUSSIAN_PROCESS, jitter=1e-30)
    memory = gaussian_process(*ROWS, rng=KEY, mechanism=hopeless)
    before = leaves(memory)
    answer, memory = attend(memory, jnp.ones((1, 4, 3)))
    assert np.isnan(answer).all()
    for old, new in zip(before, leaves(memory), strict=True):
        np.testing.assert_array_equal(old, new)


@both
def test_memory_goes_through_scan_donation_and_checkpoints_until_it_is_full(create):
    queries = draw(4, 1, 4, 3)
    memory = create(*ROWS, rng=KEY)
    answers = []
    for query in queries[:3]:
        answer, memory = memory.attend(query)
        answers.append(answer)
    assert int(memory.state.count) == CAPACITY == memory.capacity
    with pytest.raises(ValueError, match="at most 0 more queries per kv head, got 2"):
        memory.attend(queries[3])
    fresh = create(*ROWS, rng=KEY)
    saved = flax.serialization.to_bytes(fresh.state)
    step = functools.partial(jax.lax.scan, lambda memory, query: memory.attend(query)[::-1])
    last, scanned = jax.jit(step, donate_argnums=0)(fresh, queries)
    assert fresh.state.private_key.is_deleted()
    # Inside jit a full memory answers NaN and stays as it was.
    assert np.isnan(scanned[3]).all()
    np.testing.assert_allclose(scanned[:3], np.stack(answers), rtol=0, atol=2.0**-20)
    for old, new in zip(leaves(memory), leaves(last), strict=True):
        np.testing.assert_allclose(old, new, rtol=2.0**-20, atol=2.0**-20)
    blank = create(*(jnp.zeros_like(rows) for rows in ROWS), rng=jax.random.key(0))
    state = flax.serialization.from_bytes(blank.state, saved)
    restored = dataclasses.replace(blank, state=jax.tree.map(jnp.asarray, state))
    np.testing.assert_array_equal(restored.attend(queries[0])[0], answers[0])


@both
def test_memory_refuses_the_forks_it_can_see(create):
    memory = create(*ROWS, rng=KEY)
    with pytest.raises(ValueError, match="as an argument of the traced function"):
        jax.jit(lambda query: memory.attend(query)[0])(QUERY)
    with pytest.raises(ValueError, match="as an argument of the traced function"):
        jax.vmap(lambda query: memory.attend(query)[0])(QUERY[None])
    with pytest.raises(ValueError, match="got vmapped queries"):
        jax.jit(jax.vmap(lambda m, q: m.attend(q), in_axes=(None, 0)))(memory, QUERY[None])
    with pytest.raises(ValueError, match="no derivative"):
        jax.jit(jax.grad(lambda q, m: m.attend(q)[0].sum()))(QUERY, memory)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    none = jax.sharding.PartitionSpec()
    for tracked, message in ((True, "equal on all shards"), (False, "check_vma=True")):
        with pytest.raises(ValueError, match=message):
            jax.shard_map(
                lambda memory, query: memory.attend(query)[0],
                mesh=mesh,
                in_specs=(none, spec),
                out_specs=spec,
                check_vma=tracked,
            )(memory, jnp.concatenate([QUERY, QUERY]))
    memory.attend(QUERY)
    with pytest.raises(ValueError, match="not used yet"):
        memory.attend(QUERY)


@both
def test_memory_forks_share_noise_only_as_long_as_they_ask_the_same(create):
    memory = create(*ROWS, rng=KEY)
    _, memory = memory.attend(OTHER)
    other = QUERY.at[0, 0, 0].add(1e-6)
    first, left = attend(memory, QUERY)
    np.testing.assert_array_equal(attend(memory, QUERY)[0], first)
    second, right = attend(memory, other)
    # One bit of one query, and the whole step has other noise, in every head.
    assert (np.abs(np.asarray(first) - second) > 1e-3).mean() > 0.9
    assert (np.asarray(left.state.secret_history) != right.state.secret_history).all()
    one, two = memory.fork()
    np.testing.assert_array_equal(attend(one, other)[0], second)
    np.testing.assert_array_equal(attend(two, QUERY)[0], first)
    with pytest.raises(ValueError, match="not used yet"):
        memory.fork()


@both
def test_memory_is_charged_once_at_its_creation(create):
    def life(key, value, queries, rng):
        memory = create(key, value, rng=rng)
        step = lambda memory, query: memory.attend(query)[::-1]  # noqa: E731
        return jax.lax.scan(step, memory, queries)[1]

    queries = jax.ShapeDtypeStruct((100, 1, 2, 3), jnp.float32)
    event = accounting.events(life, *ROWS, queries, KEY)
    memory = create(*ROWS, rng=KEY)
    assert event == memory.event
    # Six queries of two heads, with two value columns and the denominator's.
    assert event == accounting.Gaussian(0.5, CAPACITY * 2 * 3)
    assert accounting.events(lambda m, q: m.attend(q), memory, QUERY) == accounting.NoRelease()
    forked = accounting.events(lambda memory: memory.fork(), memory)
    assert forked == event
    many = accounting.events(jax.vmap(lambda key: create(*ROWS, rng=key)), jax.random.split(KEY, 3))
    assert many == accounting.event.Repeated(event, 3)
    said = memory.guarantee(delta=1e-5)
    assert f"{accounting.epsilon(event, 1e-5):.4g}" in said and "6 queries" in said


@both
def test_memory_refuses_a_key_that_is_a_constant_of_a_jitted_function(create):
    with pytest.raises(ValueError, match="an argument of the function being traced"):
        jax.jit(lambda key: create(key, ROWS[1], rng=KEY).attend(QUERY)[0])(ROWS[0])


@both
def test_memory_vmaps_over_memories_with_noise_of_their_own(create):
    keys = jnp.stack([ROWS[0], ROWS[0]])

    def life(key, rng):
        return create(key, ROWS[1], rng=rng).attend(QUERY)

    answers, memories = jax.jit(jax.vmap(life, (0, None)))(keys, KEY)
    assert (np.abs(np.asarray(answers[0]) - answers[1]) > 1e-3).mean() > 0.9
    with pytest.raises(ValueError, match="a stack of them"):
        memories.attend(QUERY)


@both
def test_memory_takes_a_record_that_is_not_finite_for_none(create):
    key, value = ROWS
    bad = [(key.at[0, 1, 2].set(jnp.nan), value), (key, value.at[0, 0, 1].set(-jnp.inf))]
    absent = create(key.at[0].set(jnp.nan), value, rng=KEY)
    expected, _ = attend(absent, QUERY)
    present, _ = attend(create(key, value, rng=KEY), QUERY)
    assert np.isfinite(expected).all()
    assert np.abs(np.asarray(present) - expected).max() > 1e-4
    for rows in bad:
        np.testing.assert_array_equal(attend(create(*rows, rng=KEY), QUERY)[0], expected)


@both
def test_memory_answers_a_bad_query_with_nan_of_its_own(create):
    memory = create(*ROWS, rng=KEY)
    query = QUERY.at[0, 1, 2].set(jnp.inf).at[0, 3, 0].set(jnp.nan)
    answer, memory = attend(memory, query)
    nan = np.isnan(answer).all(-1)
    assert nan[0, 1] and nan[0, 3] and nan.sum() == 2 and np.isnan(answer).sum() == 4
    assert int(memory.state.count) == 2


@both
def test_memory_of_nothing_is_noise(create):
    memory = create(jnp.zeros((0, 2, 3)), jnp.zeros((0, 2, 2)), rng=KEY)
    answer, _ = attend(memory, QUERY)
    assert np.isfinite(answer).all() and np.abs(answer).min() > 0


@both
def test_memory_says_what_to_pass(create):
    key, value = ROWS
    for rows, message in (
        ((key[None], value[None]), r"Pass key\[0\]"),
        ((key[:4], value), "one value row for each key row"),
        ((key[:, 0], value), "one value row for each key row"),
        ((key[..., :0], value), "no empty axis"),
    ):
        with pytest.raises(ValueError, match=message):
            create(*rows, rng=KEY)
    with pytest.raises(TypeError, match="Cast it"):
        create(key.astype(jnp.int32), value, rng=KEY)
    # Under the signature checks of these tests the words are the checker's.
    for wrong in ({"rng": 0}, {"rng": None}, {"rng": KEY, "mechanism": FEATURES}):
        with pytest.raises(TypeError):
            create(key, value, **wrong)
    with pytest.raises(ValueError, match="capacity >= 1"):
        create(key, value, rng=KEY, capacity=0)
    with pytest.raises(ValueError, match="scale"):
        create(key, value, rng=KEY, scale=float("nan"))
    memory = create(key, value, rng=KEY)
    for shape in ((4, 3), (1, 3, 3), (1, 2, 4), (0, 2, 3)):
        with pytest.raises(ValueError, match="N a multiple of 2, H = 3"):
            memory.attend(jnp.zeros(shape))
    for text in (repr(memory), str(memory.state), repr(memory.state)):
        assert "Array" not in text and "array" not in text


def test_gaussian_process_memory_clips_values_that_may_be_replaced():
    replace = dataclasses.replace(GAUSSIAN_PROCESS, adjacency=dpfa_jax.REPLACE_ONE)
    memory = gaussian_process(ROWS[0], 50 * ROWS[1], rng=KEY, mechanism=replace)
    norms = np.linalg.norm(memory.state.private_value, axis=-1)
    assert np.abs(norms - 1).max() < 2.0**-13
    memory = gaussian_process(ROWS[0], 50 * ROWS[1], rng=KEY)
    assert np.linalg.norm(memory.state.private_value, axis=-1).max() > 50
    answer = memory.attend(QUERY.astype(jnp.bfloat16)[None])[0]
    assert answer.shape == (1, 1, 4, 2) and answer.dtype == jnp.bfloat16
