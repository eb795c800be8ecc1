"""Rényi curves of Gaussian releases of a random sample of the records.

Each function is a theorem about one way of sampling. A batch drawn another way (shuffling, a
sequential loader, "about q of the data") has no curve here, and none may be borrowed.
"""

import functools
import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from dpfa_jax import _check
from dpfa_jax.accounting import rdp

_UP = 1.0 + 1e-11
_LOG_ROOT_TWO_PI = 0.5 * math.log(2.0 * math.pi)


def _log1p_minus(y: np.ndarray) -> np.ndarray:
    """ln(1 + y) − y ≤ 0 without cancellation near 0."""
    small = np.abs(y) < 0.1
    near = np.where(small, y, 0.0)
    series = np.zeros_like(near)
    for k in range(18, 1, -1):
        series = near * series + (-1.0) ** (k + 1) / k
    with np.errstate(divide="ignore"):
        return np.where(small, near * near * series, np.log1p(y) - y)


def _lattice(centers: np.ndarray, reach: np.ndarray, step: float):
    """Points k·step within `reach` of any center of a row: flat points and each row's first index.

    Args:
      centers: (rows, c).
      reach: (rows,).
      step: distance of the points.
    """
    ordered = np.sort(centers, axis=1)
    ends = np.floor((ordered + reach[:, None]) / step)
    starts = np.ceil((ordered - reach[:, None]) / step)
    starts[:, 1:] = np.maximum(starts[:, 1:], ends[:, :-1] + 1.0)
    counts = np.maximum(ends - starts + 1.0, 0.0).astype(np.int64).ravel()
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    offsets = np.arange(counts.sum()) - np.repeat(first, counts)
    points = (np.repeat(starts.ravel(), counts) + offsets) * step
    rows = counts.reshape(ordered.shape).sum(axis=1)
    return points, np.concatenate([[0], np.cumsum(rows)[:-1]]), rows


def _log_sums(exponents: np.ndarray, first: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """ln Σ exp per row of a flat array."""
    top = np.maximum.reduceat(exponents, first)
    return top + np.log(np.add.reduceat(np.exp(exponents - np.repeat(top, rows)), first))


def _poisson_log_moments(rate: float, noise_multiplier: float, orders: np.ndarray) -> np.ndarray:
    """ln E(1 − q + q·e^w)^α for w = μu − μ²/2, u standard normal, by the trapezoidal rule."""
    mu = 1.0 / noise_multiplier
    step = 0.5 if noise_multiplier >= 2.5 else 0.2 * noise_multiplier
    log_rate, log_rest = math.log(rate), math.log1p(-rate)

    def share(u):
        return special.expit(log_rate - log_rest + mu * u - 0.5 * mu * mu)

    # Every peak of the integrand is near one of these.
    low, high = np.zeros_like(orders), orders * mu
    for _ in range(60):
        low, high = orders * mu * share(low), orders * mu * share(high)
    turn = (log_rest - log_rate + 0.5 * mu * mu) / mu
    same = np.ones_like(orders)
    centers = np.stack([0.0 * same, low, high, 2.0 * mu * same, orders * mu, turn * same], axis=1)
    wide = 1.5 * math.sqrt(noise_multiplier)
    reach = 14.0 * np.where(orders * mu * mu > 1.0, max(1.0, wide), 1.0)
    u, first, rows = _lattice(centers, reach, step)

    order = np.repeat(orders, rows)
    w = mu * u - 0.5 * mu * mu
    logarithm = np.logaddexp(log_rest, log_rate + w)
    log_step = math.log(step) - _LOG_ROOT_TWO_PI
    moments = _log_sums(order * logarithm - 0.5 * u * u, first, rows) + log_step

    # Near 1 the moment minus 1 is a sum of terms ≥ 0: (1+y)^α − 1 − αy, as E y = 0. With a = α − 1
    # and L = ln(1+y) it is a·((1+y)L − y) + (1+y)·(e^(aL) − 1 − aL), which cancels at no order.
    with np.errstate(over="ignore", invalid="ignore"):
        # e^w alone may overflow where q·e^w is small.
        y = np.where(w < 30.0, rate * np.expm1(w), np.exp(np.minimum(log_rate + w, 700.0)) - rate)
        log1p_y = np.where(w < 30.0, np.log1p(y), logarithm)
        power, beyond = order * log1p_y, order - 1.0
        near = np.abs(y) < 0.1
        entropy = np.where(near, (1.0 + y) * _log1p_minus(y) + y * y, (1.0 + y) * log1p_y - y)
        stable = beyond * entropy + (1.0 + y) * rdp.remainder(beyond * log1p_y)
        stable = stable * np.exp(-0.5 * u * u)
        # Where (1+y)^α overflows: y is large, or α so large that its power is all that counts.
        growth = beyond * (log1p_y - 1.0) + rdp.remainder(beyond * log1p_y)
        middle = growth * np.exp(log1p_y - 0.5 * u * u) + beyond * np.exp(-0.5 * u * u)
        far = np.exp(power - 0.5 * u * u) - np.exp(-0.5 * u * u)
        far -= order * (np.exp(log_rate + w - 0.5 * u * u) - rate * np.exp(-0.5 * u * u))
        far = np.where(beyond * log1p_y < 1.0, middle, far)
        excess = np.where(power < 30.0, stable, far)
    excess = np.where(np.repeat(moments, rows) < 1.0, excess, 0.0)
    small = np.add.reduceat(excess, first) * math.exp(log_step)
    return np.where(moments < 1.0, np.log1p(np.maximum(small, 0.0)), moments)


@functools.lru_cache(maxsize=4096)
def _poisson_cached(rate: float, noise_multiplier: float, orders: bytes) -> rdp.Curve:
    array = np.frombuffer(orders, dtype=np.float64)
    moments = _poisson_log_moments(rate, noise_multiplier, array)
    # An exponent is a difference of terms as large as α·ln(1/q), each known to 2⁻⁵².
    lost = 2.0**-50 * array * -math.log(rate) / np.maximum(moments, 1.0)
    curve = moments / (array - 1.0) * (_UP + lost)
    curve = np.minimum(np.maximum(curve, rdp.TINY), rdp.gaussian(noise_multiplier, array))
    curve.setflags(write=False)
    return curve


def poisson_gaussian(noise_multiplier: float, sampling_rate: float, orders: ArrayLike) -> rdp.Curve:
    """RDP of Gaussian noise on the sum of a Poisson sample: each record is in with probability q.

    Args:
      noise_multiplier: noise_std/clip_norm, ≥ 0; 0 costs ∞.
      sampling_rate: q in [0, 1].
      orders: > 1, integer or not.

    Returns:
      Equality, rounded up (1e-11), one value per order; the bound of the whole data set where
      noise_multiplier < 0.02.

    Raises:
      ValueError: for NaN or an argument outside its range.

    Guarantee: Q1 (subsample.md). ZERO_OUT only.
    Source: Mironov, Talwar and Zhang 2019, arXiv:1908.10530, Theorem 4 and Section 3.3.

    Example:
      >>> poisson_gaussian(1.0, 0.01, 2.0).round(9).tolist()
      [0.000171813]
    """
    multiplier = _check.real("noise_multiplier", noise_multiplier, low=0)
    rate = _check.real("sampling_rate", sampling_rate, low=0, high=1)
    orders = rdp.check_orders(orders)
    if rate == 0.0:
        return np.zeros(orders.shape)
    if rate == 1.0 or multiplier < 0.02:
        return rdp.gaussian(multiplier, orders)
    if multiplier > 1e6 or orders.max() > 1e14:  # too wide a lattice: monotone in both
        return _poisson_far(multiplier, rate, orders)
    return _poisson_cached(rate, multiplier, np.ascontiguousarray(orders).tobytes())


def _poisson_far(multiplier: float, rate: float, orders: rdp.Curve) -> rdp.Curve:
    near = orders <= 1e14
    curve = rdp.gaussian(multiplier, orders)
    if near.any():
        at_limit = poisson_gaussian(min(multiplier, 1e6), rate, orders[near])
        curve[near] = np.minimum(curve[near], at_limit)
    return curve


def poisson_overflow(records: int, sampling_rate: float, capacity: int) -> float:
    """Probability that a Poisson sample of n records is larger than a fixed capacity.

    Args:
      records: n ≥ 0, public.
      sampling_rate: q in [0, 1].
      capacity: ≥ 0.

    Returns:
      Upper bound of P(Binomial(n, q) > capacity), equality up to 1e-9 relative.

    Raises:
      ValueError: for NaN or an argument outside its range.

    Guarantee: Q2 (subsample.md).

    Example:
      >>> poisson_overflow(10, 0.5, 9) >= 2.0**-10
      True
    """
    records = _check.integer("records", records, low=0, high=1 << 53)
    capacity = _check.integer("capacity", capacity, low=0)
    rate = _check.real("sampling_rate", sampling_rate, low=0, high=1)
    if capacity >= records or rate == 0.0:
        return 0.0
    tail = float(special.betainc(capacity + 1.0, float(records - capacity), rate))
    return min(max(tail * (1.0 + 1e-9), 1e-300), 1.0)


def _slope(u: np.ndarray, exponents: np.ndarray, mu: float) -> np.ndarray:
    """Derivative of l·ln|e^w − 1| − u²/2."""
    with np.errstate(over="ignore"):
        return -u - exponents * mu / np.expm1(0.5 * mu * mu - mu * u)


@functools.lru_cache(maxsize=256)
def _log_even_moments(mu: float, half: int) -> np.ndarray:
    """ln E(e^w − 1)^l for l = 2, 4, …, 2·half; w = μu − μ²/2, u standard normal."""
    exponents = 2.0 * np.arange(1, half + 1)
    # On both sides of u = μ/2 the integrand is log-concave with curvature ≥ 1: one peak each.
    low, high = np.full(half, -60.0 - exponents * mu), np.full(half, 0.5 * mu)
    for _ in range(80):
        middle = 0.5 * (low + high)
        slope = _slope(middle, exponents, mu)
        low, high = np.where(slope > 0, middle, low), np.where(slope > 0, high, middle)
    left = low
    low = np.full(half, 0.5 * mu)
    high = exponents * mu + np.sqrt(exponents) + 0.5 * mu + 2.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        slope = _slope(middle, exponents, mu)
        low, high = np.where(slope > 0, middle, low), np.where(slope > 0, high, middle)
    step = 0.25
    u, first, rows = _lattice(np.stack([left, high], axis=1), np.full(half, 14.0), step)
    w = mu * u - 0.5 * mu * mu
    with np.errstate(divide="ignore", over="ignore"):
        size = np.where(w > 1.0, w + np.log1p(-np.exp(-np.abs(w))), np.log(np.abs(np.expm1(w))))
    log_step = math.log(step) - _LOG_ROOT_TWO_PI
    return _log_sums(np.repeat(exponents, rows) * size - 0.5 * u * u, first, rows) + log_step


_EXACT_TERMS = 256


@functools.lru_cache(maxsize=4096)
def _without_replacement_integer(rate: float, noise_multiplier: float, order: int) -> float:
    """(α − 1)·RDP at one integer order α ≥ 1."""
    if order == 1:
        return 0.0
    j = np.arange(2, order + 1, dtype=np.float64)
    log_binomial = -np.log1p(order) - special.betaln(order - j + 1.0, j + 1.0)
    cost = 0.5 / (noise_multiplier * noise_multiplier)  # ε(j) = j·cost
    terms = math.log(2.0) + (j - 1.0) * j * cost
    count = min(order, _EXACT_TERMS)
    even = _log_even_moments(1.0 / noise_multiplier, _EXACT_TERMS // 2)
    whole = np.arange(2, count + 1)
    paired = math.log(4.0) + 0.5 * (even[whole // 2 - 1] + even[(whole + 1) // 2 - 1])
    terms[: count - 1] = np.minimum(terms[: count - 1], paired)
    total = np.concatenate([[0.0], terms + log_binomial + j * math.log(rate)])
    # Each exponent is a difference of terms of this size, each known to 2⁻⁵².
    up = 1.0 + 2.0**-50 * order * (math.log(order) - math.log(rate))
    top = float(total[1:].max())
    if top < -1.0:  # 1 + Σ: keep the small sum
        return math.log1p(math.exp(top) * float(np.exp(total[1:] - top).sum()) * up)
    return float(special.logsumexp(total)) + (up - 1.0)


def gaussian_without_replacement(
    noise_std: float, clip_norm: float, sampling_rate: float, orders: ArrayLike
) -> rdp.Curve:
    """RDP of Gaussian noise on the sum of a fixed-size sample, drawn without replacement.

    Takes the noise and the clip separately: replacing one record moves the sum by 2·clip_norm, and
    fed noise_std/clip_norm this curve would report ε = 3.6 where 13 is reached.

    Args:
      noise_std: standard deviation of the noise, ≥ 0; 0 costs ∞.
      clip_norm: norm that every record's contribution is clipped to, > 0.
      sampling_rate: sample size over data-set size, in [0, 1].
      orders: > 1; between integers (α−1)·RDP is interpolated.

    Returns:
      Upper bound, one value per order; above order 4096 that of the whole data set.

    Raises:
      ValueError: for NaN or an argument outside its range.

    Guarantee: Q3 (subsample.md). REPLACE_ONE only.
    Source: Wang, Balle and Kasiviswanathan 2019, arXiv:1808.00087, Theorem 27.

    Example:
      >>> gaussian_without_replacement(2.0, 1.0, 0.01, 2.0).round(9).tolist()
      [0.000543509]
    """
    std = _check.real("noise_std", noise_std, low=0)
    clip = _check.real("clip_norm", clip_norm, low=0, open_low=True)
    rate = _check.real("sampling_rate", sampling_rate, low=0, high=1)
    orders = rdp.check_orders(orders)
    if rate == 0.0:
        return np.zeros(orders.shape)
    multiplier = std / (2.0 * clip) * (1.0 - 2.0**-51)
    whole = rdp.gaussian(multiplier, orders)
    # Beyond these the moments overflow or cancel; the whole data set bounds the sample.
    if rate == 1.0 or not 0.02 <= multiplier <= 1e6:
        return whole
    curve = whole.copy()
    for index, order in enumerate(orders):
        if order > 4096.0:
            continue
        below, above = math.floor(order), math.ceil(order)
        low = _without_replacement_integer(rate, multiplier, below)
        high = _without_replacement_integer(rate, multiplier, above)
        between = low + (order - below) * (high - low)
        bound = max(between / (order - 1.0) * _UP, rdp.TINY)
        curve[index] = min(curve[index], bound)
    return curve
