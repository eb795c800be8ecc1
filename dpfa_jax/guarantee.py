"""What every mechanism has: checked fields, an event, and a guarantee that can be read aloud."""

import dataclasses
from typing import Any, ClassVar

from dpfa_jax import _check, accounting
from dpfa_jax.adjacency import Adjacency
from dpfa_jax.arguments import Call


def check_adjacency(value: Any, allowed: tuple[str, ...], name: str) -> None:
    """Refuse an adjacency for which the mechanism has no statement.

    Args:
      value: what the caller passed.
      allowed: kinds with a statement.
      name: of the mechanism.

    Raises:
      TypeError: for anything but an adjacency.
      ValueError: for another kind.
    """
    if not isinstance(value, Adjacency):
        raise TypeError(
            f"Expected adjacency to be one of dpfa_jax.ZERO_OUT, REPLACE_ONE, GROUP(rows), "
            f"got {value!r}."
        )
    if value.kind not in allowed:
        raise ValueError(f"Expected adjacency {' or '.join(allowed)} for {name}, got {value}.")


class Mechanism:
    """A way to release attention; one of the dataclasses below.

    Every mechanism has `event(query_shape, key_shape, value_shape)` and `guarantee(...)`; its
    repr is its guarantee without a call.
    """

    statement: ClassVar[str] = ""
    protects: ClassVar[str] = ""
    _positive: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        for name in self._positive:
            value = getattr(self, name)
            if name == "noise_multiplier" and isinstance(value, int | float) and value == 0:
                raise ValueError(
                    "Expected noise_multiplier > 0, got 0. Use NonPrivate() for an answer without "
                    "noise: it says so in its event, which costs infinity."
                )
            checked = _check.real(name, value, low=0, open_low=True)
            object.__setattr__(self, name, checked)
        for name in ("score_cap", "floor", "denominator_weight"):
            value = getattr(self, name, None)
            if value is not None:
                low = None if name == "score_cap" else 0
                checked = _check.real(name, value, low=low, open_low=name == "floor")
                object.__setattr__(self, name, checked)
        if hasattr(self, "disjoint_batch"):
            _check.flag("disjoint_batch", self.disjoint_batch)  # pyright: ignore

    def event(self, query_shape: Any, key_shape: Any, value_shape: Any = None) -> accounting.Event:
        """What one call with these shapes is charged as.

        Args:
          query_shape: (B, T, N, H).
          key_shape: (B or 1, S, K, H).
          value_shape: (B or 1, S, K, h); by default the key's.

        Returns:
          An accounting event.
        """
        return self._event(Call.of(query_shape, key_shape, value_shape))

    def count(self, query_shape: Any, key_shape: Any, value_shape: Any = None) -> int:
        """How many queries (over all kv heads) the charge of one record counts.

        Args:
          query_shape: (B, T, N, H).
          key_shape: (B or 1, S, K, H).
          value_shape: (B or 1, S, K, h); by default the key's.

        Returns:
          m summed over kv heads. Equality.
        """
        call = Call.of(query_shape, key_shape, value_shape)
        return call.reads(getattr(self, "disjoint_batch", False))

    def guarantee(
        self,
        query_shape: Any = None,
        key_shape: Any = None,
        value_shape: Any = None,
        *,
        delta: float | None = None,
        queries: str = "public",
    ) -> str:
        """The guarantee as sentences; with shapes it names the count, with delta also ε.

        Args:
          query_shape: (B, T, N, H), or None for the mechanism alone.
          key_shape: (B or 1, S, K, H).
          value_shape: (B or 1, S, K, h); by default the key's.
          delta: δ ∈ (0, 1) at which ε is stated, or None.
          queries: what the caller promised of the queries.
        """
        fields = ", ".join(
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)  # pyright: ignore
        )
        sentence = f"{type(self).__name__}({fields}): {self.statement}"
        if query_shape is None:
            return f"{sentence} {self.protects}".strip()
        call = Call.of(query_shape, key_shape, value_shape)
        event = self._event(call)
        counted = call.reads(getattr(self, "disjoint_batch", False))
        sentence += f" This call counts {counted:,} queries ({queries} by the caller's promise)"
        sentence += f" against {call.keys:,} records and is charged as: {event}."
        if delta is not None:
            epsilon = accounting.epsilon(event, delta)
            sentence += f" Alone it is (ε = {epsilon:.4g}, δ = {delta:g})."
        return f"{sentence} {self.protects}".strip()

    def _event(self, call: Call) -> accounting.Event:
        raise NotImplementedError

    def __repr__(self):
        return self.guarantee()
