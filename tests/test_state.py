"""The ledger in jit: counts never wrap, never shrink, and unknown costs infinity."""

import math

import jax
import jax.numpy as jnp
import pytest

from dpfa_jax import accounting
from dpfa_jax.accounting import Composed, Gaussian, Laplace, Ledger, NonPrivate, Repeated
from dpfa_jax.accounting.state import SATURATED

STEP, OTHER = Gaussian(10.0, 4), Laplace(50.0)


def test_ledger_counts_under_jit_and_scan():
    @jax.jit
    def run(ledger, count):
        def body(ledger, _):
            return ledger.spend(STEP), None

        ledger, _ = jax.lax.scan(body, ledger, length=100)
        return ledger.spend(OTHER, count)

    ledger = run(Ledger.create(STEP, OTHER), jnp.int32(7))
    assert ledger.event == Composed((Repeated(STEP, 100), Repeated(OTHER, 7)))
    assert ledger.epsilon(1e-5) == accounting.epsilon(ledger.event, 1e-5)


def test_ledger_takes_compositions_apart():
    layer = Composed((Repeated(STEP, 3), OTHER))
    ledger = Ledger.create(layer).spend(layer, 2)
    assert ledger.counts.tolist() == [6, 2]
    assert Ledger.create().event == accounting.NoRelease()
    assert Ledger.create(layer).epsilon(0.0) == 0.0


@pytest.mark.parametrize("start", [0, 1, 5, SATURATED - 1, SATURATED])
@pytest.mark.parametrize("more", [0, 1, 2, SATURATED - 5, SATURATED, 2**31, 10**30])
def test_spend_saturates_instead_of_wrapping(start, more):
    ledger = Ledger.create(STEP).spend(STEP, start).spend(STEP, more)
    assert ledger.counts.tolist() == [min(start + more, SATURATED)]
    assert (ledger.epsilon(1e-5) == math.inf) == (
        start + more >= SATURATED or not accounting.epsilon(ledger.event, 1e-5) < math.inf
    )


@pytest.mark.parametrize("count", [0, 1, 715827882, 715827883, 2**31 - 1])
def test_spend_saturates_products_of_counts(count):
    triple = Repeated(STEP, 3)
    ledger = jax.jit(lambda ledger, count: ledger.spend(triple, count))(
        Ledger.create(STEP), jnp.int32(count)
    )
    assert ledger.counts.tolist() == [min(3 * count, SATURATED)]
    huge = Ledger.create(STEP).spend(Repeated(STEP, 10**12), jnp.int32(count))
    assert huge.counts.tolist() == [0 if count == 0 else SATURATED]


@pytest.mark.parametrize("count", [jnp.int32(-1), jnp.int32(-(2**31)), jnp.uint32(2**31)])
def test_spend_of_a_traced_count_out_of_range_costs_infinity(count):
    ledger = jax.jit(lambda ledger, count: ledger.spend(STEP, count))(Ledger.create(STEP), count)
    assert ledger.event == NonPrivate()
    assert ledger.epsilon(1e-5) == math.inf


def test_spend_takes_small_integer_types():
    for dtype in (jnp.int8, jnp.uint8, jnp.int16, jnp.uint32):
        assert Ledger.create(STEP).spend(STEP, jnp.asarray(100, dtype)).counts.tolist() == [100]


@pytest.mark.parametrize("bad", [-1, 1.0, math.nan, True, jnp.float32(1), jnp.ones(2, jnp.int32)])
def test_spend_refuses_what_is_no_count(bad):
    with pytest.raises((TypeError, ValueError)):
        Ledger.create(STEP).spend(STEP, bad)


def test_spend_refuses_an_unknown_event():
    with pytest.raises(ValueError, match="created for"):
        Ledger.create(STEP).spend(OTHER)
    with pytest.raises(ValueError, match="created for"):
        Ledger.create(STEP).spend(Gaussian(10.0, 5))


@pytest.mark.parametrize(
    "counts",
    [
        jnp.array([-1], jnp.int32),
        jnp.array([math.nan], jnp.float32),
        jnp.array([3.0], jnp.float32),
        jnp.array([[1], [2]], jnp.int32),
        jnp.array([], jnp.int32),
        jnp.array([1, 1], jnp.int32),
    ],
)
def test_event_of_damaged_counts_costs_infinity(counts):
    leaves, tree = jax.tree.flatten(Ledger.create(STEP))
    assert len(leaves) == 1
    damaged = jax.tree.unflatten(tree, [counts])
    assert damaged.epsilon(1e-5) == math.inf


def test_spend_after_damage_stays_infinite():
    tree = jax.tree.structure(Ledger.create(STEP))
    damaged = jax.tree.unflatten(tree, [jnp.array([-(2**31)], jnp.int32)])
    assert damaged.spend(STEP, 2**30).spend(STEP, 2**30).event == NonPrivate()


def test_merge_adds_counts_and_joins_events():
    left = Ledger.create(STEP).spend(STEP, 5)
    right = Ledger.create(OTHER, STEP).spend(OTHER, 2).spend(STEP, SATURATED - 5)
    both = jax.jit(lambda a, b: a.merge(b))(left, right)
    assert both.events == (STEP, OTHER)
    assert both.counts.tolist() == [SATURATED, 2]
    assert left.merge(Ledger.create(OTHER)).event == left.event
    assert Ledger.create().merge(left).event == left.event


def test_ledger_survives_a_round_trip_through_leaves():
    ledger = Ledger.create(STEP, OTHER).spend(OTHER, 3)
    leaves, tree = jax.tree.flatten(ledger)
    again = jax.tree.unflatten(tree, [jnp.asarray(leaf.tolist(), jnp.int32) for leaf in leaves])
    assert again.event == ledger.event


MANY = (
    *(Gaussian(30.0, 100), Gaussian(9.0), Laplace(200.0), NonPrivate()),
    accounting.PoissonSampled(Gaussian(1.0, 50), 0.01),
    accounting.TruncatedPoissonSampled(Gaussian(1.0), 0.01, 10_000, 190),
)
in_jit = jax.jit(lambda ledger: ledger.traced_epsilon(1e-5))


def test_traced_epsilon_is_above_the_host_and_close():
    counts = [
        *((100, 0, 0, 0, 0, 0), (0, 0, 0, 0, 1000, 0), (0, 0, 0, 0, 0, 1000), (0,) * 6),
        *((3, 1, 50, 0, 200, 10), (0, 0, 0, 1, 0, 0), (0, 0, 10**9, 0, 0, 0)),
    ]
    for each in counts:
        ledger = Ledger(MANY, jnp.array(each, jnp.int32))
        found, host = float(in_jit(ledger)), ledger.epsilon(1e-5)
        assert found >= host
        # Gaussian releases have an exact curve on the host; the counts of 10⁹ cost beyond 10⁶.
        slack = 1.2 if sum(each[:2]) == sum(each) else 1.02
        assert found <= slack * host or host > 1e4
    both = Ledger.create(MANY[4], accounting.SampledWithoutReplacement(1.0, 1.0, 1, 9))
    with pytest.raises(ValueError, match="adjacency"):
        both.traced_epsilon(1e-5)
    assert float(Ledger.create().traced_epsilon(0.0)) == 0.0
    for bad in (math.nan, -1.0, 1.0):
        with pytest.raises(ValueError, match="delta"):
            Ledger.create(STEP).traced_epsilon(bad)


@pytest.mark.parametrize("damage", [-1, -(2**31), SATURATED])
def test_traced_epsilon_of_damaged_counts_is_infinite(damage):
    counts = jnp.zeros(len(MANY), jnp.int32).at[1].set(damage)
    assert float(in_jit(Ledger(MANY, counts))) == math.inf


def test_traced_epsilon_pays_for_the_cut_off_and_the_overflow():
    cut = Gaussian(1.0, 34_000_000)
    flux = accounting.charge.profile_of(cut).flux
    spent = Ledger.create(cut).spend(cut)
    assert float(spent.traced_epsilon(0.9 * flux)) == math.inf
    assert spent.epsilon(2 * flux) <= float(spent.traced_epsilon(2 * flux)) < math.inf
    assert float(spent.traced_epsilon(2 * flux)) > float(spent.traced_epsilon(4 * flux))
    tight = accounting.TruncatedPoissonSampled(Gaussian(1.0), 0.01, 10_000, 160)
    spent = Ledger.create(tight).spend(tight, 100)
    host = spent.epsilon(1e-5)
    assert host <= float(spent.traced_epsilon(1e-5)) < 1.3 * host
    assert float(spent.traced_epsilon(1e-6)) == math.inf  # the overflow alone is more
