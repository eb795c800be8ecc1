"""What a run with a noise schedule has cost, as a state for jit: the multiplier may be traced.

`Ledger` counts releases whose noise is known beforehand. Here the noise multiplier of each step is
an array, as a schedule inside `jax.jit` or `lax.scan` gives it; the state holds what the steps have
cost: RDP at fixed public orders, μ² of plain Gaussian releases, and the noise cut-off.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from dpfa_jax import _check
from dpfa_jax.accounting import convert, gdp, rdp, subsample, upward

WHOLE: tuple[int, ...] = (
    *range(2, 21),
    *(22, 24, 26, 28, 32, 36, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512, 1024),
)
"""Integer orders, where the cost of a sampled release is a finite sum."""

BETWEEN: tuple[float, ...] = (
    *(1.01, 1.03, 1.06, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9),
    *(2.2, 2.4, 2.6, 2.8, 3.25, 3.5, 3.75, 4.5, 5.5),
)
"""Real orders, where it is read from a table: what a large ε needs."""

ORDERS: tuple[float, ...] = (*WHOLE, *BETWEEN)
"""The orders at which sampled releases are charged."""

UNKNOWN = 2**31 - 1
"""A count that has reached this value is no longer known: everything costs ∞."""

_ARRAY = np.array(ORDERS, np.float64)
_INTEGERS = np.array(WHOLE, np.float64)
_SORTED = np.argsort(_ARRAY)
_FINE = np.unique(np.concatenate([_ARRAY, rdp.DEFAULT_ORDERS[rdp.DEFAULT_ORDERS < WHOLE[-1]]]))
_SQUARES = np.concatenate([[0.0], np.geomspace(1e-4, 100.0, 160)]).astype(np.float32)
for _each in (_ARRAY, _INTEGERS, _SORTED, _FINE, _SQUARES):
    _each.setflags(write=False)
_EXTRA = 3  # μ² of plain releases, flux, log_factor
_LOSS = 2.0**-46  # of one addition, relative
_WIDEST = 2.0**-40  # 1/z² of the widest noise that is told apart
_UP = 1.0 + 2.0**-12


def _interpolation(orders: np.ndarray) -> np.ndarray:
    """Rows that bound RDP at real orders by RDP at ORDERS: (α − 1)·RDP is convex and 0 at α = 1."""
    nodes = np.concatenate([[1.0], _ARRAY[_SORTED]])
    above = np.clip(np.searchsorted(nodes, orders), 1, len(nodes) - 1)
    left, right = nodes[above - 1], nodes[above]
    weight = (orders - left) / (right - left)
    rows = np.zeros((len(orders), len(nodes)))
    index = np.arange(len(orders))
    rows[index, above - 1] = (1.0 - weight) * (left - 1.0) / (orders - 1.0)
    rows[index, above] += weight * (right - 1.0) / (orders - 1.0)
    unsorted = np.zeros((len(orders), len(ORDERS)))
    unsorted[:, _SORTED] = rows[:, 1:]
    return unsorted


@functools.lru_cache(maxsize=64)
def _log_weights(rate: float) -> tuple[np.ndarray, np.ndarray]:
    """(ln binom(α, k)(1 − q)^(α − k)q^k, k(k − 1)/2) for α in WHOLE and k = 2, 3, …"""
    order, k = _INTEGERS[:, None], np.arange(2.0, WHOLE[-1] + 1.0)
    inside = k <= order
    k_in = np.where(inside, k, 2.0)
    binomial = -np.log1p(order) - special.betaln(order - k_in + 1.0, k_in + 1.0)
    logs = binomial + (order - k_in) * math.log1p(-rate) + k_in * math.log(rate)
    logs, pairs = np.where(inside, logs, -np.inf), 0.5 * k * (k - 1.0)
    return logs.astype(np.float32), pairs.astype(np.float32)


@functools.lru_cache(maxsize=64)
def _log_table(rate: float) -> np.ndarray:
    """Upper bounds of ln(M − 1), M the moment at each 1/z² of _SQUARES (rows) and BETWEEN."""
    orders = np.array(BETWEEN)
    multipliers = _SQUARES[1:].astype(np.float64) ** -0.5 * (1.0 - 2.0**-50)
    curves = [subsample.poisson_gaussian(float(z), rate, orders) for z in multipliers]
    moments = np.array(curves) * (orders - 1.0) * (1.0 + 2.0**-50)
    logs = moments + np.log(-np.expm1(-moments))
    above = (logs + 2.0**-20 * np.abs(logs) + 2.0**-18).astype(np.float32)
    return np.concatenate([np.full((1, len(BETWEEN)), -np.inf, np.float32), above])


@functools.lru_cache(maxsize=64)
def _flux_slopes(coordinates: int, radius_bits: int) -> np.ndarray:
    """flux(μ)/μ of one release at μ = 1/32, 2/32, …, growing (G3); ∞ where nothing holds."""
    reach = math.sqrt(2.0 * radius_bits * math.log(2.0)) - 1.0
    grid = np.arange(1, int(32 * reach) + 1) / 32.0
    fluxes = np.array([gdp.cut_off(mu, coordinates, radius_bits=radius_bits)[1] for mu in grid])
    slopes = np.where(fluxes < 1.0, fluxes / grid * (1.0 + 1e-9), np.inf)
    return upward.at_least(np.append(slopes, np.inf))


def _log_excess_of_whole(inverse_square: jax.Array, rate: float) -> jax.Array:
    """ln(M − 1), rounded up, at the orders of WHOLE: a finite sum."""
    logs, pairs = _log_weights(rate)
    exponent = pairs * inverse_square
    growth = exponent + jnp.log(-jnp.expm1(-exponent))  # ln(e^exponent − 1)
    slack = 2.0**-20 * (jnp.abs(logs) + 2.0 * exponent + jnp.abs(growth)) + 2.0**-18
    terms = jnp.where(jnp.isfinite(logs), logs + growth + slack, -jnp.inf)
    top = jnp.max(terms, axis=1)
    total = jnp.sum(jnp.exp(terms - top[:, None]), axis=1) * (1.0 + 2.0**-13)
    return top + jnp.log(total)


def _log_excess_between(inverse_square: jax.Array, rate: float) -> jax.Array:
    """ln(M − 1), rounded up, at the orders of BETWEEN: chords of a convex function of 1/z²."""
    table, squares = jnp.asarray(_log_table(rate)), jnp.asarray(_SQUARES)
    above = jnp.clip(jnp.searchsorted(squares, inverse_square), 1, len(_SQUARES) - 1)
    left, right = squares[above - 1], squares[above]
    share = jnp.clip((inverse_square - left) / (right - left) * (1.0 + 2.0**-20), 0.0, 1.0)
    low, high = table[above - 1], table[above]
    # The left end counts with 1 − share or a little more; ln(M − 1) grows, so that is upwards too.
    mixed = share + jnp.minimum(1.0 - share + 2.0**-20, 1.0) * jnp.exp(low - high)
    fallen = jnp.log(mixed)
    logarithm = high + jnp.minimum(fallen + 2.0**-15 * jnp.abs(fallen) + 2.0**-14, 0.0)
    return jnp.where(inverse_square <= squares[-1], logarithm, jnp.inf)


def sampled_rdp(inverse_square: jax.Array, sampling_rate: float) -> jax.Array:
    """RDP at `ORDERS` of one Gaussian release of a Poisson sample, inside jit.

    Args:
      inverse_square: float32 scalar, an upper bound of 1/noise_multiplier², in [2⁻⁴⁰, ∞].
      sampling_rate: static, q in [0, 1].

    Returns:
      float32 upper bounds, about 2⁻¹¹ above the curve of `subsample.poisson_gaussian` (more where
      a real order's cost bends, and for multipliers below 0.1); 0 for q = 0, otherwise ≥ 2⁻⁸⁰.

    Raises:
      ValueError: for a bad sampling rate.

    Guarantee: U2 (traced.md). ZERO_OUT only.
    Source: Mironov, Talwar and Zhang 2019, arXiv:1908.10530, Section 3.3.

    Example:
      >>> cost = sampled_rdp(jnp.float32(1.0), 0.01)[0]
      >>> 0.000171813 <= float(cost) <= 0.0001720
      True
    """
    rate = _check.real("sampling_rate", sampling_rate, low=0, high=1)
    if rate == 0.0:
        return jnp.zeros(len(ORDERS), jnp.float32)
    whole = jnp.float32(0.5 * _ARRAY) * inverse_square
    if rate == 1.0:
        return whole * _UP
    logarithm = jnp.concatenate(
        [_log_excess_of_whole(inverse_square, rate), _log_excess_between(inverse_square, rate)]
    )
    logarithm = logarithm + 2.0**-20 * jnp.abs(logarithm) + 2.0**-14
    moment = jnp.logaddexp(0.0, logarithm)
    sampled = moment * jnp.float32(1.0 / (_ARRAY - 1.0))
    sampled = jnp.where(jnp.isfinite(sampled), sampled, jnp.inf)
    # float32 has no numbers for what a tiny rate costs; it costs something.
    return jnp.maximum(jnp.minimum(sampled, whole) * _UP, upward.SMALLEST)


def _inverse_square(noise_multiplier: Any) -> jax.Array:
    """Upper bound of 1/z² in float32, ∞ for what is not a positive number."""
    if not isinstance(noise_multiplier, jax.Array):
        noise_multiplier = _check.real("noise_multiplier", noise_multiplier, low=0)
    multiplier = jnp.asarray(noise_multiplier)
    if multiplier.shape != () or not jnp.issubdtype(multiplier.dtype, jnp.floating):
        raise TypeError(
            "Expected noise_multiplier to be one floating-point number, got "
            f"{multiplier.dtype}{list(multiplier.shape)}."
        )
    multiplier = multiplier.astype(jnp.float32)
    inverse = 1.0 / multiplier
    square = jnp.maximum(inverse * inverse * (1.0 + 2.0**-18), _WIDEST)
    return jnp.where(multiplier > 0, square, jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TracedLedger:
    """What Gaussian releases with traced noise multipliers have cost. State in, state out.

    A pytree of three arrays, made by `create`, fit for `lax.scan`, `vmap` and checkpoints. The
    multipliers must be a public schedule: a function of the step and other public things. Where
    they depend on what was released, the sum on the way is no guarantee (use a filter).

    Attributes:
      high: float32, leading words of Σμ² of plain releases, the flux and the log_factor of the
        noise cut-off, and Σ RDP of sampled releases at `ORDERS`.
      low: float32, trailing words of the same.
      count: int32, how many releases were added; 2³¹ − 1 means "unknown" and costs ∞.

    Guarantee: U3 (traced.md).

    Example:
      >>> def step(ledger, noise_multiplier):
      ...     return ledger.add(noise_multiplier, sampling_rate=0.01), None
      >>> ledger, _ = jax.lax.scan(step, TracedLedger.create(), jnp.linspace(2.0, 1.0, 100))
      >>> round(ledger.epsilon(1e-5), 1)
      1.0
    """

    high: Any
    low: Any
    count: Any

    @classmethod
    def create(cls) -> TracedLedger:
        """A ledger with nothing spent."""
        zeros = jnp.zeros(_EXTRA + len(ORDERS), jnp.float32)
        return cls(zeros, zeros, jnp.int32(0))

    def add(
        self,
        noise_multiplier: Any,
        *,
        sampling_rate: float = 1.0,
        coordinates: int = 0,
        radius_bits: int = gdp.RADIUS_BITS,
    ) -> TracedLedger:
        """The ledger after one more Gaussian release.

        Args:
          noise_multiplier: noise std over sensitivity, one floating-point number, may be traced.
            A traced NaN, 0 or negative number costs ∞.
          sampling_rate: static, q of the Poisson sample it was made of, in [0, 1]; 1 (the default)
            is a release of the whole data set.
          coordinates: static, noisy scalars of the release, as in `Gaussian`.
          radius_bits: static, of the noise, as in `Gaussian`.

        Raises:
          TypeError: for a noise_multiplier that is no floating-point scalar.
          ValueError: for a static argument outside its range.

        Guarantee: U3 (traced.md).
        """
        rate = _check.real("sampling_rate", sampling_rate, low=0, high=1)
        coordinates = _check.integer("coordinates", coordinates, low=0)
        radius_bits = _check.integer("radius_bits", radius_bits, low=gdp.RADIUS_BITS, high=128)
        square = _inverse_square(noise_multiplier)
        zero = jnp.float32(0.0)
        log_factor, flux = zero, zero
        if coordinates and rate > 0.0:
            slopes = jnp.asarray(_flux_slopes(coordinates, radius_bits))
            mu = jnp.sqrt(square) * _UP
            index = jnp.clip(jnp.ceil(32.0 * jnp.minimum(mu, 1e6)), 1, len(slopes)) - 1
            flux = mu * slopes[index.astype(jnp.int32)] * upward.at_least(rate) * _UP
            log_factor = jnp.asarray(_log_factor(coordinates, radius_bits))
        curve = sampled_rdp(square, rate) if rate < 1.0 else jnp.zeros(len(ORDERS), jnp.float32)
        plain = square if rate == 1.0 else zero
        cost = jnp.concatenate([jnp.stack([plain, flux, log_factor]), curve])
        cost = jnp.where(cost > 0, jnp.maximum(cost, upward.SMALLEST), cost)
        cost = jnp.where((square < jnp.inf) | (rate == 0.0), cost, jnp.inf)
        high, low = upward.add(self.high, self.low, cost)
        known = (self.count >= 0) & (self.count < UNKNOWN - 1)
        return TracedLedger(high, low, jnp.where(known, self.count + 1, UNKNOWN))

    def traced_epsilon(self, delta: float) -> jax.Array:
        """ε of everything added, inside jit.

        Args:
          delta: static, in [0, 1).

        Returns:
          float32 upper bound of the ε(δ) that the RDP curve certifies, about 1e-3 above it; ∞ where
          the state is unknown or damaged.

        Guarantee: U3 (traced.md).
        """
        delta = _check.real("delta", delta, low=0, high=1, open_high=True)
        loss = jnp.asarray(self.count, jnp.float32) * (2.0 * _LOSS)
        totals = (self.high + jnp.maximum(self.low, 0.0)) * (1.0 + 2.0**-20) * (1.0 + loss)
        rows = upward.at_least(_interpolation(_FINE))
        sampled = jnp.where(jnp.isfinite(totals[_EXTRA:]), totals[_EXTRA:], 3e38)
        sampled = jnp.matmul(rows, sampled, precision="highest") * _UP
        sampled = jnp.where(sampled < 1e30, sampled, jnp.inf)  # a share of an unknown one too
        curve = sampled + upward.at_least(0.5 * _FINE) * totals[0] * _UP
        left = upward.tolerance(delta, totals[1], totals[2])
        known = (self.count >= 0) & (self.count < UNKNOWN) & jnp.all(self.high >= 0)
        return jnp.where(known, upward.epsilon(_FINE, curve, left), jnp.inf)

    def _sums(self) -> np.ndarray:
        """On the host: upper bounds in float64; ∞ for a state that is unknown or damaged."""
        size = _EXTRA + len(ORDERS)
        high, low, count = (np.asarray(each) for each in (self.high, self.low, self.count))
        whole = high.shape == low.shape == (size,) and count.shape == ()
        if not whole or high.dtype != np.float32 or count.dtype != np.int32:
            return np.full(size, math.inf)
        totals = high.astype(np.float64) + low.astype(np.float64)
        if not (np.all(totals >= 0.0) and 0 <= int(count) < UNKNOWN):
            return np.full(size, math.inf)
        return totals * (1.0 + 2.0 * _LOSS * int(count))

    def rdp_curve(self, orders: Any) -> rdp.Curve:
        """RDP of everything added, of ideal noise; on the host, outside jit.

        Args:
          orders: > 1.

        Returns:
          Upper bounds: between two of `ORDERS` (α − 1)·RDP is interpolated, above the largest one
          sampled releases cost ∞.

        Raises:
          ValueError: for orders not above 1.

        Guarantee: U3 (traced.md).
        """
        return _curve_of(self._sums(), rdp.check_orders(orders))

    def epsilon(self, delta: float) -> float:
        """ε of everything added, in float64; on the host, outside jit.

        Args:
          delta: in [0, 1).

        Returns:
          Upper bound in [0, ∞]: the exact Gaussian curve where nothing was sampled, otherwise the
          best that the RDP at `ORDERS` gives (about one per cent above that of all real orders);
          the noise cut-off included.

        Guarantee: U3 (traced.md).
        """
        tolerance = _check.real("delta", delta, low=0, high=1, open_high=True)
        sums = self._sums()
        flux, log_factor = float(sums[1]), float(sums[2])
        if flux > 0.0 or log_factor > 0.0:
            kept = tolerance * math.exp(-log_factor) * (1.0 - 2.0**-50)
            tolerance = (kept - flux) * (1.0 - 2.0**-50)
            if not tolerance > 0.0:
                return math.inf
        if not sums[_EXTRA:].any():
            return gdp.epsilon(tolerance, math.sqrt(float(sums[0])) * (1.0 + 2.0**-50))
        return convert.epsilon(lambda orders: _curve_of(sums, orders), tolerance)


@functools.lru_cache(maxsize=64)
def _log_factor(coordinates: int, radius_bits: int) -> np.ndarray:
    """−K·ln(1 − 2^(−bits)) of G3, for any number of coordinates."""
    return upward.at_least(-coordinates * math.log1p(-(2.0**-radius_bits)) * (1.0 + 1e-9))


def _curve_of(sums: np.ndarray, orders: rdp.Curve) -> rdp.Curve:
    sampled = sums[_EXTRA:]
    curve = np.where(orders <= WHOLE[-1], 0.0, math.inf) if sampled.any() else 0.0 * orders
    inside = orders <= WHOLE[-1]
    if not np.isfinite(sums).all():
        finite = np.where(np.isfinite(sampled), sampled, 1e300)
        curve[inside] = _interpolation(orders[inside]) @ finite
        curve = np.where(curve < 1e250, curve, math.inf)
    else:
        curve[inside] = _interpolation(orders[inside]) @ sampled
    plain = float(sums[0])
    return (curve + (0.5 * orders * plain if plain else 0.0)) * (1.0 + 2.0**-46)
