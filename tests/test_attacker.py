"""What an attacker gains: bounds that the best attack reaches and none exceeds."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from dpfa_jax.accounting import (
    Composed,
    Deviation,
    Gaussian,
    Laplace,
    NonPrivate,
    NoRelease,
    PoissonSampled,
    attacker,
    gdp,
)


def test_true_positive_rate_is_reached_by_the_likelihood_test():
    for mu in (0.1, 1.0, 4.0):
        for rate in (1e-9, 0.01, 0.5):
            best = stats.norm.sf(stats.norm.isf(rate) - mu)
            found = attacker.true_positive_rate(Gaussian(1 / mu), rate)
            assert best * (1 - 1e-12) <= found <= best * (1 + 1e-9)
            epsilons = np.linspace(0, 30, 301)
            dual = min(math.exp(e) * rate + gdp.delta(float(e), mu) for e in epsilons)
            assert found <= dual * (1 + 1e-9)


def test_true_positive_rate_of_mixtures_bounds_every_threshold():
    """Laplace with multiplier 2 beside nothing else: the exact trade-off curve."""
    event = Laplace(2.0)
    for rate in (0.001, 0.01, 0.2, 0.5, 0.9):
        cut = stats.laplace.isf(rate, scale=2.0)
        power = stats.laplace.sf(cut - 1.0, scale=2.0)
        assert attacker.true_positive_rate(event, rate) >= power * (1 - 1e-12)
        assert attacker.true_positive_rate(event, rate) <= min(math.exp(0.5) * rate * 1.01, 1.0)
    mixed = Composed([Gaussian(2.0), Laplace(2.0)])
    assert attacker.true_positive_rate(mixed, 0.01) > attacker.true_positive_rate(event, 0.01)


def test_advantage_is_the_largest_gap():
    for event in (Gaussian(1.0), Laplace(2.0)):
        gap = max(
            attacker.true_positive_rate(event, float(rate)) - float(rate)
            for rate in np.linspace(0.05, 0.95, 19)
        )
        assert gap <= attacker.advantage(event) * (1 + 1e-9) + 0.02
    assert abs(attacker.advantage(Gaussian(1.0)) - (2 * stats.norm.cdf(0.5) - 1)) <= 1e-12


def test_edges_cost_everything_or_nothing():
    assert attacker.advantage(NonPrivate()) == 1.0
    assert attacker.advantage(NoRelease()) == 0.0
    assert attacker.true_positive_rate(NonPrivate(), 0.0) == 1.0
    assert attacker.true_positive_rate(NoRelease(), 0.3) == pytest.approx(0.3, rel=1e-9)
    assert attacker.true_positive_rate(Gaussian(1.0), 0.0) == 0.0
    assert attacker.true_positive_rate(Gaussian(1.0, 10**6), 0.0) > 0.0
    assert attacker.true_positive_rate(Gaussian(1.0), 1.0) == 1.0


def test_posterior_multiplies_the_odds():
    for prior in (1e-12, 0.1, 0.5, 0.999):
        for epsilon in (0.0, 0.5, 30.0):
            odds = prior / (1 - prior) * math.exp(epsilon)
            assert attacker.posterior(prior, epsilon) == pytest.approx(odds / (1 + odds), rel=1e-9)
    assert attacker.posterior(0.5, math.inf) == 1.0
    assert attacker.posterior(0.0, math.inf) == 0.0


def test_trade_off_lies_on_the_curve_of_a_gaussian():
    curve = attacker.trade_off(Gaussian(1.0), points=51)
    rates, reached = curve.false_positive_rates, curve.true_positive_rates
    assert rates[0] == 0.0 and rates[-1] == 1.0 and (np.diff(rates) > 0).all()
    best = stats.norm.sf(stats.norm.isf(rates) - 1.0)
    np.testing.assert_allclose(reached, best, rtol=1e-9)
    assert (reached >= best * (1 - 1e-12)).all() and (np.diff(reached) >= 0).all()
    for rate in (0.0, 1e-7, 0.3, 0.77, 1.0):
        assert curve.at(rate) >= stats.norm.sf(stats.norm.isf(rate) - 1.0) * (1 - 1e-12)
    # f is symmetric for a Gaussian: f(f(x)) = x.
    inside = slice(5, -5)
    again = np.interp(curve.false_negative_rates[inside], rates, curve.false_negative_rates)
    np.testing.assert_allclose(again, rates[inside], atol=0.1)
    assert not rates.flags.writeable


def test_trade_off_bounds_every_threshold_of_a_mixture():
    curve = attacker.trade_off(Laplace(2.0))
    cuts = np.linspace(-9.0, 9.0, 200)
    for rate, power in zip(
        stats.laplace.sf(cuts, scale=2.0), stats.laplace.sf(cuts - 1.0, scale=2.0), strict=True
    ):
        assert power * (1 - 1e-12) <= curve.at(float(rate))
    nothing = attacker.trade_off(NoRelease())
    np.testing.assert_allclose(nothing.true_positive_rates, nothing.false_positive_rates, rtol=1e-9)
    assert (attacker.trade_off(NonPrivate()).true_positive_rates == 1.0).all()
    for bad in (2, -1, 10**9):
        with pytest.raises(ValueError, match="points"):
            attacker.trade_off(Laplace(2.0), points=bad)
    for bad in (math.nan, -0.1, 1.1):
        with pytest.raises(ValueError, match="false_positive_rate"):
            curve.at(bad)


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.1])
def test_rates_refuse_bad_numbers(bad):
    with pytest.raises(ValueError, match="false_positive_rate"):
        attacker.true_positive_rate(Gaussian(1.0), bad)
    with pytest.raises(ValueError, match="prior"):
        attacker.posterior(bad, 1.0)
    with pytest.raises(ValueError, match="epsilon"):
        attacker.posterior(0.5, -1.0 if bad > 0 else bad)


def test_largest_loss_holds_but_for_its_failures():
    """The chance of a larger likelihood ratio, exactly, of a Gaussian and of a sampled one."""
    for mu, failure in itertools.product((0.1, 1.0, 4.0), (1e-9, 1e-3, 0.4)):
        loss = attacker.largest_loss(Gaussian(1 / mu), failure)
        # ln(p/q) of N(μ, 1) against N(0, 1) is N(μ²/2, μ²) under the former.
        reached = stats.norm.sf((loss - mu * mu / 2) / mu)
        assert reached <= failure * (1 + 1e-9)
        assert loss == 0.0 or reached >= failure * (1 - 1e-9)
        # Negative control: ε at δ = failure is exceeded more often than that.
        assert stats.norm.sf(gdp.epsilon(failure, mu) / mu - mu / 2) > failure or failure > 0.1
        cut = attacker.largest_loss(Gaussian(1 / mu, 10, 64), failure)
        assert loss <= cut and (cut < math.inf or mu == 4.0)
    rate, std = 0.2, 1.0
    event = PoissonSampled(Gaussian(std), rate)
    for failure in (1e-6, 1e-2):
        loss = attacker.largest_loss(event, failure)
        turn = std * std * math.log1p(math.expm1(loss) / rate) + 0.5 / std / std
        beyond = (1 - rate) * stats.norm.sf(turn) + rate * stats.norm.sf(turn - 1)
        assert beyond <= failure
    assert attacker.largest_loss(NonPrivate(), 0.5) == math.inf
    assert attacker.largest_loss(NoRelease(), 1e-9) == 0.0
    assert attacker.largest_loss(Laplace(2.0), 1e-300) <= 0.5 * (1 + 1e-12)
    assert attacker.largest_loss(Composed([Gaussian(1.0), Deviation(0.1)]), 0.01) == math.inf


def test_belief_multiplies_the_odds_by_the_largest_loss():
    event = Gaussian(2.0)
    loss = attacker.largest_loss(event, 1e-5)
    assert attacker.belief(event, 0.5, failure=1e-5) == pytest.approx(1 / (1 + math.exp(-loss)))
    assert attacker.belief(NonPrivate(), 0.5, failure=0.1) == 1.0
    assert attacker.belief(event, 0.0, failure=0.1) == 0.0
    for bad in (0.0, 1.0, math.nan, -1.0):
        with pytest.raises(ValueError, match="failure"):
            attacker.belief(event, 0.5, failure=bad)
