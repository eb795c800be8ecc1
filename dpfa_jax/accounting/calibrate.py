"""Noise for a target: the smallest multiplier that meets it, on the private side."""

import math

from dpfa_jax import _check
from dpfa_jax.accounting import charge, gdp
from dpfa_jax.accounting.event import Gaussian, Repeated


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
