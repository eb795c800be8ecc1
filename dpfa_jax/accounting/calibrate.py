"""Noise for a target: the smallest multiplier that meets it, on the private side."""

import math
from collections.abc import Callable

from dpfa_jax import _check
from dpfa_jax.accounting import charge, gdp
from dpfa_jax.accounting.event import Composed, Event, Gaussian, NoRelease, Repeated


def noise_multiplier(
    *, epsilon: float, delta: float, releases: int = 1, coordinates: int = 0
) -> float:
    """Noise multiplier at which Gaussian releases meet (ε, δ), the noise cut-off included.

    Args:
      epsilon: target, nats, in [0, ∞).
      delta: target, in (0, 1).
      releases: how many releases, each with this multiplier, ≥ 1.
      coordinates: noisy scalars of one release, as in `Gaussian`.

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
        event = Repeated(Gaussian(multiplier, coordinates), releases)
        return (
            charge.delta(event, target) <= tolerance and charge.epsilon(event, tolerance) <= target
        )

    largest = gdp.mu(target, tolerance)
    unreachable = ValueError(
        f"Expected a target that Gaussian noise can meet, got epsilon={target}, delta={tolerance} "
        f"for {releases} releases of {coordinates} coordinates. The noise cut-off alone spends it: "
        "release fewer scalars or allow a larger delta."
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


def smallest(
    make: Callable[[float], Event],
    *,
    epsilon: float,
    delta: float,
    low: float = 1e-6,
    high: float = 1e9,
    tolerance: float = 1e-6,
) -> float:
    """Smallest number x in [low, high] whose event meets (ε, δ), for a cost that falls in x.

    Args:
      make: maps x to an event, for example a noise multiplier to a training run.
      epsilon: target, nats, in [0, ∞).
      delta: target, in (0, 1).
      low: smallest x tried, > 0.
      high: largest x tried, > low.
      tolerance: relative width of the last bracket, in [1e-12, 0.1].

    Returns:
      The private side of the bracket: `accounting.epsilon(make(x), delta) <= epsilon`.

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
    target = _check.real("epsilon", epsilon, low=0)
    goal = _check.real("delta", delta, low=0, high=1, open_low=True, open_high=True)
    low = _check.real("low", low, low=0, open_low=True)
    high = _check.real("high", high, low=low, open_low=True)
    width = _check.real("tolerance", tolerance, low=1e-12, high=0.1)

    def meets(x: float) -> bool:
        return charge.epsilon(make(x), goal) <= target

    if meets(low):
        return low
    # Doubling from 1 keeps the search where costs are cheap to compute.
    start = min(max(1.0, low), high)
    if meets(start):
        high = start
    else:
        low = start
        while True:
            start = min(2.0 * start, high)
            if meets(start):
                high = start
                break
            if start == high:
                raise ValueError(
                    f"Expected a target that some value up to {high:g} meets, got epsilon={target} "
                    f"and delta={goal}: even there epsilon is "
                    f"{charge.epsilon(make(high), goal):.4g}."
                )
            low = start
    while high > low * (1.0 + width):
        middle = math.sqrt(low) * math.sqrt(high) if high > 2.0 * low else 0.5 * (low + high)
        if not low < middle < high:
            break
        if meets(middle):
            high = middle
        else:
            low = middle
    return high


def largest(
    make: Callable[[float], Event],
    *,
    epsilon: float,
    delta: float,
    low: float = 1e-12,
    high: float = 1.0,
    tolerance: float = 1e-6,
) -> float:
    """Largest number x in [low, high] whose event meets (ε, δ), for a cost that grows in x.

    Args:
      make: maps x to an event, for example a sampling rate to a training run.
      epsilon: target, nats, in [0, ∞).
      delta: target, in (0, 1).
      low: smallest x tried, > 0.
      high: largest x tried, > low.
      tolerance: relative width of the last bracket, in [1e-12, 0.1].

    Returns:
      The private side of the bracket: `accounting.epsilon(make(x), delta) <= epsilon`.

    Raises:
      ValueError: for NaN, a bad range, or a target that `low` does not meet.

    Guarantee: K2 (calibrate.md).
    """
    low = _check.real("low", low, low=0, open_low=True)
    high = _check.real("high", high, low=low, open_low=True)
    found = smallest(
        lambda inverse: make(min(max(1.0 / inverse, low), high)),
        epsilon=epsilon,
        delta=delta,
        low=1.0 / high,
        high=1.0 / low,
        tolerance=tolerance,
    )
    return min(max(1.0 / found, low), high)


def steps(event: Event, *, epsilon: float, delta: float, spent: Event | None = None) -> int:
    """How many more times a release may happen before (ε, δ) runs out; a plan fixed in advance.

    Args:
      event: one step.
      epsilon: target, nats, in [0, ∞).
      delta: target, in (0, 1).
      spent: what was released already.

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
    target = _check.real("epsilon", epsilon, low=0)
    goal = _check.real("delta", delta, low=0, high=1, open_low=True, open_high=True)
    before = NoRelease() if spent is None else spent

    def meets(count: int) -> bool:
        return charge.epsilon(Composed((before, Repeated(event, count))), goal) <= target

    low, high = 0, 1
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
