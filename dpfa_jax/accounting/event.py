"""Releases as frozen values: what happened, said once, and charged by any accountant.

An event names the noise of a release in units of its sensitivity. It knows no data, no array and no
ε. Events are hashable, so that they travel through a jaxpr as static parameters.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from dpfa_jax import _check

RADIUS_BITS = 40
"""Bits of the radius of `dpfa_jax.random.normal`: its noise ends at √(80 ln 2) = 7.45σ."""


class Event:
    """What a release is charged as; a leaf below, or `Composed` and `Repeated` of them."""


def _positive_multiplier(noise_multiplier: Any) -> float:
    return _check.real("noise_multiplier", noise_multiplier, low=0)


def _cut_off_fields(event: Any) -> None:
    """Checks `coordinates` and `radius_bits`; ideal noise has only one spelling."""
    coordinates = _check.integer("coordinates", event.coordinates, low=0)
    bits = _check.integer("radius_bits", event.radius_bits, low=RADIUS_BITS, high=128)
    object.__setattr__(event, "coordinates", coordinates)
    object.__setattr__(event, "radius_bits", bits if coordinates else RADIUS_BITS)


@dataclasses.dataclass(frozen=True)
class Gaussian(Event):
    """A Gaussian release of L2 sensitivity Δ with noise of standard deviation σ.

    Attributes:
      noise_multiplier: σ/Δ ≥ 0. The release is 1/noise_multiplier-GDP; 0 costs ∞.
      coordinates: how many released scalars carry noise that ends, ≥ 0. Their cut-off is charged to
        δ (G3 in gdp.md); 0 says that the noise is an ideal Gaussian.
      radius_bits: b of noise that ends at √(2b ln 2)σ, as given to `random.normal`, in [40, 128]:
        40 at 7.45σ, 64 at 9.42σ (what 10⁷ scalars and more need).
    """

    noise_multiplier: float
    coordinates: int = 0
    radius_bits: int = RADIUS_BITS

    def __post_init__(self):
        object.__setattr__(self, "noise_multiplier", _positive_multiplier(self.noise_multiplier))
        _cut_off_fields(self)

    def __str__(self):
        noise = "ideal noise" if self.coordinates == 0 else f"{self.coordinates:,} noisy scalars"
        if self.radius_bits != RADIUS_BITS:
            noise += f" of {self.radius_bits} radius bits"
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
class RandomizedResponse(Event):
    """An (epsilon, 0)-DP release of which nothing else is known; randomized response is the worst.

    Attributes:
      epsilon: bound on every log-likelihood ratio, nats, in [0, ∞].
    """

    epsilon: float

    def __post_init__(self):
        checked = _check.real("epsilon", self.epsilon, low=0, finite=False)
        object.__setattr__(self, "epsilon", checked)

    def __str__(self):
        return f"randomized response, epsilon {self.epsilon:.6g}"


@dataclasses.dataclass(frozen=True)
class BoundedRange(Event):
    """A release whose log-likelihood ratios span at most `bound` (exponential mechanism, softmax).

    Attributes:
      bound: largest minus smallest log-likelihood ratio, nats, in [0, ∞]. Sampled attention with
        one score replaced within [−B, B] has 2B.
    """

    bound: float

    def __post_init__(self):
        object.__setattr__(self, "bound", _check.real("bound", self.bound, low=0, finite=False))

    def __str__(self):
        return f"release of bounded range {self.bound:.6g}"


@dataclasses.dataclass(frozen=True)
class Skellam(Event):
    """A release on the integers with Skellam noise (a difference of two equal Poisson variables).

    Attributes:
      noise_std: standard deviation of the noise per coordinate, ≥ 0; 0 costs ∞.
      l1_sensitivity: on the integer lattice, ≥ l2_sensitivity.
      l2_sensitivity: on the integer lattice, > 0.
    """

    noise_std: float
    l1_sensitivity: float
    l2_sensitivity: float

    def __post_init__(self):
        std = _check.real("noise_std", self.noise_std, low=0)
        l2 = _check.real("l2_sensitivity", self.l2_sensitivity, low=0, open_low=True)
        l1 = _check.real("l1_sensitivity", self.l1_sensitivity, low=l2)
        for name, value in (("noise_std", std), ("l1_sensitivity", l1), ("l2_sensitivity", l2)):
            object.__setattr__(self, name, value)

    def __str__(self):
        return (
            f"Skellam release, noise std {self.noise_std:.6g}, sensitivity "
            f"{self.l1_sensitivity:.6g} (l1), {self.l2_sensitivity:.6g} (l2)"
        )


def _sampled_gaussian(event: Any) -> Gaussian:
    if not isinstance(event, Gaussian):
        raise TypeError(f"Expected event to be a Gaussian release, got {event!r}.")
    return event


@dataclasses.dataclass(frozen=True)
class PoissonSampled(Event):
    """A Gaussian release of a Poisson sample: each record takes part with probability q by itself.

    ZERO_OUT only. Shuffled or sequential batches are not Poisson samples and have no event here.

    Attributes:
      event: the Gaussian release, its multiplier noise_std/clip_norm.
      sampling_rate: q in [0, 1].
    """

    event: Gaussian
    sampling_rate: float

    def __post_init__(self):
        _sampled_gaussian(self.event)
        rate = _check.real("sampling_rate", self.sampling_rate, low=0, high=1)
        object.__setattr__(self, "sampling_rate", rate)

    def __str__(self):
        return f"Poisson sample at rate {self.sampling_rate:.6g}: {self.event}"


@dataclasses.dataclass(frozen=True)
class TruncatedPoissonSampled(Event):
    """A Poisson sample of which at most `capacity` records are kept, for fixed shapes.

    ZERO_OUT only, with the number of records public. An overflow is charged to δ; records beyond
    the capacity are dropped, never redrawn.

    Attributes:
      event: the Gaussian release, its multiplier noise_std/clip_norm.
      sampling_rate: q in [0, 1].
      records: how many records there are, public, ≥ 1.
      capacity: how many of a sample are kept, ≥ 1.
    """

    event: Gaussian
    sampling_rate: float
    records: int
    capacity: int

    def __post_init__(self):
        _sampled_gaussian(self.event)
        rate = _check.real("sampling_rate", self.sampling_rate, low=0, high=1)
        object.__setattr__(self, "sampling_rate", rate)
        for name in ("records", "capacity"):
            checked = _check.integer(name, getattr(self, name), low=1, high=1 << 53)
            object.__setattr__(self, name, checked)

    def __str__(self):
        return (
            f"Poisson sample at rate {self.sampling_rate:.6g} of {self.records:,} records, at most "
            f"{self.capacity:,} kept: {self.event}"
        )


@dataclasses.dataclass(frozen=True)
class SampledWithoutReplacement(Event):
    """A Gaussian release of a sample of fixed size, drawn without replacement.

    REPLACE_ONE only: noise and clip are given separately, because replacing a record moves the sum
    by 2·clip_norm.

    Attributes:
      noise_std: standard deviation of the noise on the sum, ≥ 0; 0 costs ∞.
      clip_norm: norm that each record's contribution is clipped to, > 0.
      sample_size: records in a sample, in [1, records].
      records: how many records there are, public, ≥ 1.
      coordinates: as in `Gaussian`.
      radius_bits: as in `Gaussian`.
    """

    noise_std: float
    clip_norm: float
    sample_size: int
    records: int
    coordinates: int = 0
    radius_bits: int = RADIUS_BITS

    def __post_init__(self):
        std = _check.real("noise_std", self.noise_std, low=0)
        clip = _check.real("clip_norm", self.clip_norm, low=0, open_low=True)
        records = _check.integer("records", self.records, low=1, high=1 << 53)
        size = _check.integer("sample_size", self.sample_size, low=1, high=records)
        for name, value in zip(
            ("noise_std", "clip_norm", "sample_size", "records"),
            (std, clip, size, records),
            strict=True,
        ):
            object.__setattr__(self, name, value)
        _cut_off_fields(self)

    def __str__(self):
        return (
            f"sample of {self.sample_size:,} of {self.records:,} records without replacement: "
            f"noise std {self.noise_std:.6g}, clip norm {self.clip_norm:.6g}"
        )


@dataclasses.dataclass(frozen=True)
class Deviation(Event):
    """What runs is not quite what the events beside it say: its law is within a distance of theirs.

    It costs (1 + e^ε)·total_variation of δ (E1 in charge.md).

    Attributes:
      total_variation: distance between the two laws on every data set, in [0, 1].
    """

    total_variation: float

    def __post_init__(self):
        checked = _check.real("total_variation", self.total_variation, low=0, high=1)
        object.__setattr__(self, "total_variation", checked)

    def __str__(self):
        return f"deviation of total variation {self.total_variation:.6g} from what is charged"


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


def adjacency_of(event: Event, known: str = "") -> str:
    """The adjacency that the sampled releases inside an event need.

    Args:
      event: any event.
      known: what releases beside it need, "" for no need.

    Returns:
      "ZERO_OUT", "REPLACE_ONE", or "" where nothing is sampled.

    Raises:
      ValueError: if two releases need different ones.

    Example:
      >>> adjacency_of(PoissonSampled(Gaussian(1.0), 0.1))
      'ZERO_OUT'
    """
    for leaf in leaves(event):
        if isinstance(leaf, PoissonSampled | TruncatedPoissonSampled):
            needs = "ZERO_OUT"
        elif isinstance(leaf, SampledWithoutReplacement):
            needs = "REPLACE_ONE"
        else:
            continue
        if known not in ("", needs):
            raise ValueError(
                "Expected releases for one adjacency, got Poisson sampling (ZERO_OUT) beside "
                "sampling without replacement (REPLACE_ONE). Account for them separately."
            )
        known = needs
    return known
