"""Gaussian differential privacy: exact δ(ε), its inverses, composition, and the noise cut-off.

A release is μ-GDP if telling two neighbouring data sets apart from it is at least as hard as
telling N(0, 1) from N(μ, 1). Everything is float64 on the host, computed in logarithms, and rounded
towards the larger cost.
"""

import functools
import math
from collections.abc import Iterable

import numpy as np
from scipy import special

from dpfa_jax import _check

_EPS = 2.0**-52
_TINY = 5e-324
_LOG_ROOT_TWO_PI = 0.5 * math.log(2.0 * math.pi)
_RULE = np.polynomial.legendre.leggauss(24)

RADIUS_BITS = 40
"""Bits of the Box-Muller radius of `dpfa_jax.random`: the noise ends at √(80 ln 2) = 7.45σ."""


def _mills(x: float) -> float:
    """Φ(−x)/φ(x), decreasing; +∞ below about −37."""
    return math.sqrt(math.pi / 2.0) * float(special.erfcx(x / math.sqrt(2.0)))


def _mills_slope(x: np.ndarray) -> np.ndarray:
    """−d/dx of the Mills ratio, 1 − x·m(x) > 0, without cancellation at large x."""
    mills = math.sqrt(math.pi / 2.0) * special.erfcx(x / math.sqrt(2.0))
    large = np.maximum(x, 4.0)
    tail = np.zeros_like(large)  # 1/m(x) = x + 1/(x + 2/(x + 3/(x + …)))
    for k in range(60, 1, -1):
        tail = k / (large + tail)
    return np.where(x < 4.0, 1.0 - x * mills, mills / (large + tail))


def _log_mills_drop(low: float, mu: float, high: float) -> float:
    """ln(m(low) − m(high)) for high = low + mu, relatively exact for small mu too."""
    if mu > 0.25 * max(1.0, abs(low)):
        return math.log(_mills(low) - _mills(high))
    nodes, weights = _RULE
    slope = float(weights @ _mills_slope(low + 0.5 * mu * (1.0 + nodes)))
    return math.log(mu) - math.log(2.0) + math.log(slope)


def log_delta(epsilon: float, mu: float) -> float:
    """Logarithm of the exact δ(ε) of a μ-GDP release, rounded up: finite where δ underflows.

    Args:
      epsilon: nats, in [0, ∞].
      mu: in [0, ∞].

    Returns:
      Equality up to float64, on the upper side; −∞ for δ = 0 (μ = 0, or ε = ∞).

    Raises:
      ValueError: for a negative or NaN argument.

    Guarantee: G1 (gdp.md).
    Source: Balle and Wang 2018, arXiv:1805.06530, Theorem 8.
    """
    epsilon = _check.real("epsilon", epsilon, low=0, finite=False)
    mu = _check.real("mu", mu, low=0, finite=False)
    return _log_delta(epsilon, mu)


def _log_delta(epsilon: float, mu: float) -> float:
    if mu == math.inf:
        return 0.0
    if mu == 0.0 or epsilon == math.inf:
        return -math.inf
    shift = epsilon / mu
    low, high = shift - 0.5 * mu, shift + 0.5 * mu
    if not high < 1e100:  # powers of it overflow: bounded by Φ(−low), or by 1
        return 0.0 if not low > 0.0 else -0.5 * min(low, 1e150) ** 2
    if low < -8.0:  # δ is close to 1, where nothing cancels
        tail = math.exp(-0.5 * low * low - _LOG_ROOT_TWO_PI) * _mills(high)
        return min(math.log1p(-(float(special.ndtr(low)) + tail)) + 16.0 * _EPS, 0.0)
    logarithm = -0.5 * low * low - _LOG_ROOT_TWO_PI + _log_mills_drop(low, mu, high)
    # low carries an error of _EPS·high, which the square multiplies by |low|.
    return min(logarithm + 8.0 * _EPS * (abs(low) * high + low * low + 16.0), 0.0)


def delta(epsilon: float, mu: float) -> float:
    """Exact δ of a μ-GDP release at a given ε: Φ(−ε/μ + μ/2) − e^ε·Φ(−ε/μ − μ/2).

    Args:
      epsilon: nats, in [0, ∞].
      mu: in [0, ∞].

    Returns:
      Equality up to float64, rounded up; the smallest positive float where δ underflows.

    | ε | μ | δ |
    | --- | --- | --- |
    | any | 0 | 0 |
    | any, ∞ too | ∞ | 1 |
    | ∞ | finite | 0 |

    Raises:
      ValueError: for a negative or NaN argument.

    Guarantee: G1 (gdp.md).
    Source: Balle and Wang 2018, arXiv:1805.06530, Theorem 8.

    Example:
      >>> round(delta(1.0, 1.0), 6)
      0.126937
    """
    logarithm = log_delta(epsilon, mu)
    if logarithm == -math.inf:
        return 0.0
    return min(max(math.exp(logarithm) * (1.0 + 4.0 * _EPS), _TINY), 1.0)


def epsilon(delta: float, mu: float) -> float:
    """Smallest ε at which a μ-GDP release is (ε, δ)-DP, on the upper side of its bracket.

    Args:
      delta: in [0, 1).
      mu: in [0, ∞].

    Returns:
      Equality up to float64, rounded up. δ = 0 costs ∞ unless μ = 0.

    Raises:
      ValueError: for NaN, a negative μ, or δ outside [0, 1).

    Guarantee: G1 (gdp.md).
    Source: Balle and Wang 2018, arXiv:1805.06530, Theorem 8.

    Example:
      >>> round(epsilon(1e-5, 1.0), 3)
      4.377
    """
    target = _check.real("delta", delta, low=0, high=1, open_high=True)
    mu = _check.real("mu", mu, low=0, finite=False)
    if mu == 0.0:
        return 0.0
    if target == 0.0 or mu == math.inf:
        return math.inf
    log_target = math.log(target)
    if _log_delta(0.0, mu) <= log_target:
        return 0.0
    # δ(ε) ≤ Φ(−low) ≤ exp(−low²/2) gives the first bracket; it grows while rounding says no.
    high = mu * (0.5 * mu + math.sqrt(-2.0 * log_target)) * (1.0 + 1e-9) + 1e-300
    while not _log_delta(high, mu) <= log_target:
        high *= 2.0
        if high == math.inf:
            return math.inf
    low = 0.0
    while True:
        middle = 0.5 * (low + high)
        if not low < middle < high or high - low <= _EPS * high:
            return high
        if _log_delta(middle, mu) <= log_target:
            high = middle
        else:
            low = middle


def mu(epsilon: float, delta: float) -> float:
    """Largest μ for which every μ-GDP release is (ε, δ)-DP, on the private side.

    Args:
      epsilon: target, nats, in [0, ∞).
      delta: target, in [0, 1).

    Returns:
      Equality up to float64, rounded down. 0 for δ = 0: no Gaussian noise is (ε, 0)-DP.

    Raises:
      ValueError: for NaN or an argument outside its range.

    Guarantee: G1 (gdp.md).

    Example:
      >>> round(1 / mu(1.0, 1e-5), 3)
      3.731
    """
    target = _check.real("epsilon", epsilon, low=0)
    tolerance = _check.real("delta", delta, low=0, high=1, open_high=True)
    if tolerance == 0.0:
        return 0.0
    log_target = math.log(tolerance)
    low, high = 1e-305, 1.0
    if not _log_delta(target, low) <= log_target:
        return 0.0
    while _log_delta(target, high) <= log_target:
        high *= 2.0
    while True:
        middle = math.sqrt(low) * math.sqrt(high)
        if high - low <= 1e-3 * high:
            middle = 0.5 * (low + high)
        if not low < middle < high or high - low <= _EPS * high:
            return low
        if _log_delta(target, middle) <= log_target:
            low = middle
        else:
            high = middle


def compose(mus: Iterable[float]) -> float:
    """μ of Gaussian releases taken together: √Σμ², exactly.

    Adaptive choice of the queries is covered; adaptive choice of the *costs* is not (the total must
    be fixed in advance: theory of filters).

    Args:
      mus: each in [0, ∞].

    Returns:
      Equality, rounded up.

    Raises:
      ValueError: for a negative or NaN member.

    Guarantee: G2 (gdp.md).
    Source: Dong, Roth and Su 2022, arXiv:1905.02383, Corollary 3.3.

    Example:
      >>> round(compose([3.0, 4.0]), 12)
      5.0
    """
    checked = [_check.real("mu", each, low=0, finite=False) for each in mus]
    if math.inf in checked:
        return math.inf
    total = math.hypot(*checked) if checked else 0.0
    return total * (1.0 + 4.0 * _EPS)


@functools.lru_cache(maxsize=4096)
def _one_pair(mu: float, radius: float) -> float:
    """Upper bound of the mass one pair loses when the whole shift μ ≤ R − 1 falls on it."""
    steps = 512
    left = np.arange(steps) * (0.5 * math.pi / steps)
    moved = mu * np.cos(left)
    swept = special.ndtr(moved - radius) - special.ndtr(-radius)
    if mu < 1e-4:  # the difference cancels; φ grows up to moved − R ≤ 0
        swept = moved * np.exp(-0.5 * (radius - moved) ** 2) / math.sqrt(2.0 * math.pi)
    integral = 2.0 * float(swept.sum()) * (0.5 * math.pi / steps)
    return radius / math.sqrt(2.0 * math.pi) * integral * (1.0 + 1e-9)


def cut_off(mu: float, coordinates: int, *, radius_bits: int = RADIUS_BITS) -> tuple[float, float]:
    """What Box-Muller noise that ends at √(2·bits·ln 2)σ costs μ-GDP: (log_factor, flux).

    With δ(ε) the curve for ideal noise, the curve for the noise in use is at most
    exp(log_factor)·δ(ε) + flux.

    Args:
      mu: of all releases together, in [0, ∞].
      coordinates: released noisy scalars of all releases together, ≥ 0; each may use up a pair.
      radius_bits: bits of the radius, in [1, 128].

    Returns:
      Upper bounds (log_factor ≥ 0, flux in [0, 1]); (0, 0) without coordinates or with μ = 0.

    Raises:
      ValueError: for a negative or NaN argument.

    Guarantee: G3 (gdp.md).

    Example:
      >>> log_factor, flux = cut_off(1.0, 34_000_000)
      >>> flux < 1.3e-8
      True
    """
    mu = _check.real("mu", mu, low=0, finite=False)
    coordinates = _check.integer("coordinates", coordinates, low=0)
    radius_bits = _check.integer("radius_bits", radius_bits, low=1, high=128)
    if coordinates == 0 or mu == 0.0:
        return 0.0, 0.0
    radius, lost = math.sqrt(2.0 * radius_bits * math.log(2.0)), 2.0**-radius_bits
    if not coordinates < 1 << 1000:
        return math.inf, 1.0
    log_factor = -coordinates * math.log1p(-lost) * (1.0 + 1e-9)
    if not (mu <= radius - 1.0 and coordinates < 1 << 53 and log_factor <= 1.0):
        return log_factor, 1.0
    linear = radius * lost / math.pi * mu
    flux = linear * (math.sqrt(coordinates) - 1.0) + _one_pair(mu, radius)
    return log_factor, min(max(flux * math.exp(log_factor) * (1.0 + 1e-9), _TINY), 1.0)
