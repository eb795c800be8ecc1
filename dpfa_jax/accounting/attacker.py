"""What a guarantee leaves an attacker: advantage, true positives, posterior belief.

The attacker knows everything but one record, and sees everything that was released.
"""

import dataclasses
import functools
import math

import numpy as np
from numpy.typing import NDArray
from scipy import special

from dpfa_jax import _check
from dpfa_jax.accounting import charge
from dpfa_jax.accounting.event import Event

_GRID = tuple(float(x) for x in np.concatenate([[0.0], np.geomspace(1e-3, 50.0, 40)]))


@functools.lru_cache(maxsize=64)
def _curve(event: Event) -> tuple[tuple[float, float], ...]:
    """(ε, δ(ε)) on a public grid, and at the event's own ε where it is pure."""
    pure = charge.profile_of(event).pure
    grid = (*_GRID, pure) if pure < math.inf else _GRID
    return tuple((epsilon, charge.delta(event, epsilon)) for epsilon in grid)


def advantage(event: Event) -> float:
    """Largest true-positive minus false-positive rate of any membership attack: δ(0).

    Args:
      event: what was released.

    Returns:
      Upper bound in [0, 1]; equality for Gaussian releases.

    Guarantee: B1 (attacker.md).

    Example:
      >>> from dpfa_jax import accounting
      >>> round(advantage(accounting.Gaussian(1.0)), 4)
      0.3829
    """
    return charge.delta(event, 0.0)


def true_positive_rate(event: Event, false_positive_rate: float) -> float:
    """Largest true-positive rate of any attack with a given false-positive rate.

    Args:
      event: what was released.
      false_positive_rate: in [0, 1].

    Returns:
      Upper bound in [0, 1], for Gaussian releases Φ(Φ⁻¹(FPR) + μ) with their noise cut-off.

    Raises:
      ValueError: for a rate outside [0, 1].

    Guarantee: B1 (attacker.md).
    Source: Wasserman and Zhou 2010, arXiv:0811.2501, Theorem 2.4.

    Example:
      >>> from dpfa_jax import accounting
      >>> round(true_positive_rate(accounting.Gaussian(1.0), 0.01), 4)
      0.0924
    """
    rate = _check.real("false_positive_rate", false_positive_rate, low=0, high=1)
    profile = charge.profile_of(event)
    if not profile.others and profile.mu < math.inf and profile.variation == 0.0:
        ideal = float(special.ndtr(special.ndtri(rate) + profile.mu)) if profile.mu else rate
        # TPR ≤ e^ε·FPR + δ(ε) for every ε, and δ ≤ e^(log_factor)·δ_ideal + flux.
        gain = math.exp(profile.log_factor)
        return min(gain * ideal * (1.0 + 1e-12) + profile.flux, 1.0)
    best = 1.0
    for epsilon, delta in _curve(event):
        best = min(best, math.exp(min(epsilon, 700.0)) * rate + delta)
        best = min(best, 1.0 - math.exp(-epsilon) * (1.0 - delta - rate))
    return max(min(best * (1.0 + 1e-12), 1.0), rate)


@dataclasses.dataclass(frozen=True)
class TradeOff:
    """The trade-off curve of a set of releases (f-DP), as points that can be drawn.

    Attributes:
      false_positive_rates: float64, growing from 0 to 1.
      true_positive_rates: float64, upper bounds of what any attack reaches there.

    Guarantee: B2 (attacker.md).
    """

    false_positive_rates: NDArray[np.float64]
    true_positive_rates: NDArray[np.float64]

    @property
    def false_negative_rates(self) -> NDArray[np.float64]:
        """f of f-DP at the false-positive rates: lower bounds of 1 − TPR."""
        return np.maximum(1.0 - self.true_positive_rates, 0.0)

    def at(self, false_positive_rate: float) -> float:
        """The bound between the points.

        Args:
          false_positive_rate: in [0, 1].

        Returns:
          Upper bound: that of the next point to the right.

        Guarantee: B2 (attacker.md).
        """
        rate = _check.real("false_positive_rate", false_positive_rate, low=0, high=1)
        index = np.searchsorted(self.false_positive_rates, rate)
        return float(self.true_positive_rates[index])


def trade_off(event: Event, *, points: int = 101) -> TradeOff:
    """The best attack at every false-positive rate: the trade-off curve of everything released.

    Args:
      event: what was released.
      points: how many points, ≥ 3: 0, 1, and between them evenly in log-odds from 1e-9 on.

    Returns:
      Upper bounds of the true-positive rate, never falling, never below the diagonal.

    Raises:
      ValueError: for too few points.

    Guarantee: B2 (attacker.md).
    Source: Dong, Roth and Su 2022, arXiv:1905.02383, Section 2.

    Example:
      >>> from dpfa_jax import accounting
      >>> curve = trade_off(accounting.Gaussian(1.0))
      >>> round(curve.at(0.01), 2)
      0.12
    """
    points = _check.integer("points", points, low=3, high=1 << 16)
    odds = np.linspace(-9.0, 9.0, points - 2) * math.log(10.0)
    rates = np.concatenate([[0.0], special.expit(odds), [1.0]])
    reached = np.array([true_positive_rate(event, float(rate)) for rate in rates])
    reached = np.maximum.accumulate(np.maximum(reached, rates))
    for array in (rates, reached):
        array.setflags(write=False)
    return TradeOff(rates, reached)


def posterior(prior: float, epsilon: float) -> float:
    """Largest belief that a record is present after an (ε, 0)-DP release.

    For an (ε, δ) with δ > 0 this is no bound, and δ is not the chance of more: see `belief`.

    Args:
      prior: belief beforehand, in [0, 1].
      epsilon: nats, in [0, ∞].

    Returns:
      Upper bound: odds grow at most by e^ε.

    Raises:
      ValueError: for NaN or an argument outside its range.

    Guarantee: B1 (attacker.md).

    Example:
      >>> round(posterior(0.5, 1.0), 3)
      0.731
    """
    prior = _check.real("prior", prior, low=0, high=1)
    epsilon = _check.real("epsilon", epsilon, low=0, finite=False)
    if prior in (0.0, 1.0):
        return prior
    other = (1.0 - prior) * math.exp(-epsilon)
    return min(prior / (prior + other) * (1.0 + 2.0**-50), 1.0)


def largest_loss(event: Event, failure: float) -> float:
    """What the log-likelihood ratio of the outputs stays below, but for unlikely outputs.

    An (ε, δ) does not say so with failure = δ: outputs beyond ε may have more probability than δ.

    Args:
      event: what was released.
      failure: probability of the outputs left out, in (0, 1).

    Returns:
      Upper bound, nats, in [0, ∞]: min over ε of ε − ln(1 − δ(ε)/failure); equality for Gaussian
      releases of ideal noise.

    Raises:
      ValueError: for a failure outside (0, 1).

    Guarantee: B3 (attacker.md).

    Example:
      >>> from dpfa_jax import accounting
      >>> round(largest_loss(accounting.Gaussian(1.0), 1e-5), 3)
      4.765
    """
    allowed = _check.real("failure", failure, low=0, high=1, open_low=True, open_high=True)
    profile = charge.profile_of(event)
    ideal = not profile.others and profile.variation == profile.flux == 0.0
    if ideal and profile.mu < math.inf:
        loss = profile.mu * (0.5 * profile.mu - float(special.ndtri(allowed)))
        return max(loss * (1.0 + 1e-12), 0.0)
    found = math.inf
    for epsilon, delta in _curve(event):
        if delta == 0.0:
            found = min(found, epsilon)
        elif delta < allowed:
            found = min(found, (epsilon - math.log1p(-delta / allowed)) * (1.0 + 1e-12))
    return found


def belief(event: Event, prior: float, *, failure: float) -> float:
    """Largest belief that a record is present after everything released, but for unlikely outputs.

    Args:
      event: what was released.
      prior: belief beforehand, in [0, 1].
      failure: probability of the outputs left out, whether the record is present or not, in (0, 1).

    Returns:
      Upper bound in [0, 1].

    Raises:
      ValueError: for an argument outside its range.

    Guarantee: B3 (attacker.md).

    Example:
      >>> from dpfa_jax import accounting
      >>> round(belief(accounting.Gaussian(4.0), 0.5, failure=1e-5), 3)
      0.75
    """
    return posterior(prior, largest_loss(event, failure))
