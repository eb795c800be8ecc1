"""Noise for a target: the smallest multiplier that meets it, on the private side."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable

from dpfa_jax import _check
from dpfa_jax.accounting import charge, gdp
from dpfa_jax.accounting.event import (
    Composed,
    Event,
    Gaussian,
    NoRelease,
    PoissonSampled,
    Repeated,
)


def noise_multiplier(
    *,
    epsilon: float,
    delta: float,
    releases: int = 1,
    coordinates: int = 0,
    radius_bits: int = gdp.RADIUS_BITS,
) -> float:
    """Noise multiplier at which Gaussian releases meet (ε, δ), the noise cut-off included.

    Args:
      epsilon: target, nats, in [0, ∞).
      delta: target, in (0, 1).
      releases: how many releases, each with this multiplier, ≥ 1.
      coordinates: noisy scalars of one release, as in `Gaussian`.
      radius_bits: of their noise, as in `Gaussian`.

    Returns:
      The private side of the bracket: `accounting.epsilon` and `accounting.delta` of the releases
      at this multiplier meet the target, and 1e-9 less noise does not.

    Raises:
      ValueError: for NaN, an argument outside its range, or a target that the cut-off alone spends.

    Guarantee: K1 (calibrate.md), E1 (charge.md).

    Example:
      >>> round(noise_multiplier(epsilon=1.0, delta=1e-5), 3)
      3.731
    """
    target = _check.real("epsilon", epsilon, low=0)
    tolerance = _check.real("delta", delta, low=0, high=1, open_low=True, open_high=True)
    releases = _check.integer("releases", releases, low=1)
    coordinates = _check.integer("coordinates", coordinates, low=0)

    def meets(multiplier: float) -> bool:
        event = Repeated(Gaussian(multiplier, coordinates, radius_bits), releases)
        return (
            charge.delta(event, target) <= tolerance and charge.epsilon(event, tolerance) <= target
        )

    largest = gdp.mu(target, tolerance)
    unreachable = ValueError(
        f"Expected a target that Gaussian noise can meet, got epsilon={target}, delta={tolerance} "
        f"for {releases} releases of {coordinates} coordinates. The noise cut-off alone spends it: "
        "release fewer scalars, take 64 radius bits, or allow a larger delta."
    )
    if largest == 0.0:
        raise unreachable
    try:
        low = math.sqrt(releases) / largest
    except OverflowError:
        raise unreachable from None
    if not math.isfinite(low):
        raise unreachable
    step, high = 1e-15, low
    while not meets(high):
        low, step = high, 4.0 * step
        high = high * (1.0 + step)
        if step > 1e300 or not math.isfinite(high):
            raise unreachable
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        if meets(middle):
            high = middle
        else:
            low = middle
    return high


def _goal(epsilon: float, delta: float) -> tuple[float, float]:
    goal = _check.real("delta", delta, low=0, high=1, open_low=True, open_high=True)
    return _check.real("epsilon", epsilon, low=0), goal


def _narrow(
    found: Callable[[float], float], target: float, low: float, high: float, width: float
) -> float:
    """A point within `width` of where a falling cost meets the target: it meets it itself.

    Args:
      found: the cost at a point.
      target: the cost allowed.
      low: a point that does not meet it.
      high: a larger point that does.
      width: relative width of the last bracket.
    """
    above, below = found(low), found(high)
    for turn in itertools.count():
        if not high > low * (1.0 + width):
            break
        middle = math.sqrt(low) * math.sqrt(high) if high > 2.0 * low else 0.5 * (low + high)
        # Three turns of four go where a straight line in logarithms would meet the target, a bit
        # to either side of it, so that both ends move.
        if turn % 4 < 3 and 0.0 < below < target < above < math.inf:
            share = math.log(above / target) / math.log(above / below)
            guess = low * math.exp(share * math.log(high / low))
            guess *= 1.0 + (-0.4 * width if turn % 4 == 1 else 0.4 * width)
            middle = min(max(guess, low * (1.0 + 0.1 * width)), high * (1.0 - 0.1 * width))
        if not low < middle < high:
            break
        here = found(middle)
        if here <= target:
            high, below = middle, here
        else:
            low, above = middle, here
    return high


def smallest(
    make: Callable[[float], Event],
    *,
    epsilon: float,
    delta: float,
    low: float = 1e-6,
    high: float = 1e9,
    tolerance: float = 1e-6,
    cost: Callable[[Event, float], float] = charge.epsilon,
) -> float:
    """Smallest number x in [low, high] whose event meets (ε, δ), for a cost that falls in x.

    Args:
      make: maps x to an event, for example a noise multiplier to a training run.
      epsilon: target, nats, in [0, ∞).
      delta: target, in (0, 1).
      low: smallest x tried, > 0.
      high: largest x tried, > low.
      tolerance: relative width of the last bracket, in [1e-12, 0.1].
      cost: ε of an event at δ; `pld.epsilon` calibrates the published number (give it a tolerance
        of 1e-4: each of its answers takes a second).

    Returns:
      The private side of the bracket: `cost(make(x), delta) <= epsilon`.

    Raises:
      ValueError: for NaN, a bad range, or a target that `high` does not meet.

    Guarantee: K2 (calibrate.md).

    Example:
      >>> from dpfa_jax.accounting import event
      >>> def run(multiplier):
      ...     return event.Repeated(event.PoissonSampled(event.Gaussian(multiplier), 0.01), 1000)
      >>> round(smallest(run, epsilon=1.0, delta=1e-5), 3)
      1.513
    """
    target, goal = _goal(epsilon, delta)
    low = _check.real("low", low, low=0, open_low=True)
    high = _check.real("high", high, low=low, open_low=True)
    width = _check.real("tolerance", tolerance, low=1e-12, high=0.1)

    @functools.cache
    def found(x: float) -> float:
        return cost(make(x), goal)

    # Doubling from 1 keeps the search where costs are cheap to compute; a slow accountant starts
    # where the fast one ends.
    start = min(max(1.0, low), high)
    if cost is not charge.epsilon:
        with contextlib.suppress(ValueError):
            start = smallest(
                make, epsilon=target, delta=goal, low=low, high=high, tolerance=max(width, 1e-3)
            )
    step = 2.0 if cost is charge.epsilon else 1.1
    if found(start) <= target:
        end = start
        while end > low:
            start = max(end / step, low)
            if not found(start) <= target:
                return _narrow(found, target, start, end, width)
            end, step = start, step * step
        return low
    while start < high:
        end = min(step * start, high)
        if found(end) <= target:
            return _narrow(found, target, start, end, width)
        start, step = end, min(step * step, 4.0)
    raise ValueError(
        f"Expected a target that some value up to {high:g} meets, got epsilon={target} "
        f"and delta={goal}: even there epsilon is {found(high):.4g}."
    )


def largest(
    make: Callable[[float], Event],
    *,
    epsilon: float,
    delta: float,
    low: float = 1e-12,
    high: float = 1.0,
    tolerance: float = 1e-6,
    cost: Callable[[Event, float], float] = charge.epsilon,
) -> float:
    """Largest number x in [low, high] whose event meets (ε, δ), for a cost that grows in x.

    Args:
      make: maps x to an event, for example a sampling rate to a training run.
      epsilon: target, nats, in [0, ∞).
      delta: target, in (0, 1).
      low: smallest x tried, > 0.
      high: largest x tried, > low.
      tolerance: relative width of the last bracket, in [1e-12, 0.1].
      cost: ε of an event at δ, as in `smallest`.

    Returns:
      The private side of the bracket: `cost(make(x), delta) <= epsilon`.

    Raises:
      ValueError: for NaN, a bad range, or a target that `low` does not meet.

    Guarantee: K2 (calibrate.md).
    """
    target, goal = _goal(epsilon, delta)
    low = _check.real("low", low, low=0, open_low=True)
    high = _check.real("high", high, low=low, open_low=True)
    at_low = cost(make(low), goal)
    if not at_low <= target:
        raise ValueError(
            f"Expected a target that some value from {low:g} on meets, got epsilon={target} and "
            f"delta={goal}: even there epsilon is {at_low:.4g}."
        )
    found = smallest(
        lambda inverse: make(min(max(1.0 / inverse, low), high)),
        epsilon=epsilon,
        delta=delta,
        low=1.0 / high,
        high=1.0 / low,
        tolerance=tolerance,
        cost=cost,
    )
    return min(max(1.0 / found, low), high)


def batch_size(
    make: Callable[[float], Event],
    *,
    records: int,
    epsilon: float,
    delta: float,
    cost: Callable[[Event, float], float] = charge.epsilon,
) -> int:
    """Largest expected batch whose training run meets (ε, δ).

    Args:
      make: maps a sampling rate in (0, 1] to an event whose cost grows with it.
      records: size of the data set, public, ≥ 1.
      epsilon: target, nats, in [0, ∞).
      delta: target, in (0, 1).
      cost: ε of an event at δ, as in `smallest`.

    Returns:
      The largest whole batch on the private side: `cost(make(batch / records), delta) <= epsilon`.

    Raises:
      ValueError: for NaN, a bad target, or one that a batch of one record does not meet.

    Guarantee: K2 (calibrate.md).

    Example:
      >>> from dpfa_jax.accounting import event
      >>> def run(rate):
      ...     return event.Repeated(event.PoissonSampled(event.Gaussian(1.0), rate), 1000)
      >>> batch_size(run, records=60_000, epsilon=1.0, delta=1e-5)
      213
    """
    target, goal = _goal(epsilon, delta)
    records = _check.integer("records", records, low=1, high=1 << 53)

    def meets(batch: int) -> bool:
        return cost(make(batch / records), goal) <= target

    if not meets(1):
        raise ValueError(
            f"Expected a target that a batch of one record meets, got epsilon={target} and "
            f"delta={goal}: it costs epsilon {cost(make(1 / records), goal):.4g}. Take more noise "
            "or fewer steps."
        )
    low, high = 1, 2
    while high <= records and meets(high):
        low, high = high, 2 * high
    high = min(high, records + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low


def steps(
    event: Event,
    *,
    epsilon: float,
    delta: float,
    spent: Event | None = None,
    cost: Callable[[Event, float], float] = charge.epsilon,
) -> int:
    """How many more times a release may happen before (ε, δ) runs out; a plan fixed in advance.

    Args:
      event: one step.
      epsilon: target, nats, in [0, ∞).
      delta: target, in (0, 1).
      spent: what was released already.
      cost: ε of an event at δ, as in `smallest`.

    Returns:
      The largest count on the private side, 0 if none fits, at most 2⁵³.

    Raises:
      ValueError: for NaN or a bad target.

    Guarantee: K2 (calibrate.md). For steps chosen from earlier outputs use a filter.

    Example:
      >>> from dpfa_jax.accounting import event
      >>> steps(event.PoissonSampled(event.Gaussian(1.0), 0.01), epsilon=2.0, delta=1e-5)
      881
    """
    target, goal = _goal(epsilon, delta)
    before = NoRelease() if spent is None else spent

    def meets(count: int) -> bool:
        return cost(Composed((before, Repeated(event, count))), goal) <= target

    low, high = 0, 1
    if cost is not charge.epsilon:  # a slow accountant starts where the fast one ends
        sure = steps(event, epsilon=target, delta=goal, spent=spent)
        if sure and meets(sure):
            low, high = sure, sure + max(1, sure // 8)
    while high <= 1 << 53 and meets(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if meets(middle):
            low = middle
        else:
            high = middle
    return min(low, 1 << 53)


def adaptive_clip_split(*, noise_multiplier: float, count_noise_std: float) -> float:
    """Noise multiplier of the gradients when part of the budget estimates the clip norm.

    Adaptive clipping also releases a noisy count of clipped examples; shifted by ½, each example
    moves it by at most ½. One step of both then costs what one Gaussian of `noise_multiplier` does.

    Args:
      noise_multiplier: of gradients and count together, > 0.
      count_noise_std: noise std on the count, > noise_multiplier/2.

    Returns:
      Equality, rounded up to the private side: (z⁻² − (2·count_noise_std)⁻²)^(−½).

    Raises:
      ValueError: if the count alone spends the budget.

    Guarantee: K3 (calibrate.md).
    Source: Andrew, Thakkar, McMahan and Ramaswamy 2021, arXiv:1905.03871, Theorem 1.

    Example:
      >>> round(adaptive_clip_split(noise_multiplier=1.0, count_noise_std=5.0), 4)
      1.005
    """
    total = _check.real("noise_multiplier", noise_multiplier, low=0, open_low=True)
    std = _check.real("count_noise_std", count_noise_std, low=0, open_low=True)
    ratio = total / (2.0 * std) * (1.0 + 2.0**-50)
    left = (1.0 - ratio) * (1.0 + ratio)
    if not left > 0.0:
        raise ValueError(
            f"Expected count_noise_std > noise_multiplier/2 = {0.5 * total:g}, got {std}: the "
            "count of clipped examples alone spends the budget."
        )
    return total / math.sqrt(left) * (1.0 + 2.0**-50)


def adaptive_clipping(
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    batch: int,
    coordinates: int = 0,
    radius_bits: int = gdp.RADIUS_BITS,
    cost: Callable[[Event, float], float] = charge.epsilon,
) -> tuple[float, float]:
    """Noise of the gradients and of the clip count for a target: (gradient_multiplier, count_std).

    The count of clipped examples gets the noise its authors advise, batch/20, or more where that
    would spend more than a tenth of each step's μ².

    Args:
      epsilon: target, nats, in [0, ∞).
      delta: target, in (0, 1).
      sampling_rate: q of the Poisson sample of each step, in (0, 1].
      steps: how many, ≥ 1.
      batch: expected batch size, ≥ 1, public.
      coordinates: noisy scalars of one step's gradients, as in `Gaussian`; the count adds one.
      radius_bits: of the noise of both, as in `Gaussian`.
      cost: ε of an event at δ, as in `smallest`.

    Returns:
      The private side of the bracket: `steps` Poisson samples, each releasing both, meet the
      target. Noise std on the clipped sum is gradient_multiplier·clip_norm; count_std is that on
      the count shifted by ½.

    Raises:
      ValueError: for NaN, an argument outside its range, or an unreachable target.

    Guarantee: K2, K3 (calibrate.md).
    Source: Andrew, Thakkar, McMahan and Ramaswamy 2021, arXiv:1905.03871, Section 3.

    Example:
      >>> gradient, count = adaptive_clipping(
      ...     epsilon=1.0, delta=1e-5, sampling_rate=0.01, steps=1000, batch=100
      ... )
      >>> round(gradient, 3), round(count, 3)
      (1.531, 5.0)
    """
    rate = _check.real("sampling_rate", sampling_rate, low=0, high=1, open_low=True)
    count = _check.integer("steps", steps, low=1)
    size = _check.integer("batch", batch, low=1)
    scalars = _check.integer("coordinates", coordinates, low=0)

    def run(multiplier: float) -> Event:
        leaf = Gaussian(multiplier, scalars + 1 if scalars else 0, radius_bits)
        return Repeated(PoissonSampled(leaf, rate), count)

    together = smallest(run, epsilon=epsilon, delta=delta, cost=cost)
    std = max(size / 20.0, math.sqrt(10.0) * together / 2.0)
    gradient = adaptive_clip_split(noise_multiplier=together, count_noise_std=std)
    return gradient, std
