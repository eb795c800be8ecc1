"""What an event costs: ε, δ, μ and the RDP curve of everything inside it."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from dpfa_jax import _check
from dpfa_jax.accounting import convert, gdp, rdp
from dpfa_jax.accounting import event as events_lib
from dpfa_jax.accounting.event import Event

_UP = 1.0 + 4.0 * 2.0**-52


def _float(count: int) -> float:
    """The count as a float that is not smaller, ∞ where floats end."""
    try:
        return float(count) if count <= 1 << 53 else float(count) * _UP
    except OverflowError:
        return math.inf


def _times(count: int, cost: float) -> float:
    return 0.0 if cost == 0.0 else _float(count) * cost


@dataclasses.dataclass(frozen=True)
class _Profile:
    """An event sorted by what is known exactly about its leaves."""

    mu_squared: float  # Σμ² of the Gaussian leaves
    coordinates: int  # their noisy scalars
    others: tuple[tuple[Event, int], ...]

    @property
    def mu(self) -> float:
        return 0.0 if self.mu_squared == 0.0 else math.sqrt(self.mu_squared) * _UP


def _inverse_square(noise_multiplier: float) -> float:
    if noise_multiplier == 0.0:
        return math.inf
    inverse = 1.0 / noise_multiplier
    # A noise so wide that its square underflows still costs more than nothing.
    return max(inverse * inverse, 1e-300)


def _profile(event: Event) -> _Profile:
    squared, coordinates, others = 0.0, 0, []
    for leaf, count in events_lib.leaves(event).items():
        if isinstance(leaf, events_lib.Gaussian):
            squared += _times(count, _inverse_square(leaf.noise_multiplier))
            coordinates += count * leaf.coordinates
        else:
            others.append((leaf, count))
    # Beyond 2⁶⁰ the cut-off spends every δ: no larger number is told apart.
    return _Profile(squared * _UP, min(coordinates, 1 << 60), tuple(others))


def _leaf_rdp(leaf: Event, orders: rdp.Curve) -> rdp.Curve:
    match leaf:
        case events_lib.Gaussian():
            return rdp.gaussian(leaf.noise_multiplier, orders)
        case events_lib.Laplace():
            return rdp.laplace(leaf.noise_multiplier, orders)
        case events_lib.DiscreteGaussian():
            return rdp.discrete_gaussian(leaf.noise_multiplier, orders)
        case events_lib.ExponentialMechanism():
            return rdp.exponential(leaf.epsilon, leaf.zcdp, orders)
        case events_lib.NonPrivate():
            return np.full(orders.shape, math.inf)
    raise TypeError(f"Expected a known accounting event, got {leaf!r}. It has no RDP curve here.")


def _pure_epsilon(leaf: Event) -> float:
    """ε of the leaf at δ = 0."""
    match leaf:
        case events_lib.Laplace():
            return math.inf if leaf.noise_multiplier == 0.0 else 1.0 / leaf.noise_multiplier
        case events_lib.ExponentialMechanism():
            return leaf.epsilon
    return math.inf


def _rdp(leaves: Mapping[Event, int], orders: rdp.Curve) -> rdp.Curve:
    total = np.zeros(orders.shape)
    for leaf, count in leaves.items():
        curve = _leaf_rdp(leaf, orders)
        with np.errstate(invalid="ignore", over="ignore"):
            total += np.where(curve == 0.0, 0.0, curve * _float(count))
    return total * (1.0 + 2.0**-52 * (16.0 + len(leaves)))


def rdp_curve(event: Event, orders: ArrayLike = rdp.DEFAULT_ORDERS) -> rdp.Curve:
    """RDP of everything inside the event, of ideal noise.

    Noise that ends at 7.45σ has no finite RDP; its cut-off is charged to δ where (ε, δ) is made, by
    `epsilon` and `delta`. A curve taken from here and converted elsewhere lacks that term.

    Args:
      event: what was released.
      orders: > 1.

    Returns:
      Upper bound (equality where every leaf's curve is one), one value per order, in [0, ∞].

    Raises:
      TypeError: if `event` is not an event.
      ValueError: for orders not above 1.

    Guarantee: E1 (charge.md).
    """
    return _rdp(events_lib.leaves(event), rdp.check_orders(orders))


def mu(event: Event) -> float:
    """μ of the event if it is a composition of Gaussian releases, ideal noise; otherwise ∞.

    Args:
      event: what was released.

    Returns:
      Equality, rounded up; 0 for `NoRelease`, ∞ where no μ is known.

    Raises:
      TypeError: if `event` is not an event.

    Guarantee: G2 (gdp.md), E1 (charge.md).

    Example:
      >>> from dpfa_jax.accounting import event
      >>> round(mu(event.Repeated(event.Gaussian(2.0), 4)), 12)
      1.0
    """
    profile = _profile(event)
    return math.inf if profile.others else profile.mu


def epsilon(event: Event, delta: float) -> float:
    """ε at which everything inside the event is (ε, δ)-DP.

    Args:
      event: what was released.
      delta: in [0, 1).

    Returns:
      Upper bound in [0, ∞]: exact for Gaussian releases alone, plus the noise cut-off; the
      smallest of the valid bounds for mixtures. ∞ where nothing is guaranteed.

    Raises:
      TypeError: if `event` is not an event or δ not a number.
      ValueError: for δ outside [0, 1) or NaN.

    Guarantee: E1 (charge.md).

    Example:
      >>> from dpfa_jax.accounting import event
      >>> round(epsilon(event.Gaussian(3.731), 1e-5), 3)
      1.0
    """
    tolerance = _check.real("delta", delta, low=0, high=1, open_high=True)
    profile = _profile(event)
    log_factor, flux = gdp.cut_off(profile.mu, profile.coordinates)
    if flux > 0.0:
        left = (tolerance - flux) * (1.0 - 4.0 * 2.0**-52)
        tolerance = left * math.exp(-log_factor) * (1.0 - 4.0 * 2.0**-52)
    if not tolerance >= 0.0:
        return math.inf
    gaussian = gdp.epsilon(tolerance, profile.mu)
    if not profile.others:
        return gaussian
    pure = math.fsum(_times(count, _pure_epsilon(leaf)) for leaf, count in profile.others) * _UP
    leaves = events_lib.leaves(event)
    renyi = convert.epsilon(lambda orders: _rdp(leaves, orders), tolerance)
    return min(gaussian + pure, renyi)


def delta(event: Event, epsilon: float) -> float:
    """δ at which everything inside the event is (ε, δ)-DP.

    Args:
      event: what was released.
      epsilon: nats, in [0, ∞].

    Returns:
      Upper bound in [0, 1], computed as in `epsilon`. 1 where nothing is guaranteed.

    Raises:
      TypeError: if `event` is not an event or ε not a number.
      ValueError: for a negative or NaN ε.

    Guarantee: E1 (charge.md).

    Example:
      >>> from dpfa_jax.accounting import event
      >>> delta(event.NonPrivate(), 8.0)
      1.0
    """
    target = _check.real("epsilon", epsilon, low=0, finite=False)
    profile = _profile(event)
    log_factor, flux = gdp.cut_off(profile.mu, profile.coordinates)
    if not profile.others:
        ideal = gdp.delta(target, profile.mu)
    else:
        pure = math.fsum(_times(count, _pure_epsilon(leaf)) for leaf, count in profile.others)
        pure *= _UP
        ideal = 1.0
        if pure < math.inf and pure <= target:
            ideal = gdp.delta(_minus(target, pure), profile.mu)
        leaves = events_lib.leaves(event)
        ideal = min(ideal, convert.delta(lambda orders: _rdp(leaves, orders), target))
    total = (ideal * math.exp(log_factor) + flux) * _UP if flux > 0.0 else ideal
    return min(total, 1.0)


def _minus(target: float, spent: float) -> float:
    return math.inf if target == math.inf else (target - spent) * (1.0 - 2.0**-52)
