"""What each step of a run is charged, and how many fit: known before the data is touched.

A plan is a host value made from the arguments of `privatize` and the number of parameters. Its
`spend` runs inside jit.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax import _check, accounting, clipping, random, sampling
from dpfa_jax.accounting import filters, traced
from dpfa_jax.accounting import state as counts
from dpfa_jax.optim import account

RADIUS_BITS = random.WIDE_RADIUS_BITS
"""Of the noise of a step: what all scalars of all steps lose where it ends is charged to δ."""

_SHARE = 2.0**-7  # of δ that a scheduled run may lose to the noise cut-off, and to truncation
_LOG_FACTOR = 2.0**-7
# Steps of a schedule that are looked at, before the run, to choose the order of its filter.
_AHEAD = tuple(sorted({0, *(round(2.0 ** (k / 8)) for k in range(161))}))


@dataclasses.dataclass(frozen=True)
class Target:
    """What a run may cost in all.

    Attributes:
      epsilon: nats, > 0 and finite.
      delta: in (0, 1).
    """

    epsilon: float
    delta: float

    @classmethod
    def of(cls, target: Any) -> "Target | None":
        """The pair (ε, δ) as a target, or None.

        Args:
          target: None, or two numbers.

        Returns:
          A checked target, or None.

        Raises:
          TypeError, ValueError: for anything else.
        """
        if target is None:
            return None
        try:
            epsilon, delta = target
        except (TypeError, ValueError) as error:
            raise TypeError(f"Expected target to be (epsilon, delta), got {target!r}.") from error
        return cls(
            _check.real("epsilon", epsilon, low=0, open_low=True),
            _check.real("delta", delta, low=0, high=1, open_low=True, open_high=True),
        )


@functools.lru_cache(maxsize=64)
def steps_within(event: accounting.Event, target: Target) -> int:
    """How many releases of one event a target allows, fixed before the first of them.

    Args:
      event: one step.
      target: of the whole run.

    Returns:
      The largest count whose `accounting.epsilon` keeps to the target, found by doubling and
      bisection, below 2³¹ − 1.

    Raises:
      ValueError: if not even one step fits.

    Guarantee: O1 (plan.md).
    """

    def fits(count: int) -> bool:
        repeated = accounting.Repeated(event, count)
        return accounting.epsilon(repeated, target.delta) <= target.epsilon

    low, high = 0, 1
    while high < counts.SATURATED and fits(high):
        low, high = high, 2 * high
    high = min(high, counts.SATURATED)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low == 0:
        one = accounting.epsilon(event, target.delta)
        raise ValueError(
            f"Expected a target that allows at least one step, got epsilon={target.epsilon}, "
            f"delta={target.delta}, where one step costs {one:.4g} ({event}). Raise "
            "noise_multiplier or the target."
        )
    return low


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Every step has the same noise multiplier: releases are counted.

    Attributes:
      noise_multiplier: noise_std over sensitivity, ≥ 0.
      sampling: the sampler.
      coordinates: parameters, each of which is released with noise.
      target: or None.
      count_noise_std: of the count of each step that moves the clip norm, or None.

    Guarantee: O1 (plan.md).
    """

    noise_multiplier: float
    sampling: sampling.Sampler
    coordinates: int
    target: Target | None
    count_noise_std: float | None = None

    @property
    def event(self) -> accounting.Event:
        """What a step is charged as, with its count where there is one."""
        if self.count_noise_std is None or self.noise_multiplier == 0.0:
            return self.sampling.event(self.noise_multiplier, self.coordinates, RADIUS_BITS)
        count = clipping.threshold_event(self.count_noise_std, self.sampling.adjacency)
        moved = math.hypot(1.0 / self.noise_multiplier, 1.0 / count.noise_multiplier)
        together = (1.0 - 2.0**-50) / moved
        return self.sampling.event(together, self.coordinates + 1, RADIUS_BITS)

    def create(self) -> accounting.Ledger:
        """The account before the first step."""
        if self.target is not None:
            steps_within(self.event, self.target)
        return accounting.Ledger.create(self.event)

    def spend(self, ledger: accounting.Ledger) -> tuple[accounting.Ledger, Any, float]:
        """One step more, if it fits.

        Args:
          ledger: of the steps so far.

        Returns:
          (ledger, go, noise_multiplier): the account after it, whether it may be released (True,
          or a traced bool), and its noise.

        Raises:
          ValueError: for an account of another event.
        """
        if self.event not in ledger.events:
            raise ValueError(
                f"Expected an account of {self.event}, got one of {ledger.events}: the state comes "
                "from another sampler, noise multiplier or model. Use the transformation that "
                "made it."
            )
        after = ledger.spend(self.event)
        if self.target is None:
            return after, True, self.noise_multiplier
        allowed = steps_within(self.event, self.target)
        count = after.counts[after.events.index(self.event)]
        go = (count > 0) & (count <= allowed)
        kept = dataclasses.replace(after, counts=jnp.where(go, after.counts, ledger.counts))
        return kept, go, self.noise_multiplier


@dataclasses.dataclass(frozen=True)
class Caps:
    """What a scheduled run under a target may add up to, each fixed before the first step.

    Attributes:
      index: which of `traced.ORDERS` the budget is held at.
      rdp: most RDP at that order.
      flux: most of δ that the noise cut-off may take.
      log_factor: most of the cut-off's factor.
      steps: most steps, for the truncation of the samples.

    Guarantee: O5 (plan.md).
    """

    index: int
    rdp: float
    flux: float
    log_factor: float
    steps: int


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """The noise multiplier is a function of the number of steps released: costs are added up.

    Attributes:
      schedule: an optax schedule.
      sampling: the sampler.
      coordinates: parameters, each of which is released with noise.
      target: or None.

    Guarantee: O2 (account.md), O5 (plan.md).
    """

    schedule: account.Schedule
    sampling: sampling.Poisson | sampling.TruncatedPoisson
    coordinates: int
    target: Target | None

    @property
    def event(self) -> accounting.Event:
        """What a step is charged as where only the event can speak: no guarantee."""
        return accounting.NonPrivate()

    def create(self) -> account.ScheduledLedger:
        """The account before the first step."""
        self.caps()
        return account.ScheduledLedger(traced.TracedLedger.create(), self.sampling)

    def multiplier(self, count: Any) -> jax.Array:
        """The noise multiplier of the step after `count` released ones; NaN for what is none.

        Args:
          count: int32 scalar.

        Returns:
          float32 scalar.

        Raises:
          TypeError: if the schedule gives anything but one floating-point number.
        """
        value = jnp.asarray(self.schedule(count))
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                "Expected the schedule of noise_multiplier to give one floating-point number, got "
                f"{value.dtype}{list(value.shape)}."
            )
        value = value.astype(jnp.float32)
        return jnp.where((value > 0) & jnp.isfinite(value), value, jnp.nan)

    def caps(self) -> Caps | None:
        """The budget of a run with a target.

        Returns:
          Caps, or None without a target.
        """
        if self.target is None:
            return None
        with jax.ensure_compile_time_eval():
            ahead = jax.lax.map(self.multiplier, jnp.asarray(_AHEAD, jnp.int32))
            multipliers = tuple(np.asarray(ahead, np.float64).tolist())
        return _caps(multipliers, self.sampling, self.target)

    def spend(self, ledger: account.ScheduledLedger) -> tuple[account.ScheduledLedger, Any, Any]:
        """One step more, if it fits.

        Args:
          ledger: of the steps so far.

        Returns:
          (ledger, go, noise_multiplier): as `Fixed.spend`; the multiplier is traced.

        Raises:
          ValueError: for an account of another run.
        """
        if not isinstance(ledger, account.ScheduledLedger) or ledger.sampling != self.sampling:
            raise ValueError(
                f"Expected an account of a schedule with {self.sampling}, got {ledger}. Use the "
                "transformation that made the state."
            )
        multiplier = self.multiplier(ledger.ledger.count)
        after = ledger.ledger.add(
            multiplier,
            sampling_rate=self.sampling.sampling_rate,
            coordinates=self.coordinates,
            radius_bits=RADIUS_BITS,
        )
        caps = self.caps()
        if caps is None:
            return dataclasses.replace(ledger, ledger=after), True, multiplier
        go = _within(after, caps)
        kept = jax.tree.map(lambda new, old: jnp.where(go, new, old), after, ledger.ledger)
        return dataclasses.replace(ledger, ledger=kept), go, multiplier


def _within(ledger: traced.TracedLedger, caps: Caps) -> jax.Array:
    """Whether every sum of a ledger keeps to its cap; NaN does not."""
    plain, flux, log_factor = range(3)  # the first entries of the ledger's words
    loss = 1.0 + 2.0**-20 + ledger.count.astype(jnp.float32) * 2.0**-44
    sums = (ledger.high + jnp.maximum(ledger.low, 0.0)) * loss
    rdp = sums[3 + caps.index] + 0.5 * traced.ORDERS[caps.index] * sums[plain]
    known = (ledger.count > 0) & (ledger.count <= caps.steps)
    flat = (sums[flux] <= np.float32(caps.flux)) & (sums[log_factor] <= np.float32(caps.log_factor))
    return known & flat & (rdp * (1.0 + 2.0**-20) <= np.float32(caps.rdp))


@functools.lru_cache(maxsize=64)
def _caps(
    ahead: tuple[float, ...],
    sampler: sampling.Poisson | sampling.TruncatedPoisson,
    target: Target,
) -> Caps:
    """Caps that together keep to the target, at the order that the schedule ahead favours.

    Args:
      ahead: multipliers at the steps `_AHEAD`.
      sampler: how batches are drawn.
      target: of the whole run.
    """
    overflow = account.truncation(sampler)
    lost = (1.0 + math.exp(min(target.epsilon, 700.0))) * overflow
    most = traced.UNKNOWN - 1
    most = int(min(_SHARE * target.delta / lost, most)) if lost > 0.0 else most
    left = target.delta * (1.0 - 2.0 * _SHARE - 2.0**-20) * math.exp(-_LOG_FACTOR)
    limits = np.array([_limit(order, target.epsilon, left) for order in traced.ORDERS])
    costs = np.stack([_costs(multiplier, sampler.sampling_rate) for multiplier in ahead])
    spent = np.cumsum(costs[:-1] * np.diff(_AHEAD)[:, None], axis=0)
    # How far the schedule gets at each order, from one step that was looked at to the next.
    reach = [np.interp(limits[i], [0.0, *spent[:, i]], _AHEAD) for i in range(len(limits))]
    chosen = int(np.argmax(np.where(costs[0] <= limits, reach, -1.0)))
    if not costs[0, chosen] <= limits[chosen] or most < 1:
        raise ValueError(
            f"Expected a target that allows at least one step, got epsilon={target.epsilon}, "
            f"delta={target.delta} with a noise multiplier of {ahead[0]} at the start. Raise the "
            "noise, the target or the capacity."
        )
    flux = float(np.float32(_SHARE * target.delta))
    return Caps(chosen, float(limits[chosen]) * (1.0 - 2.0**-20), flux, _LOG_FACTOR, most)


def _limit(order: float, epsilon: float, delta: float) -> float:
    """RDP that one order holds for a target; −1 where it cannot."""
    try:
        return filters.for_renyi(order=order, epsilon=epsilon, delta=delta).limit
    except ValueError:
        return -1.0


def _costs(multiplier: float, rate: float) -> np.ndarray:
    """RDP of one step at `traced.ORDERS`; more than anything for a multiplier that is none."""
    orders = np.array(traced.ORDERS, np.float64)
    if not (multiplier > 0.0 and math.isfinite(multiplier)):
        return np.full(orders.shape, 1e100)
    event = accounting.PoissonSampled(accounting.Gaussian(multiplier), rate)
    return accounting.rdp_curve(event, orders)


type Plan = Fixed | Scheduled


def make(
    noise_multiplier: Any,
    sampler: sampling.Sampler,
    coordinates: int,
    target: Target | None,
    count_noise_std: float | None = None,
) -> Plan:
    """The plan of a run.

    Args:
      noise_multiplier: a number ≥ 0, or a schedule.
      sampler: one of `sampling`.
      coordinates: parameters of the model.
      target: or None.
      count_noise_std: of the count of each step, > 0; or None.

    Returns:
      A plan whose steps are charged as they are noised.

    Raises:
      TypeError, ValueError: for a number that is none, NaN or negative.
      NotImplementedError: for a schedule with samples of a fixed size, or with a count.
    """
    if count_noise_std is not None:
        count_noise_std = _check.real("count_noise_std", count_noise_std, low=0, open_low=True)
    if not callable(noise_multiplier):
        multiplier = _check.real("noise_multiplier", noise_multiplier, low=0)
        return Fixed(multiplier, sampler, coordinates, target, count_noise_std)
    if count_noise_std is not None:
        raise NotImplementedError(
            "count_noise_std is charged beside a constant noise_multiplier only, got a schedule."
        )
    if isinstance(sampler, sampling.WithoutReplacement):
        raise NotImplementedError(
            "A noise schedule is charged for Poisson samples only; WithoutReplacement takes a "
            "constant noise_multiplier."
        )
    return Scheduled(noise_multiplier, sampler, coordinates, target)
