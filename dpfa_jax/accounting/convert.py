"""From Rényi curves to (ε, δ) and back, for one order, a grid, or a curve that is a function."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from dpfa_jax import _check
from dpfa_jax.accounting import rdp

_EPS = 2.0**-52


def _check_curve(values: ArrayLike, orders: rdp.Curve) -> rdp.Curve:
    curve = rdp.real_array("rdp", values)
    if curve.shape != orders.shape:
        raise ValueError(f"Expected one rdp per order, got {curve.shape} for {orders.shape}.")
    bad = ~(curve >= 0.0)
    if bad.any():
        raise ValueError(f"Expected rdp >= 0, got {curve[bad][0]}.")
    return curve


def epsilons(orders: ArrayLike, values: ArrayLike, delta: float) -> rdp.Curve:
    """ε(δ) that each order by itself certifies; every one of them holds.

    Args:
      orders: > 1.
      values: RDP at these orders, in [0, ∞].
      delta: in [0, 1).

    Returns:
      Upper bounds ρ + ln(1 − 1/α) − ln(δα)/(α − 1), never below 0, one value per order; 0 where
      δ ≥ √(1 − e^(−ρ)).

    Raises:
      ValueError: for NaN, a negative value, or δ outside [0, 1).

    Guarantee: C1, C2 (convert.md).
    Source: Canonne, Kamath and Steinke 2020, arXiv:2004.00010, Proposition 12.
    """
    tolerance = _check.real("delta", delta, low=0, high=1, open_high=True)
    orders = rdp.check_orders(orders)
    curve = _check_curve(values, orders)
    if tolerance == 0.0:
        return np.where(curve == 0.0, 0.0, math.inf)
    log_delta = math.log(tolerance)
    conversion = np.log1p(-1.0 / orders) - (log_delta + np.log(orders)) / (orders - 1.0)
    size = np.abs(np.log1p(-1.0 / orders)) + (np.log(orders) - log_delta) / (orders - 1.0)
    result = curve + conversion + 8.0 * _EPS * (curve + size)
    free = -np.expm1(-curve) * (1.0 + 8.0 * _EPS) <= tolerance * tolerance
    return np.where(free, 0.0, np.maximum(result, 0.0))


def log_deltas(orders: ArrayLike, values: ArrayLike, epsilon: float) -> rdp.Curve:
    """Logarithm of the δ(ε) that each order by itself certifies; every one of them holds.

    Args:
      orders: > 1.
      values: RDP at these orders, in [0, ∞].
      epsilon: nats, in [0, ∞].

    Returns:
      Upper bounds, never above 0, one value per order.

    Raises:
      ValueError: for NaN or a negative value.

    Guarantee: C1, C2 (convert.md).
    Source: Canonne, Kamath and Steinke 2020, arXiv:2004.00010, Proposition 12.
    """
    epsilon = _check.real("epsilon", epsilon, low=0, finite=False)
    orders = rdp.check_orders(orders)
    curve = _check_curve(values, orders)
    if epsilon == math.inf:
        return np.where(curve == math.inf, 0.0, -math.inf)
    away = np.log1p(-1.0 / orders)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        logarithm = (orders - 1.0) * (curve - epsilon + away) - np.log(orders)
        spread = (orders - 1.0) * (curve + epsilon + np.abs(away)) + np.log(orders)
        logarithm = logarithm + 8.0 * _EPS * spread
        variation = 0.5 * np.log(-np.expm1(-curve)) + 8.0 * _EPS
    # Where sizes overflow the order says nothing: δ = 1.
    logarithm = np.where(np.isnan(logarithm), 0.0, logarithm)
    return np.minimum(np.minimum(logarithm, variation), 0.0)


def _minimum(cost: Callable[[rdp.Curve], rdp.Curve]) -> float:
    """Smallest value of a cost over orders: a grid, then ever finer grids around its minimum.

    Every order is valid, so a missed minimum costs tightness and never privacy.
    """
    orders = rdp.DEFAULT_ORDERS
    best = math.inf
    for _ in range(6):
        costs = cost(orders)
        index = int(np.argmin(costs))
        best = min(best, float(costs[index]))
        left, right = orders[max(index - 1, 0)], orders[min(index + 1, orders.size - 1)]
        if index == 0:
            left = 1.0 + (orders[0] - 1.0) * 1e-3
        if index == orders.size - 1:
            right = orders[-1] * 1e3
        if not math.isfinite(best) or not right - left > 1e-9 * left or right > 1e15:
            break
        orders = 1.0 + np.geomspace(left - 1.0, right - 1.0, 14)
    return best


def epsilon(curve: Callable[[rdp.Curve], rdp.Curve], delta: float) -> float:
    """ε(δ) of an RDP curve given as a function of the orders, over all real orders.

    Args:
      curve: maps an array of orders > 1 to RDP in [0, ∞].
      delta: in [0, 1).

    Returns:
      Upper bound; the best that C1 and C2 give, up to about 1e-9 relative.

    Raises:
      ValueError: for δ outside [0, 1) or a curve with NaN or negative values.

    Guarantee: C1, C2 (convert.md).

    Example:
      >>> round(epsilon(lambda orders: rdp.gaussian(3.731, orders), 1e-5), 3)
      1.092
    """
    return _minimum(lambda orders: epsilons(orders, curve(orders), delta))


def delta(curve: Callable[[rdp.Curve], rdp.Curve], epsilon: float) -> float:
    """δ(ε) of an RDP curve given as a function of the orders, over all real orders.

    Args:
      curve: maps an array of orders > 1 to RDP in [0, ∞].
      epsilon: nats, in [0, ∞].

    Returns:
      Upper bound in [0, 1]; the smallest positive float where it underflows.

    Raises:
      ValueError: for a negative or NaN ε or a curve with NaN or negative values.

    Guarantee: C1, C2 (convert.md).
    """
    logarithm = _minimum(lambda orders: log_deltas(orders, curve(orders), epsilon))
    if logarithm == -math.inf:
        return 0.0
    return min(max(math.exp(logarithm) * (1.0 + 4.0 * _EPS), 5e-324), 1.0)


def zcdp_epsilon(rho: float, delta: float) -> float:
    """ε(δ) of a ρ-zCDP release.

    Args:
      rho: in [0, ∞].
      delta: in [0, 1).

    Returns:
      Upper bound.

    Raises:
      ValueError: for NaN or an argument outside its range.

    Guarantee: C1, C2 (convert.md).

    Example:
      >>> round(zcdp_epsilon(0.5, 1e-5), 3)
      4.728
    """
    rho = _check.real("rho", rho, low=0, finite=False)
    return epsilon(lambda orders: rdp.zcdp(rho, orders), delta)


def zcdp_rho(epsilon: float, delta: float) -> float:
    """Largest ρ for which every ρ-zCDP release is (ε, δ)-DP by C1 and C2, on the private side.

    Args:
      epsilon: target, nats, in [0, ∞).
      delta: target, in [0, 1).

    Returns:
      The private side: `zcdp_epsilon(result, delta) <= epsilon`. 0 where nothing else is certified.

    Raises:
      ValueError: for NaN or an argument outside its range.

    Guarantee: C1 (convert.md).
    """
    target = _check.real("epsilon", epsilon, low=0)
    tolerance = _check.real("delta", delta, low=0, high=1, open_high=True)
    if tolerance == 0.0:
        return 0.0
    low, high = 0.0, 1.0
    while zcdp_epsilon(high, tolerance) <= target:
        low, high = high, 2.0 * high
    while high - low > 1e-12 * high and high > 1e-300:
        middle = 0.5 * (low + high)
        if zcdp_epsilon(middle, tolerance) <= target:
            low = middle
        else:
            high = middle
    return low
