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
      spent: of the budget.
      released: of the coordinates.
      adjacency: what the sampled releases so far need, "" if there were none.

    Guarantee: FI1 (filters.md).
    """

    currency: str
    limit: float
    order: float = math.inf
    coordinates: int = 0
    spent: float = 0.0
    released: int = 0
    adjacency: str = ""

    def __post_init__(self):
        _check.choice("currency", self.currency, ("rdp", "zcdp", "gdp"))
        _check.real("limit", self.limit, low=0)
        _check.real("spent", self.spent, low=0)
        _check.integer("coordinates", self.coordinates, low=0)
        _check.integer("released", self.released, low=0)
        if self.currency == "rdp":
            rdp.check_orders(self.order)

    def cost(self, event: Event) -> float:
        """What an event costs in this filter's currency.

        Args:
          event: a release; its cost may have been chosen from earlier outputs.

        Returns:
          Upper bound, ∞ where the currency cannot express it.

        Raises:
          NotImplementedError: for noise that ends inside a random sample, truncated or of fixed
            size: a filter pays for noise that ends only where no sampling hides it.

        Guarantee: FI1 (filters.md).
        """
        for leaf in events_lib.leaves(event):
            sampled = isinstance(leaf, events_lib.PoissonSampled) and leaf.event.coordinates
            fixed = isinstance(leaf, events_lib.SampledWithoutReplacement) and leaf.coordinates
            if sampled or fixed or isinstance(leaf, events_lib.TruncatedPoissonSampled):
                raise NotImplementedError(
                    f"{leaf} has a cost in delta that a filter does not carry. Fix the number of "
                    "steps in advance and use accounting.epsilon."
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
        if not (spent <= self.limit and released <= self.coordinates):
            return None
        unit = events_lib.adjacency_of(event, self.adjacency)
        return dataclasses.replace(self, spent=spent, released=released, adjacency=unit)

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
                f"of {self.coordinates - self.released:,}."
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
        if self.coordinates:
            mu = self._largest_mu()
            log_factor, flux = gdp.cut_off(mu, min(self.coordinates, 1 << 60))
            tolerance = (tolerance - flux) * math.exp(-min(log_factor, 700.0)) * (1.0 - 2.0**-48)
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


def _coordinates(event: Event) -> int:
    return sum(
        count * leaf.coordinates
        for leaf, count in events_lib.leaves(event).items()
        if isinstance(leaf, events_lib.Gaussian)
    )


def _zcdp_of(leaf: Event) -> float:
    """ρ of a leaf that is not Gaussian; ∞ where there is none."""
    match leaf:
        case events_lib.DiscreteGaussian():
            return rdp.zcdp_of_gaussian(leaf.noise_multiplier)
        case events_lib.ExponentialMechanism():
            return min(leaf.zcdp, 0.5 * leaf.epsilon * leaf.epsilon)
        case events_lib.RandomizedResponse():
            return 0.5 * leaf.epsilon * leaf.epsilon
        case events_lib.BoundedRange():
            return leaf.bound * leaf.bound / 8.0
        case events_lib.Laplace():
            return rdp.zcdp_of_gaussian(leaf.noise_multiplier)
    return math.inf


def for_gdp(*, epsilon: float, delta: float, coordinates: int = 0) -> Filter:
    """A GDP filter whose whole run is (ε, δ)-DP: √Σμ² of Gaussian releases.

    Args:
      epsilon: target, nats, in [0, ∞).
      delta: target, in (0, 1).
      coordinates: noisy scalars that the run may release in all.

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
    return _for_target(Filter("gdp", 0.0, coordinates=coordinates), epsilon, delta)


def for_zcdp(*, epsilon: float, delta: float, coordinates: int = 0) -> Filter:
    """A zCDP filter whose whole run is (ε, δ)-DP: Σρ.

    Args:
      epsilon: target, nats, in [0, ∞).
      delta: target, in (0, 1).
      coordinates: noisy scalars that the run may release in all.

    Returns:
      A fresh filter on the private side of the target.

    Raises:
      ValueError: for NaN, a bad target, or one that the cut-off alone spends.

    Guarantee: FI1 (filters.md).
    Source: Feldman and Zrnic 2021, arXiv:2008.11193, Theorem 4.4 (all orders at once).
    """
    return _for_target(Filter("zcdp", 0.0, coordinates=coordinates), epsilon, delta)


def for_renyi(*, order: float, epsilon: float, delta: float, coordinates: int = 0) -> Filter:
    """An RDP filter at one order fixed in advance, whose whole run is (ε, δ)-DP.

    Args:
      order: α > 1; choosing it after the run is no theorem.
      epsilon: target, nats, in [0, ∞).
      delta: target, in (0, 1).
      coordinates: noisy scalars that the run may release in all.

    Returns:
      A fresh filter on the private side of the target.

    Raises:
      ValueError: for NaN, a bad target, or one that the order or the cut-off cannot meet.

    Guarantee: FI1 (filters.md).
    Source: Feldman and Zrnic 2021, arXiv:2008.11193, Theorem 4.3.
    """
    start = Filter("rdp", 0.0, order=float(rdp.check_orders(order)[0]), coordinates=coordinates)
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
