"""Subsampled Gaussian curves against exact sums, quadrature, and explicit worst pairs."""

import math

import mpmath
import numpy as np
import pytest
from dp_accounting.rdp import rdp_privacy_accountant as rival_rdp
from scipy import stats

from dpfa_jax.accounting import convert, rdp, subsample


def poisson_by_binomial_sum(rate, noise_multiplier, order) -> mpmath.mpf:
    """Mironov, Talwar and Zhang's sum at an integer order."""
    with mpmath.workdps(60):
        q, variance = mpmath.mpf(rate), mpmath.mpf(noise_multiplier) ** 2
        terms = (
            mpmath.binomial(order, k)
            * (1 - q) ** (order - k)
            * q**k
            * mpmath.exp(k * (k - 1) / (2 * variance))
            for k in range(order + 1)
        )
        return mpmath.log(mpmath.fsum(terms)) / (order - 1)


def poisson_by_quadrature(rate, noise_multiplier, order, digits=40) -> mpmath.mpf:
    """The defining integral minus 1, minus its vanishing linear term, over every place it peaks."""
    with mpmath.workdps(digits):
        q, mu, a = mpmath.mpf(rate), 1 / mpmath.mpf(noise_multiplier), mpmath.mpf(order)

        def integrand(u):
            y = q * mpmath.expm1(mu * u - mu * mu / 2)
            return mpmath.npdf(u) * ((1 + y) ** a - 1 - a * y)

        turn = (mpmath.log((1 - q) / q) + mu * mu / 2) / mu
        points = sorted(
            c + k for c in (0, a * mu, 2 * mu, turn) for k in (-36, -12, -5, -2, 0, 2, 5, 12, 36)
        )
        spread = [points[0]]
        for point in points[1:]:
            if point - spread[-1] < 0.5:
                continue
            while point - spread[-1] > 12:
                spread.append(spread[-1] + 12)
            spread.append(point)
        return mpmath.log1p(mpmath.quad(integrand, spread, maxdegree=7)) / (a - 1)


@pytest.mark.parametrize("noise_multiplier", [0.1, 0.7, 1.0, 4.0, 100.0])
@pytest.mark.parametrize("rate", [1e-7, 0.01, 0.5, 0.999])
def test_poisson_gaussian_equals_the_sum_at_integer_orders(rate, noise_multiplier):
    for order in (2, 3, 17, 256):
        exact = poisson_by_binomial_sum(rate, noise_multiplier, order)
        found = subsample.poisson_gaussian(noise_multiplier, rate, float(order))[0]
        assert exact <= found <= exact * (1 + mpmath.mpf(2e-11))


@pytest.mark.parametrize(
    ("rate", "noise_multiplier", "order"),
    [(1e-7, 0.1, 1.5), (0.01, 0.1, 1.001), (0.3, 0.5, 1.9), (0.01, 1.0, 2.5), (0.999, 2.0, 7.3)],
)
def test_poisson_gaussian_equals_quadrature_at_real_orders(rate, noise_multiplier, order):
    exact = poisson_by_quadrature(rate, noise_multiplier, order)
    found = subsample.poisson_gaussian(noise_multiplier, rate, order)[0]
    assert exact <= found <= exact * (1 + mpmath.mpf(2e-11))


def test_poisson_gaussian_finds_the_peak_of_tiny_rates():
    # Here the integrand peaks near u = 2/z, between the order times 1/z and the turn.
    exact = poisson_by_quadrature(1e-150, 1 / 14, 1.001, digits=340)
    found = subsample.poisson_gaussian(1 / 14, 1e-150, 1.001)[0]
    assert exact <= found <= exact * (1 + mpmath.mpf(2e-10))


@pytest.mark.slow
@pytest.mark.parametrize("noise_multiplier", [0.03, 0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("rate", [1e-7, 1e-3, 0.3, 0.999])
def test_poisson_gaussian_equals_its_definition_in_every_corner(rate, noise_multiplier):
    for order in (1.00001, 1.01, 1.2, 1.99, 3.7, 63.5):
        if order * max(1.0, 1 / noise_multiplier) > 400:
            continue
        exact = poisson_by_quadrature(rate, noise_multiplier, order)
        found = subsample.poisson_gaussian(noise_multiplier, rate, order)[0]
        assert exact <= found <= exact * (1 + mpmath.mpf(3e-11))
    exact = poisson_by_binomial_sum(rate, noise_multiplier, 10_000)
    found = subsample.poisson_gaussian(noise_multiplier, rate, 1e4)[0]
    lost = 2.0**-50 * 1e4 * -math.log(rate)  # what Q1 (subsample.md) adds for its exponents
    assert exact <= found <= exact * (1 + mpmath.mpf(2e-11 + lost))


def test_poisson_gaussian_agrees_with_dp_accounting():
    orders = [2.0, 3.0, 8.0, 32.0, 64.0]
    for rate, noise_multiplier in ((0.01, 1.0), (0.1, 0.8), (0.5, 3.0)):
        rival = rival_rdp._compute_rdp_poisson_subsampled_gaussian(rate, noise_multiplier, orders)
        ours = subsample.poisson_gaussian(noise_multiplier, rate, orders)
        np.testing.assert_allclose(ours, rival, rtol=1e-9)


def test_poisson_gaussian_where_dp_accounting_is_loose():
    # dp_accounting 0.6.0 returns at real orders a bound that is up to 4 % above the integral.
    rival = rival_rdp._compute_rdp_poisson_subsampled_gaussian(0.01, 1.0, [1.5])[0]
    ours = subsample.poisson_gaussian(1.0, 0.01, 1.5)[0]
    exact = poisson_by_quadrature(0.01, 1.0, 1.5)
    assert exact <= ours <= exact * (1 + mpmath.mpf(2e-11))
    assert 1.03 * ours < rival < 1.05 * ours


def test_poisson_gaussian_gives_the_published_table():
    # theory.md section 6: q = .01, z = 1, δ = 1e-5.
    for steps, published in ((100, 1.214), (1000, 2.101), (10_000, 6.713)):
        found = convert.epsilon(
            lambda orders, t=steps: t * subsample.poisson_gaussian(1.0, 0.01, orders), 1e-5
        )
        assert abs(found - published) <= 1e-3


def test_poisson_gaussian_is_never_below_the_exact_pair_in_either_direction():
    """δ of one step by integration: N(0,1) against (1−q)N(0,1) + qN(1/z,1), both ways."""
    for rate, noise_multiplier in ((0.01, 1.0), (0.3, 0.5), (0.9, 2.0)):
        mu = 1 / noise_multiplier
        u = np.linspace(-12, 12 + mu, 400_001)
        without = stats.norm.pdf(u)
        having = (1 - rate) * without + rate * stats.norm.pdf(u - mu)
        for epsilon in (0.01, 0.3, 1.0):
            bound = convert.delta(
                lambda o, z=noise_multiplier, q=rate: subsample.poisson_gaussian(z, q, o), epsilon
            )
            for p, q in ((having, without), (without, having)):
                exact = np.trapezoid(np.maximum(p - math.exp(epsilon) * q, 0), u)
                assert bound >= exact * (1 - 1e-6)


def test_poisson_gaussian_grows_with_rate_and_order_and_falls_with_noise():
    orders = np.array([1.01, 1.5, 2.0, 9.5, 300.0, 1e5])
    last = np.zeros(orders.shape)
    for rate in (0.0, 1e-12, 1e-6, 0.01, 0.5, 0.99, 1 - 1e-12, 1.0):
        curve = subsample.poisson_gaussian(1.3, rate, orders)
        assert (curve >= last).all()
        assert (np.diff(curve) >= 0).all()
        last = curve
    assert (last == rdp.gaussian(1.3, orders)).all()
    last = np.full(orders.shape, math.inf)
    for noise_multiplier in (0.0, 1e-9, 0.019, 0.021, 0.3, 2.0, 2.6, 50.0, 9e5, 1e7, 1e200):
        curve = subsample.poisson_gaussian(noise_multiplier, 0.2, orders)
        assert (curve <= last * (1 + 1e-10)).all()
        assert (curve > 0).all()
        last = curve


def test_poisson_gaussian_takes_huge_orders():
    curve = subsample.poisson_gaussian(1.0, 0.01, [1e6, 1e12, 1e13, 1e15, 1e17])
    whole = rdp.gaussian(1.0, [1e6, 1e12, 1e13, 1e15, 1e17])
    assert (curve <= whole).all()
    assert (curve >= 0.99 * whole).all()


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.1, -math.inf, math.inf])
def test_poisson_gaussian_refuses_bad_numbers(bad):
    with pytest.raises(ValueError, match="sampling_rate"):
        subsample.poisson_gaussian(1.0, bad, 2.0)
    if not bad > 0:
        with pytest.raises(ValueError, match="noise_multiplier"):
            subsample.poisson_gaussian(bad, 0.1, 2.0)
        with pytest.raises(ValueError, match="order"):
            subsample.poisson_gaussian(1.0, 0.1, bad)


@pytest.mark.parametrize(
    ("records", "rate", "capacity"),
    [(10, 0.5, 9), (1000, 0.001, 6), (10_000, 0.01, 160), (10**6, 1e-4, 160), (50, 0.9, 49)],
)
def test_poisson_overflow_bounds_the_exact_tail(records, rate, capacity):
    with mpmath.workdps(50):
        q = mpmath.mpf(rate)
        exact = mpmath.fsum(
            mpmath.binomial(records, k) * q**k * (1 - q) ** (records - k)
            for k in range(capacity + 1, min(records, capacity + 400) + 1)
        )
    found = subsample.poisson_overflow(records, rate, capacity)
    assert exact <= found <= float(exact) * (1 + 1e-8)


def test_poisson_overflow_has_the_stated_edges():
    assert subsample.poisson_overflow(10, 0.5, 10) == 0.0
    assert subsample.poisson_overflow(10, 0.0, 0) == 0.0
    assert subsample.poisson_overflow(10, 1.0, 9) == 1.0
    assert subsample.poisson_overflow(10**6, 1e-9, 900_000) > 0.0


def without_replacement_by_sum(rate, multiplier, order) -> mpmath.mpf:
    """Theorem 27's bound from alternating sums, in 250 digits."""
    with mpmath.workdps(250):
        q, cost = mpmath.mpf(rate), 1 / (2 * mpmath.mpf(multiplier) ** 2)

        def even(length):
            return mpmath.fsum(
                (-1) ** (length - i) * mpmath.binomial(length, i) * mpmath.exp(i * (i - 1) * cost)
                for i in range(length + 1)
            )

        evens = {length: even(length) for length in range(2, order + 2, 2)}
        total = mpmath.mpf(1)
        for j in range(2, order + 1):
            paired = 4 * mpmath.sqrt(evens[j // 2 * 2] * evens[(j + 1) // 2 * 2])
            term = min(paired, 2 * mpmath.exp((j - 1) * j * cost))
            total += term * mpmath.binomial(order, j) * q**j
        return min(mpmath.log(total) / (order - 1), order * cost)


@pytest.mark.parametrize(
    ("rate", "noise_std", "order"),
    [(0.01, 2.0, 2), (1e-4, 0.6, 9), (0.3, 40.0, 64), (0.5, 3.0, 20), (0.01, 300.0, 33)],
)
def test_gaussian_without_replacement_equals_the_theorem(rate, noise_std, order):
    exact = without_replacement_by_sum(rate, noise_std / 2, order)
    found = subsample.gaussian_without_replacement(noise_std, 1.0, rate, float(order))[0]
    assert exact <= found <= exact * (1 + mpmath.mpf(2e-11))


def test_gaussian_without_replacement_agrees_with_dp_accounting_fed_half_the_multiplier():
    for rate, noise_std in ((0.01, 2.0), (0.3, 8.0), (1e-4, 0.6)):
        for order in (2, 3, 7, 33, 200, 300):
            rival = rival_rdp._compute_rdp_sample_wor_gaussian_scalar(rate, noise_std / 2, order)
            rival = min(rival, order / (2 * (noise_std / 2) ** 2))
            ours = subsample.gaussian_without_replacement(noise_std, 1.0, rate, float(order))[0]
            assert abs(ours / rival - 1) <= 1e-9


def test_gaussian_without_replacement_where_dp_accounting_loses_digits():
    # dp_accounting 0.6.0 takes forward differences in float64: at order 100 it is 3.6 × too large.
    rival = rival_rdp._compute_rdp_sample_wor_gaussian_scalar(0.3, 20.0, 100)
    exact = without_replacement_by_sum(0.3, 20.0, 100)
    ours = subsample.gaussian_without_replacement(40.0, 1.0, 0.3, 100.0)[0]
    assert exact <= ours <= exact * (1 + mpmath.mpf(2e-11))
    assert rival > 3 * ours


def test_gaussian_without_replacement_charges_the_doubled_sensitivity():
    # theory.md section 6: fed s/C the same routine reports 3.58; fed s/(2C) 20.99.
    def epsilon(noise_std):
        return convert.epsilon(
            lambda o: 1000 * subsample.gaussian_without_replacement(noise_std, 1.0, 0.01, o), 1e-5
        )

    assert abs(epsilon(2.0) - 3.58) <= 0.01
    assert 20.5 <= epsilon(1.0) <= 21.1


def test_gaussian_without_replacement_is_never_below_an_explicit_pair():
    """Records all 0 but one: −C against +C, so the sum is ±C if it is in the sample, else 0."""
    for rate, noise_std in ((0.1, 2.0), (0.5, 4.0)):
        u = np.linspace(-14 * noise_std, 14 * noise_std, 400_001)

        def density(shift, q=rate, s=noise_std, u=u):
            return (1 - q) * stats.norm.pdf(u, 0, s) + q * stats.norm.pdf(u, shift, s)

        p, q = density(1.0), density(-1.0)
        for order in (2.0, 3.0, 10.0, 40.0):
            moment = np.trapezoid(np.exp(order * np.log(p) + (1 - order) * np.log(q)), u)
            exact = math.log(moment) / (order - 1)
            bound = subsample.gaussian_without_replacement(noise_std, 1.0, rate, order)[0]
            assert exact <= bound


def test_gaussian_without_replacement_interpolates_from_above_and_stays_below_the_whole():
    orders = np.array([1.2, 2.0, 2.5, 3.0, 7.9, 100.0, 5000.0])
    curve = subsample.gaussian_without_replacement(3.0, 1.0, 0.05, orders)
    assert (np.diff(curve) >= 0).all()
    assert (curve <= rdp.gaussian(1.5, orders) * (1 + 1e-12)).all()
    assert (subsample.gaussian_without_replacement(3.0, 1.0, 0.0, orders) == 0).all()
    assert (subsample.gaussian_without_replacement(0.0, 1.0, 0.1, orders) == math.inf).all()
    assert (subsample.gaussian_without_replacement(1e-9, 1.0, 0.1, orders) > 1e9).all()
    assert (subsample.gaussian_without_replacement(1e9, 1.0, 0.1, orders) > 0).all()


@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf])
def test_gaussian_without_replacement_refuses_bad_numbers(bad):
    for arguments in (
        (bad, 1.0, 0.1, 2.0),
        (1.0, bad, 0.1, 2.0),
        (1.0, 0.0, 0.1, 2.0),
        (1.0, 1.0, bad, 2.0),
        (1.0, 1.0, 0.1, bad),
    ):
        with pytest.raises(ValueError, match="Expected"):
            subsample.gaussian_without_replacement(*arguments)


def test_log1p_minus_keeps_its_digits():
    for y in (-0.9, -0.0999, -1e-9, 1e-12, 0.05, 0.11, 3.0, 1e10):
        with mpmath.workdps(40):
            exact = mpmath.log1p(mpmath.mpf(y)) - mpmath.mpf(y)
        found = float(subsample._log1p_minus(np.array([y]))[0])
        assert abs(found / exact - 1) <= 1e-14


def poisson_by_trapezoid(rate, noise_multiplier, order) -> mpmath.mpf:
    """The defining integral by a lattice of z/8, in 60 digits: no cancellation matters."""
    with mpmath.workdps(60):
        q, z, a = mpmath.mpf(rate), mpmath.mpf(noise_multiplier), mpmath.mpf(order)
        step, total, u = min(z / 8, mpmath.mpf(1) / 4), mpmath.mpf(0), mpmath.mpf(-18)
        while u < 2 / z + 24:
            y = q * mpmath.expm1(u / z - 1 / (2 * z * z))
            total += mpmath.npdf(u) * (mpmath.powm1(1 + y, a) - a * y)
            u += step
        return mpmath.log1p(total * step) / (a - 1)


@pytest.mark.parametrize("beyond", [1e-3, 1e-7, 1e-11, 1e-15])
def test_poisson_gaussian_keeps_its_digits_next_to_order_one(beyond):
    for rate, multiplier in ((1e-4, 20.0), (0.1, 1.0), (2e-5, 0.2), (0.99, 3.0)):
        exact = poisson_by_trapezoid(rate, multiplier, 1 + beyond)
        found = subsample.poisson_gaussian(multiplier, rate, 1 + beyond)[0]
        assert exact <= found <= exact * (1 + mpmath.mpf(3e-11)), (rate, multiplier)


@pytest.mark.parametrize("rate", [1e-50, 1e-200, 1e-300])
def test_poisson_gaussian_of_tiny_rates_rounds_up(rate):
    """Noise at which the last term e^(α ln q + α(α−1)/(2z²)) is 1: exponents of 10⁵ cancel."""
    for order in (50, 300):
        multiplier = math.sqrt((order - 1) / (-2 * math.log(rate)))
        exact = poisson_by_binomial_sum(rate, multiplier, order)
        with mpmath.workdps(400):
            exact = poisson_by_binomial_sum(rate, multiplier, order)
        found = subsample.poisson_gaussian(multiplier, rate, float(order))[0]
        assert exact <= found <= exact * (1 + mpmath.mpf(1e-9))


def test_gaussian_without_replacement_rounds_up_where_exponents_cancel():
    for order, rate in ((200, 1e-15), (250, 1e-4)):
        multiplier = math.sqrt((order - 1) / (-2 * math.log(rate)))
        exact = without_replacement_by_sum(rate, multiplier, order)
        found = subsample.gaussian_without_replacement(2 * multiplier, 1.0, rate, float(order))[0]
        assert exact <= found <= exact * (1 + mpmath.mpf(1e-9))
