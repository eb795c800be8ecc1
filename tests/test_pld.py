"""Loss distributions: the published numbers, and never below what is exact."""

import math

import pytest
from dp_accounting import dp_event as dp
from dp_accounting.pld import pld_privacy_accountant

from dpfa_jax import accounting
from dpfa_jax.accounting import (
    BoundedRange,
    Composed,
    Deviation,
    DiscreteGaussian,
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
    gdp,
    pld,
    subsample,
)


@pytest.mark.parametrize(("steps", "published"), [(1000, 1.828), (10_000, 6.188)])
def test_epsilon_gives_the_published_table(steps, published):
    event = Repeated(PoissonSampled(Gaussian(1.0), 0.01), steps)
    found = pld.epsilon(event, 1e-5)
    assert abs(found - published) <= 1e-3
    assert found <= accounting.epsilon(event, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "delta", "published"),
    [
        (TruncatedPoissonSampled(Gaussian(1.0), 0.01, 10_000, 160), 1e-5, 1.8283),
        (TruncatedPoissonSampled(Gaussian(1.0), 0.01, 10_000, 120), 1e-5, 5.30),
    ],
)
def test_epsilon_of_truncated_sampling_uses_its_own_distribution(event, delta, published):
    assert abs(pld.epsilon(Repeated(event, 1000), delta) / published - 1) <= 1e-3


def test_epsilon_of_truncated_sampling_is_above_that_of_poisson_sampling():
    poisson = PoissonSampled(Gaussian(2.0), 0.2)
    tight = TruncatedPoissonSampled(Gaussian(2.0), 0.2, 40, 10)
    assert pld.epsilon(tight, 1e-3) > pld.epsilon(poisson, 1e-3)


def test_epsilon_of_truncated_noise_that_ends_pays_for_the_overflow():
    def run(capacity, coordinates):
        leaf = Gaussian(1.0, coordinates, 64)
        return Repeated(TruncatedPoissonSampled(leaf, 0.01, 10_000, capacity), 100)

    poisson = pld.epsilon(Repeated(PoissonSampled(Gaussian(1.0, 10**6, 64), 0.01), 100), 1e-5)
    roomy = pld.epsilon(run(200, 10**6), 1e-5)
    assert poisson <= roomy <= poisson * (1 + 1e-6)
    tight = pld.epsilon(run(160, 10**6), 1e-5)
    overflow = 100 * subsample.poisson_overflow(10_000, 0.01, 160)
    paid = (1 + math.exp(tight)) * overflow
    assert 1e-7 < paid < 1e-5
    left = pld.epsilon(Repeated(PoissonSampled(Gaussian(1.0), 0.01), 100), 1e-5 - paid)
    assert left <= tight <= left * (1 + 1e-6)
    assert pld.epsilon(run(100, 10**6), 1e-5) == math.inf


def test_epsilon_is_never_below_the_exact_gaussian():
    for mu in (0.2, 1.0, 3.0):
        exact = gdp.epsilon(1e-6, mu)
        found = pld.epsilon(Gaussian(1 / mu), 1e-6)
        assert exact * (1 - 1e-9) <= found <= exact + 3e-4


def test_epsilon_charges_the_cut_off_and_adds_pure_releases():
    cut = Gaussian(1.0, 34_000_000)
    flux = gdp.cut_off(1.0, 34_000_000)[1]
    assert pld.epsilon(cut, 0.9 * flux) == math.inf
    assert pld.epsilon(cut, 2 * flux) > pld.epsilon(Gaussian(1.0), 2 * flux)
    base = pld.epsilon(Gaussian(1.0), 1e-5)
    more = pld.epsilon(Composed([Gaussian(1.0), RandomizedResponse(0.3), BoundedRange(0.2)]), 1e-5)
    assert abs(more - base - 0.5) <= 1e-9
    assert pld.epsilon(RandomizedResponse(0.3), 1e-5) >= 0.3
    assert pld.epsilon(RandomizedResponse(math.inf), 1e-5) == math.inf


def test_epsilon_of_nothing_and_of_everything():
    assert pld.epsilon(NoRelease(), 1e-5) == 0.0
    assert pld.epsilon(NonPrivate(), 1e-5) == math.inf
    assert pld.epsilon(Gaussian(0.0), 1e-5) == math.inf


@pytest.mark.parametrize(
    "event",
    [DiscreteGaussian(3.0), Skellam(9.0, 1.0, 1.0), SampledWithoutReplacement(2.0, 1.0, 1, 10)],
    ids=str,
)
def test_epsilon_says_so_where_there_is_no_distribution(event):
    with pytest.raises(NotImplementedError, match="RDP"):
        pld.epsilon(event, 1e-5)
    reported = accounting.report(event, 1e-5)
    assert reported.epsilon == accounting.epsilon(event, 1e-5)
    assert reported.missing


def test_epsilon_refuses_what_would_not_fit():
    with pytest.raises(NotImplementedError, match="would not fit"):
        pld.epsilon(Gaussian(1e-3), 1e-5)


@pytest.mark.parametrize("bad", [math.nan, -1.0, 0.0, 1.0, 2.0])
def test_epsilon_refuses_a_bad_delta(bad):
    with pytest.raises(ValueError, match="delta"):
        pld.epsilon(Gaussian(1.0), bad)
    with pytest.raises(ValueError, match="delta"):
        accounting.report(Gaussian(1.0), bad)


def test_dp_event_halves_the_multiplier_without_replacement():
    event = pld.dp_event(SampledWithoutReplacement(2.0, 0.5, 10, 1000))
    assert event == dp.SampledWithoutReplacementDpEvent(1000, 10, dp.GaussianDpEvent(2.0))


def test_dp_event_keeps_counts_and_structure():
    event = Composed([Repeated(Gaussian(2.0), 3), Laplace(4.0), Gaussian(2.0)])
    assert pld.dp_event(event) == dp.ComposedDpEvent(
        [dp.SelfComposedDpEvent(dp.GaussianDpEvent(2.0), 4), dp.LaplaceDpEvent(4.0)]
    )
    assert pld.dp_event(NoRelease()) == dp.NoOpDpEvent()
    assert pld.dp_event(DiscreteGaussian(2.0)) == dp.ZCDpEvent(0.125)
    with pytest.raises(NotImplementedError, match="Skellam"):
        pld.dp_event(Skellam(9.0, 1.0, 1.0))


def test_report_names_every_accountant_and_the_larger_number():
    gaussian = accounting.report(Gaussian(3.7306316348159743), 1e-5)
    assert [name for name, _ in gaussian.accounts] == [
        "exact Gaussian curve",
        "RDP",
        "privacy loss distribution",
    ]
    assert abs(gaussian.epsilon - 1.0) <= 1e-9
    assert gaussian.largest > 1.09
    for _, epsilon in gaussian.accounts:
        assert f"{epsilon:.6g}" in str(gaussian)
    mixed = accounting.report(Composed([Gaussian(3.0), Laplace(9.0)]), 1e-5)
    assert mixed.epsilon == mixed.accounts[0][1] < mixed.largest
    assert accounting.report(NonPrivate(), 1e-5).epsilon == math.inf


def test_epsilon_of_truncated_sampling_is_not_that_of_poisson_where_that_is_free():
    # Records displace each other in 97 of 100 samples, which Poisson sampling does not know.
    tight = TruncatedPoissonSampled(Gaussian(10.0), 0.5, 1000, 470)
    delta = 0.0355
    assert accounting.epsilon(PoissonSampled(Gaussian(10.0), 0.5), delta) == 0.0
    accountant = pld_privacy_accountant.PLDAccountant(
        pld_privacy_accountant.NeighborRel.REPLACE_SPECIAL, 1e-4
    )
    accountant.compose(pld.dp_event(tight))
    assert pld.epsilon(tight, delta) == accountant.get_epsilon(delta) > 0.09


def test_epsilon_pays_for_deviations_and_takes_any_count():
    plan = Repeated(PoissonSampled(Gaussian(1.0), 0.01), 100)
    found = pld.epsilon(Composed([plan, Deviation(1e-6)]), 1e-5)
    left = 1e-5 - (1 + math.exp(found)) * 1e-6
    assert pld.epsilon(plan, left) == pytest.approx(found, rel=1e-6)
    assert pld.epsilon(Deviation(1e-6), 3e-6) == 0.0
    assert pld.epsilon(Deviation(1e-6), 1e-6) == math.inf
    assert (
        pld.epsilon(Composed([plan, Repeated(RandomizedResponse(1.0), 10**400)]), 0.1) == math.inf
    )
    wide = pld.dp_event(DiscreteGaussian(1e155))
    assert wide.rho > 0
