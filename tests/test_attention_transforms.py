import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import dpfa_jax
from dpfa_jax import accounting, random, releases
from tests.attention_common import (
    CLIPPED,
    INDEPENDENT,
    KEY,
    MEMORIES,
    NOISY,
    NON_PRIVATE,
    PROCESS,
    WIDTH,
    B,
    H,
    K,
    N,
    S,
    T,
    arrays,
    ask,
    compiled,
)

# Noise under transformations ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NOISY)
def test_vmap_with_one_key_gives_every_example_its_own_noise(name):
    query, key, value = arrays()
    three = jnp.stack([query] * 3)
    call = functools.partial(compiled(NOISY[name]), rng=KEY)
    batched = np.asarray(jax.vmap(lambda q: call(q, key, value))(three))
    looped = np.stack(
        [ask(NOISY[name], query, key, value, random.fold_in(KEY, i)) for i in range(3)]
    )
    assert np.allclose(batched, looped, atol=1e-5)
    assert len(np.unique(batched[:, 0, 0, 0, 0])) == 3


def test_nested_vmap_with_one_key_gives_every_example_its_own_noise():
    query, key, value = arrays()
    call = functools.partial(compiled(INDEPENDENT), rng=KEY)
    for order in ((0, None, None), (None, 0, None)), ((None, 0, None), (0, None, None)):
        nested = jax.vmap(jax.vmap(call, order[0]), order[1])
        answers = nested(jnp.stack([query] * 2), jnp.stack([key] * 3), value)
        assert len(np.unique(answers[:, :, 0, 0, 0, 0])) == 6


def test_vmap_over_keys_equals_a_loop_over_them():
    query, key, value = arrays()
    keys = random.split(KEY, 3)
    batched = jax.vmap(compiled(INDEPENDENT), (None, None, None, 0))(query, key, value, keys)
    looped = [ask(INDEPENDENT, query, key, value, rng) for rng in keys]
    assert np.allclose(batched, np.stack(looped), atol=1e-6)


def test_grad_remat_and_jacrev_see_one_release():
    query, key, value = arrays()

    def answer(q):
        return compiled(INDEPENDENT)(q, key, value, KEY)[0, 0]

    plain, pull = jax.vjp(answer, query)
    # jacrev maps the pull-back over cotangents: folding the key again there would be another noise.
    rows = jax.jacrev(answer)(query)
    for index in np.ndindex(N, WIDTH):
        cotangent = jnp.zeros((N, WIDTH)).at[index].set(1.0)
        assert np.allclose(rows[index], pull(cotangent)[0], atol=1e-6)
    again, pull_again = jax.vjp(jax.checkpoint(answer), query)
    assert np.array_equal(plain, again)
    assert np.allclose(pull_again(plain)[0], pull(plain)[0], atol=1e-6)


@pytest.mark.parametrize("name", ["independent", "process"])
def test_gradients_hold_the_noise_fixed(name):
    # Central differences of the compiled answer itself, key and so noise unchanged. For S5 the
    # query moves its own noise, which the gradient leaves out: differentiate in the value there.
    query, key, value = arrays()
    direction = jnp.asarray(np.random.default_rng(1).normal(size=value.shape), jnp.float32)
    # Little noise has a fine grid: differences across the steps of a coarse one measure nothing.
    call = compiled(dataclasses.replace(MEMORIES[name], noise_multiplier=0.01))

    def loss(v):
        return jnp.sum(call(query, key, v, KEY) ** 2)

    slope = float(jnp.sum(jax.grad(loss)(value) * direction))
    step = 1e-2
    measured = float(loss(value + step * direction) - loss(value - step * direction)) / (2 * step)
    assert math.isclose(slope, measured, rel_tol=0.03, abs_tol=1e-3)


def _mesh(*shape):
    names = ("a", "b")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["independent", "process"])
def test_shard_map_gives_every_shard_its_own_noise(name, check_vma):
    query, key, value = arrays()
    eight = [jnp.stack([x[0]] * 8) for x in (query, key, value)]
    call = functools.partial(compiled(NOISY[name]), rng=KEY)
    spec = P(("a", "b"))
    sharded = jax.shard_map(
        call, mesh=_mesh(4, 2), in_specs=(spec,) * 3, out_specs=spec, check_vma=check_vma
    )
    answers = jax.jit(sharded)(*eight)
    assert len(np.unique(answers[:, 0, 0, 0])) == 8


def test_shard_map_over_queries_of_one_memory_has_the_right_gradient():
    query, key, value = arrays(memories=1)
    quiet = dataclasses.replace(INDEPENDENT, noise_multiplier=1e-6, floor=0.1)

    def call(rng, q, k, v):
        return dpfa_jax.private_attention(q, k, v, mechanism=quiet, rng=rng, queries="public")

    sharded = jax.shard_map(
        call, mesh=_mesh(2), in_specs=(P(), P("a"), P(), P()), out_specs=P("a"), check_vma=True
    )
    grads = [
        jax.jit(jax.grad(lambda k, v, rng, f=f: jnp.sum(f(rng, query, k, v) ** 2), (0, 1)))(
            key, value, KEY
        )
        for f in (sharded, call)
    ]
    for left, right in zip(*grads, strict=True):
        assert np.allclose(left, right, atol=2e-4 * np.max(np.abs(right)))


def test_replicated_operands_are_one_release_under_shard_map():
    query, key, value = arrays()
    call = functools.partial(compiled(INDEPENDENT), rng=KEY)
    replicated = jax.shard_map(
        call, mesh=_mesh(4), in_specs=(P(), P(), P()), out_specs=P(), check_vma=True
    )
    assert np.allclose(jax.jit(replicated)(query, key, value), call(query, key, value), atol=1e-6)


def test_pmap_gives_every_device_its_own_noise():
    query, key, value = arrays()
    four = [jnp.stack([x] * 4) for x in (query, key, value)]
    answers = jax.pmap(functools.partial(compiled(INDEPENDENT), rng=KEY))(*four)
    assert len(np.unique(np.asarray(answers)[:, 0, 0, 0, 0])) == 4


def test_scan_over_split_keys_draws_new_noise_each_step():
    query, key, value = arrays()

    def step(carry, rng):
        return carry, compiled(INDEPENDENT)(query, key, value, rng)[0, 0, 0, 0]

    _, drawn = jax.lax.scan(step, 0, random.split(KEY, 5))
    assert len(np.unique(drawn)) == 5


# What it costs -----------------------------------------------------------------------------------


def test_event_counts_batch_time_and_query_heads():
    shapes = (3, 5, 8, 4), (3, 9, 2, 4), (3, 9, 2, 6)
    assert INDEPENDENT.count(*shapes) == 3 * 5 * 8
    assert INDEPENDENT.count((3, 5, 8, 4), (1, 9, 2, 4)) == 3 * 5 * 8
    disjoint = dataclasses.replace(INDEPENDENT, disjoint_batch=True)
    assert disjoint.count(*shapes) == 5 * 8
    assert disjoint.count((3, 5, 8, 4), (1, 9, 2, 4)) == 3 * 5 * 8
    assert INDEPENDENT.event(*shapes) == accounting.Gaussian(0.5, 3 * 5 * 8 * 7)


def test_sensitivity_grows_with_the_queries_counted():
    def delta(mechanism, *shapes):
        return mechanism.l2_sensitivity(releases.Call.of(*shapes))

    one = delta(INDEPENDENT, (1, 1, 1, 4), (1, 9, 1, 4))
    assert math.isclose(delta(INDEPENDENT, (2, 3, 4, 4), (1, 9, 1, 4)), math.sqrt(24) * one)
    assert math.isclose(delta(INDEPENDENT, (2, 3, 4, 4), (2, 9, 2, 4)), math.sqrt(24) * one)
    disjoint = dataclasses.replace(INDEPENDENT, disjoint_batch=True)
    assert math.isclose(delta(disjoint, (2, 3, 4, 4), (2, 9, 2, 4)), math.sqrt(12) * one)


def test_accounting_events_finds_the_releases_of_a_program():
    query, key, value = arrays()

    def program(query, rng):
        first, second = random.split(rng)
        answer = compiled(INDEPENDENT)(query, key, value, first)

        def step(carry, rng):
            return carry, compiled(CLIPPED)(query, key, value, rng)

        return answer, jax.lax.scan(step, 0, random.split(second, 5))[1]

    one = INDEPENDENT.event(query.shape, key.shape, value.shape)
    assert accounting.mu(accounting.events(program, query, KEY)) == pytest.approx(
        accounting.mu(one) * math.sqrt(6)
    )
    batched = jax.vmap(program, (0, None))
    assert accounting.mu(accounting.events(batched, jnp.stack([query] * 2), KEY)) == pytest.approx(
        accounting.mu(one) * math.sqrt(12)
    )
    free = accounting.events(lambda q: compiled(NON_PRIVATE)(q, key, value, None), query)
    assert accounting.epsilon(free, 1e-5) == math.inf


def test_guarantee_names_the_promise_the_count_and_what_is_not_protected():
    text = PROCESS.guarantee((B, T, N, H), (B, S, K, H), (B, S, K, WIDTH), delta=1e-5)
    for part in ("public", f"{B * T * N} queries", "S5", "ε = ", "δ = 1e-05", "Not protected"):
        assert part in text
    assert repr(PROCESS) == PROCESS.guarantee()
    assert "ε = ∞" in repr(NON_PRIVATE)
