"""Lower bounds on what a mechanism leaks, from runs on two neighbouring inputs.

Which statement this makes true: with probability at least 1 − failure_probability the number
returned is at most the true μ (or ε) of the pair that was run. So a result above the claimed value
refutes the claim; a result below it proves nothing. NumPy and SciPy only; nothing of what is
audited is imported.
"""

from collections.abc import Callable

import numpy as np
import scipy.special
import scipy.stats
from numpy.typing import ArrayLike, NDArray

from dpfa_jax import _check

type Array = NDArray[np.float64]

_SELECTION_SHARE = 10
_CANDIDATES = 199
_WIDEN = 1e-9


def clopper_pearson(
    successes: int, trials: int, *, failure_probability: float
) -> tuple[float, float]:
    """One-sided bounds on a success probability, each failing with the given probability.

    Args:
      successes: how many of the trials succeeded, in [0, trials].
      trials: number of independent trials, ≥ 1.
      failure_probability: chance that the lower bound exceeds the truth, and separately that the
        upper bound falls below it, in (0, 1).

    Returns:
      (lower, upper), widened outward by 10⁻⁹ relative, more than the error of the inversion.

    Guarantee: AU1 (bounds.md).
    Source: Clopper, Pearson 1934, doi:10.1093/biomet/26.4.404.

    Example:
      >>> low, high = clopper_pearson(0, 10, failure_probability=0.05)
      >>> low, round(high, 4)
      (0.0, 0.2589)
    """
    trials = _check.integer("trials", trials, low=1)
    successes = _check.integer("successes", successes, low=0, high=trials)
    alpha = _check.real(
        "failure_probability", failure_probability, low=0, high=1, open_low=True, open_high=True
    )
    low, high = _interval(np.array([successes]), trials, alpha)
    return float(low[0]), float(high[0])


def _interval(successes: NDArray[np.int64], trials: int, alpha: float):
    failures = trials - successes
    # Each quantile is taken on the side where it is small, and kept there until the end.
    low = scipy.stats.beta.ppf(alpha, np.maximum(successes, 1), failures + 1)
    rest = scipy.stats.beta.ppf(alpha, np.maximum(failures, 1), successes + 1)
    low = np.where(successes > 0, low * (1 - _WIDEN), 0.0)
    high = 1 - np.where(failures > 0, rest * (1 - _WIDEN), 0.0)
    return low, np.minimum(np.nextafter(high, 2.0), 1.0)


def _normal_gap(true_positive: Array, false_positive: Array) -> Array:
    """Φ⁻¹(TPR) − Φ⁻¹(FPR), and −∞ where one of them is not a test."""
    return scipy.special.ndtri(true_positive) - scipy.special.ndtri(false_positive)


def _log_ratio(true_positive: Array, false_positive: Array, delta: float) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        event = np.log(np.maximum(true_positive - delta, 0)) - np.log(false_positive)
        rest = np.log(np.maximum(1 - false_positive - delta, 0)) - np.log1p(-true_positive)
    return np.maximum(event, rest)


def _scores(name: str, values: ArrayLike) -> Array:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or scores.size < 2 * _SELECTION_SHARE:
        raise ValueError(
            f"Expected {name} to be one score per run, at least {2 * _SELECTION_SHARE} of them, "
            f"got shape {scores.shape}."
        )
    if np.isnan(scores).any():
        raise ValueError(f"Expected {name} without NaN: a run that gave NaN is itself a finding.")
    return scores


def _rates(null: Array, alternative: Array, thresholds: Array, alpha: float) -> tuple[Array, Array]:
    """(TPR lower bounds, FPR upper bounds) of the tests score ≥ threshold, each at α/2."""
    hits = alternative.size - np.searchsorted(np.sort(alternative), thresholds, side="left")
    alarms = null.size - np.searchsorted(np.sort(null), thresholds, side="left")
    low, _ = _interval(hits, alternative.size, alpha / 2)
    _, high = _interval(alarms, null.size, alpha / 2)
    return low, high


def _best_split(
    scores_null: ArrayLike,
    scores_alternative: ArrayLike,
    alpha: float,
    gap: Callable[[Array, Array], Array],
) -> float:
    """The gap of the rates at the threshold that a first tenth of the runs chose."""
    null = _scores("scores_null", scores_null)
    alternative = _scores("scores_alternative", scores_alternative)
    first, second = null.size // _SELECTION_SHARE, alternative.size // _SELECTION_SHARE
    pooled = np.concatenate([null[:first], alternative[:second]])
    grid = np.linspace(0, 1, _CANDIDATES + 2)[1:-1]
    candidates = np.quantile(pooled, grid, method="higher")
    chosen = np.argmax(gap(*_rates(null[:first], alternative[:second], candidates, alpha)))
    threshold = candidates[chosen : chosen + 1]
    found = float(gap(*_rates(null[first:], alternative[second:], threshold, alpha))[0])
    return max(0.0, found)


def mu_lower_bound(
    scores_null: ArrayLike, scores_alternative: ArrayLike, *, failure_probability: float = 1e-6
) -> float:
    """A μ that every Gaussian-DP guarantee of this mechanism must reach.

    The first tenth of each array chooses one threshold t among 199 quantiles; the other nine
    tenths, untouched until then, give TPR_lo and FPR_hi of the test "score ≥ t".

    Args:
      scores_null: one test statistic per run on the first input, independent runs.
      scores_alternative: the same statistic on the neighbouring input, on which it is larger.
      failure_probability: chance that the result exceeds the true μ, in (0, 1).

    Returns:
      max(0, Φ⁻¹(TPR_lo) − Φ⁻¹(FPR_hi)). Lower bound with confidence 1 − failure_probability. On
      an exact pair with the optimal statistic it is about .85, .956 and .987 of μ = 1 at 10⁴, 10⁵
      and 10⁶ runs a side (.92, .974, .992 of μ = 2), so it refutes a claim that the truth exceeds
      by 30 %, 10 % and 3 %.

    Raises:
      ValueError: on NaN, on fewer than 20 runs a side, or if an array is not one-dimensional.

    Guarantee: AU2 (bounds.md).
    Source: Dong, Roth, Su 2022, arXiv:1905.02383, Definition 2.6; Nasr et al. 2023,
      arXiv:2302.07956 (auditing through the trade-off curve).

    Example:
      >>> runs = np.linspace(-3, 3, 10_001)[np.random.default_rng(0).permutation(10_001)]
      >>> mu_lower_bound(runs, runs)
      0.0
    """
    alpha = _check.real(
        "failure_probability", failure_probability, low=0, high=1, open_low=True, open_high=True
    )
    return _best_split(scores_null, scores_alternative, alpha, _normal_gap)


def epsilon_lower_bound(
    scores_null: ArrayLike,
    scores_alternative: ArrayLike,
    *,
    delta: float,
    failure_probability: float = 1e-6,
) -> float:
    """An ε that every (ε, δ) guarantee of this mechanism must reach.

    The threshold is chosen and evaluated as in `mu_lower_bound`. For Gaussian noise it is much
    weaker than `mu_lower_bound`: at δ = 10⁻⁵ it misses a claim 30 % too small even at 4·10⁶ runs.

    Args:
      scores_null: one test statistic per run on the first input, independent runs.
      scores_alternative: the same statistic on the neighbouring input, on which it is larger.
      delta: δ of the claim under attack, in [0, 1].
      failure_probability: chance that the result exceeds the true ε(δ), in (0, 1).

    Returns:
      max(0, ln((TPR_lo−δ)/FPR_hi), ln((1−FPR_hi−δ)/(1−TPR_lo))). Lower bound with confidence
      1 − failure_probability.

    Raises:
      ValueError: on NaN, on fewer than 20 runs a side, or if an array is not one-dimensional.

    Guarantee: AU3 (bounds.md).
    Source: Kairouz, Oh, Viswanath 2015, arXiv:1311.0776, Theorem 2.1.

    Example:
      >>> coins = np.tile([0.0, 1.0], 5_000)
      >>> epsilon_lower_bound(coins, coins, delta=0.0)
      0.0
    """
    delta = _check.real("delta", delta, low=0, high=1)
    alpha = _check.real(
        "failure_probability", failure_probability, low=0, high=1, open_low=True, open_high=True
    )

    def gap(true_positive: Array, false_positive: Array) -> Array:
        return _log_ratio(true_positive, false_positive, delta)

    return _best_split(scores_null, scores_alternative, alpha, gap)
