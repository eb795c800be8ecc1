"""Privacy loss distributions: the number to publish, from dp_accounting, loaded on demand."""

import math
from typing import TYPE_CHECKING

from dpfa_jax import _check
from dpfa_jax.accounting import charge, rdp
from dpfa_jax.accounting import event as events_lib
from dpfa_jax.accounting.event import Event

if TYPE_CHECKING:
    from dp_accounting import dp_event as dp

_PURE = (
    events_lib.ExponentialMechanism,
    events_lib.RandomizedResponse,
    events_lib.BoundedRange,
)


_UP = 1.0 + 2.0**-48


def _leaf(leaf: Event) -> "dp.DpEvent":
    from dp_accounting import dp_event as dp

    match leaf:
        case events_lib.NonPrivate():
            return dp.NonPrivateDpEvent()
        case events_lib.Gaussian():
            return dp.GaussianDpEvent(leaf.noise_multiplier)
        case events_lib.Laplace():
            return dp.LaplaceDpEvent(leaf.noise_multiplier)
        case events_lib.DiscreteGaussian():
            return dp.ZCDpEvent(rdp.zcdp_of_gaussian(leaf.noise_multiplier))
        case events_lib.PoissonSampled():
            gaussian = dp.GaussianDpEvent(leaf.event.noise_multiplier)
            return dp.PoissonSampledDpEvent(leaf.sampling_rate, gaussian)
        case events_lib.TruncatedPoissonSampled():
            return dp.TruncatedSubsampledGaussianDpEvent(
                leaf.records, leaf.sampling_rate, leaf.capacity, leaf.event.noise_multiplier
            )
        case events_lib.SampledWithoutReplacement():
            # Replacing a record moves the sum by 2·clip_norm: the multiplier is half of s/C.
            gaussian = dp.GaussianDpEvent(leaf.noise_std / (2.0 * leaf.clip_norm))
            return dp.SampledWithoutReplacementDpEvent(leaf.records, leaf.sample_size, gaussian)
    raise NotImplementedError(
        f"dp_accounting 0.6.0 has no event for {type(leaf).__name__}; account for it with RDP."
    )


def dp_event(event: Event) -> "dp.DpEvent":
    """The event in dp_accounting's language, with ideal noise: its cut-off does not translate.

    Args:
      event: what was released.

    Returns:
      A `dp_accounting.DpEvent`: equality in everything that event can say.

    Raises:
      NotImplementedError: for a leaf that dp_accounting has no event for.

    Guarantee: P1 (pld.md).

    Example:
      >>> dp_event(events_lib.Repeated(events_lib.Gaussian(2.0), 3))
      SelfComposedDpEvent(event=GaussianDpEvent(noise_multiplier=2.0), count=3)
    """
    from dp_accounting import dp_event as dp

    parts = [
        _leaf(leaf) if count == 1 else dp.SelfComposedDpEvent(_leaf(leaf), count)
        for leaf, count in events_lib.leaves(event).items()
    ]
    if not parts:
        return dp.NoOpDpEvent()
    return parts[0] if len(parts) == 1 else dp.ComposedDpEvent(parts)


def _split(event: Event) -> tuple[Event, Event, float, float]:
    """(what has a loss distribution, the same without truncation, Σε of the pure rest, Στ).

    Where a record that is drawn may displace another one under noise that ends, the first is the
    second too, and τ is its overflow; τ holds every `Deviation` as well.
    """
    exact, ideal, apart, pure = [], [], [], 0.0
    for leaf, count in events_lib.leaves(event).items():
        if isinstance(leaf, _PURE):
            bound = leaf.bound if isinstance(leaf, events_lib.BoundedRange) else leaf.epsilon
            pure += charge.times(count, bound)
            continue
        known = (
            events_lib.Gaussian,
            events_lib.Laplace,
            events_lib.PoissonSampled,
            events_lib.TruncatedPoissonSampled,
            events_lib.Deviation,
            events_lib.NonPrivate,
        )
        if not isinstance(leaf, known):
            raise NotImplementedError(
                f"{type(leaf).__name__} has no privacy loss distribution here; its RDP curve is "
                "what can be charged."
            )
        whole = events_lib.Repeated(leaf, count)
        if isinstance(leaf, events_lib.Deviation):
            apart.append(whole)
            continue
        plain = whole
        if isinstance(leaf, events_lib.TruncatedPoissonSampled):
            poisson = events_lib.PoissonSampled(leaf.event, leaf.sampling_rate)
            plain = events_lib.Repeated(poisson, count)
            if leaf.event.coordinates:
                apart.append(whole)
                whole = plain
        exact.append(whole)
        ideal.append(plain)
    variation = charge.profile_of(events_lib.Composed(apart)).variation if apart else 0.0
    if not exact:
        return events_lib.NoRelease(), events_lib.NoRelease(), pure * _UP, variation
    return events_lib.Composed(exact), events_lib.Composed(ideal), pure * _UP, variation


def epsilon(event: Event, delta: float, *, discretization: float = 1e-4) -> float:
    """ε at δ from the privacy loss distribution of everything inside the event.

    Truncated Poisson sampling is charged by its own distribution (ZERO_OUT, dropped at random), or,
    where its noise ends, as Poisson sampling beside its overflow; overflow, `Deviation` and the
    noise cut-off as in `accounting.epsilon`, pure releases by their Σε.

    Args:
      event: what was released.
      delta: in (0, 1).
      discretization: width of the loss grid, nats, in [1e-6, 1]; losses are rounded up.

    Returns:
      Upper bound, exact up to the grid: the number to publish for a plan fixed in advance.

    Raises:
      NotImplementedError: for a leaf without a loss distribution, or a cost beyond ε = 1000.
      ValueError: for NaN or an argument outside its range.

    Guarantee: P1 (pld.md). Never stop a run "when this crosses a budget": use a filter.

    Example:
      >>> round(epsilon(events_lib.Gaussian(3.731), 1e-5), 3)
      1.0
    """
    tolerance = _check.real("delta", delta, low=0, high=1, open_low=True, open_high=True)
    width = _check.real("discretization", discretization, low=1e-6, high=1)
    exact, ideal, pure, variation = _split(event)
    profile = charge.profile_of(ideal)
    left = charge.ideal_tolerance(profile, tolerance)
    if not left > 0.0 or pure == math.inf:
        return math.inf
    rough = charge.epsilon(ideal, tolerance)
    if rough == 0.0 and exact == ideal and variation == 0.0:
        return pure
    if rough == math.inf:
        return math.inf
    if not rough <= 1000.0:
        raise NotImplementedError(
            f"a loss distribution for epsilon {rough:.3g} would not fit; the RDP value stands"
        )
    from dp_accounting.pld import pld_privacy_accountant

    relation = pld_privacy_accountant.NeighborRel.ADD_OR_REMOVE_ONE
    if any(
        isinstance(leaf, events_lib.TruncatedPoissonSampled) for leaf in events_lib.leaves(exact)
    ):
        relation = pld_privacy_accountant.NeighborRel.REPLACE_SPECIAL
    accountant = pld_privacy_accountant.PLDAccountant(relation, max(width, rough * 1e-5))
    accountant.compose(dp_event(exact))
    found = 0.0
    for _ in range(200):  # (1 + e^ε)·variation is paid from δ: iterate from below, as in charge
        charged = (1.0 + math.exp(min(found + pure, 700.0))) * variation * _UP
        left = charge.ideal_tolerance(profile, tolerance - charged)
        needed = float(accountant.get_epsilon(left)) if left > 0.0 else math.inf
        if not needed >= 0.0:
            raise ArithmeticError(f"dp_accounting returned epsilon {needed} for {exact}.")
        if needed <= found or variation == 0.0 or needed == math.inf:
            return max(needed, found) + pure
        found = needed * (1.0 + 1e-9)
    return math.inf
