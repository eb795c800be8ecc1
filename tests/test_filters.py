"""Filters: what fits passes, what does not is refused, and the theorem holds on adaptive runs."""

import dataclasses
import math

import numpy as np
import pytest

from dpfa_jax import accounting
from dpfa_jax.accounting import convert, filters, gdp, subsample
from dpfa_jax.accounting.event import (
    BoundedRange,
    Composed,
    Deviation,
    DiscreteGaussian,
    ExponentialMechanism,
    Gaussian,
    Laplace,
    NonPrivate,
    NoRelease,
    PoissonSampled,
    RandomizedResponse,
    Repeated,
    SampledWithoutReplacement,
    Skellam,
    TruncatedPoissonSampled,
)

MAKERS = (
    filters.for_gdp,
    filters.for_zcdp,
    lambda **target: filters.for_renyi(order=16.0, **target),
)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("epsilon", [0.5, 2.0, 20.0])
def test_for_target_is_the_private_side(make, epsilon):
    budget = make(epsilon=epsilon + 1.0, delta=1e-6)
    assert budget.epsilon(1e-6) <= epsilon + 1.0
    assert budget.epsilon(1e-6) >= (epsilon + 1.0) * (1 - 1e-9)


@pytest.mark.parametrize("make", MAKERS)
def test_filter_lets_through_what_fits_and_no_more(make):
    budget = make(epsilon=3.0, delta=1e-6)
    step = Gaussian(50.0)
    count = budget.forecast(step)
    assert not budget.would_exceed(step, count)
    assert budget.would_exceed(step, count + 1)
    for _ in range(count):
        budget = budget.spend(step)
    assert budget.forecast(step) == 0
    with pytest.raises(filters.BudgetExceeded, match="more than is left"):
        budget.spend(step)
    assert budget.spend(NoRelease()).spent == budget.spent
    # A fixed plan of the same releases costs no more than the filter's promise.
    assert accounting.epsilon(Repeated(step, count), 1e-6) <= 3.0


def test_filter_refuses_what_its_currency_cannot_express():
    gaussian = filters.for_gdp(epsilon=5.0, delta=1e-5)
    for event in (Laplace(1e6), DiscreteGaussian(1e6), PoissonSampled(Gaussian(1e6), 0.1)):
        assert gaussian.would_exceed(event)
    concentrated = filters.for_zcdp(epsilon=5.0, delta=1e-5)
    for event in (NonPrivate(), Skellam(1e6, 1.0, 1.0), PoissonSampled(Gaussian(1e3), 0.1)):
        assert concentrated.would_exceed(event)
    for event, cost in (
        (DiscreteGaussian(10.0), 0.005),
        (Laplace(10.0), 0.005),
        (RandomizedResponse(0.1), 0.005),
        (BoundedRange(0.2), 0.005),
        (ExponentialMechanism(0.2, 0.005), 0.005),
        (Composed((Gaussian(10.0), Gaussian(10.0))), 0.01),
    ):
        spent = concentrated.spend(event).spent
        assert cost <= spent <= cost * (1 + 1e-12)
    renyi = filters.for_renyi(order=8.0, epsilon=5.0, delta=1e-5)
    step = PoissonSampled(Gaussian(1.0), 0.01)
    assert renyi.spend(step).spent >= accounting.rdp_curve(step, 8.0)[0]


@pytest.mark.parametrize("make", MAKERS)
def test_filter_charges_the_cut_off(make):
    with pytest.raises(ValueError, match="filter can hold"):
        make(epsilon=3.0, delta=1e-7, coordinates=10**13)
    budget = make(epsilon=3.0, delta=1e-6, coordinates=1000)
    assert budget.limit < make(epsilon=3.0, delta=1e-6).limit
    step = Gaussian(100.0, 400)
    assert budget.forecast(step) == 2
    assert make(epsilon=3.0, delta=1e-6).would_exceed(step)


def test_filter_refuses_costs_in_delta_it_cannot_carry():
    budget = filters.for_renyi(order=8.0, epsilon=5.0, delta=1e-5)
    for event in (TruncatedPoissonSampled(Gaussian(1.0), 0.01, 100, 10), Deviation(1e-9)):
        assert budget.would_exceed(event)
        with pytest.raises(filters.BudgetExceeded, match="total variation"):
            budget.spend(event)
    # Nothing was set aside for noise that ends: a refusal, not a smaller cost.
    for event in (
        PoissonSampled(Gaussian(1.0, 10), 0.01),
        SampledWithoutReplacement(9.0, 1.0, 1, 100, 10),
    ):
        assert budget.would_exceed(event)
        with pytest.raises(filters.BudgetExceeded, match="flux"):
            budget.spend(event)
    wide = filters.for_gdp(epsilon=5.0, delta=1e-5, coordinates=100, radius_bits=64)
    with pytest.raises(NotImplementedError, match="64 radius bits"):
        wide.spend(Gaussian(9.0, 10))
    assert wide.spend(Gaussian(9.0, 10, 64)).spend(Gaussian(9.0)).released == 10


def test_filter_charges_sampled_noise_that_ends():
    target = {"order": 8.0, "epsilon": 5.0, "delta": 1e-5}
    step = PoissonSampled(Gaussian(1.0, 10**6, 64), 0.01)
    fresh = filters.for_renyi(**target, coordinates=10**9, radius_bits=64, flux=1e-8)
    budget = fresh.spend(step, 100)
    each = 0.01 * gdp.cut_off(1.0, 10**6, radius_bits=64)[1]
    assert 100 * each <= budget.leaked <= 100 * each * (1 + 1e-6)
    assert budget.released == 10**8
    assert fresh.forecast(step) == 1000 and fresh.would_exceed(step, 1001)
    little = filters.for_renyi(**target, coordinates=10**9, radius_bits=64, flux=5.5 * each)
    assert little.forecast(step) == 5
    none = filters.for_renyi(**target, coordinates=10**9, radius_bits=64)
    assert none.would_exceed(step) and not none.would_exceed(Gaussian(9.0, 10**6, 64))
    assert fresh.limit < filters.for_renyi(**target).limit
    assert fresh.epsilon(1e-5) <= 5.0
    # What was set aside is what is charged: an ideal filter at the rest of δ has the same limit.
    left = (1e-5 - 1e-8) * math.exp(-(10**9) * 2.0**-64)
    assert fresh.epsilon(1e-5) == pytest.approx(
        filters.Filter("rdp", fresh.limit, order=8.0).epsilon(left), rel=1e-6
    )
    narrow = PoissonSampled(Gaussian(1.0, 10**6), 0.01)
    loose = filters.for_renyi(**target, coordinates=10**9, flux=1e-6)
    flux = 0.01 * gdp.cut_off(1.0, 10**6)[1]
    assert loose.forecast(narrow) == min(int(1e-6 / flux), 1000)
    fixed = SampledWithoutReplacement(9.0, 1.0, 1, 100, 10)
    assert loose.spend(fixed).leaked >= 0.03 * gdp.cut_off(2 / 9, 10)[1]
    for flux in (1e-5, 0.9):
        with pytest.raises(ValueError, match="filter can hold"):
            filters.for_renyi(**target, coordinates=10**6, flux=flux)
    for bad in (-1e-9, math.nan, 1.0):
        with pytest.raises(ValueError, match="flux"):
            filters.for_renyi(**target, coordinates=10**6, flux=bad)


def test_filter_does_not_mix_adjacencies():
    budget = filters.for_renyi(order=8.0, epsilon=5.0, delta=1e-5)
    budget = budget.spend(PoissonSampled(Gaussian(5.0), 0.01))
    with pytest.raises(ValueError, match="adjacency"):
        budget.spend(SampledWithoutReplacement(50.0, 1.0, 1, 100))


def test_filter_holds_for_an_adaptive_run_by_simulation():
    """A run that picks its next noise from the last output stays within the exact GDP curve.

    Law of the log-likelihood ratio under P at N = 200,000 runs. False alarm rate 1e-6 per level
    (normal bound 4.9 standard errors on an exceedance frequency).
    """
    rng = np.random.default_rng(7)
    runs, budget = 200_000, filters.for_gdp(epsilon=1.0, delta=1e-2)
    limit = budget.limit

    def exceedance(overspend):
        spent = np.zeros(runs)
        loss = np.zeros(runs)
        for step in range(30):
            mu = np.where(loss > 0, 0.3, 0.05) * (1 + 0.1 * step)
            allowed = limit * overspend
            mu = np.where(spent + mu * mu <= allowed, mu, 0.0)
            noise = rng.standard_normal(runs)
            loss += mu * noise + mu * mu / 2
            spent += mu * mu
        # E(1 − e^(ε−Z))₊ under P estimates δ(ε).
        return np.maximum(1 - np.exp(1.0 - loss), 0)

    held = exceedance(1.0)
    assert held.mean() - 4.9 * held.std() / math.sqrt(runs) <= gdp.delta(1.0, math.sqrt(limit))
    # Negative control: a run that spends 1.5 times the budget is caught.
    over = exceedance(1.5)
    assert over.mean() - 4.9 * over.std() / math.sqrt(runs) > gdp.delta(1.0, math.sqrt(limit))


@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf])
def test_filters_refuse_bad_numbers(bad):
    for call in (
        lambda: filters.for_gdp(epsilon=bad, delta=1e-5),
        lambda: filters.for_zcdp(epsilon=1.0, delta=bad),
        lambda: filters.for_zcdp(epsilon=1.0, delta=0.0),
        lambda: filters.for_renyi(order=bad, epsilon=1.0, delta=1e-5),
        lambda: filters.for_renyi(order=1.0, epsilon=1.0, delta=1e-5),
        lambda: filters.for_renyi(order=2.0, epsilon=1e-6, delta=1e-9),
        lambda: filters.Filter("gdp", bad),
        lambda: filters.Filter("gdp", 1.0, spent=bad),
        lambda: filters.Filter("pld", 1.0),
        lambda: filters.Filter("gdp", 1.0).would_exceed(Gaussian(1.0), 0),
        lambda: filters.Filter("gdp", 1.0).epsilon(bad),
    ):
        with pytest.raises(ValueError):
            call()


def test_filter_promises_the_budget_not_what_was_spent():
    budget = filters.for_zcdp(epsilon=2.0, delta=1e-5)
    assert budget.spend(Gaussian(100.0)).epsilon(1e-5) == budget.epsilon(1e-5)
    assert budget.epsilon(1e-5) == convert.zcdp_epsilon(budget.limit, 1e-5)


def test_filter_holds_truncated_samples_within_its_variation():
    event = TruncatedPoissonSampled(Gaussian(1.0, 10**6, 64), 0.01, 10_000, 180)
    overflow = subsample.poisson_overflow(10_000, 0.01, 180)
    budget = filters.for_renyi(
        order=8.0, epsilon=2.0, delta=1e-5, coordinates=10**9, radius_bits=64, flux=1e-9,
        variation=50.5 * overflow,
    )  # fmt: skip
    assert budget.epsilon(1e-5) <= 2.0
    after = budget.spend(event, 50)
    assert after.would_exceed(event) and after.spent < after.limit
    assert 50 * overflow <= after.deviated <= 50.5 * overflow
    # What is set aside is paid for: at the same limit ε is that of the smaller δ.
    paid = (1 + math.exp(budget.epsilon(1e-5))) * budget.variation
    bare = dataclasses.replace(budget, variation=0.0)
    assert bare.epsilon(1e-5 - paid) == pytest.approx(budget.epsilon(1e-5), rel=1e-9)
    assert bare.limit == budget.limit and bare.epsilon(1e-5) < budget.epsilon(1e-5)
    with pytest.raises(ValueError, match="Expected"):
        filters.for_renyi(order=8.0, epsilon=2.0, delta=1e-5, variation=1e-5)
    plain = filters.for_gdp(epsilon=1.0, delta=1e-5)
    assert plain.would_exceed(Deviation(1e-12)) and not plain.would_exceed(Deviation(0.0))


def test_filter_charges_what_underflows_when_squared():
    budget = filters.for_zcdp(epsilon=1.0, delta=1e-5)
    for event in (
        RandomizedResponse(1e-170),
        BoundedRange(1e-170),
        ExponentialMechanism(1e-170, math.inf),
        Laplace(1e170),
        DiscreteGaussian(1e170),
        Gaussian(1e170),
    ):
        assert budget.cost(event) > 0
        assert budget.would_exceed(event, 10**345)
