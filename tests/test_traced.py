"""The state of a noise schedule: an upper bound in jit, a close one on the host, ∞ when damaged."""

import functools
import itertools
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import accounting
from dpfa_jax.accounting import (
    Composed,
    Gaussian,
    PoissonSampled,
    Repeated,
    convert,
    rdp,
    subsample,
    traced,
    upward,
)
from dpfa_jax.accounting.traced import ORDERS, TracedLedger

ARRAY = np.array(ORDERS, np.float64)
in_jit = jax.jit(lambda ledger: ledger.traced_epsilon(1e-6))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def run(multipliers, rate=1.0, coordinates=0, bits=40):
    def step(ledger, multiplier):
        ledger = ledger.add(
            multiplier, sampling_rate=rate, coordinates=coordinates, radius_bits=bits
        )
        return ledger, None

    return jax.lax.scan(step, TracedLedger.create(), multipliers)[0]


def exact(high, low):
    """The double words as fractions."""
    return [Fraction(float(a)) + Fraction(float(b)) for a, b in zip(high, low, strict=True)]


def test_add_loses_nothing_that_reading_does_not_restore():
    rng = np.random.default_rng(0)
    costs = np.exp(rng.uniform(-50, 10, (4000, 8))).astype(np.float32)
    costs[:, 0], costs[:, 1], costs[1:, 2] = 2.0**-80, 0.1, 1e-9
    zeros = jnp.zeros(8, jnp.float32)

    def step(sums, cost):
        return upward.add(sums[0], sums[1], cost), None

    high, low = jax.jit(lambda c: jax.lax.scan(step, (zeros, zeros), c)[0])(costs)
    true = [sum(map(Fraction, column.tolist())) for column in costs.T]
    for found, sum_ in zip(exact(high, low), true, strict=True):
        assert sum_ <= found * (1 + len(costs) * Fraction(1, 2**45))
        assert found <= sum_ * (1 + len(costs) * Fraction(1, 2**45))
    # Negative control: one float32 word does lose more than that.
    plain = functools.reduce(np.add, costs[:, 1], np.float32(0))
    assert abs(Fraction(float(plain)) / true[1] - 1) > Fraction(1, 2**20)


def test_add_never_shrinks_and_forgets_no_damage():
    words = [0.0, 2.0**-80, 1e-9, 1.0, 1e30, 3e38, math.inf, math.nan, -1.0]
    high, cost = (jnp.float32(x) for x in zip(*itertools.product(words, words), strict=True))
    upper, lower = jax.jit(upward.add)(high, jnp.zeros_like(high), cost)
    for before, more, after, rest in zip(*map(np.asarray, (high, cost, upper, lower)), strict=True):
        if before >= 0 and more >= 0 and float(before) + float(more) < 3.4e38:
            assert after >= max(before, more) and abs(rest) <= after
        else:
            assert after == math.inf and rest == 0
    again = jax.jit(upward.add)(upper, lower, jnp.float32(1.0))[0]
    assert bool(jnp.all(again >= upper))


def test_upward_epsilon_lies_just_above_the_host():
    orders = rdp.DEFAULT_ORDERS
    for multiplier, delta in itertools.product((0.05, 0.7, 4.0, 300.0), (1e-30, 1e-6, 0.3)):
        curve = rdp.gaussian(multiplier, orders)
        host = float(convert.epsilons(orders, curve, delta).min())
        left = upward.tolerance(delta, 0.0, 0.0)
        found = float(upward.epsilon(orders, jnp.asarray(upward.at_least(curve)), left))
        assert host <= found <= host * (1 + 1e-3) + 1e-3
    zero = jnp.zeros(orders.shape, jnp.float32)
    assert float(upward.epsilon(orders, zero, jnp.float32(0.0))) == 0.0
    for bad in (math.nan, math.inf):
        assert float(upward.epsilon(orders, zero + bad, jnp.float32(1e-5))) == math.inf
    for small in (0.0, 1e-39, 1e-45):  # denormal numbers may count as 0
        assert float(upward.epsilon(orders, zero + 1e-9, jnp.float32(small))) == math.inf
    assert float(upward.tolerance(1e-6, 2e-6, 0.0)) == 0.0
    assert 0 < float(upward.tolerance(1e-6, 1e-8, 3.0)) <= 1e-6 * math.exp(-3) - 1e-8


def test_epsilon_beside_pays_for_variation():
    orders, curve = rdp.DEFAULT_ORDERS, upward.at_least(rdp.gaussian(1.0, rdp.DEFAULT_ORDERS))

    def found(variation):
        return float(upward.epsilon_beside(orders, jnp.asarray(curve), 1e-5, (0.0, 0.0), variation))

    free = found(0.0)
    for variation in (1e-12, 1e-9, 1e-8):
        charged = found(variation)
        assert free < charged < math.inf
        left = 1e-5 - (1 + math.exp(charged)) * variation
        assert left > 0
        assert float(convert.epsilons(orders, curve, left).min()) <= charged
    assert found(1e-6) == math.inf and found(math.nan) == math.inf


GRID = tuple(itertools.product((1e-7, 1e-3, 0.3, 0.999), (0.03, 0.5, 1.0, 7.0, 1e3)))


@pytest.mark.parametrize("rate", sorted({rate for rate, _ in GRID}))
def test_sampled_rdp_bounds_the_curve_closely(rate):
    cost = jax.jit(lambda square: traced.sampled_rdp(square, rate))
    for multiplier in (0.03, 0.1, 0.5, 1.0, 1.7, 7.0, 90.0, 1e3, 1e5):
        # The cost of the float32 number itself, which is what was charged.
        square = np.float32(multiplier**-2)
        found = np.asarray(cost(square), np.float64)
        host = subsample.poisson_gaussian(float(square) ** -0.5, rate, ARRAY)
        assert (found >= host).all()
        count = len(traced.WHOLE)
        assert (found[:count] <= host[:count] * (1 + 4e-3)).all()
        # Between integers the table's chords: loose where a cost bends, below the whole data set's.
        assert (found <= rdp.gaussian(float(square) ** -0.5, ARRAY) * 1.001).all()
        if 1.0 <= multiplier <= 1e3:
            assert np.median(found[count:] / host[count:]) <= 1.01


def test_sampled_rdp_grows_with_the_rate_and_falls_with_the_noise():
    squares = jnp.asarray(np.geomspace(2.0**-40, 1e30, 40), jnp.float32)
    each = jax.vmap(traced.sampled_rdp, (0, None))
    costs = [np.asarray(each(squares, rate)) for rate in (0.01, 0.6)]
    for cost in costs:
        assert (np.diff(cost, axis=0) >= -4e-3 * cost[1:]).all() and np.isfinite(cost).all()
    assert (costs[0] <= costs[1] * (1 + 4e-3)).all()
    assert (np.asarray(traced.sampled_rdp(jnp.float32(1.0), 0.0)) == 0).all()
    whole = np.asarray(traced.sampled_rdp(jnp.float32(1.0), 1.0), np.float64)
    assert (whole >= ARRAY / 2).all() and (whole <= ARRAY / 2 * 1.001).all()
    assert (np.asarray(traced.sampled_rdp(jnp.float32(math.inf), 0.1)) == math.inf).all()


@pytest.mark.parametrize("rate", [0.01, 1.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_add_of_hostile_multipliers_costs_infinity(rate, dtype):
    add = jax.jit(lambda z: TracedLedger.create().add(z, sampling_rate=rate, coordinates=5))
    for bad in (math.nan, 0.0, -0.0, -1.0, -math.inf, 1e-30):
        ledger = add(jnp.asarray(bad, dtype))
        assert ledger.epsilon(0.9) == math.inf and float(in_jit(ledger)) == math.inf
        after = ledger.add(1.0)
        assert after.epsilon(0.9) == math.inf
    for tiny in (math.inf, 1e30):  # noise without bound still costs something
        assert 0.0 < add(jnp.asarray(tiny, dtype)).epsilon(1e-20)


def test_add_refuses_what_is_no_multiplier():
    ledger = TracedLedger.create()
    for bad in (jnp.int32(1), jnp.ones(2), jnp.array(True), "1", None, True, math.nan, -1.0):
        with pytest.raises((TypeError, ValueError), match="Expected"):
            ledger.add(bad)
    for name, bad in itertools.product(
        ("sampling_rate", "coordinates", "radius_bits"), (math.nan, -1, "1", None, 1.5)
    ):
        wrong: dict[str, Any] = {name: bad}
        with pytest.raises((TypeError, ValueError), match="Expected"):
            ledger.add(1.0, **wrong)
    with pytest.raises(ValueError, match="radius_bits"):
        ledger.add(1.0, coordinates=1, radius_bits=0)


def test_ledger_of_a_schedule_bounds_the_events_closely():
    multipliers = np.linspace(3.0, 0.9, 40).astype(np.float32)
    ledger = run(multipliers, 0.02)
    event = Composed([PoissonSampled(Gaussian(float(z)), 0.02) for z in multipliers])
    for delta in (1e-9, 1e-6, 1e-3):
        assert accounting.epsilon(event, delta) <= ledger.epsilon(delta)
        host = convert.epsilons(ARRAY, accounting.rdp_curve(event, ARRAY), delta).min()
        assert ledger.epsilon(delta) <= host * (1 + 2e-3)
    curve = ledger.rdp_curve([1.3, 2.0, 7.5, 900.0])
    exact_curve = accounting.rdp_curve(event, [1.3, 2.0, 7.5, 900.0])
    assert (curve >= exact_curve).all()
    assert curve[1] <= exact_curve[1] * 1.003
    assert ledger.rdp_curve(2000.0)[0] == math.inf
    assert ledger.count == 40
    mixed = ledger.add(2.0)
    beside = accounting.epsilon(Composed([event, Gaussian(2.0)]), 1e-6)
    assert beside <= mixed.epsilon(1e-6) <= beside * 1.05


def test_ledger_of_plain_releases_is_the_exact_curve():
    multipliers = np.linspace(30.0, 9.0, 50).astype(np.float32)
    event = Composed([Gaussian(float(z)) for z in multipliers])
    for delta in (1e-9, 1e-3):
        host = accounting.epsilon(event, delta)
        assert host <= run(multipliers).epsilon(delta) <= host * (1 + 1e-4)
    assert TracedLedger.create().epsilon(0.0) == 0.0
    assert float(in_jit(TracedLedger.create())) == 0.0
    assert run(np.ones(3, np.float32), 0.0, 7).epsilon(0.0) == 0.0


def test_ledger_charges_the_cut_off_of_every_release():
    for rate, multiplier, coordinates, delta in (
        (1.0, 3.0, 10**7, 1e-7),
        (0.01, 0.8, 10**6, 1e-6),
        (0.05, 0.4, 10**3, 1e-7),
    ):
        ledger = run(np.full(3, multiplier, np.float32), rate, coordinates)
        leaf = Gaussian(multiplier, coordinates)
        event = Repeated(PoissonSampled(leaf, rate) if rate < 1 else leaf, 3)
        host = accounting.epsilon(event, delta)
        ideal = run(np.full(3, multiplier, np.float32), rate).epsilon(delta)
        assert ideal < ledger.epsilon(delta) <= host * 1.1
        assert 1.0 <= float(ledger.high[2]) / (3 * coordinates * 2.0**-40) <= 1.001
        assert ledger.high[1] >= 3 * rate * accounting.gdp.cut_off(1 / multiplier, coordinates)[1]
    for multiplier in np.linspace(0.17, 5.0, 40):  # between the points of the table
        flux = float(run(np.full(1, multiplier, np.float32), 1.0, 10).high[1])
        exact = accounting.gdp.cut_off(1 / float(np.float32(multiplier)), 10)[1]
        assert exact <= flux <= exact * math.exp(7.5 / 32)
    assert run(np.full(3, 0.1, np.float32), 0.05, 10).epsilon(1e-6) == math.inf
    # The factor alone: 2⁴⁰ pairs multiply δ by e, which leaves ideal noise δ/e.
    many = TracedLedger.create().add(1e6, sampling_rate=0.5)
    many = TracedLedger(many.high.at[2].set(1.0), many.low, many.count)
    one_of_e = TracedLedger(many.high.at[2].set(0.0), many.low, many.count)
    assert many.epsilon(1e-9) >= one_of_e.epsilon(1e-9 / math.e) * (1 - 1e-9)
    assert many.epsilon(1e-9) > one_of_e.epsilon(1e-9)
    assert float(in_jit(many)) > float(in_jit(one_of_e))


def test_traced_epsilon_is_above_the_host_and_close():
    for rate, multiplier in ((0.01, 1.0), (0.3, 20.0), (1.0, 8.0), (0.001, 0.5)):
        ledger = run(np.full(100, multiplier, np.float32), rate, 100)
        found, host = float(in_jit(ledger)), ledger.epsilon(1e-6)
        assert host <= found <= host * (1.002 if rate < 1 else 1.2)
    assert float(jax.jit(lambda x: x.traced_epsilon(0.0))(ledger)) == math.inf
    with pytest.raises(ValueError, match="delta"):
        ledger.traced_epsilon(math.nan)


def test_ledger_saturates_and_survives_a_checkpoint():
    ledger = run(np.ones(4, np.float32), 0.1, 3)
    leaves, tree = jax.tree.flatten(ledger)
    assert [leaf.dtype for leaf in leaves] == [jnp.float32, jnp.float32, jnp.int32]
    again = jax.tree.unflatten(tree, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    assert again.epsilon(1e-5) == ledger.epsilon(1e-5)
    late = TracedLedger(ledger.high, ledger.low, jnp.int32(traced.UNKNOWN - 1))
    assert late.epsilon(1e-5) < math.inf
    full = late.add(1.0)
    assert int(full.count) == int(full.add(1.0).count) == traced.UNKNOWN
    assert full.epsilon(1e-5) == math.inf and float(in_jit(full)) == math.inf
    both = jax.vmap(lambda z: TracedLedger.create().add(z))(jnp.array([1.0, math.nan]))
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], both) for i in (0, 1))
    assert first.epsilon(1e-5) < second.epsilon(1e-5) == math.inf


def test_damaged_state_costs_infinity():
    good = run(np.ones(4, np.float32), 0.1)
    unknown = good.high.at[3:].set(math.inf)  # no order is known any more
    assert float(in_jit(TracedLedger(unknown, good.low, good.count))) == math.inf
    n = len(good.high)
    for place, value in itertools.product((0, 1, 2, 3, n - 1), (math.nan, -1.0, math.inf)):
        damaged = TracedLedger(good.high.at[place].set(value), good.low, good.count)
        if place > 2 and value == math.inf:  # the other orders still hold
            assert good.epsilon(1e-6) <= damaged.epsilon(1e-6)
            continue
        assert damaged.epsilon(1e-6) == math.inf, (place, value)
        assert float(in_jit(damaged)) == math.inf, (place, value)
    for high, count in (
        (good.high[1:], good.count),
        (good.high.astype(jnp.bfloat16), good.count),
        (good.high, jnp.float32(4)),
        (good.high, jnp.int32(-1)),
    ):
        assert TracedLedger(high, good.low, count).epsilon(1e-6) == math.inf


@pytest.mark.parametrize(
    ("rate", "multiplier", "delta"),
    [(0.01, 0.6, 1e-5), (0.001, 0.5, 1e-6), (0.3, 0.7, 1e-3)],
)
def test_ledger_of_a_large_epsilon_needs_real_orders(rate, multiplier, delta):
    """The best order is no integer here: with integers alone ε is 5, 9 and 170 per cent above."""
    steps = 1000
    ledger = run(np.full(steps, multiplier, np.float32), rate)
    exact_ = accounting.epsilon(
        Repeated(PoissonSampled(Gaussian(float(np.float32(multiplier))), rate), steps), delta
    )
    assert exact_ <= ledger.epsilon(delta) <= 1.015 * exact_
    found = float(jax.jit(lambda each: each.traced_epsilon(delta))(ledger))
    assert ledger.epsilon(delta) <= found <= ledger.epsilon(delta) * 1.001


def test_table_lies_on_the_convex_side():
    """Chords of M − 1 in 1/z² bound it at every point between, at every real order."""
    rng = np.random.default_rng(1)
    for rate in (1e-5, 0.05, 0.7):
        cost = jax.jit(lambda square, rate=rate: traced.sampled_rdp(square, rate))
        for square in np.exp(rng.uniform(np.log(2e-6), np.log(150.0), 40)).astype(np.float32):
            found = np.asarray(cost(square), np.float64)
            assert (found >= subsample.poisson_gaussian(float(square) ** -0.5, rate, ARRAY)).all()


def test_rates_below_float32_still_cost_something():
    for rate in (1e-25, 5e-324):
        ledger = run(np.ones(2, np.float32), rate)
        assert ledger.epsilon(0.0) == math.inf
        assert ledger.epsilon(1e-30) > 0.0
        assert float(jax.jit(lambda each: each.traced_epsilon(0.0))(ledger)) == math.inf
