"""Releases as frozen values: what happened, said once, and charged by any accountant.

An event names the noise of a release in units of its sensitivity. It knows no data, no array and no
ε. Events are hashable, so that they travel through a jaxpr as static parameters.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from dpfa_jax import _check


class Event:
    """What a release is charged as; a leaf below, or `Composed` and `Repeated` of them."""


def _positive_multiplier(noise_multiplier: Any) -> float:
    return _check.real("noise_multiplier", noise_multiplier, low=0)


@dataclasses.dataclass(frozen=True)
class Gaussian(Event):
    """A Gaussian release of L2 sensitivity Δ with noise of standard deviation σ.

    Attributes:
      noise_multiplier: σ/Δ ≥ 0. The release is 1/noise_multiplier-GDP; 0 costs ∞.
      coordinates: how many released scalars carry noise that ends at 7.45σ, ≥ 0. Their cut-off is
        charged to δ (G3 in gdp.md); 0 says that the noise is an ideal Gaussian.
    """

    noise_multiplier: float
    coordinates: int = 0

    def __post_init__(self):
        object.__setattr__(self, "noise_multiplier", _positive_multiplier(self.noise_multiplier))
        object.__setattr__(
            self, "coordinates", _check.integer("coordinates", self.coordinates, low=0)
        )

    def __str__(self):
        noise = "ideal noise" if self.coordinates == 0 else f"{self.coordinates:,} noisy scalars"
        return f"Gaussian release, noise multiplier {self.noise_multiplier:.6g}, {noise}"


@dataclasses.dataclass(frozen=True)
class Laplace(Event):
    """A Laplace release of L1 sensitivity Δ with noise of scale b, E|noise| = b.

    Attributes:
      noise_multiplier: b/Δ ≥ 0. The release is (1/noise_multiplier, 0)-DP; 0 costs ∞.
    """

    noise_multiplier: float

    def __post_init__(self):
        object.__setattr__(self, "noise_multiplier", _positive_multiplier(self.noise_multiplier))

    def __str__(self):
        return f"Laplace release, noise multiplier {self.noise_multiplier:.6g}"


@dataclasses.dataclass(frozen=True)
class DiscreteGaussian(Event):
    """A release on the integers with discrete Gaussian noise, charged as zCDP (never as GDP).

    Attributes:
      noise_multiplier: s/Δ ≥ 0 with s² the parameter in exp(−x²/(2s²)) and Δ the L2 sensitivity on
        the lattice. The release is 1/(2·noise_multiplier²)-zCDP; 0 costs ∞.
    """

    noise_multiplier: float

    def __post_init__(self):
        object.__setattr__(self, "noise_multiplier", _positive_multiplier(self.noise_multiplier))

    def __str__(self):
        return f"discrete Gaussian release, noise multiplier {self.noise_multiplier:.6g}"


@dataclasses.dataclass(frozen=True)
class ExponentialMechanism(Event):
    """A choice of one public candidate, (epsilon, 0)-DP and zcdp-zCDP (S8).

    Attributes:
      epsilon: bound on every log-likelihood ratio, nats, in [0, ∞].
      zcdp: ρ of its zero-concentrated bound, in [0, ∞]; ∞ where none is known.
    """

    epsilon: float
    zcdp: float

    def __post_init__(self):
        for name in ("epsilon", "zcdp"):
            checked = _check.real(name, getattr(self, name), low=0, finite=False)
            object.__setattr__(self, name, checked)

    def __str__(self):
        return f"exponential mechanism, epsilon {self.epsilon:.6g}, zCDP {self.zcdp:.6g}"


@dataclasses.dataclass(frozen=True)
class NonPrivate(Event):
    """A release without a guarantee: it costs ∞, and so does everything composed with it."""

    def __str__(self):
        return "release without a guarantee"


@dataclasses.dataclass(frozen=True)
class NoRelease(Event):
    """Nothing private was released: costs 0."""

    def __str__(self):
        return "no release"


@dataclasses.dataclass(frozen=True)
class Composed(Event):
    """Several releases of the same data; later ones may depend on the outputs of earlier ones.

    Attributes:
      events: at least one event, kept as a tuple. For none, say `NoRelease()`.
    """

    events: Sequence[Event]

    def __post_init__(self):
        if not isinstance(self.events, Sequence):
            raise TypeError(f"Expected events to be a sequence of events, got {self.events!r}.")
        events = tuple(check_event("events", each) for each in self.events)
        if not events:
            raise ValueError("Expected at least one event, got (). Pass NoRelease() for none.")
        object.__setattr__(self, "events", events)

    def __str__(self):
        return " + ".join(f"({each})" for each in self.events)


@dataclasses.dataclass(frozen=True)
class Repeated(Event):
    """The same release `count` times.

    Attributes:
      event: the release.
      count: how often, ≥ 1. For 0 times, say `NoRelease()`.
    """

    event: Event
    count: int

    def __post_init__(self):
        check_event("event", self.event)
        object.__setattr__(self, "count", _check.integer("count", self.count, low=1))

    def __str__(self):
        return f"{self.count:,} × ({self.event})"


def check_event(name: str, value: Any) -> Event:
    """The value if it is an event.

    Args:
      name: the argument's name as the caller wrote it.
      value: anything.

    Returns:
      The value itself.

    Raises:
      TypeError: otherwise; a class or a string is not an event.
    """
    if not isinstance(value, Event) or type(value) is Event:
        raise TypeError(f"Expected {name} to be an accounting event, got {value!r}.")
    return value


def _walk(event: Event, count: int) -> Iterator[tuple[Event, int]]:
    stack = [(event, count)]
    while stack:
        event, count = stack.pop()
        if isinstance(event, Composed):
            stack.extend((each, count) for each in reversed(event.events))
        elif isinstance(event, Repeated):
            stack.append((event.event, count * event.count))
        elif not isinstance(event, NoRelease):
            yield event, count


def leaves(event: Event) -> dict[Event, int]:
    """The distinct leaf events inside `event` and how often each happens.

    Args:
      event: any event; nesting may be deep.

    Returns:
      A dictionary from leaf to count ≥ 1 in order of first occurrence; `NoRelease` is left out.

    Example:
      >>> leaves(Composed((Repeated(Laplace(2.0), 3), Laplace(2.0), NoRelease())))
      {Laplace(noise_multiplier=2.0): 4}
    """
    counts: dict[Event, int] = {}
    for leaf, count in _walk(check_event("event", event), 1):
        counts[leaf] = counts.get(leaf, 0) + count
    return counts
