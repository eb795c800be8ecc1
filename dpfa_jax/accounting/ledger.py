"""What was released, written down: a history as a value, and a file that shows tampering.

The file holds one JSON object per line; each carries the hash of the line before it. Changing,
removing, inserting or reordering a line breaks the chain from there on. Cutting lines off the *end*
leaves a shorter valid chain: keep the last hash (`head`) elsewhere and give it to `verify`.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

from dpfa_jax import _check
from dpfa_jax.accounting import charge
from dpfa_jax.accounting import event as events_lib
from dpfa_jax.accounting.event import Event

GENESIS = "0" * 64
"""What the first line names as the hash of the line before it."""

_KINDS = (
    events_lib.Gaussian,
    events_lib.Laplace,
    events_lib.DiscreteGaussian,
    events_lib.ExponentialMechanism,
    events_lib.RandomizedResponse,
    events_lib.BoundedRange,
    events_lib.Skellam,
    events_lib.PoissonSampled,
    events_lib.TruncatedPoissonSampled,
    events_lib.SampledWithoutReplacement,
    events_lib.Deviation,
    events_lib.NonPrivate,
    events_lib.NoRelease,
    events_lib.Composed,
    events_lib.Repeated,
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a history.

    Attributes:
      event: what was released.
      count: how often, ≥ 1.
      label: whose it is (a layer, a head, a step, a query), for people.

    Guarantee: V1 (ledger.md).
    """

    event: Event
    count: int = 1
    label: str = ""

    def __post_init__(self):
        events_lib.check_event("event", self.event)
        object.__setattr__(self, "count", _check.integer("count", self.count, low=1))
        if not isinstance(self.label, str):
            raise TypeError(f"Expected label to be a string, got {self.label!r}.")


def _add(counts: dict[Event, int], entry: Entry) -> None:
    for leaf, times in events_lib.leaves(entry.event).items():
        counts[leaf] = counts.get(leaf, 0) + times * entry.count


def _added(counts: Mapping[Event, int], entry: Entry) -> Mapping[Event, int]:
    copy = dict(counts)
    _add(copy, entry)
    return types.MappingProxyType(copy)


@dataclasses.dataclass(frozen=True)
class History:
    """Releases of the same data in the order they happened: an immutable value.

    Attributes:
      entries: the releases.

    Guarantee: V1 (ledger.md).

    Example:
      >>> history = History().spend(events_lib.Gaussian(4.0), 8, label="layer 0")
      >>> history = history.spend(events_lib.Laplace(9.0), label="count")
      >>> round(history.epsilon(1e-5), 2)
      3.05
    """

    entries: tuple[Entry, ...] = ()

    def spend(self, event: Event, count: int = 1, *, label: str = "") -> "History":
        """The history with `count` more releases of an event.

        Args:
          event: what was released.
          count: how often, ≥ 1.
          label: whose it is, for people.

        Returns:
          A new history; this one is unchanged.
        """
        entry = Entry(event, count, label)
        longer = History((*self.entries, entry))
        # What was added up for this history need not be added up again for the longer one.
        longer.__dict__["_counts"] = _added(self._counts, entry)
        return longer

    @functools.cached_property
    def _counts(self) -> Mapping[Event, int]:
        counts: dict[Event, int] = {}
        for entry in self.entries:
            _add(counts, entry)
        return types.MappingProxyType(counts)

    @property
    def event(self) -> Event:
        """Everything released, as one event."""
        parts = tuple(events_lib.Repeated(leaf, count) for leaf, count in self._counts.items())
        return events_lib.Composed(parts) if parts else events_lib.NoRelease()

    def epsilon(self, delta: float) -> float:
        """ε of everything released.

        Args:
          delta: in [0, 1).

        Returns:
          Upper bound: `accounting.epsilon(history.event, delta)`.

        Guarantee: E1 (charge.md).
        """
        return charge.epsilon(self.event, delta)

    def by_label(self, delta: float) -> dict[str, float]:
        """ε of each label's releases by themselves; they do not add up to the total.

        Args:
          delta: in [0, 1), for each label.

        Returns:
          Upper bounds, label by label in order of first occurrence.

        Guarantee: E1 (charge.md).
        """
        parts: dict[str, History] = {}
        for entry in self.entries:
            known = parts.get(entry.label, History())
            parts[entry.label] = History((*known.entries, entry))
        return {label: part.epsilon(delta) for label, part in parts.items()}


def to_json(event: Event) -> dict[str, Any]:
    """An event as plain JSON values; `from_json` gives it back, bit for bit.

    Args:
      event: any event of this package.

    Returns:
      A dictionary with the event's class under "kind".

    Raises:
      TypeError: for what is no event of this package.

    Guarantee: V1 (ledger.md).

    Example:
      >>> to_json(events_lib.Repeated(events_lib.Laplace(2.0), 3))
      {'kind': 'Repeated', 'event': {'kind': 'Laplace', 'noise_multiplier': 2.0}, 'count': 3}
    """
    events_lib.check_event("event", event)
    if type(event) not in _KINDS:
        raise TypeError(f"Expected an event of dpfa_jax.accounting, got {event!r}.")
    written: dict[str, Any] = {"kind": type(event).__name__}
    for field in dataclasses.fields(event):  # pyright: ignore[reportArgumentType]
        value = getattr(event, field.name)
        if isinstance(value, Event):
            value = to_json(value)
        elif isinstance(value, tuple):
            value = [to_json(each) for each in value]
        elif isinstance(value, float) and value == math.inf:
            value = "inf"  # JSON has no infinity
        written[field.name] = value
    return written


def from_json(written: Any) -> Event:
    """The event that `to_json` wrote.

    Args:
      written: a dictionary made by `to_json`.

    Returns:
      An equal event, checked anew.

    Raises:
      ValueError: for an unknown kind, a missing, unknown or bad field.

    Guarantee: V1 (ledger.md).
    """
    if not isinstance(written, dict):
        raise ValueError(f"Expected an event as a JSON object, got {written!r}.")
    kinds = {kind.__name__: kind for kind in _KINDS}
    kind = kinds.get(written.get("kind", ""))
    if kind is None:
        raise ValueError(f"Expected kind to be one of {', '.join(kinds)}, got {written!r}.")
    names = [field.name for field in dataclasses.fields(kind)]
    if sorted(written) != sorted(["kind", *names]):
        raise ValueError(f"Expected {kind.__name__} with {names}, got {sorted(written)}.")
    arguments = {}
    for name in names:
        value = written[name]
        if isinstance(value, dict):
            value = from_json(value)
        elif isinstance(value, list):
            value = tuple(from_json(each) for each in value)
        elif value == "inf":
            value = math.inf
        arguments[name] = value
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"Expected a valid {kind.__name__}: {error}") from error


def _hash(previous: str, body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(f"{previous}\n{text}".encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Verification:
    """What a ledger file says, once its chain has been checked.

    Attributes:
      history: the releases in it.
      head: hash of its last line; keep it elsewhere.

    Guarantee: V1 (ledger.md).
    """

    history: History
    head: str


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    text = path.read_bytes().decode("utf-8")
    if text and not text.endswith("\n"):
        raise ValueError(
            f"{path}: the last line is incomplete (a crash while writing?). Nothing after the line "
            "before it is certain."
        )
    yield from enumerate(text.split("\n")[:-1], start=1)


def _only_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def verify(path: str | os.PathLike[str], *, head: str | None = None) -> Verification:
    """The history in a ledger file, after checking every link of its chain.

    Args:
      path: a file written by `append`.
      head: hash of the last line as noted elsewhere; without it, lines cut off the end are missed.

    Returns:
      The history and the hash of the last line.

    Raises:
      ValueError: for the first line that is not what was appended, or another head.
      OSError: if the file cannot be read.

    Guarantee: V1 (ledger.md).
    """
    path = pathlib.Path(path)
    previous, entries = GENESIS, []
    for number, line in _lines(path):
        try:
            record = json.loads(line, object_pairs_hook=_only_once)
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
            if sorted(record) != ["count", "event", "hash", "index", "label", "previous"]:
                raise ValueError(f"unexpected fields {sorted(record)}")
            claimed = record.pop("hash")
            if record["index"] != number - 1 or isinstance(record["index"], bool):
                raise ValueError(f"index {record['index']} where {number - 1} is due")
            if record["previous"] != previous:
                raise ValueError("it does not follow the line before it")
            if claimed != _hash(previous, record):
                raise ValueError("its content does not match its hash")
            entries.append(Entry(from_json(record["event"]), record["count"], record["label"]))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}.") from error
        previous = claimed
    if head is not None and head != previous:
        raise ValueError(
            f"{path}: ends with {previous}, not with {head}: lines were cut off or added."
        )
    return Verification(History(tuple(entries)), previous)


def append(
    path: str | os.PathLike[str], event: Event, count: int = 1, *, label: str = ""
) -> Verification:
    """Adds one entry to a ledger file, under a lock, after verifying what is there.

    Args:
      path: the file; made if it does not exist.
      event: what was released. Append *before* releasing: a crash then over-states the cost.
      count: how often, ≥ 1.
      label: whose it is, for people.

    Returns:
      The history with the entry, and the new head to keep elsewhere.

    Raises:
      ValueError: if the file is damaged; nothing is written then.
      OSError: if the file cannot be written.

    Guarantee: V1 (ledger.md).
    """
    import fcntl

    entry = Entry(event, count, label)
    path = pathlib.Path(path)
    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        so_far = verify(path)
        body = {
            "index": len(so_far.history.entries),
            "event": to_json(entry.event),
            "count": entry.count,
            "label": entry.label,
            "previous": so_far.head,
        }
        head = _hash(so_far.head, body)
        file.write(json.dumps(body | {"hash": head}, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return Verification(History((*so_far.history.entries, entry)), head)
