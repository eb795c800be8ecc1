"""Splitting one budget over layers, heads, steps or queries, by public weights.

Gaussian releases compose as Σμ² = μ_total², so a split is a share of μ² for each part.
"""

import math
from collections.abc import Sequence

from dpfa_jax import _check

_DOWN = 1.0 - 2.0**-46


def _checked(name: str, values: Sequence[float]) -> list[float]:
    checked = [_check.real(name, value, low=0, open_low=True) for value in values]
    if not checked:
        raise ValueError(f"Expected at least one of {name}, got none.")
    return checked


def by_weights(mu: float, weights: Sequence[float]) -> list[float]:
    """Noise multipliers of parts that take shares of μ² in proportion to public weights.

    Args:
      mu: of all parts together, > 0 (`gdp.mu(epsilon, delta)`).
      weights: > 0, public; equal weights share equally.

    Returns:
      One noise multiplier per part, on the private side: √Σ1/z² ≤ mu.

    Raises:
      ValueError: for NaN or what is not positive.

    Guarantee: A1 (allocate.md).

    Example:
      >>> [round(z, 3) for z in by_weights(1.0, [1.0, 3.0])]
      [2.0, 1.155]
    """
    mu = _check.real("mu", mu, low=0, open_low=True)
    weights = _checked("weights", weights)
    largest = max(weights)
    shares = [weight / largest for weight in weights]  # no overflow in the sum
    total = math.fsum(shares)
    multipliers = []
    for share in shares:
        part = mu * math.sqrt(share / total) * _DOWN
        if not (part > 0.0 and 1.0 / part < math.inf):
            raise ValueError(f"Expected weights whose ratios a float can hold, got {weights}.")
        multipliers.append(1.0 / part)
    return multipliers


def by_importance(mu: float, importance: Sequence[float]) -> list[float]:
    """Noise multipliers that make Σ importance·z² least at a given total μ.

    With importance = coordinates·Δ² this is the least total noise variance; a public factor for
    how much a part matters may multiply it.

    Args:
      mu: of all parts together, > 0.
      importance: > 0, public; one per part.

    Returns:
      One noise multiplier per part, on the private side: √Σ1/z² ≤ mu.

    Raises:
      ValueError: for NaN or what is not positive.

    Guarantee: A1 (allocate.md).

    Example:
      >>> [round(z, 3) for z in by_importance(1.0, [1.0, 16.0])]
      [2.236, 1.118]
    """
    return by_weights(mu, [math.sqrt(each) for each in _checked("importance", importance)])
