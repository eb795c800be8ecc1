"""Gaussian differential privacy against quadrature of its definition, in mpmath."""

import math
import random

import dp_accounting
import mpmath
import numpy as np
import pytest
from dp_accounting import pld

from dpfa_jax.accounting import gdp

MUS = (1e-12, 1e-6, 0.03, 0.26, 1.0, 3.7, 40.0, 1e3)
EPSILONS = (0.0, 1e-9, 0.1, 1.0, 60.0, 1e5)


def log_delta_by_quadrature(epsilon: float, mu: float) -> mpmath.mpf:
    """ln ∫ (p − e^ε q)₊ for p = N(μ, 1), q = N(0, 1), from the edge where it turns positive."""
    with mpmath.workdps(32):
        epsilon, mu = mpmath.mpf(epsilon), mpmath.mpf(mu)
        edge = epsilon / mu + mu / 2
        base = max(edge - mu, mpmath.mpf(0))
        peak = max(mu - edge, mpmath.mpf(0))

        def integrand(t):
            exponent = base**2 / 2 - (t + edge - mu) ** 2 / 2
            return mpmath.exp(exponent) * -mpmath.expm1(-mu * t)

        width = 1 / (1 + base)
        points = {mpmath.mpf(0), *(width * k for k in (0.5, 1, 3, 8, 20, 60))}
        points |= {max(peak + k, mpmath.mpf(0)) for k in (-12, -4, 0, 4, 12)}
        mass = mpmath.quad(integrand, sorted(points))
        return mpmath.log(mass / mpmath.sqrt(2 * mpmath.pi)) - base**2 / 2


@pytest.mark.parametrize("mu", MUS)
def test_log_delta_equals_quadrature_and_lies_above(mu):
    for epsilon in EPSILONS:
        if epsilon / mu > 1e9:
            continue
        exact = log_delta_by_quadrature(epsilon, mu)
        found = gdp.log_delta(epsilon, mu)
        # ln δ has the condition number (ε/μ + μ)² in its arguments.
        slack = 1e-13 + 1e-14 * ((epsilon / mu) ** 2 + mu * mu)
        assert found >= float(exact)
        assert float(found - exact) <= slack


def test_delta_underflows_upwards():
    assert gdp.delta(1e5, 1.0) == 5e-324
    assert gdp.delta(1.0, 1e-300) == 5e-324
    assert gdp.log_delta(1e5, 1.0) < -1e9
    assert gdp.delta(0.0, 1e-300) > 3.9e-301


def test_delta_has_the_stated_edges():
    assert gdp.delta(3.0, 0.0) == 0.0
    assert gdp.delta(math.inf, 1.0) == 0.0
    assert gdp.delta(math.inf, math.inf) == 1.0
    assert gdp.delta(3.0, math.inf) == 1.0
    assert gdp.delta(0.0, 1e200) == 1.0


@pytest.mark.parametrize("delta", [1e-300, 1e-30, 1e-9, 1e-5, 0.1, 0.9])
def test_epsilon_is_the_upper_side_of_its_bracket(delta):
    for mu in (1e-6, 0.01, 0.3, 1.0, 7.0, 300.0):
        epsilon = gdp.epsilon(delta, mu)
        assert gdp.log_delta(epsilon, mu) <= math.log(delta)
        if epsilon > 0.0:
            assert gdp.log_delta(epsilon * (1 - 1e-9), mu) > math.log(delta)


@pytest.mark.parametrize("delta", [1e-300, 1e-12, 1e-5, 0.5])
def test_mu_is_the_private_side_of_its_bracket(delta):
    for epsilon in (0.0, 1e-6, 0.25, 1.0, 8.0, 1e4):
        mu = gdp.mu(epsilon, delta)
        assert gdp.log_delta(epsilon, mu) <= math.log(delta)
        assert gdp.log_delta(epsilon, mu * (1 + 1e-9)) > math.log(delta)
        assert gdp.epsilon(delta, mu) <= epsilon * (1 + 1e-12) + 1e-15


@pytest.mark.parametrize(
    ("epsilon", "delta", "expected"),
    [
        (0.5, 1e-5, 7.03),
        (1, 1e-5, 3.731),
        (2, 1e-5, 1.994),
        (4, 1e-5, 1.081),
        (8, 1e-5, 0.600),
        (0.5, 1e-6, 8.06),
        (1, 1e-6, 4.225),
        (2, 1e-6, 2.231),
        (4, 1e-6, 1.194),
        (8, 1e-6, 0.653),
    ],
)
def test_mu_gives_the_published_table(epsilon, delta, expected):
    digits = len(str(expected).split(".")[1])
    assert abs(1 / gdp.mu(float(epsilon), delta) - expected) <= 0.6 * 10**-digits


def test_epsilon_agrees_with_dp_accounting_where_it_is_accurate():
    for mu, delta in ((0.3, 1e-5), (1.0, 1e-6), (2.0, 1e-8)):
        loss = pld.privacy_loss_mechanism.GaussianPrivacyLoss(1.0 / mu)
        for epsilon in (0.1, gdp.epsilon(delta, mu)):
            rival = loss.get_delta_for_epsilon(epsilon)
            assert abs(gdp.delta(epsilon, mu) / rival - 1.0) <= 1e-9
    deltas = dp_accounting.get_sigma_gaussian(1.0, 1e-5)
    assert abs(1.0 / gdp.mu(1.0, 1e-5) / deltas - 1.0) <= 1e-6


def test_compose_is_the_root_of_squares_from_above():
    random_mus = [random.Random(0).uniform(0, 3) for _ in range(1000)]
    exact = mpmath.sqrt(mpmath.fsum(mpmath.mpf(mu) ** 2 for mu in random_mus))
    assert exact <= gdp.compose(random_mus) <= exact * (1 + 1e-14)
    assert gdp.compose([]) == 0.0
    assert gdp.compose([1.0, math.inf]) == math.inf
    assert gdp.compose([1e-200, 1e-200]) > 1.4e-200


def lost_mass(t: float, bits: int) -> mpmath.mpf:
    """P(|z| ≤ R, |z − t| > R) of a standard normal pair, by slices of the lens."""
    with mpmath.workdps(40):
        radius = mpmath.sqrt(2 * bits * mpmath.log(2))
        t = mpmath.mpf(t)

        def slice_(x):
            height = mpmath.sqrt(max(radius**2 - x**2, mpmath.mpf(0)))
            return mpmath.npdf(x) * mpmath.erf(height / mpmath.sqrt(2))

        # Both discs hold z: the half x ≥ t/2 is bounded by |z| ≤ R, the other by |z − t| ≤ R.
        points = [t / 2, *(p for p in (1, 2, 4, 6) if t / 2 < p < radius), radius]
        right = mpmath.quad(slice_, points)
        mirrored = mpmath.quad(
            lambda x: (
                mpmath.npdf(t - x)
                * mpmath.erf(mpmath.sqrt(max(radius**2 - x**2, mpmath.mpf(0))) / mpmath.sqrt(2))
            ),
            points,
        )
        return 1 - mpmath.mpf(2) ** -bits - right - mirrored


@pytest.mark.parametrize(
    ("bits", "mu"), [(2, 0.6), (8, 0.02), (8, 2.0), (40, 1e-3), (40, 1.0), (40, 4.0), (40, 6.4)]
)
def test_cut_off_bounds_the_mass_one_pair_loses(bits, mu):
    log_factor, flux = gdp.cut_off(mu, 1, radius_bits=bits)
    exact = lost_mass(mu, bits) / (1 - mpmath.mpf(2) ** -bits)
    assert flux >= exact
    # The trailing edge also sweeps points that were never inside, at most as many again.
    assert flux <= 2.0 * exact
    assert log_factor >= -math.log1p(-(2.0**-bits))


@pytest.mark.parametrize(("bits", "mu"), [(2, 0.6), (8, 2.0), (40, 3.0)])
def test_cut_off_bounds_every_split_of_the_shift(bits, mu):
    grid = np.linspace(0.0, mu, 17)[1:]
    losses = {float(t): float(lost_mass(float(t), bits)) for t in grid}
    rng = random.Random(1)
    for pairs in (2, 8, 200):
        flux = gdp.cut_off(mu, pairs, radius_bits=bits)[1]
        for trial in range(20):
            left, total, used = mu * mu, 0.0, 0
            while used < pairs and left >= grid[0] ** 2:
                fits = [t for t in losses if t * t <= left]
                t = fits[0] if trial == 0 else fits[-1] if trial == 1 else rng.choice(fits)
                total, left, used = total + losses[t], left - t * t, used + 1
            assert flux >= min(total / (1 - 2.0**-bits), 1.0)


def test_cut_off_of_even_splits_is_close_to_the_truth():
    mu, pairs = 1.0, 10_000
    flux = gdp.cut_off(mu, pairs)[1]
    exact = pairs * lost_mass(mu / math.sqrt(pairs), 40)
    assert exact <= flux <= float(exact) * 2.0


def test_cut_off_of_the_whole_curve_bounds_two_discs_exactly():
    """δ of N(t, 1) against N(0, 1), both restricted to a disc, by two-dimensional quadrature."""
    bits, mu = 3, 0.7
    radius = math.sqrt(2 * bits * math.log(2))
    size = 1501
    axis = (np.arange(size) + 0.5) / size * 2 * (radius + mu) - (radius + mu)
    x, y = np.meshgrid(axis, axis, indexing="ij")
    cell = (axis[1] - axis[0]) ** 2
    scale = 1 / (2 * math.pi * (1 - 2.0**-bits))
    p = (
        np.where((x - mu) ** 2 + y * y <= radius**2, np.exp(-((x - mu) ** 2 + y * y) / 2), 0)
        * scale
    )
    q = np.where(x * x + y * y <= radius**2, np.exp(-(x * x + y * y) / 2), 0) * scale
    log_factor, flux = gdp.cut_off(mu, 1, radius_bits=bits)
    for epsilon in (0.0, 0.2, 0.8, 2.0):
        exact = float(np.maximum(p - math.exp(epsilon) * q, 0).sum() * cell)
        bound = math.exp(log_factor) * gdp.delta(epsilon, mu) + flux
        assert exact <= bound + 1e-3  # error of the midpoint rule at the discs' edges
        assert exact >= 0.5 * bound


def test_cut_off_of_many_coordinates_is_its_linear_term():
    for bits in (32, 40, 64):
        radius = math.sqrt(2 * bits * math.log(2))
        linear = math.sqrt(34_000_000) * radius * 2.0**-bits / math.pi
        assert linear <= gdp.cut_off(1.0, 34_000_000, radius_bits=bits)[1] <= 1.1 * linear


def test_cut_off_grows_with_shift_and_coordinates():
    last = 0.0
    for mu in np.linspace(1e-3, 6.44, 60):
        flux = gdp.cut_off(float(mu), 1000)[1]
        assert flux > last
        assert gdp.cut_off(float(mu), 1001)[1] > flux
        last = flux
    assert gdp.cut_off(6.5, 1)[1] == 1.0
    assert gdp.cut_off(1.0, 10**30)[1] == 1.0
    assert gdp.cut_off(1.0, 2**52)[1] == 1.0
    assert gdp.cut_off(1.0, 0) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, -1e-9, -math.inf])
def test_every_function_refuses_nan_and_negatives(bad):
    for call in (
        lambda: gdp.delta(bad, 1.0),
        lambda: gdp.delta(1.0, bad),
        lambda: gdp.log_delta(bad, 1.0),
        lambda: gdp.log_delta(1.0, bad),
        lambda: gdp.epsilon(bad, 1.0),
        lambda: gdp.epsilon(0.1, bad),
        lambda: gdp.epsilon(1.0, 1.0),
        lambda: gdp.epsilon(math.inf, 1.0),
        lambda: gdp.mu(bad, 0.1),
        lambda: gdp.mu(math.inf, 0.1),
        lambda: gdp.mu(1.0, bad),
        lambda: gdp.mu(1.0, 1.0),
        lambda: gdp.compose([1.0, bad]),
        lambda: gdp.cut_off(bad, 1),
        lambda: gdp.cut_off(1.0, -1),
    ):
        with pytest.raises(ValueError):
            call()


def test_epsilon_without_delta_is_infinite():
    assert gdp.epsilon(0.0, 1e-9) == math.inf
    assert gdp.epsilon(0.0, 0.0) == 0.0
    assert gdp.mu(1e4, 0.0) == 0.0


def test_smallest_mu_is_no_error():
    for mu in (5e-324, 1e-322, 1e-310):
        found = gdp.delta(0.0, mu)
        assert mu / math.sqrt(2 * math.pi) * (1 - 1e-6) <= found <= mu
        assert gdp.delta(mu, mu) <= found and gdp.epsilon(1e-5, mu) == 0.0


def test_cut_off_of_tiny_shifts_keeps_its_digits():
    """One pair: the flux is a·μ to leading order, a = R·2^(−b)/π; a plain difference gives 0."""
    radius = math.sqrt(80 * math.log(2))
    slope = radius * 2.0**-40 / math.pi
    for mu in (1e-3, 1e-5, 1e-9, 1e-14, 1e-17, 1e-100, 1e-300):
        flux = gdp.cut_off(mu, 1)[1]
        assert slope * mu <= flux <= slope * mu * (1 + 5 * mu + 4e-3)


def test_cut_off_keeps_its_factor_where_the_flux_is_everything():
    for mu, coordinates in ((10.0, 10**12), (1.0, 1 << 60), (1.0, 1 << 900)):
        factor, flux = gdp.cut_off(mu, coordinates)
        assert flux == 1.0
        assert factor >= coordinates * 2.0**-40
    assert gdp.cut_off(1.0, 10**400) == (math.inf, 1.0)
