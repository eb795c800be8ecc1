"""Splitting one budget over layers, heads, steps or queries, by public weights.

Gaussian releases compose as Σμ² = μ_total², so a split is a share of μ² for each part.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from dpfa_jax import _check
from dpfa_jax.accounting import charge, gdp
from dpfa_jax.accounting.event import RADIUS_BITS, Composed, Event, Gaussian, Repeated

_DOWN = 1.0 - 2.0**-46


def _checked(name: str, values: Sequence[float]) -> list[float]:
    checked = [_check.real(name, value, low=0, open_low=True) for value in values]
    if not checked:
        raise ValueError(f"Expected at least one of {name}, got none.")
    return checked


def by_weights(mu: float, weights: Sequence[float]) -> list[float]:
    """Noise multipliers of parts that take shares of μ² in proportion to public weights.

    Args:
      mu: of all parts together, > 0 (`gdp.mu(epsilon, delta)`).
      weights: > 0, public; equal weights share equally.

    Returns:
      One noise multiplier per part, on the private side: √Σ1/z² ≤ mu.

    Raises:
      ValueError: for NaN or what is not positive.

    Guarantee: A1 (allocate.md).

    Example:
      >>> [round(z, 3) for z in by_weights(1.0, [1.0, 3.0])]
      [2.0, 1.155]
    """
    mu = _check.real("mu", mu, low=0, open_low=True)
    weights = _checked("weights", weights)
    largest = max(weights)
    shares = [weight / largest for weight in weights]  # no overflow in the sum
    total = math.fsum(shares)
    multipliers = []
    for share in shares:
        part = mu * math.sqrt(share / total) * _DOWN
        if not (part > 0.0 and 1.0 / part < math.inf):
            raise ValueError(f"Expected weights whose ratios a float can hold, got {weights}.")
        multipliers.append(1.0 / part)
    return multipliers


def by_importance(mu: float, importance: Sequence[float]) -> list[float]:
    """Noise multipliers that make Σ importance·z² least at a given total μ.

    With importance = coordinates·Δ² this is the least total noise variance; a public factor for
    how much a part matters may multiply it.

    Args:
      mu: of all parts together, > 0.
      importance: > 0, public; one per part.

    Returns:
      One noise multiplier per part, on the private side: √Σ1/z² ≤ mu.

    Raises:
      ValueError: for NaN or what is not positive.

    Guarantee: A1 (allocate.md).

    Example:
      >>> [round(z, 3) for z in by_importance(1.0, [1.0, 16.0])]
      [2.236, 1.118]
    """
    return by_weights(mu, [math.sqrt(each) for each in _checked("importance", importance)])


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a budget: a layer, a head, a group of parameters.

    Attributes:
      importance: > 0, public; how much the variance of its noise matters, relative to the others.
      releases: how often it is released, ≥ 1.
      coordinates: noisy scalars of one release, as in `Gaussian`.
      radius_bits: as in `Gaussian`.
    """

    importance: float = 1.0
    releases: int = 1
    coordinates: int = 0
    radius_bits: int = RADIUS_BITS

    def __post_init__(self):
        _check.real("importance", self.importance, low=0, open_low=True)
        _check.integer("releases", self.releases, low=1, high=1 << 53)
        self.at(1.0)

    def at(self, noise_multiplier: float) -> Event:
        """The part's releases at a noise multiplier.

        Args:
          noise_multiplier: of each of its releases, ≥ 0.
        """
        leaf = Gaussian(noise_multiplier, self.coordinates, self.radius_bits)
        return Repeated(leaf, self.releases)


@dataclasses.dataclass(frozen=True)
class Split:
    """A budget split over named parts.

    Attributes:
      names: of the parts; "layer 0/head 3" belongs to "layer 0".
      noise_multipliers: one for each.
      events: one for each, all of its releases.

    Guarantee: A2 (allocate.md).
    """

    names: tuple[str, ...]
    noise_multipliers: tuple[float, ...]
    events: tuple[Event, ...]

    @property
    def event(self) -> Event:
        """All parts together."""
        return Composed(self.events)

    def of(self, name: str) -> Event:
        """The releases of one part, or of all parts under a name such as "layer 0".

        Args:
          name: a part's name, or what stands before a "/" in some.

        Raises:
          ValueError: for a name that no part has.
        """
        inside = [
            event
            for each, event in zip(self.names, self.events, strict=True)
            if each == name or each.startswith(f"{name}/")
        ]
        if not inside:
            raise ValueError(f"Expected one of {', '.join(self.names)}, got {name!r}.")
        return Composed(inside)

    def epsilons(self, delta: float) -> dict[str, float]:
        """ε of every part and of every layer by itself; they do not add up to the total.

        Args:
          delta: in [0, 1), for each.

        Returns:
          Upper bounds by name, layers before their heads.

        Guarantee: E1 (charge.md).
        """
        names = dict.fromkeys(
            "/".join(name.split("/")[: end + 1])
            for name in self.names
            for end in range(name.count("/") + 1)
        )
        return {name: charge.epsilon(self.of(name), delta) for name in names}

    def __str__(self):
        pairs = zip(self.names, self.noise_multipliers, strict=True)
        return "\n".join(f"{name}: noise multiplier {z:.6g}" for name, z in pairs)


def split(parts: Mapping[str, Part], *, epsilon: float, delta: float) -> Split:
    """The noise of named parts that together meet (ε, δ), least in Σ importance·z².

    Args:
      parts: by name, at least one.
      epsilon: target of all parts together, nats, in [0, ∞).
      delta: target, in (0, 1).

    Returns:
      The split on the private side: `accounting.epsilon(split.event, delta) <= epsilon`.

    Raises:
      TypeError: for what is no `Part`.
      ValueError: for NaN, no part, or a target that no noise meets.

    Guarantee: A2 (allocate.md).

    Example:
      >>> found = split({"a": Part(), "b": Part(importance=16.0)}, epsilon=1.0, delta=1e-5)
      >>> [round(z, 2) for z in found.noise_multipliers]
      [8.34, 4.17]
    """
    target = _check.real("epsilon", epsilon, low=0)
    goal = _check.real("delta", delta, low=0, high=1, open_low=True, open_high=True)
    if not parts:
        raise ValueError("Expected at least one part, got none.")
    for name, part in parts.items():
        if not isinstance(part, Part):
            raise TypeError(f"Expected parts[{name!r}] to be a Part, got {part!r}.")
    # A part of n releases with multiplier z costs n/z² of μ²: Σ w·z² is least for √(w·n) shares.
    weights = [math.sqrt(part.importance * part.releases) for part in parts.values()]

    def at(mu: float) -> Split:
        whole = by_weights(mu, weights)
        multipliers = tuple(
            z * math.sqrt(part.releases) * (1.0 + 2.0**-50)
            for z, part in zip(whole, parts.values(), strict=True)
        )
        events = tuple(part.at(z) for z, part in zip(multipliers, parts.values(), strict=True))
        return Split(tuple(parts), multipliers, events)

    def meets(mu: float) -> bool:
        return charge.epsilon(at(mu).event, goal) <= target

    ideal = high = gdp.mu(target, goal)
    low = high * (1.0 - 2.0**-40)
    while low > 1e-12 * ideal and not meets(low):
        high, low = low, 0.5 * low
    if not low > 1e-12 * ideal:
        raise ValueError(
            f"Expected a target that Gaussian noise can meet, got epsilon={target} and "
            f"delta={goal}: the noise cut-off alone spends it. Release fewer scalars, take 64 "
            "radius bits, or allow a larger delta."
        )
    while high - low > 1e-9 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if meets(middle) else (low, middle)
    return at(low)


def per_head(
    *,
    layers: int,
    heads: int,
    epsilon: float,
    delta: float,
    importance: Sequence[Sequence[float]] | None = None,
    releases: int = 1,
    coordinates: int = 0,
    radius_bits: int = RADIUS_BITS,
) -> Split:
    """Private heads of private layers in one call: a noise multiplier for each, one (ε, δ) for all.

    Args:
      layers: how many layers read the private memory, ≥ 1.
      heads: kv heads of each layer, ≥ 1.
      epsilon: target of all heads together, nats, in [0, ∞).
      delta: target, in (0, 1).
      importance: public, [layer][head], > 0; equal if not given.
      releases: calls of each head, ≥ 1.
      coordinates: noisy scalars of one head's call, as in `Gaussian`.
      radius_bits: as in `Gaussian`.

    Returns:
      The split on the private side, its parts named "layer 0/head 0" and so on.

    Raises:
      ValueError: for NaN, importance of another shape, or a target that no noise meets.

    Guarantee: A2 (allocate.md).

    Example:
      >>> heads = per_head(layers=2, heads=4, epsilon=1.0, delta=1e-5)
      >>> round(heads.epsilons(1e-5)["layer 1"], 2), round(heads.noise_multipliers[0], 2)
      (0.68, 10.55)
    """
    layers = _check.integer("layers", layers, low=1, high=1 << 20)
    heads = _check.integer("heads", heads, low=1, high=1 << 20)
    table = [[1.0] * heads] * layers if importance is None else importance
    if len(table) != layers or any(len(row) != heads for row in table):
        raise ValueError(f"Expected importance of {layers} layers with {heads} heads each.")
    parts = {
        f"layer {layer}/head {head}": Part(table[layer][head], releases, coordinates, radius_bits)
        for layer in range(layers)
        for head in range(heads)
    }
    return split(parts, epsilon=epsilon, delta=delta)
