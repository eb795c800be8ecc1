"""What releases cost somebody who owns several rows: GROUP(r) for every event.

Each row is clipped, sampled and noised as before; the unit of privacy is up to `rows` of them
together (a document, a patient). The event for the group is again an event, so every accountant
takes it.
"""

import dataclasses
import math

from dpfa_jax import _check
from dpfa_jax.accounting import event as events_lib
from dpfa_jax.accounting import subsample
from dpfa_jax.accounting.event import Event

_UP = 1.0 + 2.0**-50


def _leaf(leaf: Event, rows: int) -> Event:
    match leaf:
        case events_lib.Gaussian() | events_lib.Laplace() | events_lib.DiscreteGaussian():
            return dataclasses.replace(leaf, noise_multiplier=leaf.noise_multiplier / rows / _UP)
        case events_lib.ExponentialMechanism():
            return events_lib.ExponentialMechanism(
                leaf.epsilon * rows * _UP, leaf.zcdp * rows * _UP * rows * _UP
            )
        case events_lib.RandomizedResponse():
            return events_lib.RandomizedResponse(leaf.epsilon * rows * _UP)
        case events_lib.BoundedRange():
            return events_lib.BoundedRange(leaf.bound * rows * _UP)
        case events_lib.Skellam():
            first, second = leaf.l1_sensitivity * rows * _UP, leaf.l2_sensitivity * rows * _UP
            return events_lib.Skellam(leaf.noise_std, first, second)
        case events_lib.PoissonSampled():
            rate = leaf.sampling_rate
            if 0.0 < rate < 1.0:
                rate = min(-math.expm1(rows * math.log1p(-rate)) * (1.0 + 2.0**-46), 1.0)
            inner = _leaf(leaf.event, rows)
            assert isinstance(inner, events_lib.Gaussian)
            return events_lib.PoissonSampled(inner, rate)
        case events_lib.TruncatedPoissonSampled():
            overflow = subsample.poisson_overflow(leaf.records, leaf.sampling_rate, leaf.capacity)
            whole = _leaf(events_lib.PoissonSampled(leaf.event, leaf.sampling_rate), rows)
            return events_lib.Composed((whole, events_lib.Deviation(overflow)))
        case events_lib.SampledWithoutReplacement():
            return dataclasses.replace(
                leaf,
                clip_norm=leaf.clip_norm * rows * _UP,
                sample_size=min(leaf.sample_size * rows, leaf.records),
            )
        case events_lib.NonPrivate() | events_lib.Deviation():
            return leaf
    raise TypeError(f"Expected a known accounting event, got {leaf!r}. It has no group bound here.")


def grouped(event: Event, rows: int) -> Event:
    """What an event costs where up to `rows` rows belong to one person.

    For whole groups that are sampled and clipped as one record this is not needed: charge the event
    itself.

    Args:
      event: what was released, charged per row.
      rows: how many rows one person may own, public, ≥ 1.

    Returns:
      An event for the group: an upper bound, exact for Gaussian, Laplace and pure releases.

    Raises:
      TypeError: if `event` is not an event.
      ValueError: if `rows` is no whole number ≥ 1.

    Guarantee: GR1 (groups.md).

    Example:
      >>> step = events_lib.PoissonSampled(events_lib.Gaussian(4.0), 0.01)
      >>> group = grouped(step, 3)
      >>> round(group.sampling_rate, 6), round(group.event.noise_multiplier, 3)
      (0.029701, 1.333)
    """
    events_lib.check_event("event", event)
    rows = _check.integer("rows", rows, low=1, high=1 << 53)
    if rows == 1:
        return event
    parts = tuple(
        events_lib.Repeated(_leaf(leaf, rows), count)
        for leaf, count in events_lib.leaves(event).items()
    )
    if len(parts) > 1:
        return events_lib.Composed(parts)
    for only in parts:
        return only.event if only.count == 1 else only
    return events_lib.NoRelease()
