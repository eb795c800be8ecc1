"""Rényi divergences of single releases, as curves over the order.

Every function maps orders to the RDP of one release. Curves of releases of the same data add, order
by order, also when later releases depend on earlier outputs. Host float64.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpfa_jax import _check

Curve = NDArray[np.float64]

LARGEST_ORDER = 1e18
"""Orders beyond this are refused: their powers overflow, and 1 + 1/order is 1."""

TINY = 1e-290
"""The least cost that anything but nothing has: float64 keeps its digits there, and above."""

_UP = 1.0 + 2.0**-46

DEFAULT_ORDERS: Curve = np.concatenate(
    [1.0 + np.logspace(-3.0, 0.0, 18, endpoint=False), np.logspace(math.log10(2.0), 6.0, 46)]
)
"""Orders to start a search from: 1.001 to 1e6, denser where small δ and large ε need it."""

DEFAULT_ORDERS.setflags(write=False)


def real_array(name: str, values: ArrayLike) -> Curve:
    """The values as a float64 array with at least one axis.

    Args:
      name: the argument's name as the caller wrote it.
      values: real numbers; no strings, bools or complex numbers.

    Returns:
      The same numbers.

    Raises:
      TypeError: for anything else.

    Guarantee: R1 (rdp.md).
    """
    array = np.atleast_1d(np.asarray(values))
    if array.dtype.kind not in "fiu":
        raise TypeError(f"Expected {name} to be real numbers, got {values!r}.")
    return array.astype(np.float64)


def check_orders(orders: ArrayLike) -> Curve:
    """The orders as a float64 array with at least one axis.

    Args:
      orders: > 1 and at most 1e18, at least one.

    Returns:
      The same numbers.

    Raises:
      ValueError: if one is NaN, infinite or at most 1, or if there are none.

    Guarantee: R1 (rdp.md).
    """
    array = real_array("orders", orders)
    if array.size == 0:
        raise ValueError("Expected at least one order, got an empty array.")
    bad = ~((array > 1.0) & (array <= LARGEST_ORDER))
    if bad.any():
        raise ValueError(f"Expected orders > 1 and <= {LARGEST_ORDER:g}, got {array[bad][0]}.")
    return array


def remainder(x: Any) -> Curve:
    """e^x − 1 − x ≥ 0 without cancellation near 0; +∞ where it overflows.

    Args:
      x: any real numbers.

    Returns:
      Equality up to float64, one value per element.

    Guarantee: R2 (rdp.md).
    """
    x = np.asarray(x, dtype=np.float64)
    small = np.abs(x) < 0.5
    near = np.where(small, x, 0.0)
    series = np.ones_like(near)
    for k in range(18, 2, -1):
        series = 1.0 + near / k * series
    with np.errstate(over="ignore"):
        far = np.expm1(np.minimum(x, 710.0)) - np.minimum(x, 710.0)
    return np.where(small, 0.5 * near * near * series, far)


def gaussian(noise_multiplier: float, orders: ArrayLike) -> Curve:
    """RDP of the Gaussian mechanism: α/(2·noise_multiplier²).

    Args:
      noise_multiplier: σ/Δ₂, ≥ 0; 0 costs ∞.
      orders: > 1.

    Returns:
      Equality, one value per order.

    Guarantee: R1 (rdp.md).
    Source: Mironov 2017, arXiv:1702.07476, Proposition 7.

    Example:
      >>> gaussian(2.0, [2.0, 8.0]).tolist()
      [0.25, 1.0]
    """
    multiplier = _check.real("noise_multiplier", noise_multiplier, low=0)
    return zcdp(zcdp_of_gaussian(multiplier), orders)


def zcdp_of_gaussian(noise_multiplier: float) -> float:
    """ρ of a Gaussian or discrete Gaussian release, 1/(2·noise_multiplier²).

    Args:
      noise_multiplier: ≥ 0; 0 costs ∞.

    Returns:
      Equality up to float64, at least 1e-290.

    Guarantee: R1 (rdp.md).
    """
    if noise_multiplier == 0.0:
        return math.inf
    return zcdp_of_pure(1.0 / noise_multiplier)


def zcdp_of_pure(epsilon: float) -> float:
    """ρ of an (ε, 0)-DP release, ε²/2.

    Args:
      epsilon: nats, in [0, ∞].

    Returns:
      Upper bound, equality up to float64 and at least 1e-290 where ε > 0.

    Guarantee: R4 (rdp.md).
    Source: Bun and Steinke 2016, arXiv:1605.02065, Proposition 1.4.

    Example:
      >>> zcdp_of_pure(2.0), zcdp_of_pure(1e-200)
      (2.0, 1e-290)
    """
    return 0.0 if epsilon == 0.0 else max(0.5 * epsilon * epsilon, TINY)


def discrete_gaussian(noise_multiplier: float, orders: ArrayLike) -> Curve:
    """RDP bound of the discrete Gaussian mechanism: α/(2·noise_multiplier²).

    Args:
      noise_multiplier: s/Δ₂ on the integer lattice, ≥ 0; 0 costs ∞.
      orders: > 1.

    Returns:
      Upper bound (reached up to e^(−2π²s²) for wide noise), one value per order.

    Guarantee: R3 (rdp.md).
    Source: Canonne, Kamath and Steinke 2020, arXiv:2004.00010, Theorem 4.
    """
    return gaussian(noise_multiplier, orders)


def zcdp(rho: float, orders: ArrayLike) -> Curve:
    """RDP of a ρ-zCDP release: α·ρ.

    Args:
      rho: in [0, ∞].
      orders: > 1.

    Returns:
      The bound that zCDP means, one value per order.

    Guarantee: R1 (rdp.md).
    Source: Bun and Steinke 2016, arXiv:1605.02065, Definition 1.1.
    """
    rho = _check.real("rho", rho, low=0, finite=False)
    with np.errstate(over="ignore"):
        return check_orders(orders) * rho


def laplace(noise_multiplier: float, orders: ArrayLike) -> Curve:
    """RDP of the Laplace mechanism on vectors of L1 sensitivity Δ₁.

    ln(α/(2α−1)·e^((α−1)x) + (α−1)/(2α−1)·e^(−αx))/(α−1) with x = 1/noise_multiplier.

    Args:
      noise_multiplier: b/Δ₁, ≥ 0; 0 costs ∞.
      orders: > 1.

    Returns:
      Equality for one coordinate, upper bound for several, one value per order.

    Guarantee: R2 (rdp.md).
    Source: Mironov 2017, arXiv:1702.07476, Proposition 6.

    Example:
      >>> laplace(1.0, 2.0).round(6).tolist()
      [0.619124]
    """
    multiplier = _check.real("noise_multiplier", noise_multiplier, low=0)
    orders = check_orders(orders)
    if multiplier == 0.0 or 1.0 / multiplier == math.inf:
        return np.full(orders.shape, math.inf)
    x = 1.0 / multiplier
    with np.errstate(over="ignore"):
        up, down = (orders - 1.0) * x, -orders * x
        # The first-order terms of both exponentials cancel exactly.
        excess = (orders * remainder(up) + (orders - 1.0) * remainder(down)) / (2.0 * orders - 1)
        logarithm = np.log1p(excess)
    # Beyond e^30 the second exponential and both −1 are below half an ulp of the first.
    far = up + np.log(orders) - np.log(2.0 * orders - 1.0) + 1e-13
    logarithm = np.where(up > 30.0, far, logarithm)
    return np.minimum(np.maximum(logarithm / (orders - 1.0) * _UP, TINY), x * _UP)


def randomized_response(epsilon: float, orders: ArrayLike) -> Curve:
    """RDP of the extreme (ε, 0)-DP release: randomized response on two answers.

    ln(p^α(1−p)^(1−α) + (1−p)^α p^(1−α))/(α−1) with p = 1/(1+e^(−ε)).

    Args:
      epsilon: in [0, ∞].
      orders: > 1.

    Returns:
      Equality for randomized response, upper bound for every (ε, 0)-DP release; at most ε.

    Guarantee: R4 (rdp.md).
    Source: Mironov 2017, arXiv:1702.07476, Proposition 5.

    Example:
      >>> randomized_response(1.0, [2.0, 1e5]).round(4).tolist()
      [0.7353, 1.0]
    """
    epsilon = _check.real("epsilon", epsilon, low=0, finite=False)
    orders = check_orders(orders)
    if epsilon > 1e100:  # powers overflow; ε itself bounds every order
        return np.full(orders.shape, epsilon)
    with np.errstate(over="ignore"):
        up = (orders - 1.0) * epsilon
        share = 1.0 / (1.0 + math.exp(-epsilon))
        excess = share * remainder(up) + (1.0 - share) * remainder(-up)
        logarithm = np.log1p(excess + math.tanh(0.5 * epsilon) * up)
    far = up - math.log1p(math.exp(-epsilon)) + 1e-13  # the other term is below half an ulp
    logarithm = np.where(up > 30.0, far, logarithm)
    return np.minimum(np.maximum(logarithm / (orders - 1.0) * _UP, min(TINY, epsilon)), epsilon)


def exponential(epsilon: float, rho: float, orders: ArrayLike) -> Curve:
    """RDP of a release that is both (ε, 0)-DP and ρ-zCDP, as sampled attention is (S8).

    Args:
      epsilon: in [0, ∞].
      rho: in [0, ∞].
      orders: > 1.

    Returns:
      Upper bound: the smaller of αρ and the curve of randomized response at ε.

    Guarantee: R4 (rdp.md).
    """
    return np.minimum(zcdp(rho, orders), randomized_response(epsilon, orders))


def bounded_range(bound: float, orders: ArrayLike) -> Curve:
    """RDP of a release whose log-likelihood ratios span at most `bound` (softmax sampling).

    With t* = ln((α−1)A/(αB)), A = e^η(1−e^(−αη)), B = 1−e^((1−α)η):
    t* + ln(A/(α(e^η−1)))/(α−1), and never more than αη²/8.

    Args:
      bound: η, in [0, ∞].
      orders: > 1.

    Returns:
      Upper bound, reached by a two-point release, one value per order.

    Guarantee: R5 (rdp.md).
    Source: Dong, Durfee and Rogers 2020, arXiv:1909.13830, Lemma 3.2 and Section 3.

    Example:
      >>> bounded_range(2.0, [2.0, 1e5]).round(4).tolist()
      [0.8676, 1.9999]
    """
    eta = _check.real("bound", bound, low=0, finite=False)
    orders = check_orders(orders)
    # αη²/8 holds at every range: the zCDP of a bounded range.
    quadratic = orders * (eta / 8.0 * eta) if eta < 1e150 else np.full(orders.shape, math.inf)
    quadratic = np.maximum(quadratic * _UP, min(TINY, eta))
    if not 1e-100 < eta <= 1e100:
        return np.minimum(quadratic, eta)
    log_a = eta + np.log(-np.expm1(-orders * eta))
    log_b = np.log(-np.expm1((1.0 - orders) * eta))
    turn = np.log1p(-1.0 / orders) + log_a - log_b
    log_growth = eta + math.log(-math.expm1(-eta))
    exact = turn + (log_a - np.log(orders) - log_growth) / (orders - 1.0)
    size = np.abs(log_a) + np.abs(log_b) + abs(log_growth) + np.log(orders) + 1.0
    exact = exact + 2.0**-48 * (size + size / (orders - 1.0))
    return np.minimum(np.minimum(exact, quadratic), eta)


def skellam(
    noise_std: float, l1_sensitivity: float, l2_sensitivity: float, orders: ArrayLike
) -> Curve:
    """RDP bound of Skellam noise on integer vectors.

    αΔ₂²/(2v) + min(((2α−1)Δ₂² + 6Δ₁)/(4v²), 3Δ₁/(2v)) at integer α, v = noise_std².

    Args:
      noise_std: ≥ 0; 0 costs ∞.
      l1_sensitivity: Δ₁ on the lattice.
      l2_sensitivity: Δ₂ on the lattice, > 0; below 1, which no two integer vectors have, it is 1.
      orders: > 1; between integers (α−1)·RDP is interpolated.

    Returns:
      Upper bound, one value per order.

    Guarantee: R6 (rdp.md).
    Source: Agarwal, Kairouz and Liu 2021, arXiv:2110.04995, Theorem 3.5.

    Example:
      >>> skellam(10.0, 1.0, 1.0, 2.0).round(6).tolist()
      [0.010225]
    """
    std = _check.real("noise_std", noise_std, low=0)
    l2 = _check.real("l2_sensitivity", l2_sensitivity, low=0, open_low=True)
    l1 = _check.real("l1_sensitivity", l1_sensitivity, low=l2)
    orders = check_orders(orders)
    if std < 1e-75:
        return np.full(orders.shape, math.inf)
    inverse, l1, l2 = 1.0 / std, max(l1, 1.0), max(l2, 1.0)
    share = l2 * inverse  # no variance is squared: wide noise has none that a float holds

    def scaled(alpha: Curve) -> Curve:
        far = 1.5 * l1 * inverse * inverse
        near = (2.0 * alpha - 1.0) * share * inverse * share * inverse
        near = 0.25 * (near + 6.0 * l1 * inverse * inverse * inverse * inverse)
        return (alpha - 1.0) * (0.5 * alpha * share * share + np.minimum(near, far))

    below, above = np.floor(orders), np.ceil(orders)
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = scaled(below), scaled(above)
        total = low + (orders - below) * (high - low)
    return np.maximum(np.where(np.isnan(total), math.inf, total) / (orders - 1.0) * _UP, TINY)
