"""What events cost: exact where one mechanism stands alone, never below an exact pair's cost."""

import math

import mpmath
import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant

from dpfa_jax import accounting
from dpfa_jax.accounting import (
    Composed,
    DiscreteGaussian,
    ExponentialMechanism,
    Gaussian,
    Laplace,
    NonPrivate,
    NoRelease,
    PoissonSampled,
    Repeated,
    SampledWithoutReplacement,
    TruncatedPoissonSampled,
    charge,
    convert,
    gdp,
)


def test_epsilon_of_gaussians_is_the_exact_one():
    event = Composed([Repeated(Gaussian(4.0), 9), Gaussian(2.0)])
    mu = math.sqrt(9 / 16 + 1 / 4)
    assert abs(accounting.mu(event) / mu - 1) <= 1e-14
    for delta in (1e-12, 1e-5):
        assert abs(accounting.epsilon(event, delta) / gdp.epsilon(delta, mu) - 1) <= 1e-12
    for epsilon in (0.0, 1.0, 30.0):
        assert abs(accounting.delta(event, epsilon) / gdp.delta(epsilon, mu) - 1) <= 1e-10


def test_epsilon_charges_the_cut_off():
    ideal, cut = Gaussian(1.0), Gaussian(1.0, 34_000_000)
    flux = gdp.cut_off(1.0, 34_000_000)[1]
    assert accounting.delta(cut, 1.0) > accounting.delta(ideal, 1.0) + 0.99 * flux
    assert accounting.epsilon(cut, 1e-7) > accounting.epsilon(ideal, 1e-7)
    assert accounting.epsilon(cut, flux) == math.inf
    assert accounting.epsilon(cut, 0.9 * flux) == math.inf
    assert accounting.epsilon(cut, 1.5 * flux) < math.inf
    # Four quarters of the coordinates cost what the whole does.
    quarters = Repeated(Gaussian(2.0, 8_500_000), 4)
    whole = accounting.epsilon(cut, 1e-7)
    assert (1 - 1e-3) * whole <= accounting.epsilon(quarters, 1e-7) <= whole * (1 + 1e-9)
    # Other releases beside it do not lose the term.
    mixed = Composed([cut, Laplace(10.0)])
    assert accounting.epsilon(mixed, 0.9 * flux) == math.inf
    assert accounting.delta(mixed, 500.0) >= flux


def test_epsilon_of_pure_releases_adds_without_delta():
    event = Composed([Repeated(Laplace(2.0), 3), ExponentialMechanism(0.5, math.inf)])
    assert abs(accounting.epsilon(event, 0.0) - 2.0) <= 1e-12
    assert accounting.epsilon(event, 0.0) >= 2.0
    assert accounting.epsilon(event, 1e-9) <= 2.0 * (1 + 1e-12)
    assert accounting.delta(event, 2.0 + 1e-9) == 0.0
    assert accounting.mu(event) == math.inf


def test_epsilon_of_many_pure_releases_uses_their_curve():
    event = Repeated(Laplace(100.0), 10_000)
    assert accounting.epsilon(event, 1e-5) < 0.1 * accounting.epsilon(event, 0.0)


def test_epsilon_of_a_mixture_is_never_below_the_exact_pair():
    """Gaussian (σ = 2) and Laplace (b = 1.5) together: δ by quadrature over both losses."""
    event = Composed([Gaussian(2.0), Laplace(1.5)])
    for epsilon in (0.2, 0.6, 1.0):
        # The Laplace loss has atoms at ±2/3 and the density of x ~ 1 + Lap between.
        def gaussian_delta(level):
            # δ_μ at any real level, negative too: δ(−ε) = 1 − e^(−ε)(1 − δ(ε)).
            if level >= 0:
                return mpmath.mpf(gdp.delta(float(level), 0.5))
            return 1 - mpmath.exp(level) * (1 - mpmath.mpf(gdp.delta(float(-level), 0.5)))

        shift = 1 / 1.5
        high = mpmath.mpf(1) / 2
        low = mpmath.exp(-shift) / 2
        middle = mpmath.quad(
            lambda x, e=epsilon: (
                gaussian_delta(e - (2 * x - 1) / 1.5) * mpmath.exp(-(1 - x) / 1.5) / 3
            ),
            [0, 0.25, 0.5, 0.75, 1],
        )
        exact = high * gaussian_delta(epsilon - shift) + low * gaussian_delta(epsilon + shift)
        exact += middle
        found = accounting.delta(event, epsilon)
        assert found >= exact
        assert accounting.epsilon(event, float(exact)) >= epsilon


def test_epsilon_is_never_below_dp_accountings_pld():
    accountant = pld_privacy_accountant.PLDAccountant()
    accountant.compose(dp_event.GaussianDpEvent(4.0), 10)
    accountant.compose(dp_event.LaplaceDpEvent(20.0), 5)
    rival = accountant.get_epsilon(1e-5)
    ours = accounting.epsilon(
        Composed([Repeated(Gaussian(4.0), 10), Repeated(Laplace(20.0), 5)]), 1e-5
    )
    assert rival * 0.999 <= ours <= 1.2 * rival


def test_epsilon_of_the_discrete_gaussian_is_that_of_its_zcdp():
    event = Repeated(DiscreteGaussian(10.0), 4)
    assert abs(accounting.epsilon(event, 1e-5) / convert.zcdp_epsilon(0.02, 1e-5) - 1) <= 1e-12
    assert accounting.mu(event) == math.inf


def test_composition_order_and_nesting_do_not_change_the_cost():
    parts = [Gaussian(3.0, 5), Laplace(7.0), DiscreteGaussian(9.0), Gaussian(1.5)]
    one = accounting.epsilon(Composed(parts), 1e-6)
    other = accounting.epsilon(Composed([Composed(parts[2:]), Composed(parts[1::-1])]), 1e-6)
    assert abs(one / other - 1) <= 1e-12


def test_non_private_costs_infinity_whatever_is_beside_it():
    for event in (NonPrivate(), Composed([Gaussian(9.0), NonPrivate()]), Gaussian(0.0)):
        assert accounting.epsilon(event, 0.5) == math.inf
        assert accounting.delta(event, 1e9) == 1.0
        assert accounting.delta(event, math.inf) == 1.0
        assert accounting.mu(event) == math.inf
        assert (accounting.rdp_curve(event) == math.inf).all()


def test_no_release_costs_nothing():
    event = Composed([NoRelease(), Repeated(NoRelease(), 10**9)])
    assert accounting.epsilon(event, 0.0) == 0.0
    assert accounting.delta(event, 0.0) == 0.0
    assert accounting.mu(event) == 0.0
    assert (accounting.rdp_curve(event) == 0.0).all()


@pytest.mark.parametrize("leaf", [Gaussian(5.0, 3), Laplace(50.0), DiscreteGaussian(5.0)], ids=str)
def test_cost_grows_with_the_count_up_to_infinity(leaf):
    last_epsilon, last_delta = 0.0, 0.0
    for exponent in (0, 1, 3, 6, 12, 20, 40, 200):
        # Nested, the last count is 10⁴⁰⁰: beyond every float.
        event = Repeated(Repeated(leaf, 10**exponent), 10**exponent)
        epsilon, delta = accounting.epsilon(event, 1e-5), accounting.delta(event, 0.01)
        assert epsilon >= last_epsilon
        assert delta >= last_delta * (1 - 1e-12)
        last_epsilon, last_delta = epsilon, delta
    assert last_epsilon == math.inf
    assert last_delta == 1.0


def test_cost_of_wide_noise_is_small_but_not_zero():
    for leaf in (Gaussian(1e200), Gaussian(1e300)):
        assert 0.0 < accounting.mu(leaf) <= 1e-149
        assert accounting.delta(leaf, 1.0) > 0.0


def test_sampled_releases_cost_their_curve_and_compose():
    step = PoissonSampled(Gaussian(1.0), 0.01)
    for steps, published in ((100, 1.214), (1000, 2.101)):
        assert abs(accounting.epsilon(Repeated(step, steps), 1e-5) - published) <= 1e-3
    layer = Composed([Repeated(step, 1000), Gaussian(5.0)])
    assert accounting.epsilon(layer, 1e-5) > accounting.epsilon(Repeated(step, 1000), 1e-5)
    assert accounting.mu(step) == math.inf
    assert accounting.epsilon(step, 0.0) == math.inf


def test_sampled_releases_charge_the_cut_off():
    ideal = Repeated(PoissonSampled(Gaussian(1.0), 0.01), 1000)
    cut = Repeated(PoissonSampled(Gaussian(1.0, 10**6), 0.01), 1000)
    flux = 10 * gdp.cut_off(1.0, 10**6)[1]
    assert accounting.delta(cut, 2.0) > accounting.delta(ideal, 2.0) + 0.99 * flux
    assert accounting.epsilon(cut, flux) == math.inf
    fixed = Repeated(SampledWithoutReplacement(1.0, 1.0, 10, 1000, 10**6), 100)
    flux = 3 * gdp.cut_off(2.0, 10**6)[1]  # 100 steps at rate 0.01, shifts of 2C
    assert accounting.delta(fixed, 1e3) > 0.99 * flux
    assert accounting.epsilon(fixed, flux) == math.inf
    assert accounting.epsilon(fixed, 1.1 * flux) < math.inf


def test_cut_off_of_a_training_run_is_ruinous_with_40_bits_and_free_with_64():
    def run(bits, steps=10**5, coordinates=10**8):
        leaf = Gaussian(1.0, coordinates, bits) if bits else Gaussian(1.0)
        return Repeated(PoissonSampled(leaf, 0.001), steps)

    ideal = accounting.epsilon(run(None), 1e-6)
    assert 2.0 < ideal < 2.01
    assert accounting.epsilon(run(40), 1e-6) == math.inf
    assert accounting.epsilon(run(40, coordinates=10**7), 1e-6) == math.inf
    assert ideal < accounting.epsilon(run(64), 1e-6) <= ideal * (1 + 1e-6)
    assert 5e-7 < charge.profile_of(run(64)).log_factor < 6e-7
    assert 9.0 < charge.profile_of(run(40)).log_factor < 9.1
    # Noise of two kinds: each pays for its own coordinates.
    both = Composed([Gaussian(2.0, 10**12, 64), Gaussian(2.0, 100, 40)])
    assert charge.profile_of(both).flux < 1e-9
    assert charge.profile_of(Gaussian(2.0, 10**12 + 100, 40)).flux > 1e-6
    alike = [Gaussian(2.0, 10**6, bits) for bits in (40, 41)]
    apart = sum(charge.profile_of(each).flux for each in alike)
    assert charge.profile_of(Composed(alike)).flux == pytest.approx(apart, rel=1e-5)


def discs(shifts, radius, step):
    """Densities of normal pairs around points, ideal and cut off at a radius, times step²."""
    x = np.arange(-radius - 3.0, radius + max(shifts) + 3.0, step)
    y = np.arange(-radius - 3.0, radius + 3.0, step)[:, None]
    squares = np.array([(x - shift) ** 2 + y**2 for shift in shifts])
    ideal = np.exp(-squares / 2) / (2 * math.pi) * step * step
    cut = ideal * (squares <= radius * radius)
    return ideal, cut / cut.sum((1, 2), keepdims=True)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.95])
def test_cut_off_of_sampled_noise_bounds_discs_exactly(rate):
    """One pair with three bits of radius: Poisson both ways, and three points of a fixed sample."""
    bits, shift, step = 3, 0.9, 0.02
    radius = math.sqrt(2 * bits * math.log(2))
    factor, flux = gdp.cut_off(shift, 1, radius_bits=bits)
    # The grid moves each point of an edge by half a step at most.
    edge = 2 * math.pi * radius * step / 2 * 2.0**-bits / (2 * math.pi)
    for shifts, p, q, share in (
        ((0.0, shift), (0, 1), (0, 0), 1.0),
        ((0.0, shift), (0, 0), (0, 1), 1.0),
        ((shift / 2, 0.0, shift), (0, 1), (0, 2), 3.0),
        ((shift, 0.0, shift), (0, 1), (0, 2), 3.0),
        ((0.0, 0.0, shift), (0, 1), (0, 2), 3.0),
    ):
        lost = []
        for epsilon in (0.0, 0.05, 0.3, 1.0, 3.0):
            deltas = []
            for law in discs(shifts, radius, step):
                left, right = ((1 - rate) * law[a] + rate * law[b] for a, b in (p, q))
                deltas.append(np.maximum(left - math.exp(epsilon) * right, 0.0).sum())
            lost.append(deltas[1] - math.exp(factor) * deltas[0])
        assert max(lost) <= share * rate * flux + 2 * edge
        # Negative control: where the flux is more than the grid, the bound needs it.
        assert p == (0, 0) or rate < 0.5 or max(lost) > 2 * edge


def test_truncation_is_free_with_room_and_charged_without():
    ideal = Repeated(PoissonSampled(Gaussian(1.0), 0.01), 1000)
    free = Repeated(TruncatedPoissonSampled(Gaussian(1.0), 0.01, 10_000, 200), 1000)
    tight = Repeated(TruncatedPoissonSampled(Gaussian(1.0), 0.01, 10_000, 150), 1000)
    hopeless = Repeated(TruncatedPoissonSampled(Gaussian(1.0), 0.01, 10_000, 110), 1000)
    base = accounting.epsilon(ideal, 1e-5)
    assert base <= accounting.epsilon(free, 1e-5) <= base * (1 + 1e-6)
    assert accounting.epsilon(ideal, 1e-2) < accounting.epsilon(tight, 1e-2) < math.inf
    assert accounting.epsilon(hopeless, 1e-5) == math.inf
    for event, delta in ((free, 1e-5), (tight, 1e-2)):
        epsilon = accounting.epsilon(event, delta)
        assert accounting.delta(event, epsilon) <= delta * (1 + 1e-6)


def test_adjacencies_do_not_mix():
    mixed = Composed(
        [PoissonSampled(Gaussian(1.0), 0.1), SampledWithoutReplacement(1.0, 1.0, 1, 9)]
    )
    for call in (
        lambda: accounting.epsilon(mixed, 1e-5),
        lambda: accounting.delta(mixed, 1.0),
        lambda: accounting.rdp_curve(mixed),
        lambda: accounting.mu(mixed),
    ):
        with pytest.raises(ValueError, match="adjacency"):
            call()


def test_rdp_curve_adds_the_leaves():
    orders = np.array([1.5, 2.0, 64.0])
    event = Composed([Repeated(Gaussian(2.0), 3), Laplace(1.0)])
    expected = 3 * orders / 8 + accounting.rdp.laplace(1.0, orders)
    np.testing.assert_allclose(accounting.rdp_curve(event, orders), expected, rtol=1e-14)
    assert (accounting.rdp_curve(event, orders) >= expected).all()


@pytest.mark.parametrize("bad", [math.nan, -1e-9, 1.0, 2.0, math.inf, -math.inf])
def test_epsilon_refuses_a_delta_outside_its_range(bad):
    for event in (Gaussian(1.0), Laplace(1.0), NonPrivate(), NoRelease()):
        with pytest.raises(ValueError, match="delta"):
            accounting.epsilon(event, bad)


@pytest.mark.parametrize("bad", [math.nan, -1e-9, -math.inf])
def test_delta_refuses_an_epsilon_outside_its_range(bad):
    for event in (Gaussian(1.0), Laplace(1.0), NonPrivate(), NoRelease()):
        with pytest.raises(ValueError, match="epsilon"):
            accounting.delta(event, bad)


def test_every_function_refuses_what_is_no_event():
    for bad in (None, Gaussian, 1.0, (Gaussian(1.0),), accounting.Event()):
        for call in (
            lambda bad=bad: accounting.epsilon(bad, 1e-5),
            lambda bad=bad: accounting.delta(bad, 1.0),
            lambda bad=bad: accounting.mu(bad),
            lambda bad=bad: accounting.rdp_curve(bad),
        ):
            with pytest.raises(TypeError):
                call()


def test_epsilon_of_the_widest_noise_counts_every_release():
    count = 10**308
    for leaf, zcdp in (
        (DiscreteGaussian(1e155), 0.005),
        (accounting.Skellam(1e155, 1.0, 1.0), 0.005),
        (Laplace(1e155), 0.005),
        (accounting.RandomizedResponse(1e-155), 0.005),
    ):
        found = accounting.epsilon(Repeated(leaf, count), 1e-5)
        assert found >= 0.99 * convert.zcdp_epsilon(zcdp * (1 - 1e-9), 1e-5), leaf
    assert accounting.epsilon(accounting.Skellam(1e200, 1e200, 1e200), 1e-5) > 3


def test_mu_of_many_different_releases_is_rounded_up():
    # Adding these one by one, to nearest, ends 6 ulps below the sum.
    multipliers = np.random.default_rng(0).uniform(50, 5000, 20_000).tolist()
    with mpmath.workdps(40):
        exact = mpmath.fsum(1 / mpmath.mpf(z) ** 2 for z in multipliers)
        found = charge.profile_of(Composed([Gaussian(z) for z in multipliers])).mu_squared
        assert exact <= found <= exact * (1 + mpmath.mpf(2) ** -48)


def test_sampled_releases_keep_the_factor_of_the_cut_off():
    """Where a shift is beyond the disc its share is lost; the rest still grows by the factor."""
    for leaf in (Gaussian(0.1, 10**12), Gaussian(1.0, 1 << 60)):
        profile = charge.profile_of(PoissonSampled(leaf, 1e-6))
        assert profile.flux >= 1e-6
        assert profile.log_factor >= min(leaf.coordinates * 2.0**-40, 700.0)
    assert accounting.epsilon(PoissonSampled(Gaussian(1.0, 1 << 60), 1e-6), 1e-3) == math.inf
    assert accounting.epsilon(PoissonSampled(Gaussian(1.0, 1 << 60), 0.0), 0.0) == 0.0
    # As many releases as a cut-off of one rounds away.
    wide = charge.profile_of(Repeated(Gaussian(1e17, 1), 10**12))
    assert 2e-17 <= wide.flux <= 6e-17  # the factor is e^.9


def test_deviation_is_paid_from_delta():
    """P' = (1−τ)P + τ·(an outcome P never gives): δ(ε) grows by exactly τ on one side."""
    for tau, epsilon in ((1e-6, 0.5), (1e-3, 1.0)):
        event = Composed([Gaussian(1.0), accounting.Deviation(tau)])
        exact = (1 - tau) * gdp.delta(epsilon, 1.0) + tau
        found = accounting.delta(event, epsilon)
        assert exact <= found <= gdp.delta(epsilon, 1.0) + (1 + math.exp(epsilon)) * tau * 1.001
        delta = 100 * tau
        assert accounting.delta(event, accounting.epsilon(event, delta)) <= delta * (1 + 1e-9)
    ten = Repeated(accounting.Deviation(1e-7), 10)
    assert accounting.epsilon(ten, 2.1e-6) == 0.0
    assert accounting.epsilon(ten, 1.9e-6) == math.inf
    assert accounting.mu(event) == math.inf and accounting.mu(accounting.Deviation(0.0)) == 0.0
    assert accounting.epsilon(Composed([Gaussian(1.0), accounting.Deviation(1.0)]), 0.9) == math.inf
    reported = accounting.report(event, 0.1)
    assert reported.accounts[0][0] == "exact Gaussian curve"
    assert reported.epsilon == accounting.epsilon(event, 0.1)
    for bad in (math.nan, -1e-9, 1.1, "0"):
        with pytest.raises((TypeError, ValueError), match="total_variation"):
            accounting.Deviation(bad)
