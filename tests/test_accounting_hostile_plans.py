"""Hostile inputs to everything that plans: an error, or a plan that costs no more than it says."""

import math
import random

import jax.numpy as jnp
import pytest

from dpfa_jax import accounting
from dpfa_jax.accounting import allocate, attacker, calibrate, filters, groups
from dpfa_jax.accounting.event import (
    Gaussian,
    Laplace,
    NonPrivate,
    PoissonSampled,
    RandomizedResponse,
    Repeated,
    SampledWithoutReplacement,
)
from dpfa_jax.accounting.traced import TracedLedger

HOSTILE = (
    *(math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 1e-300, 1e300, -1.0, 1 - 2**-53, 700.0),
    *(None, "1", b"1", True, [1.0], (1.0,), {}, 1j, object(), float, -1, 0, 2**31, 2**53 + 1),
    *(10**30, 10**400, -(10**400), 1 << 20000),
)
EPSILON, DELTA, WHOLE = (0.5, 1.0, 8.0), (1e-9, 1e-6), (1, 2, 7)
ERRORS = (TypeError, ValueError, NotImplementedError, filters.BudgetExceeded)
EVENTS = (
    *(Gaussian(9.0, 100), Laplace(20.0), PoissonSampled(Gaussian(2.0), 0.01), NonPrivate()),
    *(RandomizedResponse(0.1), SampledWithoutReplacement(9.0, 1.0, 10, 1000)),
)


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def check_target(found, epsilon, delta):
    """What a planner returned for a target meets it."""
    assert is_number(epsilon) and is_number(delta) and 0 < delta < 1
    assert accounting.epsilon(found, delta) <= epsilon * (1 + 1e-12)


def plan_split(rng, pick):
    epsilon, delta = pick(*EPSILON), pick(*DELTA)
    parts = {"a": allocate.Part(pick(*EPSILON), pick(*WHOLE), pick(*WHOLE)), "b": allocate.Part()}
    check_target(allocate.split(parts, epsilon=epsilon, delta=delta).event, epsilon, delta)


def plan_per_head(rng, pick):
    epsilon, delta, layers = pick(*EPSILON), pick(*DELTA), pick(*WHOLE)
    if not (isinstance(layers, int) and layers > 8):  # not refused, only long
        found = allocate.per_head(layers=layers, heads=2, epsilon=epsilon, delta=delta)
        check_target(found.event, epsilon, delta)


def plan_noise(rng, pick):
    epsilon, delta = pick(*EPSILON), pick(*DELTA)
    releases, coordinates = pick(*WHOLE), pick(*WHOLE)
    found = accounting.noise_multiplier(
        epsilon=epsilon, delta=delta, releases=releases, coordinates=coordinates
    )
    check_target(Repeated(Gaussian(found, coordinates), releases), epsilon, delta)


def plan_steps(rng, pick):
    event, epsilon, delta = rng.choice(EVENTS), pick(*EPSILON), pick(*DELTA)
    count = calibrate.steps(event, epsilon=epsilon, delta=delta)
    if count:
        check_target(Repeated(event, count), epsilon, delta)


def plan_smallest(rng, pick):
    epsilon, delta, low, high = pick(*EPSILON), pick(*DELTA), pick(0.1), pick(1e6)
    found = calibrate.smallest(Gaussian, epsilon=epsilon, delta=delta, low=low, high=high)
    assert is_number(low) and is_number(high) and low <= found <= high
    check_target(Gaussian(found), epsilon, delta)


def plan_filter(rng, pick):
    make = rng.choice((filters.for_gdp, filters.for_zcdp))
    epsilon, delta = pick(*EPSILON), pick(*DELTA)
    coordinates, event = pick(500), rng.choice(EVENTS)
    budget = make(epsilon=epsilon, delta=delta, coordinates=coordinates)
    assert is_number(epsilon) and is_number(delta)
    assert budget.epsilon(delta) <= epsilon
    count = pick(*WHOLE)
    after = budget.spend(event, count)
    assert is_number(count) and count >= 1 and not isinstance(event, NonPrivate)
    assert budget.limit >= after.spent > 0 and after.released <= coordinates


def plan_renyi(rng, pick):
    order, epsilon, delta, flux = pick(8.0, 40.0), pick(*EPSILON), pick(*DELTA), pick(1e-12)
    event = rng.choice(EVENTS)
    budget = filters.for_renyi(
        order=order, epsilon=epsilon, delta=delta, coordinates=10**4, radius_bits=64, flux=flux
    )
    assert is_number(flux) and flux < delta
    assert budget.epsilon(delta) <= epsilon
    after = budget.spend(event, 3)
    assert after.spent >= 3 * accounting.rdp_curve(event, order)[0]


def plan_group(rng, pick):
    event, rows = rng.choice(EVENTS), pick(*WHOLE)
    group = groups.grouped(event, rows)
    assert is_number(rows) and rows >= 1
    assert accounting.epsilon(group, 1e-6) >= accounting.epsilon(event, 1e-6) * (1 - 1e-9)


def plan_attacker(rng, pick):
    event, rate = rng.choice(EVENTS), pick(0.1, 1e-6)
    reached = attacker.true_positive_rate(event, rate)
    assert is_number(rate) and min(rate, 1.0) <= reached * (1 + 1e-9) <= 1 + 1e-8


def plan_traced(rng, pick):
    multiplier, rate, delta = pick(0.7, 4.0), pick(0.1, 1.0), pick(*DELTA)
    coordinates, bits = pick(*WHOLE), pick(40, 64)
    start = TracedLedger.create().add(5.0)
    after = start.add(multiplier, sampling_rate=rate, coordinates=coordinates, radius_bits=bits)
    for value in (multiplier, rate, coordinates, bits):
        assert is_number(value)
    assert after.epsilon(1e-6) >= start.epsilon(1e-6) * (1 - 1e-12)
    found = float(after.traced_epsilon(delta))
    assert is_number(delta) and found >= after.epsilon(delta) * (1 - 1e-12)


PLANS = (
    *(plan_split, plan_per_head, plan_noise, plan_steps, plan_smallest, plan_filter, plan_renyi),
    *(plan_group, plan_attacker),
)


def attack(plans, trials, seed):
    """Calls that returned a plan; some must, or the attack tests nothing but its checks."""
    rng = random.Random(seed)
    through = dict.fromkeys(plans, 0)
    for trial in range(trials):
        plan = plans[trial % len(plans)]
        share = rng.choice((0.0, 0.2, 0.5))

        def pick(*harmless, share=share):
            return rng.choice(HOSTILE if rng.random() < share else harmless)

        try:
            plan(rng, pick)
        except ERRORS:
            continue
        through[plan] += 1
    return through


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
def test_hostile_plans_never_cost_more_than_they_say():
    through = attack(PLANS, 108, seed=0)
    assert min(through.values()) >= 1, through


def test_hostile_schedules_never_cost_less():
    through = attack((plan_traced,), 12, seed=1)
    assert sum(through.values()) >= 1
    for bad in (math.nan, -1.0, 0.0, -math.inf):
        assert TracedLedger.create().add(jnp.float32(bad)).epsilon(0.5) == math.inf


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_ten_thousand_hostile_plans_never_cost_more_than_they_say(seed):
    through = attack(PLANS, 1000, seed=seed)  # ten seeds
    assert min(through.values()) >= 2, through
