"""Which statement does this file keep true? What a memory's answers tell is what it is charged.

Each test runs a memory through its public functions on two neighbouring data sets, N times a side
with keys of their own, and scores the answers by the log-likelihood ratio of the two known normal
laws, the most powerful test there is. `mu_lower_bound` exceeds the truth with probability 1e-6,
which is the false-alarm rate of every assertion `<=`; each test carries a control that must fail.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpfa_jax
from dpfa_jax.auditing.attacks import two_point_direction
from dpfa_jax.auditing.bounds import mu_lower_bound
from dpfa_jax.memory import (
    FilteredMemory,
    GaussianProcessMemory,
    RandomFeatureMemory,
    RandomFeatures,
)
from tests import oracles

RUNS = 20_000
FLOOR = 100.0  # the answer is the numerator over this: linear in the noise, nothing is projected
KEY = jnp.array([[[0.6, 0.8]], [[-1.0, 0.0]]])
VALUE = jnp.array([[[1.0]], [[0.5]]])
WITHOUT = KEY.at[0].set(jnp.nan)
NEAR = jnp.array([[0.6, 0.8], [0.5, 0.85], [0.65, 0.7], [0.6, 0.9]])[:, None]
FAR = jnp.array([[0.0, 1.0], [0.8, 0.6], [0.9, 0.3], [0.3, 1.0]])[:, None]
PLAIN = {"value_bound": 1.0, "denominator_weight": 0.0, "floor": FLOOR}


def process(noise_multiplier, jitter=1e-4):
    return dpfa_jax.GaussianProcessNoise(
        noise_multiplier=noise_multiplier, key_bound=1.0, jitter=jitter, **PLAIN
    )


def keys(seed, runs):
    return jax.random.split(jax.random.key(seed), runs)


def kernel(left, right):
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    return np.exp(-((left[:, None] - right[None]) ** 2).sum(-1) / 2)


def both_sides(run, runs=RUNS, seed=0):
    """Numerators (runs, queries) of `run(rng, key)` without and with record 0."""
    run = jax.jit(jax.vmap(run, in_axes=(0, None)))
    return [
        FLOOR * np.asarray(run(keys(2 * seed + side, runs), key), np.float64)
        for side, key in enumerate((WITHOUT, KEY))
    ]


def adaptive(noise_multiplier, rng, key):
    """Eight answers; the last four queries depend on the first four answers."""
    memory = GaussianProcessMemory.create(
        key, VALUE, mechanism=process(noise_multiplier), rng=rng, capacity=8, scale=1.0
    )

    def step(carry, _):
        memory, query = carry
        answer, memory = memory.attend(query)
        return (memory, jnp.where(answer[0, 0, 0] > 0, NEAR, FAR)), answer[:, 0, 0]

    return jax.lax.scan(step, (memory, NEAR), length=2)[1].reshape(-1)


def adaptive_scores(answers, noise_std):
    """The log-likelihood ratio of each run, on the queries that it asked."""
    scores = np.empty(len(answers))
    near = np.asarray(NEAR[:, 0], np.float64)
    for positive in (True, False):
        asked = np.concatenate([near, near if positive else np.asarray(FAR[:, 0], np.float64)])
        chosen = (answers[:, 0] > 0) == positive
        covariance = noise_std**2 * (kernel(asked, asked) + 1e-4 * np.eye(8))
        shift = kernel(asked, KEY[0])[:, 0]
        base = 0.5 * kernel(asked, KEY[1])[:, 0]
        direction, mu = two_point_direction(shift, covariance)
        scores[chosen] = mu * ((answers[chosen] - base) @ direction) - mu**2 / 2
    return scores


def audit_process(noise_multiplier, runs):
    answers = both_sides(functools.partial(adaptive, noise_multiplier), runs)
    noise_std = noise_multiplier * (1 + 1e-6)
    return mu_lower_bound(*(adaptive_scores(side, noise_std) for side in answers))


def test_gaussian_process_memory_tells_what_it_is_charged_for_adaptive_queries():
    found = audit_process(1.0, RUNS)
    assert 0.8 < found <= 1.0
    # The same audit refutes a claim of 1 where the noise is .7 of what it should be.
    assert audit_process(0.7, 6000) > 1.0


@pytest.mark.slow
def test_gaussian_process_memory_audit_catches_a_tenth_less_noise():
    runs = 100_000
    assert 0.9 < audit_process(1.0, runs) <= 1.0
    assert audit_process(0.9, runs) > 1.0


def test_gaussian_process_memory_audit_catches_noise_that_is_not_one_process():
    # Four queries of four memories, each with noise as if the other three were not asked.
    def run(rng, key):
        def one(rng, query):
            memory = GaussianProcessMemory.create(
                key, VALUE, mechanism=process(1.0), rng=rng, capacity=1, scale=1.0
            )
            return memory.attend(query[None])[0][0, 0, 0]

        return jax.vmap(one)(jax.random.split(rng, 4), NEAR)

    answers = both_sides(run, 4000)
    shift = kernel(NEAR[:, 0], KEY[0])[:, 0]
    assert mu_lower_bound(*(side @ shift for side in answers)) > 1.5


def forks(shared, rng, key):
    """The answers of two forks of one memory, to two near queries; `shared`: under one noise."""
    memory = GaussianProcessMemory.create(
        key, VALUE, mechanism=process(1.0), rng=rng, capacity=2, scale=1.0
    )
    if not shared:
        left, right = memory.fork()
        return jnp.stack([left.attend(NEAR[:1])[0], right.attend(NEAR[1:2])[0]])[:, 0, 0, 0]
    # What a fork must not be: another data set, under the same key, asked the same.
    known = GaussianProcessMemory.create(
        WITHOUT, VALUE, mechanism=process(1.0), rng=rng, capacity=2, scale=1.0
    )
    return jnp.stack([memory.attend(NEAR[:1])[0], known.attend(NEAR[:1])[0]])[:, 0, 0, 0]


def test_gaussian_process_memory_fork_costs_one_memory_more_and_no_more():
    answers = both_sides(functools.partial(forks, False))
    shift = kernel(NEAR[:2, 0], KEY[0])[:, 0]
    found = mu_lower_bound(*(side @ shift for side in answers))
    assert 1.0 < found <= np.sqrt(2)
    # Without record 0 the two answers are independent. |correlation| < 6/√N but for 1e-8.
    assert abs(np.corrcoef(answers[0].T)[0, 1]) < 6 / np.sqrt(RUNS)
    # A key that serves two memories is no noise at all, and the audit says so.
    reused = both_sides(functools.partial(forks, True), 4000)
    assert mu_lower_bound(*(side[:, 0] - side[:, 1] for side in reused)) > 4


def filtered_life(noise_multiplier, forgetful, rng, key):
    """Six queries at the record's cap; a `forgetful` memory does not keep what was spent."""
    noise = dpfa_jax.ClippedContributions(
        noise_multiplier=noise_multiplier, score_cap=0.0, clip_norm=1.5, **PLAIN
    )
    memory = FilteredMemory.create(key, VALUE, mechanism=noise, rng=rng, capacity=6, scale=1.0)

    def step(memory, query):
        answer, memory = memory.attend(query)
        if forgetful:
            state = memory.state
            state = state._replace(private_spent=jnp.zeros_like(state.private_spent))
            memory = dataclasses.replace(memory, state=state)
        return memory, answer[0, 0, 0]

    query = jnp.array([[[0.6, 0.8]]])
    return jax.lax.scan(step, memory, jnp.broadcast_to(query, (6, 1, 1, 2)))[1]


def audit_filter(noise_multiplier, forgetful, runs):
    answers = both_sides(functools.partial(filtered_life, noise_multiplier, forgetful), runs)
    # Two full answers, then what is left of 1.5², then silence.
    shift = np.ones(6) if forgetful else np.array([1.0, 1.0, 0.5, 0.0, 0.0, 0.0])
    return mu_lower_bound(*(side @ shift for side in answers))


def test_filtered_memory_tells_what_it_is_charged():
    assert 0.8 < audit_filter(1.0, False, RUNS) <= 1.0
    # Noise of .7, and a memory that forgets what was spent (μ = 1.63).
    assert audit_filter(0.7, False, 6000) > 1.0
    assert audit_filter(1.0, True, 6000) > 1.2


@pytest.mark.slow
def test_filtered_memory_audit_catches_a_tenth_less_noise():
    assert 0.9 < audit_filter(1.0, False, 100_000) <= 1.0
    assert audit_filter(0.9, False, 100_000) > 1.0


def audit_features(noise_multiplier, runs):
    noise = RandomFeatures(noise_multiplier=noise_multiplier, key_bound=1.0, features=3, **PLAIN)
    public = jax.random.key(99)

    def sums(rng, key):
        memory = RandomFeatureMemory.release(
            key, VALUE, mechanism=noise, rng=rng, feature_rng=public, scale=1.0
        )
        return memory.sums.reshape(-1)

    frequencies = dpfa_jax.random.normal(public, (3, 2))
    shift = oracles.random_feature_sums(
        np.asarray(frequencies, np.float64),
        np.asarray(KEY[:1, 0], np.float64),
        np.ones((1, 1)),
        np.ones(1),
        gamma=1.0,
        denominator_weight=0.0,
        clip_norm=1.0,
    )
    return mu_lower_bound(*(side @ shift[:, 0] for side in both_sides(sums, runs)))


def test_random_feature_memory_tells_what_it_is_charged():
    assert 0.8 < audit_features(1.0, RUNS) <= 1.0


@pytest.mark.slow
def test_random_feature_memory_audit_catches_a_tenth_less_noise():
    assert 0.9 < audit_features(1.0, 100_000) <= 1.0
    assert audit_features(0.9, 100_000) > 1.0
