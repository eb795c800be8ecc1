"""What an event costs: ε, δ, μ and the RDP curve of everything inside it."""

import dataclasses
import functools
import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from dpfa_jax import _check
from dpfa_jax.accounting import convert, gdp, rdp, subsample
from dpfa_jax.accounting import event as events_lib
from dpfa_jax.accounting.event import Event

_UP = 1.0 + 4.0 * 2.0**-52


def _float(count: int) -> float:
    """The count as a float that is not smaller, ∞ where floats end."""
    try:
        return float(count) if count <= 1 << 53 else float(count) * _UP
    except OverflowError:
        return math.inf


def _sum(costs: Iterable[float]) -> float:
    """Sum of costs ≥ 0, correctly rounded, ∞ where floats end."""
    try:
        return math.fsum(costs)
    except OverflowError:
        return math.inf


def times(count: int, cost: float) -> float:
    """A cost that occurs `count` times, 0 where it is 0.

    Args:
      count: ≥ 0, of any size.
      cost: in [0, ∞].

    Returns:
      Upper bound up to the rounding of one product.

    Guarantee: E1 (charge.md).
    """
    return 0.0 if cost == 0.0 or count == 0 else _float(count) * cost


@dataclasses.dataclass(frozen=True)
class Profile:
    """An event sorted by what is known exactly about its leaves.

    Attributes:
      mu_squared: Σμ² of the Gaussian leaves.
      others: the other leaves and how often each happens; a `Deviation` is none of them.
      pure: Σε of the others at δ = 0, ∞ if one of them is not pure.
      log_factor: of all noise that ends (G3).
      flux: of all noise that ends, in [0, 1].
      variation: Σ of total variation distances between what runs and what is charged.

    Guarantee: E1 (charge.md).
    """

    mu_squared: float
    others: tuple[tuple[Event, int], ...]
    pure: float
    log_factor: float
    flux: float
    variation: float

    @property
    def mu(self) -> float:
        """μ of the Gaussian leaves together."""
        return 0.0 if self.mu_squared == 0.0 else math.sqrt(self.mu_squared) * _UP


def _inverse_square(noise_multiplier: float) -> float:
    if noise_multiplier == 0.0:
        return math.inf
    inverse = 1.0 / noise_multiplier
    # A noise so wide that its square underflows still costs more than nothing.
    return max(inverse * inverse, 1e-300)


def _cut_off(noise_multiplier: float, coordinates: int, bits: int) -> tuple[float, float]:
    mu = math.sqrt(_inverse_square(noise_multiplier)) * _UP
    return gdp.cut_off(mu, coordinates, radius_bits=bits)


def _few(coordinates: int) -> int:
    """Beyond 2⁶⁰ the cut-off spends every δ: no larger number is told apart."""
    return min(coordinates, 1 << 60)


def profile_of(event: Event) -> Profile:
    """The event, sorted by what is known exactly about its leaves.

    Args:
      event: what was released.

    Returns:
      Upper bounds, each rounded up.

    Raises:
      TypeError: if `event` is not an event.
      ValueError: for releases of different adjacencies.

    Guarantee: E1 (charge.md).
    """
    ending: dict[int, tuple[list[float], int]] = {}  # by radius_bits: each μ², and coordinates
    squares, apart, factors, fluxes, variations, others = [], [], [], [], [], []
    events_lib.adjacency_of(event)
    for leaf, count in events_lib.leaves(event).items():
        if isinstance(leaf, events_lib.Gaussian):
            squares.append(times(count, _inverse_square(leaf.noise_multiplier)))
            if leaf.coordinates:
                alike, scalars = ending.setdefault(leaf.radius_bits, ([], 0))
                alike.append(squares[-1])
                ending[leaf.radius_bits] = alike, scalars + count * leaf.coordinates
                apart.append(times(count, _leaf_cut_off(leaf)[1]))
            continue
        if isinstance(leaf, events_lib.Deviation):
            variations.append(times(count, leaf.total_variation))
            continue
        others.append((leaf, count))
        factor, flux = _leaf_cut_off(leaf)
        factors.append(times(count, factor))
        fluxes.append(times(count, flux))
        if isinstance(leaf, events_lib.TruncatedPoissonSampled):
            overflow = subsample.poisson_overflow(leaf.records, leaf.sampling_rate, leaf.capacity)
            variations.append(times(count, overflow))
    pure = _sum(times(count, _pure_epsilon(leaf)) for leaf, count in others) * _UP
    together = 0.0
    for bits, (alike, scalars) in ending.items():
        factor, flux = gdp.cut_off(math.sqrt(_sum(alike)) * _UP, _few(scalars), radius_bits=bits)
        factors.append(factor)
        together += flux
    factor = _sum(factors) * _UP
    flux = min(together, _sum(apart)) + _sum(fluxes)
    flux = math.inf if factor > 700.0 else flux * math.exp(factor) * _UP
    return Profile(
        _sum(squares) * _UP,
        tuple(others),
        pure,
        min(factor, 700.0),
        min(flux, 1.0),
        _sum(variations) * _UP,
    )


def _leaf_cut_off(leaf: Event) -> tuple[float, float]:
    """(log_factor, flux) of one release whose noise ends; (0, 0) of any other."""
    match leaf:
        case events_lib.Gaussian():
            return _cut_off(leaf.noise_multiplier, leaf.coordinates, leaf.radius_bits)
        case events_lib.PoissonSampled() | events_lib.TruncatedPoissonSampled():
            if leaf.sampling_rate == 0.0:
                return 0.0, 0.0
            factor, flux = _leaf_cut_off(leaf.event)
            return factor, flux * leaf.sampling_rate
        case events_lib.SampledWithoutReplacement():
            multiplier = leaf.noise_std / (2.0 * leaf.clip_norm) / _UP
            factor, flux = _cut_off(multiplier, leaf.coordinates, leaf.radius_bits)
            return factor, min(3.0 * flux * leaf.sample_size / leaf.records * _UP, 1.0)
    return 0.0, 0.0


def _leaf_rdp(leaf: Event, orders: rdp.Curve) -> rdp.Curve:
    match leaf:
        case events_lib.Laplace():
            return rdp.laplace(leaf.noise_multiplier, orders)
        case events_lib.DiscreteGaussian():
            return rdp.discrete_gaussian(leaf.noise_multiplier, orders)
        case events_lib.ExponentialMechanism():
            return rdp.exponential(leaf.epsilon, leaf.zcdp, orders)
        case events_lib.RandomizedResponse():
            return rdp.randomized_response(leaf.epsilon, orders)
        case events_lib.BoundedRange():
            return rdp.bounded_range(leaf.bound, orders)
        case events_lib.Skellam():
            return rdp.skellam(leaf.noise_std, leaf.l1_sensitivity, leaf.l2_sensitivity, orders)
        case events_lib.PoissonSampled() | events_lib.TruncatedPoissonSampled():
            multiplier, rate = leaf.event.noise_multiplier, leaf.sampling_rate
            return subsample.poisson_gaussian(multiplier, rate, orders)
        case events_lib.SampledWithoutReplacement():
            rate = min(leaf.sample_size / leaf.records * _UP, 1.0)
            return subsample.gaussian_without_replacement(
                leaf.noise_std, leaf.clip_norm, rate, orders
            )
        case events_lib.NonPrivate():
            return np.full(orders.shape, math.inf)
    raise TypeError(f"Expected a known accounting event, got {leaf!r}. It has no RDP curve here.")


def _pure_epsilon(leaf: Event) -> float:
    """ε of the leaf at δ = 0."""
    match leaf:
        case events_lib.Laplace():
            return math.inf if leaf.noise_multiplier == 0.0 else 1.0 / leaf.noise_multiplier
        case events_lib.ExponentialMechanism() | events_lib.RandomizedResponse():
            return leaf.epsilon
        case events_lib.BoundedRange():
            return leaf.bound
    return math.inf


def _rdp(profile: Profile, orders: rdp.Curve) -> rdp.Curve:
    total = rdp.zcdp(0.5 * profile.mu_squared, orders)
    for leaf, count in profile.others:
        curve = _leaf_rdp(leaf, orders)
        with np.errstate(invalid="ignore", over="ignore"):
            total = total + np.where(curve == 0.0, 0.0, curve * _float(count))
    return total * (1.0 + 2.0**-52 * (16.0 + len(profile.others)))


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
      ValueError: for orders not above 1, or for releases of different adjacencies.

    Guarantee: E1 (charge.md).
    """
    return _rdp(profile_of(event), rdp.check_orders(orders))


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
    profile = profile_of(event)
    return math.inf if profile.others or profile.variation else profile.mu


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
    profile = profile_of(event)
    if profile.variation == 0.0:
        return _ideal_epsilon(profile, ideal_tolerance(profile, tolerance))
    # (1 + e^ε)·variation is paid from δ, so ε solves ε = f(ε) with f growing: iterate from below.
    found = 0.0
    for _ in range(200):
        charged = (1.0 + math.exp(min(found, 700.0))) * profile.variation * _UP
        left = ideal_tolerance(profile, tolerance - charged)
        needed = _ideal_epsilon(profile, left) if left > 0.0 else math.inf
        if needed <= found:
            return found
        if needed == math.inf:
            return math.inf
        found = needed * (1.0 + 1e-12)
    return math.inf


def ideal_tolerance(profile: Profile, tolerance: float) -> float:
    """δ that is left for ideal noise after its cut-off; below 0 where nothing is.

    Args:
      profile: what was released.
      tolerance: δ in (−∞, 1).

    Returns:
      Rounded down, to the private side.

    Guarantee: E1 (charge.md).
    """
    if profile.flux == 0.0:
        return tolerance
    left = (tolerance - profile.flux) * (1.0 - 4.0 * 2.0**-52)
    return left * math.exp(-profile.log_factor) * (1.0 - 4.0 * 2.0**-52)


def _ideal_epsilon(profile: Profile, tolerance: float) -> float:
    if not tolerance >= 0.0:
        return math.inf
    gaussian = gdp.epsilon(tolerance, profile.mu)
    if not profile.others:
        return gaussian
    return min(
        gaussian + profile.pure, convert.epsilon(functools.partial(_rdp, profile), tolerance)
    )


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
    profile = profile_of(event)
    if not profile.others:
        ideal = gdp.delta(target, profile.mu)
    else:
        ideal = 1.0
        if profile.pure < math.inf and profile.pure <= target:
            ideal = gdp.delta(_minus(target, profile.pure), profile.mu)
        ideal = min(ideal, convert.delta(functools.partial(_rdp, profile), target))
    if profile.flux > 0.0:
        ideal = (ideal * math.exp(profile.log_factor) + profile.flux) * _UP
    if profile.variation > 0.0:
        ideal += (1.0 + math.exp(min(target, 700.0))) * profile.variation * _UP
    return min(ideal * _UP if profile.variation else ideal, 1.0)


def _minus(target: float, spent: float) -> float:
    return math.inf if target == math.inf else (target - spent) * (1.0 - 2.0**-52)
