"""Which statement does noise in shares keep true? O7: all shares together are the noise charged.

Statistical tests raise a false alarm with probability 1e-6 each. Every test runs on the eight
devices of tests/conftest.py.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import scipy.stats
from jax.sharding import PartitionSpec as P

from dpfa_jax import accounting, clipping, optim, random, sampling
from dpfa_jax.optim import shares
from tests.optim_common import COORDINATES, PARAMS, SAMPLER, certificate, private
from tests.shares_common import LARGE, ROWS, SAME, in_shares, mapped, mesh, on_each

ALARM = 1e-6
DELTA = 1e-5
STEP = SAMPLER.event(2.0, 1024 * COORDINATES, 64)


# The sum and its noise --------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_shares_add_up_to_the_sum_and_to_the_noise_that_is_charged(devices):
    source = np.random.default_rng(devices)
    sums = jax.tree.map(
        lambda leaf: jnp.asarray(source.normal(size=(devices, *leaf.shape)), jnp.float32), LARGE
    )
    tx = in_shares()
    updates, state = mapped(tx, devices)(tx.init(LARGE), sums)
    released = {name: 16.0 * np.asarray(updates[name], np.float64) for name in LARGE}
    noise = np.concatenate(
        [(released[name] - np.asarray(sums[name], np.float64).sum(0)).ravel() for name in LARGE]
    )
    law = scipy.stats.chi2(noise.size)

    def has_std(std):
        return law.ppf(ALARM / 2) < np.sum((noise / std) ** 2) < law.isf(ALARM / 2)

    assert has_std(2.0) and not has_std(2.0 * 1.05) and not has_std(2.0 / 1.05)
    assert scipy.stats.kstest(noise / 2.0, "norm").pvalue > ALARM
    # Negative control: noise of the right variance and the wrong law.
    assert (
        scipy.stats.kstest(source.laplace(scale=0.5**0.5, size=noise.size), "norm").pvalue < ALARM
    )
    whole = released["w"] * 2.0**9  # the public grid of a std of 2
    assert np.all(whole == np.round(whole))
    assert optim.event(state) == accounting.Repeated(SAMPLER.event(2.0, 1024 * 32832, 64), 1)


def _shares_alone(data, devices, step_keys=SAME):
    """The share of every shard, (devices, coordinates), in units of its own std."""

    def body(data):
        zeros = [jnp.zeros(4096)]
        ((whole, parts),) = shares.own_share(zeros, data, jnp.float32(1.0), 2.0**-10, ("data",))
        return (whole + parts * 2.0**-20)[None]

    run = jax.shard_map(body, mesh=mesh(devices), in_specs=step_keys, out_specs=ROWS)
    return np.asarray(jax.jit(run)(data), np.float64) * 2.0**-10 * math.sqrt(devices)


def test_shares_are_distinct_streams_and_each_has_its_part_of_the_variance():
    drawn = [
        _shares_alone(random.key_data(jax.random.key(seed)), devices)
        for seed, devices in ((0, 8), (0, 2), (1, 8))
    ]
    every = np.concatenate(drawn)
    rows = np.asarray(np.corrcoef(every))[np.triu_indices(len(every), 1)]
    # The first shards of two and of eight devices share words: two runs under one key.
    same = {(i, 8 + i) for i in range(2)}
    pairs = list(zip(*np.triu_indices(len(every), 1), strict=True))
    others = [r for r, pair in zip(rows, pairs, strict=True) if pair not in same]
    assert len(others) == len(rows) - 2 and np.max(np.abs(others)) < 6.2 / 64  # 4096 each: 6.2 s.e.
    law = scipy.stats.chi2(4096)

    def has_unit_variance(row):
        return law.ppf(ALARM / 2) < np.sum(row**2) < law.isf(ALARM / 2)

    assert all(map(has_unit_variance, every))
    assert has_unit_variance(drawn[0].sum(0) / math.sqrt(8))
    # Negative control: one stream of the eight used by two shards adds too much noise.
    assert not has_unit_variance((drawn[0][[0, 0, 2, 3, 4, 5, 6, 7]]).sum(0) / math.sqrt(8))


def test_a_key_of_each_shards_own_is_taken_and_equal_ones_do_not_repeat():
    equal = jnp.concatenate([random.key_data(jax.random.key(0))] * 8)
    own = jnp.concatenate([random.key_data(jax.random.key(seed)) for seed in range(8)])
    for keys in (equal, own):
        drawn = _shares_alone(keys, 8, P("data"))
        rows = np.asarray(np.corrcoef(drawn))[np.triu_indices(8, 1)]
        assert np.max(np.abs(rows)) < 6.2 / 64
    tx = in_shares()
    state = tx.init(LARGE)._replace(key_data=own)
    specs = jax.tree.map(lambda _: P(), state)._replace(key_data=P("data"))
    step = mapped(tx, 8, specs)
    first, state = step(state, on_each(LARGE, 8))
    second, state = step(state, on_each(LARGE, 8))
    assert state.key_data.shape == (64,)
    assert len({np.asarray(each).tobytes() for each in state.key_data.reshape(8, 8)}) == 8
    correlation = np.corrcoef(first["w"].ravel(), second["w"].ravel())[0, 1]
    assert abs(correlation) < 5.0 / math.sqrt(first["w"].size)
    other = in_shares(axes=None)
    state = other.init(LARGE)._replace(key_data=own)
    specs = jax.tree.map(lambda _: P(), state)._replace(key_data=P("data"))

    def step(state, own):
        c = certificate(jax.tree.map(lambda leaf: leaf[0], own)).psum("data")
        return other.update(c.tree, state, clipped=c)

    run = jax.shard_map(step, mesh=mesh(8), in_specs=(specs, ROWS), out_specs=(SAME, specs))
    with pytest.raises(ValueError, match="one key for all shards"):
        jax.eval_shape(run, state, on_each(LARGE, 8))


@pytest.mark.parametrize("devices", [2, 8])
def test_a_sum_of_shares_does_not_depend_on_the_order_of_its_parts(devices):
    # Sums of very different size: in float32 their order decides the last bits.
    source = np.random.default_rng(0)
    sums = {"a": jnp.asarray(source.normal(size=(devices, 3, 4)) * 30, jnp.float32)}
    sums["b"] = jnp.asarray(source.normal(size=(devices, 5)) * 1e-3, jnp.float32)
    tx = in_shares()
    updates, _ = mapped(tx, devices)(tx.init(PARAMS), sums)
    _, own = random.split(random.wrap_key_data(tx.init(PARAMS).key_data))
    data = random.key_data(own)
    std, step = jnp.float32(shares.enlarged(2.0, COORDINATES, 16 * devices)), 2.0**-9

    def alone(data, own):
        leaves = [leaf[0] for leaf in jax.tree.leaves(own)]
        mine = shares.own_share(leaves, data, std, step, ("data",))
        return jax.tree.map(lambda leaf: leaf[None], mine)

    run = jax.shard_map(alone, mesh=mesh(devices), in_specs=(SAME, ROWS), out_specs=ROWS)
    pairs = jax.jit(run)(data, sums)
    for name, (whole, parts) in zip(("a", "b"), pairs, strict=True):
        exact = sum(2**20 * np.asarray(whole, np.int64)[::-1]) + sum(np.asarray(parts))
        steps = (exact + 2**19) // 2**20
        np.testing.assert_array_equal(updates[name], np.float32(steps * step) / 16)


def test_nothing_crosses_devices_but_integers_that_hold_noise():
    tx = in_shares()
    rows = on_each(PARAMS, 8)
    text = mapped(tx, 8).lower(tx.init(PARAMS), rows).compile().as_text()
    moved = re.findall(r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all)", text)
    kinds = {kind for each in moved for kind in re.findall(r"([a-z]+\d+)\[", each)}
    assert moved and kinds == {"s32"}
    # Negative control: a sum that is made before its noise is seen to cross as it is.
    plain = in_shares(axes=None)

    def step(state, own):
        c = certificate(jax.tree.map(lambda leaf: leaf[0], own)).psum("data")
        return plain.update(c.tree, state, clipped=c)[0]

    run = jax.shard_map(step, mesh=mesh(8), in_specs=(SAME, ROWS), out_specs=SAME)
    text = jax.jit(run).lower(plain.init(PARAMS), rows).compile().as_text()
    assert re.search(r"= .*?f32\[.*? all-reduce", text)


def test_to_steps_is_within_half_a_part():
    source = np.random.default_rng(0)
    value = np.float32(source.normal(size=4096) * 2.0 ** source.integers(-40, 17, 4096))
    step = 2.0**-10
    whole, parts = jax.jit(shares.to_steps, static_argnums=1)(value, step)
    exact = np.float64(value) / step
    found = np.asarray(whole, np.float64) + np.asarray(parts, np.float64) * 2.0**-20
    assert np.max(np.abs(found - exact)) <= 2.0**-21 < 4 * np.max(np.abs(found - exact))
    assert np.max(np.abs(np.asarray(parts))) <= 2**19
    whole, parts = shares.to_steps(jnp.float32(3e38), step)
    assert (int(whole), int(parts)) == (1 << 30, 0)


def test_rounding_of_the_shards_sums_is_paid_for():
    # What rounding may move a sum of P coordinates by is 2⁻³⁰ of the noise for each of them.
    for multiplier, coordinates in ((1.0, 10**8), (8.0, 10**10), (1e-3, 1), (1000.0, 10**9)):
        found = shares.enlarged(multiplier, coordinates, 1)
        part = 2.0**-30 * math.sqrt(coordinates)  # √P·2⁻²⁰ steps of 2⁻¹⁰, of a noise of 1
        assert found >= multiplier * (1.0 + found * part)
        assert multiplier < found < multiplier * (1.0 + 2.1 * multiplier * part + 1e-12)
        traced = float(shares.enlarged(jnp.float32(multiplier), coordinates, 1))
        assert found <= traced < found * (1.0 + 2.0**-19)
    for multiplier, coordinates, units in ((1e9, 100, 1), (1e5, 10**10, 1), (0.5, 1, 1 << 18)):
        with pytest.raises(ValueError, match="integers of 32 bits"):
            shares.enlarged(multiplier, coordinates, units)
        assert math.isnan(shares.enlarged(jnp.float32(multiplier), coordinates, units))
    assert math.isnan(shares.enlarged(jnp.float32(math.nan), 1, 1))


# Clipping, account, checkpoints -----------------------------------------------------------------


def _loss(w, x):
    return jnp.sum(jnp.tanh(x @ w))


def test_sensitivity_of_a_release_in_shares_is_what_is_claimed():
    # Noise of 2⁻⁷ of the clip norm and always the same words: what is left is what a row moves.
    clip_norm, multiplier = 0.5, 2.0**-7
    everyone = sampling.Poisson(16, 1.0)
    tx = in_shares(multiplier, sampling=everyone)
    w = jnp.full((3, 2), 0.1)

    def step(state, x):
        c = clipping.clipped_grad(_loss, clip_norm=clip_norm)(w, x)
        return tx.update(c.tree, state, clipped=c)[0]

    run = jax.jit(jax.shard_map(step, mesh=mesh(8), in_specs=(P(), P("data")), out_specs=P()))
    source, state, largest = np.random.default_rng(0), tx.init(w), 0.0
    for scale in (1.0, 10.0, 100.0):
        x = jnp.asarray(scale * (np.abs(source.normal(size=(16, 3))) + 0.1), jnp.float32)
        for row in (0, 5, 15):
            whole, other = (np.float64(run(state, each)) for each in (x, x.at[row].set(0.0)))
            largest = max(largest, 16 * float(np.linalg.norm(whole - other)))
    grid = 2.0**-17 * math.sqrt(6)  # one step for each coordinate, which is post-processing
    assert 0.99 * clip_norm - grid <= largest <= clip_norm + grid


@pytest.mark.parametrize("noise", [2.0, optax.constant_schedule(2.0)], ids=["fixed", "schedule"])
def test_shares_cost_what_the_same_plan_costs_without_them(noise):
    tx, plain = in_shares(noise), private(noise)
    states = {}
    for devices in (1, 2, 8):
        state = tx.init(PARAMS)
        step = mapped(tx, devices)
        for _ in range(3):
            _, state = step(state, on_each(PARAMS, devices))
        states[devices] = state
    state = plain.init(PARAMS)
    update = jax.jit(lambda c, s: plain.update(c.tree, s, clipped=c))
    for _ in range(3):
        _, state = update(certificate(PARAMS), state)
    expected = optim.epsilon(state, DELTA)
    found = {optim.epsilon(each, DELTA) for each in states.values()}
    assert len(found) == 1 and expected <= found.pop() < expected * (1 + 1e-4)


def test_events_counts_shares_once():
    for axes, sizes in (("data", (8,)), (("data", "model"), (2, 4)), ("data", (2, 4))):
        tx = in_shares(axes=axes)

        def step(state, own, tx=tx):
            c = certificate(jax.tree.map(lambda leaf: leaf[0], own))
            return tx.update(c.tree, state, clipped=c)

        specs = P(axes)
        run = jax.shard_map(step, mesh=mesh(*sizes), in_specs=(P(), specs), out_specs=P())
        rows = on_each(PARAMS, 8 if axes != "data" else sizes[0])
        assert accounting.events(run, tx.init(PARAMS), rows) == STEP


def test_two_axes_of_shares_add_up_as_one_axis_of_as_many_shards():
    sums = jax.tree.map(lambda leaf: jnp.arange(8.0 * leaf.size).reshape(8, *leaf.shape), PARAMS)
    found = []
    for axes, sizes in (("data", (8,)), (("data", "model"), (2, 4))):
        tx = in_shares(axes=axes)

        def step(state, own, tx=tx):
            c = certificate(jax.tree.map(lambda leaf: leaf[0], own))
            return tx.update(c.tree, state, clipped=c)[0]

        run = jax.shard_map(step, mesh=mesh(*sizes), in_specs=(P(), P(axes)), out_specs=P())
        found.append(jax.jit(run)(tx.init(PARAMS), sums))
    for name in PARAMS:
        np.testing.assert_array_equal(found[0][name], found[1][name])


def test_run_in_shares_resumes_bit_for_bit_and_goes_on_on_other_devices(tmp_path):
    target = (0.95, DELTA)
    tx = optax.chain(in_shares(target=target), optax.adam(0.1))

    def stepper(devices):
        def step(params, state, own):
            c = certificate(jax.tree.map(lambda leaf: leaf[0], own))
            updates, state = tx.update(c.tree, state, params, clipped=c)
            return optax.apply_updates(params, updates), state

        run = jax.shard_map(step, mesh=mesh(devices), in_specs=(SAME, SAME, ROWS), out_specs=SAME)
        return jax.jit(run)

    step, training, trail = stepper(8), (PARAMS, tx.init(PARAMS)), []
    own = on_each(jax.tree.map(jnp.ones_like, PARAMS), 8)
    with ocp.StandardCheckpointer() as checkpointer:
        for count in range(9):
            training = step(*training, own)
            trail.append((jax.tree.leaves(training), optim.epsilon(training[1], DELTA)))
            if count == 1:
                checkpointer.save(tmp_path / "two", training)
                checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "two", jax.eval_shape(lambda: training))
    restored = jax.tree.map(np.asarray, restored)
    moved = step(*restored, own)
    for one, other in zip(jax.tree.leaves(moved), trail[2][0], strict=True):
        np.testing.assert_array_equal(one, other)
    assert optim.epsilon(moved[1], DELTA) == trail[2][1]
    # On two devices: other noise, the same account.
    elsewhere = stepper(2)(*restored, on_each(jax.tree.map(jnp.ones_like, PARAMS), 2))
    assert optim.epsilon(elsewhere[1], DELTA) == trail[2][1]
    assert np.any(np.asarray(elsewhere[0]["a"]) != np.asarray(moved[0]["a"]))
    # The target stops it, and one step more would have gone beyond.
    spent = sorted({epsilon for _, epsilon in trail})
    assert spent[-1] <= 0.95 and len(spent) < 9
    assert accounting.epsilon(accounting.Repeated(STEP, len(spent) + 1), DELTA) > 0.95


SPECS = {"a": P(None, "data"), "b": P()}


def test_shares_are_added_up_into_the_parts_of_the_parameters():
    params = {"a": jnp.zeros((3, 16)), "b": jnp.zeros(5)}
    sums = jax.tree.map(
        lambda leaf: jnp.arange(8.0 * leaf.size).reshape(8, *leaf.shape) - 100, params
    )
    found = []
    for specs in (SPECS, None):
        tx = in_shares(partition_specs=specs)
        held = P() if specs is None else specs

        def step(params, state, own, tx=tx):
            c = certificate(jax.tree.map(lambda leaf: leaf[0], own))
            return tx.update(c.tree, state, params, clipped=c)

        run = jax.shard_map(
            step, mesh=mesh(8), in_specs=(held, P(), P("data")), out_specs=(held, P())
        )
        found.append(jax.jit(run)(params, tx.init(params), sums))
    assert accounting.events(run, params, tx.init(params), sums) == optim.event(found[0][1]).event
    for one, other in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_array_equal(one, other)

    wrong = in_shares(partition_specs=SPECS | {"a": P("data")})
    with pytest.raises(ValueError, match="equal parts"):
        _parts_step(wrong, SPECS, params, sums)
    for other in (None, {"a": P(), "b": P()}):
        with pytest.raises(ValueError, match=r"cut as their parameters|another sampler"):
            _parts_step(in_shares(partition_specs=other or P()), SPECS, params, sums)


def _parts_step(tx, held, params, sums):
    def step(params, state, own):
        c = certificate(jax.tree.map(lambda leaf: leaf[0], own))
        return tx.update(c.tree, state, params, clipped=c)[0]

    run = jax.shard_map(step, mesh=mesh(8), in_specs=(held, P(), P("data")), out_specs=held)
    jax.eval_shape(run, params, tx.init(params), sums)
