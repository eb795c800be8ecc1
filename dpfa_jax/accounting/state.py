"""A ledger that travels through jit: int32 counts, ε rounded up there, in float64 on the host."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dpfa_jax import _check
from dpfa_jax.accounting import charge, upward
from dpfa_jax.accounting import event as events_lib
from dpfa_jax.accounting.event import Event

SATURATED = 2**31 - 1
"""A count that has reached this value is no longer known: it costs ∞."""

_ORDERS = 1.0 + np.geomspace(1e-3, 1e5, 250)
_ORDERS.setflags(write=False)


def _add(counts: Array, more: Array) -> Array:
    """Sum of counts ≥ 0 that sticks at SATURATED; a negative count goes there too."""
    room = SATURATED - counts
    full = (more < 0) | (counts < 0) | (more >= room)
    return jnp.where(full, SATURATED, counts + jnp.where(full, 0, more))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ledger:
    """How often each of a fixed set of releases has happened. A pytree: state in, state out.

    Attributes:
      events: the distinct releases that it can count; static, part of the tree's structure.
      counts: int32, one per event; 2³¹ − 1 means "unknown" and costs ∞.

    Guarantee: L1 (state.md).

    Example:
      >>> from dpfa_jax import accounting
      >>> step = accounting.Gaussian(10.0)
      >>> ledger = jax.jit(lambda ledger: ledger.spend(step))(Ledger.create(step))
      >>> ledger.event
      Repeated(event=Gaussian(noise_multiplier=10.0, coordinates=0, radius_bits=40), count=1)
    """

    events: tuple[Event, ...] = dataclasses.field(metadata={"static": True})
    counts: Any

    @classmethod
    def create(cls, *events: Event) -> Ledger:
        """A ledger with nothing spent that can count the releases inside these events.

        Args:
          *events: what may be spent; compositions are taken apart.
        """
        leaves: dict[Event, int] = {}
        for event in events:
            leaves |= events_lib.leaves(event)
        return cls(tuple(leaves), jnp.zeros(len(leaves), jnp.int32))

    def spend(self, event: Event, count: int | Array = 1) -> Ledger:
        """The ledger after `count` more releases of an event.

        Args:
          event: a release, or a composition of releases, that the ledger was created for.
          count: how often, ≥ 0; may be a traced integer. Negative: the count saturates.

        Raises:
          ValueError: for an event the ledger does not know, or a negative static count.
          TypeError: for a count that is no integer.
        """
        leaves = events_lib.leaves(event)
        for leaf in leaves:
            if leaf not in self.events:
                raise ValueError(
                    f"Expected an event this ledger was created for, got {leaf}. Create the "
                    f"ledger with Ledger.create(...) of every event that will be spent."
                )
        if not isinstance(count, jax.Array):
            # Static counts may exceed int32: they saturate.
            times = jnp.int32(min(_check.integer("count", count, low=0), SATURATED))
        elif not jnp.issubdtype(count.dtype, jnp.integer) or count.shape != ():
            raise TypeError(f"Expected count to be one integer, got {count.dtype}{count.shape}.")
        else:
            high = count > SATURATED if jnp.iinfo(count.dtype).max > SATURATED else False
            times = jnp.where(high | (count < 0), SATURATED, count).astype(jnp.int32)
        counts = self.counts
        for index, leaf in enumerate(self.events):
            if leaf in leaves:
                each = min(leaves[leaf], SATURATED)
                fits = times <= SATURATED // each
                more = jnp.where(fits, times * each, jnp.where(times == 0, 0, SATURATED))
                counts = counts.at[index].set(_add(counts[index], more))
        return dataclasses.replace(self, counts=counts)

    def merge(self, other: Ledger) -> Ledger:
        """The ledger of both: releases of the same data counted in two places, all of them.

        Merge ledgers that started empty, never two copies of one: those count its past twice
        (an over-charge).

        Args:
          other: may know other events.
        """
        events = (*self.events, *(each for each in other.events if each not in self.events))
        counts = jnp.zeros(len(events), jnp.int32)
        for ledger in (self, other):
            places = jnp.array([events.index(each) for each in ledger.events], jnp.int32)
            spread = jnp.zeros(len(events), jnp.int32).at[places].set(ledger.counts)
            counts = _add(counts, spread)
        return Ledger(events, counts)

    @property
    def event(self) -> Event:
        """What has been spent, as an event; on the host, outside jit.

        A count that is saturated, negative or not an integer becomes `NonPrivate()`.
        """
        counts = np.asarray(self.counts)
        if counts.shape != (len(self.events),) or not np.issubdtype(counts.dtype, np.integer):
            return events_lib.NonPrivate()
        parts = []
        for each, count in zip(self.events, counts.tolist(), strict=True):
            if not 0 <= count < SATURATED:
                return events_lib.NonPrivate()
            if count:
                parts.append(events_lib.Repeated(each, count))
        if not parts:
            return events_lib.NoRelease()
        return parts[0] if len(parts) == 1 else events_lib.Composed(tuple(parts))

    def epsilon(self, delta: float) -> float:
        """ε of everything spent, on the host: `accounting.epsilon(ledger.event, delta)`.

        Args:
          delta: in [0, 1).

        Returns:
          Upper bound; ∞ where a count is saturated.
        """
        return charge.epsilon(self.event, delta)

    def traced_epsilon(self, delta: float) -> Array:
        """ε of everything spent, inside jit.

        Args:
          delta: static, in [0, 1).

        Returns:
          float32 upper bound of what the RDP of the releases certifies, about 1e-3 above it
          (Gaussian releases alone are tighter on the host, by their exact curve); ∞ where a count
          is saturated or damaged.

        Raises:
          ValueError: for a bad δ, or events of different adjacencies.

        Guarantee: L2 (state.md).
        """
        delta = _check.real("delta", delta, low=0, high=1, open_high=True)
        if not self.events:
            return jnp.float32(0.0)
        events_lib.adjacency_of(events_lib.Composed(self.events))
        each = [charge.profile_of(event) for event in self.events]
        ends = [[one.log_factor, one.flux, one.variation] for one in each]
        curves = [charge.rdp_curve(event, _ORDERS) for event in self.events]
        costs = upward.at_least(np.concatenate([ends, curves], axis=1))
        counts = jnp.asarray(self.counts, jnp.float32)[:, None] * (1.0 + 2.0**-20)
        total = jnp.sum(jnp.where(counts == 0, 0.0, counts * costs), axis=0) * (1.0 + 2.0**-12)
        found = upward.epsilon_beside(_ORDERS, total[3:], delta, (total[0], total[1]), total[2])
        known = jnp.all((self.counts >= 0) & (self.counts < SATURATED))
        return jnp.where(known, found, jnp.inf)
