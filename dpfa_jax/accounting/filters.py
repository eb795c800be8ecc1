"""Budgets for runs that choose their next release after seeing the last: filters that are theorems.

A filter fixes its currency and its budget beforehand and refuses what would go over. Three
currencies have a theorem: RDP at one order fixed in advance, zCDP, and GDP. "Stop when the loss
distribution's ε crosses the budget" has none and is offered nowhere.
"""

import dataclasses
import math

from dpfa_jax import _check
from dpfa_jax.accounting import charge, convert, gdp, rdp
from dpfa_jax.accounting import event as events_lib
from dpfa_jax.accounting.event import Event

_UP = 1.0 + 2.0**-50


class BudgetExceeded(Exception):
    """A release would cost more than is left.

    Guarantee: FI1 (filters.md).
    """


@dataclasses.dataclass(frozen=True)
class Filter:
    """A budget in one currency, and what is spent of it: an immutable value.

    Make one with `renyi`, `zcdp` or `gdp`.

    Attributes:
      currency: "rdp", "zcdp" or "gdp".
      limit: the whole budget in the currency (μ² for "gdp"), ≥ 0.
      order: α of "rdp", fixed in advance; ∞ otherwise.
      coordinates: how many noisy scalars may be released in all; their cut-off is part of the δ.
      radius_bits: of that noise; releases with fewer are refused.
      flux: δ that the cut-offs of sampled releases may take in all, in [0, 1).
      variation: total variation that overflows and deviations may add up to, in [0, 1).
      spent: of the budget.
      released: of the coordinates.
      leaked: of the flux.
      deviated: of the variation.
      adjacency: what the sampled releases so far need, "" if there were none.

    Guarantee: FI1 (filters.md).
    """

    currency: str
    limit: float
    order: float = math.inf
    coordinates: int = 0
    radius_bits: int = gdp.RADIUS_BITS
    flux: float = 0.0
    variation: float = 0.0
    spent: float = 0.0
    released: int = 0
    leaked: float = 0.0
    deviated: float = 0.0
    adjacency: str = ""

    def __post_init__(self):
        _check.choice("currency", self.currency, ("rdp", "zcdp", "gdp"))
        _check.real("limit", self.limit, low=0)
        _check.real("spent", self.spent, low=0)
        _check.integer("coordinates", self.coordinates, low=0)
        _check.integer("radius_bits", self.radius_bits, low=gdp.RADIUS_BITS, high=128)
        _check.real("flux", self.flux, low=0, high=1, open_high=True)
        _check.integer("released", self.released, low=0)
        _check.real("leaked", self.leaked, low=0)
        _check.real("variation", self.variation, low=0, high=1, open_high=True)
        _check.real("deviated", self.deviated, low=0)
        if self.currency == "rdp":
            rdp.check_orders(self.order)

    def cost(self, event: Event) -> float:
        """What an event costs in this filter's currency.

        Args:
          event: a release; its cost may have been chosen from earlier outputs.

        Returns:
          Upper bound, ∞ where the currency cannot express it.

        Raises:
          NotImplementedError: for noise of fewer radius bits than the filter's.

        Guarantee: FI1 (filters.md).
        """
        for leaf in events_lib.leaves(event):
            scalars, bits = _ending(leaf)
            if scalars and bits < self.radius_bits:
                raise NotImplementedError(
                    f"Expected noise of at least {self.radius_bits} radius bits, which this filter "
                    f"charges for, got {bits} in {leaf}."
                )
        profile = charge.profile_of(event)
        if self.currency == "gdp":
            return math.inf if profile.others else profile.mu_squared
        if self.currency == "rdp":
            return float(charge.rdp_curve(event, self.order)[0])
        total = 0.5 * profile.mu_squared
        for leaf, count in profile.others:
            total += charge.times(count, _zcdp_of(leaf))
        return total * _UP

    def would_exceed(self, event: Event, count: int = 1) -> bool:
        """Whether this release would cost more than is left.

        Args:
          event: a release.
          count: how often, ≥ 1.

        Returns:
          False only if all of it fits.

        Raises:
          ValueError: if it needs another adjacency than what was released before.

        Guarantee: FI1 (filters.md).
        """
        return self._after(event, count) is None

    def _after(self, event: Event, count: int) -> "Filter | None":
        count = _check.integer("count", count, low=1)
        price = self.cost(event)
        spent = (self.spent + charge.times(count, price)) * _UP if price else self.spent
        released = self.released + count * _coordinates(event)
        leak = _leak(event)
        leaked = (self.leaked + charge.times(count, leak)) * _UP if leak else self.leaked
        apart = charge.profile_of(event).variation
        deviated = (self.deviated + charge.times(count, apart)) * _UP if apart else self.deviated
        fits = spent <= self.limit and released <= self.coordinates and leaked <= self.flux
        if not (fits and deviated <= self.variation):
            return None
        unit = events_lib.adjacency_of(event, self.adjacency)
        return dataclasses.replace(
            self, spent=spent, released=released, leaked=leaked, deviated=deviated, adjacency=unit
        )

    def spend(self, event: Event, count: int = 1) -> "Filter":
        """The filter after a release; call it *before* releasing.

        Args:
          event: a release.
          count: how often, ≥ 1.

        Returns:
          A new filter; this one is unchanged.

        Raises:
          BudgetExceeded: if it does not fit; nothing is spent then.

        Guarantee: FI1 (filters.md).
        """
        after = self._after(event, count)
        if after is None:
            raise BudgetExceeded(
                f"{count} × ({event}) would cost more than is left: {self.cost(event):.4g} each of "
                f"{self.remaining:.4g} {self.currency}, {_coordinates(event):,} coordinates each "
                f"of {self.coordinates - self.released:,}, a flux of {_leak(event):.3g} each of "
                f"{max(self.flux - self.leaked, 0.0):.3g}, a total variation of "
                f"{charge.profile_of(event).variation:.3g} each of "
                f"{max(self.variation - self.deviated, 0.0):.3g}."
            )
        return after

    @property
    def remaining(self) -> float:
        """What is left of the budget, in the currency; rounded down, ≥ 0."""
        return max(self.limit - self.spent, 0.0) * (1.0 - 2.0**-50)

    def forecast(self, event: Event) -> int:
        """How many more releases of an event fit.

        Args:
          event: a release.

        Returns:
          The largest count that `would_exceed` lets pass, at most 2⁵³.

        Guarantee: FI1 (filters.md).
        """
        low, high = 0, 1
        while high <= 1 << 53 and not self.would_exceed(event, high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self.would_exceed(event, middle):
                high = middle
            else:
                low = middle
        return low

    def epsilon(self, delta: float) -> float:
        """ε that the whole run has, whatever it does within the budget.

        Args:
          delta: in [0, 1).

        Returns:
          Upper bound at the *budget*: what was spent on the way is no guarantee by itself.

        Guarantee: FI1 (filters.md).
        """
        tolerance = _check.real("delta", delta, low=0, high=1, open_high=True)
        found = 0.0
        for _ in range(200):  # (1 + e^ε)·variation is paid from δ: from below, as in charge
            paid = (1.0 + math.exp(min(found, 700.0))) * self.variation * _UP
            needed = self._certified(tolerance - paid) if tolerance >= paid else math.inf
            if needed <= found or self.variation == 0.0 or needed == math.inf:
                return max(found, needed)
            found = needed * (1.0 + 1e-12)
        return math.inf

    def _certified(self, tolerance: float) -> float:
        """ε at the budget where all that is sampled is sampled as charged."""
        if self.coordinates:
            mu = self._largest_mu()
            scalars = min(self.coordinates, 1 << 60)
            log_factor, flux = gdp.cut_off(mu, scalars, radius_bits=self.radius_bits)
            if not flux < 1.0:
                return math.inf
            flux += self.flux * math.exp(log_factor) * _UP
            tolerance = (tolerance - flux) * math.exp(-log_factor) * (1.0 - 2.0**-48)
            if not tolerance > 0.0:
                return math.inf
        if self.currency == "gdp":
            return gdp.epsilon(tolerance, math.sqrt(self.limit) * _UP)
        if self.currency == "zcdp":
            return convert.zcdp_epsilon(self.limit, tolerance)
        return float(convert.epsilons(self.order, self.limit, tolerance)[0])

    def _largest_mu(self) -> float:
        """Largest μ of all Gaussian releases that fit in the budget together."""
        if self.currency == "gdp":
            return math.sqrt(self.limit) * _UP
        per_mu_squared = 0.5 if self.currency == "zcdp" else 0.5 * self.order
        return math.sqrt(self.limit / per_mu_squared) * _UP


def _ending(leaf: Event) -> tuple[int, int]:
    """(coordinates, radius_bits) of a leaf's noise that ends."""
    match leaf:
        case events_lib.Gaussian() | events_lib.SampledWithoutReplacement():
            return leaf.coordinates, leaf.radius_bits
        case events_lib.PoissonSampled() | events_lib.TruncatedPoissonSampled():
            return leaf.event.coordinates, leaf.event.radius_bits
    return 0, 0


def _coordinates(event: Event) -> int:
    return sum(count * _ending(leaf)[0] for leaf, count in events_lib.leaves(event).items())


def _leak(event: Event) -> float:
    """Flux of the sampled releases; that of plain ones is charged for all coordinates at once."""
    fluxes = (
        charge.times(count, charge.profile_of(leaf).flux)
        for leaf, count in events_lib.leaves(event).items()
        if not isinstance(leaf, events_lib.Gaussian)
    )
    return sum(fluxes) * _UP


def _zcdp_of(leaf: Event) -> float:
    """ρ of a leaf that is not Gaussian; ∞ where there is none."""
    match leaf:
        case events_lib.DiscreteGaussian():
            return rdp.zcdp_of_gaussian(leaf.noise_multiplier)
        case events_lib.ExponentialMechanism():
            return min(leaf.zcdp, rdp.zcdp_of_pure(leaf.epsilon))
        case events_lib.RandomizedResponse():
            return rdp.zcdp_of_pure(leaf.epsilon)
        case events_lib.BoundedRange():
            return max(0.125 * leaf.bound * leaf.bound, rdp.TINY) if leaf.bound else 0.0
        case events_lib.Laplace():
            return rdp.zcdp_of_gaussian(leaf.noise_multiplier)
    return math.inf


def for_gdp(
    *, epsilon: float, delta: float, coordinates: int = 0, radius_bits: int = gdp.RADIUS_BITS
) -> Filter:
    """A GDP filter whose whole run is (ε, δ)-DP: √Σμ² of Gaussian releases.

    Args:
      epsilon: target, nats, in [0, ∞).
      delta: target, in (0, 1).
      coordinates: noisy scalars that the run may release in all.
      radius_bits: of their noise, as in `Gaussian`.

    Returns:
      A fresh filter on the private side of the target.

    Raises:
      ValueError: for NaN, a bad target, or one that the cut-off alone spends.

    Guarantee: FI1 (filters.md).
    Source: Smith and Thakurta 2022, arXiv:2210.17520; Koskela et al. 2022, arXiv:2209.15596.

    Example:
      >>> budget = for_gdp(epsilon=1.0, delta=1e-5)
      >>> budget.forecast(events_lib.Gaussian(37.306316349))
      100
    """
    start = Filter("gdp", 0.0, coordinates=coordinates, radius_bits=radius_bits)
    return _for_target(start, epsilon, delta)


def for_zcdp(
    *, epsilon: float, delta: float, coordinates: int = 0, radius_bits: int = gdp.RADIUS_BITS
) -> Filter:
    """A zCDP filter whose whole run is (ε, δ)-DP: Σρ.

    Args:
      epsilon: target, nats, in [0, ∞).
      delta: target, in (0, 1).
      coordinates: noisy scalars that the run may release in all.
      radius_bits: of their noise, as in `Gaussian`.

    Returns:
      A fresh filter on the private side of the target.

    Raises:
      ValueError: for NaN, a bad target, or one that the cut-off alone spends.

    Guarantee: FI1 (filters.md).
    Source: Feldman and Zrnic 2021, arXiv:2008.11193, Theorem 4.4 (all orders at once).
    """
    start = Filter("zcdp", 0.0, coordinates=coordinates, radius_bits=radius_bits)
    return _for_target(start, epsilon, delta)


def for_renyi(
    *,
    order: float,
    epsilon: float,
    delta: float,
    coordinates: int = 0,
    radius_bits: int = gdp.RADIUS_BITS,
    flux: float = 0.0,
    variation: float = 0.0,
) -> Filter:
    """An RDP filter at one order fixed in advance, whose whole run is (ε, δ)-DP.

    Args:
      order: α > 1; choosing it after the run is no theorem.
      epsilon: target, nats, in [0, ∞).
      delta: target, in (0, 1).
      coordinates: noisy scalars that the run may release in all.
      radius_bits: of their noise, as in `Gaussian`.
      flux: part of delta set aside for the cut-offs of sampled releases with coordinates, in
        [0, delta): a thousandth of it is plenty with 64 radius bits.
      variation: what the overflows of truncated samples, and deviations, may add up to, in
        [0, delta): it takes (1 + e^ε)·variation of delta.

    Returns:
      A fresh filter on the private side of the target.

    Raises:
      ValueError: for NaN, a bad target, or one that the order or the cut-off cannot meet.

    Guarantee: FI1 (filters.md).
    Source: Feldman and Zrnic 2021, arXiv:2008.11193, Theorem 4.3.
    """
    start = Filter(
        "rdp",
        0.0,
        order=float(rdp.check_orders(order)[0]),
        coordinates=coordinates,
        radius_bits=radius_bits,
        flux=flux,
        variation=variation,
    )
    return _for_target(start, epsilon, delta)


def _for_target(start: Filter, epsilon: float, delta: float) -> Filter:
    target = _check.real("epsilon", epsilon, low=0)
    tolerance = _check.real("delta", delta, low=0, high=1, open_low=True, open_high=True)

    def meets(limit: float) -> bool:
        return dataclasses.replace(start, limit=limit).epsilon(tolerance) <= target

    low, high = 0.0, 1e-12
    while meets(high) and high < 1e12:
        low, high = high, 2.0 * high
    if low == 0.0:
        raise ValueError(
            f"Expected a target that a {start.currency} filter can hold, got epsilon={target}, "
            f"delta={tolerance}: any release would be too much. Allow a larger delta, fewer "
            "coordinates, or a larger order."
        )
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        if meets(middle):
            low = middle
        else:
            high = middle
    return dataclasses.replace(start, limit=low)
