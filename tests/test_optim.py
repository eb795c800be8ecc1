"""Which statement does this file keep true? O1 to O4: a step's noise is what its account says.

Statistical tests raise a false alarm with probability 1e-6 each.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import scipy.stats
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant

from dpfa_jax import accounting, optim, random, sampling
from dpfa_jax.accounting import convert, traced
from dpfa_jax.doubleword import grid_step, to_grid
from dpfa_jax.optim import account, noise, plan
from tests.optim_common import COORDINATES, PARAMS, SAMPLER, certificate, private, stepper

ALARM = 1e-6
DELTA = 1e-5
FIXED = sampling.WithoutReplacement(128, 16)
LARGE = {"w": jnp.zeros((64, 512))}


def _noise(tx, clip_norm=1.0, state=None):
    """The noise of one step over many coordinates, in units of the sum."""
    state = tx.init(LARGE) if state is None else state
    c = certificate(LARGE, clip_norm)
    updates, after = _updated(tx, c, state)
    return 16.0 * np.asarray(updates["w"], np.float64).ravel(), after


def _updated(tx, c, state):
    return jax.jit(lambda c, s: tx.update(c.tree, s, clipped=c))(c, state)


def _has_std(noise: np.ndarray, std: float) -> bool:
    law = scipy.stats.chi2(noise.size)
    square = float(np.sum((noise / std) ** 2))
    return law.ppf(ALARM / 2) < square < law.isf(ALARM / 2)


@pytest.mark.parametrize(
    ("sampler", "clip_norm", "std"),
    [
        (SAMPLER, 1.0, 2.0),
        (SAMPLER, 0.3, 0.6),
        (SAMPLER, jnp.float32(3.0), 6.0),
        (FIXED, 0.3, 1.2),  # replacing a record moves the sum by twice the clip
    ],
)
def test_privatize_adds_the_noise_of_its_multiplier(sampler, clip_norm, std):
    noise, _ = _noise(private(2.0, sampler=sampler), clip_norm)
    assert _has_std(noise, std)
    assert not _has_std(noise, 1.05 * std) and not _has_std(noise, std / 1.05)
    assert abs(noise.mean()) < 5.2 * std / math.sqrt(noise.size)  # 2Φ(−5.2) = 2e-7
    grid = 2.0 ** math.floor(math.log2(std) - 10)
    assert np.all(noise / grid == np.round(noise / grid)), "off the public grid"


@pytest.mark.parametrize("clip_norm", (1e-45, 3e-38, 1e-31))
def test_noise_of_a_traced_clip_norm_never_vanishes(clip_norm):
    noise, _ = _noise(private(2.0), jnp.float32(clip_norm))
    assert _has_std(noise, 2.0**-100)


def test_noise_is_never_rounded_below_what_is_charged():
    source = np.random.default_rng(0)
    numbers = 10.0 ** source.uniform(-9, 9, 100)
    for value in numbers:
        std, step = noise._noise_scale(float(value))
        assert value <= float(std) <= value * (1 + 2**-23) and step == grid_step(float(std))
    multipliers, norms = np.float32(numbers), np.float32(numbers[::-1])
    stds, _ = jax.jit(jax.vmap(lambda z, c: noise._noise_scale(z * c)))(multipliers, norms)
    exact = np.float64(multipliers) * np.float64(norms)
    assert np.all(exact <= np.asarray(stds)) and np.all(np.asarray(stds) <= exact * (1 + 2**-21))


def test_privatize_takes_new_noise_for_every_step_and_leaf():
    tx = private()
    # Two large leaves with keys of their own, and two small ones that share one.
    shapes = {"a": (1024, 1024), "b": (1024, 1024), "c": (8, 64), "d": (8, 64)}
    twins = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    state, seen = tx.init(twins), []
    update = jax.jit(lambda c, state: tx.update(c.tree, state, clipped=c))
    for _ in range(3):
        updates, state = update(certificate(twins), state)
        seen += [np.asarray(leaf).ravel()[:512] for leaf in jax.tree.leaves(updates)]
    correlations = np.corrcoef(seen)[np.triu_indices(12, 1)]
    assert np.all(np.abs(correlations) < 0.25)  # 512 pairs: 5.6 standard errors


def test_privatize_draws_the_radius_bits_that_it_charges():
    tx = private()
    state = tx.init(PARAMS)
    updates, after = _updated(tx, certificate(PARAMS), state)
    following, own = random.split(random.wrap_key_data(state.key_data))
    # What is kept is the key of the noise to come: it does not give away the noise that was used.
    np.testing.assert_array_equal(after.key_data, random.key_data(following))
    key = random.fold_in(own, 2)  # two leaves, both small
    bits = optim.event(after).event.event.radius_bits
    normals = random.normal(key, (COORDINATES,), radius_bits=bits)
    expected = to_grid(2.0 * normals, grid_step(2.0)) / 16.0
    drawn = jnp.concatenate([updates["a"].ravel(), updates["b"]])
    np.testing.assert_array_equal(drawn, expected)
    assert bits == 64


def test_privatize_gives_every_vmapped_example_its_own_noise():
    tx, state = private(), private().init(PARAMS)

    def one(state, sums):
        c = certificate(sums)
        return tx.update(c.tree, state, clipped=c)[0]

    sums = jax.tree.map(lambda leaf: jnp.zeros((2, *leaf.shape)), PARAMS)
    out = jax.jit(lambda state, sums: jax.vmap(lambda sums: one(state, sums))(sums))(state, sums)
    assert not np.any(np.asarray(out["a"][0]) == np.asarray(out["a"][1]))


def test_privatize_without_noise_is_the_sum_over_the_public_size():
    tx = private(0.0)
    sums = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.linspace(-1.0, 1.0, 5)}
    updates, state = _updated(tx, certificate(sums), tx.init(PARAMS))
    for name in sums:
        np.testing.assert_array_equal(updates[name], sums[name] / 16.0)
    assert optim.epsilon(state, DELTA) == math.inf


def _oracle(event, steps: int) -> float:
    """dp_accounting's ε over orders that are refined around its own best one."""
    orders, width, found = np.geomspace(2, 1e3, 100), 0.05, math.inf
    for _ in range(3):
        accountant = RdpAccountant(orders)
        accountant.compose(event, steps)
        found, best = accountant.get_epsilon_and_optimal_order(DELTA)
        orders = np.linspace(1 + (best - 1) * (1 - width), 1 + (best - 1) * (1 + width), 61)
        width /= 20
    return found


def test_epsilon_equals_dp_accounting_at_every_step_through_checkpoints(tmp_path):
    # A rate at which dp_accounting's series for real orders converges to 1e-8.
    sampler = sampling.Poisson(1024, 1 / 64)
    tx = optax.chain(private(1.1, sampler=sampler), optax.adam(1e-3))
    params, state = PARAMS, tx.init(PARAMS)
    step = stepper(tx)
    event = dp_event.PoissonSampledDpEvent(1 / 64, dp_event.GaussianDpEvent(1.1))
    with ocp.StandardCheckpointer() as checkpointer:
        for count in range(1, 13):
            params, state = step(params, state, PARAMS)
            path = tmp_path / str(count)
            checkpointer.save(path, state)
            checkpointer.wait_until_finished()
            # What the next step goes on from is what was read.
            state = checkpointer.restore(path, jax.eval_shape(lambda: tx.init(PARAMS)))
            assert optim.epsilon(state, DELTA) == pytest.approx(_oracle(event, count), rel=1e-6)
    assert optim.event(state) == accounting.Repeated(sampler.event(1.1, COORDINATES, 64), 12)
    pld = optim.epsilon(state, DELTA, method="pld")
    assert pld == accounting.pld.epsilon(optim.event(state), DELTA) < optim.epsilon(state, DELTA)


def test_events_reads_one_release_from_a_step():
    tx = private(1.1)
    state = tx.init(PARAMS)
    assert accounting.events(stepper(tx), PARAMS, state, PARAMS) == SAMPLER.event(
        1.1, COORDINATES, 64
    )
    scheduled = private(optax.constant_schedule(1.1))
    step = stepper(scheduled)
    assert accounting.events(step, PARAMS, scheduled.init(PARAMS), PARAMS) == (
        accounting.NonPrivate()
    )


def test_target_stops_at_the_last_step_that_fits_and_spends_no_more():
    target = (0.75, DELTA)
    tx = optax.chain(private(2.0, target=target), optax.sgd(1.0))
    step, params, state = stepper(tx), PARAMS, tx.init(PARAMS)
    epsilons, moved = [], []
    for _ in range(9):
        following, state = step(params, state, PARAMS)
        moved.append(bool(np.any(np.asarray(following["a"]) != np.asarray(params["a"]))))
        params = following
        epsilons.append(optim.epsilon(state, DELTA))
    allowed = moved.index(False)
    assert allowed == plan.steps_within(SAMPLER.event(2.0, COORDINATES, 64), plan.Target(*target))
    assert moved == [True] * allowed + [False] * (9 - allowed)
    one_more = accounting.Repeated(SAMPLER.event(2.0, COORDINATES, 64), allowed + 1)
    assert max(epsilons) <= 0.75 < accounting.epsilon(one_more, DELTA)
    assert len(set(epsilons)) == allowed


@pytest.mark.parametrize("target", [(1e-3, DELTA), (0.5, 1e-300)])
@pytest.mark.parametrize("noise", [0.5, optax.constant_schedule(0.5)], ids=["fixed", "schedule"])
def test_target_that_allows_no_step_is_refused(noise, target):
    with pytest.raises(ValueError, match="allows at least one step"):
        private(noise, target=target).init(PARAMS)


SCHEDULE = optax.linear_schedule(3.0, 1.0, 8)


def _scheduled_event(steps: int) -> accounting.Event:
    multipliers = [float(np.float32(SCHEDULE(t))) for t in range(steps)]
    return accounting.Composed([SAMPLER.event(z, COORDINATES, 64) for z in multipliers])


def test_schedule_noises_and_charges_each_step_as_it_says():
    tx = private(SCHEDULE)
    state = tx.init(LARGE)
    for count in range(3):
        noise, state = _noise(tx, state=state)
        expected = 3.0 - 0.25 * count
        assert _has_std(noise, expected) and not _has_std(noise, expected + 0.1)
    small = private(SCHEDULE)
    step, params, state = stepper(small), PARAMS, small.init(PARAMS)
    for count in range(1, 13):
        params, state = step(params, state, PARAMS)
        event, orders = _scheduled_event(count), np.array(traced.ORDERS, float)
        at_orders = convert.epsilons(orders, accounting.rdp_curve(event, orders), DELTA).min()
        found = optim.epsilon(state, DELTA)
        assert accounting.epsilon(event, DELTA) <= found < at_orders * 1.001
    with pytest.raises(TypeError, match="schedule"):
        optim.event(state)


def test_schedule_under_a_target_keeps_to_it_on_every_path():
    schedule = optax.linear_schedule(6.0, 3.0, 60)
    tx = private(schedule, target=(1.0, DELTA))

    @jax.jit
    def run(state, sums):
        def step(state, _):
            c = certificate(jax.tree.map(lambda leaf: leaf + 0.0 * state.key_data[0], sums))
            updates, state = tx.update(c.tree, state, clipped=c)
            return state, jnp.any(updates["a"] != 0)

        return jax.lax.scan(step, state, length=120)

    state, moved = run(tx.init(PARAMS), PARAMS)
    steps = int(jnp.sum(moved))
    assert moved.tolist() == [True] * steps + [False] * (120 - steps)

    def exact(count):
        multipliers = [float(np.float32(schedule(t))) for t in range(count)]
        events = [SAMPLER.event(z, COORDINATES, 64) for z in multipliers]
        return accounting.epsilon(accounting.Composed(events), DELTA)

    # At one order fixed beforehand: no more than the best order allows, and not much less.
    assert exact(steps) <= optim.epsilon(state, DELTA) <= 1.0 < exact(steps + 3)


def test_schedule_of_truncated_samples_pays_for_their_truncation():
    roomy, tight = (sampling.TruncatedPoisson(128, 0.125, room) for room in (80, 30))
    found = {}
    for sampler in (SAMPLER, roomy, tight):
        tx = private(optax.constant_schedule(2.0), sampler=sampler)
        step, state = stepper(tx), tx.init(PARAMS)
        _, state = step(PARAMS, state, PARAMS)
        found[sampler] = optim.epsilon(state, 1e-3)
        assert accounting.epsilon(sampler.event(2.0, COORDINATES, 64), 1e-3) <= found[sampler]
    assert found[SAMPLER] <= found[roomy] < 1.01 * found[SAMPLER]
    assert found[tight] > 1.05 * found[SAMPLER]
    with pytest.raises(NotImplementedError, match="WithoutReplacement"):
        private(optax.constant_schedule(2.0), sampler=FIXED)


def _spent(made, most=200):
    """(account, steps) of a plan that is spent until it stops, at most that many steps."""
    spend, ledger = jax.jit(made.spend), made.create()
    for count in range(most):
        ledger, go, _ = spend(ledger)
        if not go:
            return ledger, count
    return ledger, most


def test_schedule_pays_for_the_truncation_of_every_step():
    tight, steps, delta = sampling.TruncatedPoisson(128, 0.125, 31), 8, 4e-3
    ledger, _ = _spent(plan.make(optax.constant_schedule(2.0), tight, COORDINATES, None), steps)
    charged = accounting.epsilon(
        accounting.Repeated(tight.event(2.0, COORDINATES, 64), steps), delta
    )
    whole = accounting.epsilon(accounting.Repeated(SAMPLER.event(2.0, 17, 64), steps), delta)
    assert whole * 1.1 < charged <= ledger.epsilon(delta) < 1.01 * charged
    assert charged <= float(ledger.traced_epsilon(delta)) < 1.5 * charged


def test_schedule_charges_the_end_of_the_noise_of_every_parameter():
    constant, many = optax.constant_schedule(2.0), 10**30
    found = {}
    for coordinates in (1, many):
        ledger, _ = _spent(plan.make(constant, SAMPLER, coordinates, None), 1)
        found[coordinates] = ledger.epsilon(DELTA)
        assert found[coordinates] >= accounting.epsilon(SAMPLER.event(2.0, coordinates, 64), DELTA)
    assert found[many] > 1.01 * found[1]


def test_schedule_stops_where_the_end_of_the_noise_or_truncation_has_spent_its_share():
    constant, target = optax.constant_schedule(4.0), plan.Target(4.0, DELTA)
    # Of 10¹⁵ scalars the factor (1 − 2⁻⁶⁴)^(−K) is e^(5.42e-5) a step and may be e^(1/128); at a
    # smaller δ it is the flux, 1.6e-13 of δ/128, that is spent first.
    cases = ((1, DELTA, 200), (10**15, DELTA, 144), (10**15, 1e-10, 4))
    for coordinates, delta, allowed in cases:
        made = plan.make(constant, SAMPLER, coordinates, plan.Target(4.0, delta))
        ledger, steps = _spent(made)
        assert steps == allowed and ledger.epsilon(delta) <= 4.0
    for room in range(40, 80):
        tight = sampling.TruncatedPoisson(128, 0.125, room)
        lost = (1 + math.exp(4.0)) * account.truncation(tight)
        if lost < DELTA / 200:
            break
    assert DELTA / 128 < 200 * lost, "the capacity is too roomy to tell"
    ledger, steps = _spent(plan.make(constant, tight, 1, target))
    assert steps == math.floor(DELTA / 128 / lost) and ledger.epsilon(DELTA) <= 4.0


def test_schedule_that_gives_no_multiplier_poisons_and_costs_infinity():
    for value in (math.nan, 0.0, -1.0, math.inf):
        scheduled = plan.make(optax.constant_schedule(value), SAMPLER, COORDINATES, None)
        assert isinstance(scheduled, plan.Scheduled)
        assert math.isnan(scheduled.multiplier(jnp.int32(0)))
    tx = private(lambda count: jnp.where(count < 1, 2.0, -1.0))
    step, params, state = stepper(tx), PARAMS, tx.init(PARAMS)
    params, state = step(params, state, PARAMS)
    assert np.all(np.isfinite(np.asarray(params["a"]))) and optim.epsilon(state, DELTA) < 1
    params, state = step(params, state, PARAMS)
    assert np.all(np.isnan(np.asarray(params["a"])))
    assert optim.epsilon(state, DELTA) == math.inf


def test_traced_clip_norm_that_is_none_poisons_the_update():
    tx = private()
    update = jax.jit(lambda c, state: tx.update(c.tree, state, clipped=c)[0])
    for norm in (math.nan, 0.0, -1.0, math.inf):
        updates = update(certificate(PARAMS, jnp.float32(norm)), tx.init(PARAMS))
        assert all(np.all(np.isnan(np.asarray(leaf))) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("sampler", [SAMPLER, sampling.TruncatedPoisson(128, 0.125, 60)])
@pytest.mark.parametrize("noise", [2.0, optax.constant_schedule(2.0)], ids=["fixed", "schedule"])
def test_traced_epsilon_is_close_above_that_of_the_host(noise, sampler):
    tx = private(noise, sampler=sampler)

    @jax.jit
    def run(state):
        def step(state, _):
            c = certificate(jax.tree.map(lambda leaf: leaf + state.key_data[0] * 0.0, PARAMS))
            _, state = tx.update(c.tree, state, clipped=c)
            return state, optim.traced_epsilon(state, 1e-3)

        return jax.lax.scan(step, state, length=5)

    state, trail = run(tx.init(PARAMS))
    host = optim.epsilon(state, 1e-3)
    assert host <= float(trail[-1]) < 1.02 * host and np.all(np.diff(trail) > 0)
    broken = state._replace(plan=state.plan + 1)
    assert math.isinf(optim.traced_epsilon(broken, 1e-3))


def test_state_of_another_configuration_is_found_out():
    tx, other = private(2.0), private(1.0)
    state = tx.init(PARAMS)
    c = certificate(PARAMS)
    with pytest.raises(ValueError, match="another sampler, noise multiplier or model"):
        other.update(c.tree, state, clipped=c)
    constant, elsewhere = optax.constant_schedule(2.0), sampling.Poisson(128, 0.25)
    scheduled = private(constant).init(PARAMS)
    with pytest.raises(ValueError, match="account of a schedule with"):
        private(constant, sampler=elsewhere).update(c.tree, scheduled, clipped=c)
    # A checkpoint keeps arrays: restored into another structure it would be charged as another.
    leaves = jax.tree.leaves(state)
    restored = jax.tree.unflatten(jax.tree.structure(other.init(PARAMS)), leaves)
    with pytest.raises(ValueError, match="restored into another"):
        optim.epsilon(restored, DELTA)
    updates, _ = _updated(other, c, restored)
    assert np.all(np.isnan(np.asarray(updates["a"])))
    with pytest.raises(ValueError, match="another"):
        tx.update(
            {"a": c.tree["a"]}, state, clipped=dataclasses.replace(c, tree={"a": c.tree["a"]})
        )


def test_fork_renews_the_noise_and_keeps_the_account():
    tx = optax.chain(private(), optax.sgd(1.0))
    step = stepper(tx)
    _, state = step(PARAMS, tx.init(PARAMS), PARAMS)
    again, _ = step(PARAMS, state, PARAMS)
    same, _ = step(PARAMS, state, PARAMS)
    forked = optim.fork(state, jax.random.key(7))
    other, after = step(PARAMS, forked, PARAMS)
    np.testing.assert_array_equal(again["a"], same["a"])
    assert not np.any(np.asarray(other["a"]) == np.asarray(again["a"]))
    assert optim.event(after) == accounting.Repeated(SAMPLER.event(2.0, COORDINATES, 64), 2)
    with pytest.raises(ValueError, match="PrivateState"):
        optim.fork(optax.sgd(1.0).init(PARAMS), jax.random.key(7))


def test_epsilon_of_a_state_without_privacy_is_refused():
    with pytest.raises(ValueError, match="PrivateState"):
        optim.epsilon(optax.adam(1e-3).init(PARAMS), DELTA)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"noise_multiplier": math.nan}, ValueError),
        ({"noise_multiplier": -1.0}, ValueError),
        ({"noise_multiplier": math.inf}, ValueError),
        ({"noise_multiplier": "2"}, TypeError),
        ({"noise_multiplier": None}, TypeError),
        ({"sampling": None}, TypeError),
        ({"sampling": "shuffle"}, TypeError),
        ({"rng": 0}, TypeError),
        ({"rng": np.zeros(2, np.uint32)}, TypeError),
        ({"target": 1.0}, TypeError),
        ({"target": (1.0, math.nan)}, ValueError),
        ({"target": (math.nan, DELTA)}, ValueError),
        ({"target": (0.0, DELTA)}, ValueError),
        ({"target": (1.0, 1.0)}, ValueError),
    ],
)
def test_privatize_refuses_hostile_arguments(changes, error):
    given = dict(noise_multiplier=1.0, sampling=SAMPLER, rng=jax.random.key(0)) | changes
    with pytest.raises(error, match=r"Expected|Type-check"):
        optim.privatize(**given)
