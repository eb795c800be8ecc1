"""Rényi curves against quadrature of the defining integral, in mpmath."""

import math

import mpmath
import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant

from dpfa_jax.accounting import rdp

ORDERS = (1.001, 1.5, 2.0, 7.3, 64.0, 1000.0)


def divergence(log_p, log_q, order, points) -> float:
    """ln ∫ p^α q^(1−α) / (α − 1), each in mpmath with 25 digits."""
    with mpmath.workdps(25):
        order = mpmath.mpf(order)
        mass = mpmath.quad(
            lambda x: mpmath.exp(order * log_p(x) + (1 - order) * log_q(x)), sorted(points)
        )
        return mpmath.log(mass) / (order - 1)


@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 20.0])
def test_gaussian_equals_quadrature(noise_multiplier):
    for order in ORDERS:
        variance = mpmath.mpf(noise_multiplier) ** 2
        center = mpmath.mpf(order)

        def log_density(x, mean, variance=variance):
            return -((x - mean) ** 2) / (2 * variance) - mpmath.log(2 * mpmath.pi * variance) / 2

        points = [center + k * noise_multiplier for k in (-14, -6, -2, 0, 2, 6, 14)]
        exact = divergence(lambda x: log_density(x, 1), lambda x: log_density(x, 0), order, points)
        found = rdp.gaussian(noise_multiplier, order)[0]
        assert abs(found / exact - 1) <= 1e-12


@pytest.mark.parametrize("noise_multiplier", [0.05, 0.4, 1.0, 30.0, 1e4])
def test_laplace_equals_quadrature(noise_multiplier):
    for order in ORDERS:
        scale = mpmath.mpf(noise_multiplier)

        def log_density(x, mean, scale=scale):
            return -abs(x - mean) / scale - mpmath.log(2 * scale)

        points = [0, 1, *(s * k for s in (scale,) for k in (-90, -30, -9, -3, -1))]
        points += [1 + scale * k for k in (1, 3, 9, 30, 90)]
        exact = divergence(lambda x: log_density(x, 1), lambda x: log_density(x, 0), order, points)
        found = rdp.laplace(noise_multiplier, order)[0]
        assert abs(found / exact - 1) <= 1e-11


@pytest.mark.parametrize("noise_multiplier", [0.3, 2.0])
def test_laplace_of_a_vector_is_at_most_that_of_one_coordinate(noise_multiplier):
    orders = np.array(ORDERS)
    whole = rdp.laplace(noise_multiplier, orders)
    for parts in ((0.5, 0.5), (0.9, 0.1), (0.2, 0.3, 0.5), (0.05,) * 20):
        split = sum(rdp.laplace(noise_multiplier / part, orders) for part in parts)
        assert (split <= whole * (1 + 1e-12)).all()


@pytest.mark.parametrize("noise_multiplier", [0.4, 0.8, 3.0])
def test_discrete_gaussian_bounds_the_exact_sum_and_is_reached(noise_multiplier):
    with mpmath.workdps(40):
        variance = mpmath.mpf(noise_multiplier) ** 2
        reach = 60 + int(60 * noise_multiplier)

        def mass(x):
            return mpmath.exp(-(mpmath.mpf(x) ** 2) / (2 * variance))

        total = mpmath.fsum(mass(x) for x in range(-reach, reach + 1))
        for order in (1.5, 2.0, 7.3, 20.0):
            center = int(order)
            alpha = mpmath.mpf(order)
            moment = mpmath.fsum(
                (mass(x - 1) / total) ** alpha * (mass(x) / total) ** (1 - alpha)
                for x in range(center - reach, center + reach + 1)
            )
            exact = mpmath.log(moment) / (alpha - 1)
            found = rdp.discrete_gaussian(noise_multiplier, order)[0]
            assert found >= exact * (1 - mpmath.mpf(1e-15))
            if order == int(order):  # a shifted lattice sum is the same sum: equality
                assert abs(found / exact - 1) <= 1e-12


@pytest.mark.parametrize("epsilon", [1e-7, 0.1, 1.0, 5.0, 50.0, 800.0])
def test_randomized_response_equals_the_two_point_sum(epsilon):
    with mpmath.workdps(60):
        p = 1 / (1 + mpmath.exp(-mpmath.mpf(epsilon)))
        q = 1 / (1 + mpmath.exp(mpmath.mpf(epsilon)))
        for order in ORDERS:
            alpha = mpmath.mpf(order)
            moment = p**alpha * q ** (1 - alpha) + q**alpha * p ** (1 - alpha)
            exact = mpmath.log(moment) / (alpha - 1)
            found = rdp.randomized_response(epsilon, order)[0]
            assert abs(found / exact - 1) <= 1e-12


def test_randomized_response_bounds_every_pure_release():
    """Random pairs whose log-ratios stay within ε never exceed the curve."""
    rng = np.random.default_rng(0)
    orders = np.array(ORDERS[:5])
    for epsilon in (0.1, 1.0, 4.0):
        curve = rdp.randomized_response(epsilon, orders)
        for _ in range(200):
            losses = rng.uniform(0, epsilon, size=5)
            q = rng.dirichlet(np.ones(5))
            ratio = np.exp(losses)
            p = q * ratio
            p /= p.sum()  # normalising moves the ratios by one constant: still within ε
            for order, bound in zip(orders, curve, strict=True):
                found = math.log(float((p**order * q ** (1 - order)).sum())) / (order - 1)
                assert found <= bound * (1 + 1e-9)


def test_exponential_is_the_smaller_of_both_bounds():
    curve = rdp.exponential(2.0, 0.5, [1.1, 2.0, 100.0])
    assert curve.tolist() == [0.55, 1.0, rdp.randomized_response(2.0, 100.0)[0]]


@pytest.mark.parametrize("bound", [1e-6, 0.01, 0.5, 3.0, 40.0, 600.0])
def test_bounded_range_is_the_worst_two_point_pair(bound):
    with mpmath.workdps(60):
        eta = mpmath.mpf(bound)
        for order in ORDERS:
            alpha = mpmath.mpf(order)

            def divergence_at(t, alpha=alpha):
                # Log-ratios t and t − η: the first with the probability that makes the mean 1.
                weight = (mpmath.exp(eta - t) - 1) / (mpmath.exp(eta) - 1)
                moment = weight * mpmath.exp(alpha * t)
                moment += (1 - weight) * mpmath.exp(alpha * (t - eta))
                return mpmath.log(moment) / (alpha - 1)

            found = rdp.bounded_range(bound, order)[0]
            turn = mpmath.log(
                (1 - 1 / alpha)
                * mpmath.exp(eta)
                * (1 - mpmath.exp(-alpha * eta))
                / (1 - mpmath.exp((1 - alpha) * eta))
            )
            best = divergence_at(turn)
            for k in range(1, 20):
                assert found >= divergence_at(eta * k / 20)
            assert found >= best
            if bound >= 0.01 and order >= 1.5:
                assert found <= best * (1 + mpmath.mpf(1e-8))
            # For tiny ranges the quadratic bound takes over, and there it is the value.
            assert found <= best * (1 + max(mpmath.mpf(1e-8), eta * order))


@pytest.mark.parametrize("variance", [0.05, 0.5, 3.0, 100.0])
def test_skellam_bounds_the_exact_sum(variance):
    """One coordinate, integer shifts and orders: the exact divergence by summing Bessel masses."""
    with mpmath.workdps(40):
        reach = 90 + int(12 * math.sqrt(variance))
        logs = [mpmath.log(mpmath.besseli(k, variance)) - variance for k in range(reach + 1)]
        for shift in (1, 2, 5):
            for order in (2, 3, 8):
                cells = range(-reach, reach + 1 - shift)
                moment = mpmath.fsum(
                    mpmath.exp(order * logs[abs(k)] + (1 - order) * logs[abs(k + shift)])
                    for k in cells
                )
                exact = mpmath.log(moment) / (order - 1)
                bound = rdp.skellam(math.sqrt(variance), shift, shift, float(order))[0]
                assert exact <= bound
    # The theorem's two forms of the excess: 3Δ₁/(2v) for narrow noise, the other for wide.
    narrow = 8 * 4 / (2 * 0.5) + 3 * 3 / (2 * 0.5)
    assert abs(rdp.skellam(math.sqrt(0.5), 3.0, 2.0, 8.0)[0] / narrow - 1) <= 1e-12
    broad = 8 * 4 / (2 * 100) + (15 * 4 + 6 * 3) / (4 * 100**2)
    assert abs(rdp.skellam(10.0, 3.0, 2.0, 8.0)[0] / broad - 1) <= 1e-12
    wide = rdp.skellam(1e3, 1.0, 1.0, 2.0)[0]
    assert abs(wide / rdp.gaussian(1e3, 2.0)[0] - 1) <= 1e-5


def test_skellam_interpolates_between_integer_orders():
    orders = np.array([1.5, 2.0, 2.5, 3.0])
    curve = rdp.skellam(2.0, 1.0, 1.0, orders)
    scaled = (orders - 1) * curve
    np.testing.assert_allclose(scaled[2], 0.5 * (scaled[1] + scaled[3]), rtol=1e-12)
    assert (rdp.skellam(0.0, 1.0, 1.0, orders) == math.inf).all()
    assert (rdp.skellam(1e200, 1.0, 1.0, orders) > 0).all()


@pytest.mark.parametrize("noise_multiplier", [0.7, 3.0])
def test_curves_agree_with_dp_accounting(noise_multiplier):
    orders = [1.5, 2.0, 8.0, 64.0]
    for event, curve in (
        (dp_event.GaussianDpEvent, rdp.gaussian),
        (dp_event.LaplaceDpEvent, rdp.laplace),
    ):
        accountant = RdpAccountant(orders=orders).compose(event(noise_multiplier))
        rival = accountant.get_epsilon_and_optimal_order  # converts by the same formula as ours
        ours = curve(noise_multiplier, orders)
        log_delta = math.log(1e-5)
        expected = min(
            r + math.log1p(-1 / a) - (log_delta + math.log(a)) / (a - 1)
            for a, r in zip(orders, ours, strict=True)
        )
        assert abs(rival(1e-5)[0] / max(expected, 0) - 1) <= 1e-9


def test_zero_noise_and_infinite_bounds_cost_infinity():
    orders = np.array([1.5, 1e6])
    for curve in (
        rdp.gaussian(0.0, orders),
        rdp.laplace(0.0, orders),
        rdp.discrete_gaussian(0.0, orders),
        rdp.gaussian(1e-200, orders),
        rdp.laplace(5e-324, orders),
        rdp.zcdp(math.inf, orders),
        rdp.randomized_response(math.inf, orders),
        rdp.exponential(math.inf, math.inf, orders),
    ):
        assert (curve == math.inf).all()


def test_curves_of_tiny_costs_are_not_zero():
    orders = np.array([1.001, 2.0])
    for curve in (
        rdp.gaussian(1e200, orders),
        rdp.laplace(1e200, orders),
        rdp.randomized_response(1e-200, orders),
    ):
        assert (curve > 0.0).all()
    assert (rdp.randomized_response(0.0, orders) == 0.0).all()


def test_curves_never_shrink_with_the_order_and_are_never_nan():
    orders = np.concatenate([1 + np.logspace(-12, 0, 50), np.logspace(0.4, 12, 100)])
    for curve in (
        *(rdp.gaussian(s, orders) for s in (1e-3, 1.0, 1e3)),
        *(rdp.laplace(s, orders) for s in (1e-3, 1.0, 1e3, 1e8)),
        *(rdp.randomized_response(e, orders) for e in (1e-9, 1e-3, 1.0, 40.0, 900.0, 1e5)),
    ):
        assert np.isfinite(curve).all()
        assert (np.diff(curve) >= -1e-9 * curve[1:]).all()
        assert (curve > 0).all()


@pytest.mark.parametrize("bad", [math.nan, -1.0, -math.inf])
def test_curves_refuse_nan_and_negatives(bad):
    for call in (
        lambda: rdp.gaussian(bad, 2.0),
        lambda: rdp.laplace(bad, 2.0),
        lambda: rdp.discrete_gaussian(bad, 2.0),
        lambda: rdp.zcdp(bad, 2.0),
        lambda: rdp.randomized_response(bad, 2.0),
        lambda: rdp.exponential(bad, 1.0, 2.0),
        lambda: rdp.bounded_range(bad, 2.0),
        lambda: rdp.skellam(bad, 1.0, 1.0, 2.0),
        lambda: rdp.skellam(1.0, bad, 1.0, 2.0),
        lambda: rdp.skellam(1.0, 1.0, bad, 2.0),
        lambda: rdp.exponential(1.0, bad, 2.0),
        lambda: rdp.gaussian(1.0, bad),
        lambda: rdp.gaussian(1.0, [2.0, bad]),
    ):
        with pytest.raises(ValueError, match="Expected"):
            call()


@pytest.mark.parametrize(
    "orders", [[], [1.0], [0.5], [math.inf], [2.0, 1.0], [1e19], ["2"], [True]]
)
def test_check_orders_refuses_what_is_no_order(orders):
    with pytest.raises((TypeError, ValueError), match="order"):
        rdp.check_orders(orders)


def test_curves_of_the_widest_noise_still_cost_what_they_cost():
    """Squares of these numbers leave the floats; the cost times a count that fits does not."""
    for multiplier, order in ((1e155, 2.0), (1e200, 1e18), (1.7e308, 1.5), (1e150, 7.5)):
        exact = mpmath.mpf(order) / 2 / mpmath.mpf(multiplier) ** 2
        assert rdp.gaussian(multiplier, order)[0] * (1 + 1e-15) >= exact
        assert rdp.zcdp_of_gaussian(multiplier) * (1 + 1e-15) >= exact / order
        for curve in (
            rdp.laplace(multiplier, order)[0],
            rdp.randomized_response(1 / multiplier, order)[0],
            rdp.bounded_range(2 / multiplier, order)[0],
        ):
            # Each is αε²/2 to leading order, and never more than ε.
            assert curve * (1 + 1e-12) >= min(exact, 1 / mpmath.mpf(multiplier))
    assert rdp.zcdp_of_pure(0.0) == 0.0 and rdp.zcdp_of_pure(math.inf) == math.inf
    assert rdp.zcdp_of_pure(5e-324) > 0.0 and rdp.zcdp_of_pure(3.0) == 4.5


def test_skellam_of_the_widest_noise_is_that_of_its_share():
    # noise_std² overflows; αΔ²/(2v) does not.
    for std, l2 in ((1e155, 1e155), (1e200, 3e200), (1e308, 1e300)):
        exact = mpmath.mpf(l2) ** 2 / mpmath.mpf(std) ** 2
        assert exact <= rdp.skellam(std, l2, l2, 2.0)[0] <= exact * (1 + 1e-9)
    assert rdp.skellam(9.0, 1e-3, 1e-3, 2.0)[0] == rdp.skellam(9.0, 1.0, 1.0, 2.0)[0]
