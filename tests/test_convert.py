"""Conversions of Rényi curves, against the supremum they bound and against dp_accounting."""

import math

import mpmath
import numpy as np
import pytest
from dp_accounting.rdp import rdp_privacy_accountant

from dpfa_jax.accounting import convert, gdp, rdp

DELTAS = (1e-300, 1e-12, 1e-5, 0.1, 0.9)


@pytest.mark.parametrize("delta", DELTAS[:4])
def test_epsilons_equal_the_formula_from_above(delta):
    orders = np.array([1.01, 2.0, 33.0, 1e5])
    curve = np.array([0.3, 1.0, 2.0, 1e4])
    with mpmath.workdps(40):
        for order, value, found in zip(
            orders, curve, convert.epsilons(orders, curve, delta), strict=True
        ):
            a = mpmath.mpf(float(order))
            exact = value + mpmath.log(1 - 1 / a) - mpmath.log(mpmath.mpf(delta) * a) / (a - 1)
            assert found >= max(exact, 0)
            assert found <= max(exact, 0) + 1e-13 * (abs(exact) + 100)


@pytest.mark.parametrize("order", [1.2, 2.0, 9.0, 200.0])
def test_epsilons_hold_for_every_two_point_release_with_that_rdp(order):
    """C1 against explicit pairs: (1−p, p) against (1−q, q), rescaled to one RDP value."""
    for q in (1e-9, 1e-4, 0.03, 0.4):
        for ratio in (1.5, 10.0, 1e3):
            p = min(q * ratio, 0.999)
            hit = order * math.log(p) + (1 - order) * math.log(q)
            miss = order * math.log1p(-p) + (1 - order) * math.log1p(-q)
            value = float(np.logaddexp(hit, miss)) / (order - 1)
            for epsilon in (0.0, 0.2, 1.0, 4.0):
                exact = max(p - math.exp(epsilon) * q, 0) + max(
                    (1 - p) - math.exp(epsilon) * (1 - q), 0
                )
                bound = math.exp(convert.log_deltas(order, value, epsilon)[0])
                assert exact <= bound * (1 + 1e-9) + 1e-16
                if 0 < exact < 1:
                    back = convert.epsilons(order, value, exact)[0]
                    assert back >= epsilon * (1 - 1e-9) - 1e-12


def test_epsilons_and_log_deltas_invert_each_other():
    for order in (1.5, 3.0, 100.0):
        for delta in DELTAS[:4]:
            epsilon = convert.epsilons(order, 5.0, delta)[0]
            back = convert.log_deltas(order, 5.0, epsilon)[0]
            assert abs(back - math.log(delta)) <= 1e-10 * abs(math.log(delta))


@pytest.mark.parametrize("mu", [0.05, 0.3, 1.0, 3.0, 20.0])
def test_epsilon_of_gaussian_noise_is_never_below_the_exact_one(mu):
    for delta in DELTAS:
        exact = gdp.epsilon(delta, mu)
        found = convert.zcdp_epsilon(mu * mu / 2, delta)
        assert found >= exact
        if delta == 1e-5:
            assert found <= 1.2 * exact + 0.05


def test_epsilon_finds_the_best_order():
    for rho in (1e-6, 1e-3, 0.1, 2.0, 300.0):
        for delta in (1e-12, 1e-5, 0.01):
            orders = 1 + np.geomspace(1e-6, 1e9, 300_000)
            dense = convert.epsilons(orders, rho * orders, delta).min()
            found = convert.zcdp_epsilon(rho, delta)
            assert found <= dense * (1 + 1e-8) + 1e-300


def test_delta_finds_the_best_order_and_inverts_epsilon():
    for rho in (1e-3, 0.1, 2.0):
        for delta in (1e-200, 1e-12, 1e-5, 0.01):
            epsilon = convert.zcdp_epsilon(rho, delta)
            found = convert.delta(lambda orders, rho=rho: rdp.zcdp(rho, orders), epsilon)
            assert abs(math.log(found) / math.log(delta) - 1) <= 1e-8


def test_epsilons_agree_with_dp_accounting():
    orders = np.array([1.5, 2.0, 8.0, 64.0])
    for rho in (1e-3, 0.1, 2.0):
        for delta in (1e-9, 1e-5, 0.3):
            rival, _ = rdp_privacy_accountant.compute_epsilon(orders, rho * orders, delta)
            ours = convert.epsilons(orders, rho * orders, delta).min()
            assert abs(ours - rival) <= 1e-9 * max(rival, 1e-3)
        for epsilon in (0.1, 1.0, 5.0):
            rival, _ = rdp_privacy_accountant.compute_delta(orders, rho * orders, epsilon)
            ours = math.exp(convert.log_deltas(orders, rho * orders, epsilon).min())
            assert abs(ours / rival - 1) <= 1e-9


def test_epsilon_where_dp_accounting_returns_zero_for_nan_is_an_error():
    # The rival drops orders whose RDP is NaN or negative and then reports ε = 0 (0.6.0).
    rival, _ = rdp_privacy_accountant.compute_epsilon([2.0], [math.nan], 1e-5)
    assert not rival > 0
    with pytest.raises(ValueError, match="rdp"):
        convert.epsilons([2.0], [math.nan], 1e-5)


def test_zcdp_rho_is_the_private_side():
    for epsilon in (1e-3, 0.5, 1.0, 8.0, 500.0):
        for delta in (1e-12, 1e-5):
            rho = convert.zcdp_rho(epsilon, delta)
            assert convert.zcdp_epsilon(rho, delta) <= epsilon
            assert convert.zcdp_epsilon(rho * (1 + 1e-6), delta) > epsilon
    assert convert.zcdp_rho(1.0, 0.0) == 0.0


def test_edges_cost_infinity_or_nothing():
    assert convert.zcdp_epsilon(math.inf, 0.5) == math.inf
    assert convert.zcdp_epsilon(0.0, 1e-5) == 0.0
    assert convert.zcdp_epsilon(0.0, 0.0) == 0.0
    assert convert.zcdp_epsilon(1e-300, 0.0) == math.inf
    infinite = lambda orders: np.full(orders.shape, math.inf)  # noqa: E731
    assert convert.delta(infinite, math.inf) == 1.0
    assert convert.delta(infinite, 3.0) == 1.0
    assert convert.delta(lambda orders: 0.1 * orders, math.inf) == 0.0
    assert convert.delta(lambda orders: 0.1 * orders, 1e6) == 5e-324


@pytest.mark.parametrize("bad", [math.nan, -1.0])
def test_conversions_refuse_nan_and_negatives(bad):
    for call in (
        lambda: convert.epsilons([2.0], [bad], 1e-5),
        lambda: convert.epsilons([2.0], [1.0], bad),
        lambda: convert.epsilons([2.0], [1.0], 1.0),
        lambda: convert.epsilons([2.0], [1.0, 2.0], 1e-5),
        lambda: convert.epsilons([bad], [1.0], 1e-5),
        lambda: convert.log_deltas([2.0], [bad], 1.0),
        lambda: convert.log_deltas([2.0], [1.0], bad),
        lambda: convert.zcdp_epsilon(bad, 1e-5),
        lambda: convert.zcdp_epsilon(1.0, bad),
        lambda: convert.zcdp_rho(bad, 1e-5),
        lambda: convert.zcdp_rho(1.0, bad),
        lambda: convert.epsilon(lambda orders: orders * bad, 1e-5),
    ):
        with pytest.raises(ValueError, match="Expected"):
            call()
