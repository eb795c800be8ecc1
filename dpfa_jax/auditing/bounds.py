"""Lower bounds on what a mechanism leaks, from runs on two neighbouring inputs.

Which statement this makes true: with probability at least 1 − failure_probability the number
returned is at most the true μ (or ε) of the pair that was run. So a result above the claimed value
refutes the claim; a result below it proves nothing. NumPy and SciPy only; nothing of what is
audited is imported.
"""

import math

import numpy as np
import scipy.special
import scipy.stats
from numpy.typing import ArrayLike, NDArray

from dpfa_jax import _check

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

    Guarantee: A1 (bounds.md).
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
    failures = trials - successes
    low, high = 0.0, 1.0
    if successes > 0:
        low = float(scipy.stats.beta.ppf(alpha, successes, failures + 1)) * (1 - _WIDEN)
    if failures > 0:
        # The complement keeps its relative accuracy where the upper bound is close to 1.
        below = float(scipy.stats.beta.ppf(alpha, failures, successes + 1)) * (1 - _WIDEN)
        high = 1 - below
    return low, high


def _normal_gap(true_positive: float, false_positive: float) -> float:
    if not true_positive > 0 or not false_positive < 1:
        return 0.0
    return float(scipy.special.ndtri(true_positive) - scipy.special.ndtri(false_positive))


def _log_ratio(true_positive: float, false_positive: float, delta: float) -> float:
    best = 0.0
    if true_positive > delta:
        best = max(best, math.log((true_positive - delta) / false_positive))
    if 1 - false_positive > delta and true_positive < 1:
        best = max(best, math.log((1 - false_positive - delta) / (1 - true_positive)))
    return best


def _scores(name: str, values: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or scores.size < 2 * _SELECTION_SHARE:
        raise ValueError(
            f"Expected {name} to be one score per run, at least {2 * _SELECTION_SHARE} of them, "
            f"got shape {scores.shape}."
        )
    if np.isnan(scores).any():
        raise ValueError(f"Expected {name} without NaN: a run that gave NaN is itself a finding.")
    return scores


def _rates(
    null: NDArray[np.float64],
    alternative: NDArray[np.float64],
    threshold: float,
    failure_probability: float,
) -> tuple[float, float]:
    """(TPR lower bound, FPR upper bound) of the test score ≥ threshold."""
    hits = int(np.count_nonzero(alternative >= threshold))
    alarms = int(np.count_nonzero(null >= threshold))
    low, _ = clopper_pearson(hits, alternative.size, failure_probability=failure_probability)
    _, high = clopper_pearson(alarms, null.size, failure_probability=failure_probability)
    return low, high


def _split_rates(scores_null: ArrayLike, scores_alternative: ArrayLike, alpha: float, gap):
    null = _scores("scores_null", scores_null)
    alternative = _scores("scores_alternative", scores_alternative)
    null_cut, alternative_cut = null.size // _SELECTION_SHARE, alternative.size // _SELECTION_SHARE
    chosen_on = null[:null_cut], alternative[:alternative_cut]
    grid = np.linspace(0, 1, _CANDIDATES + 2)[1:-1]
    pooled = np.quantile(np.concatenate(chosen_on), grid, method="higher")
    threshold = max(
        (float(candidate) for candidate in pooled),
        key=lambda candidate: gap(*_rates(*chosen_on, candidate, alpha / 2)),
    )
    return _rates(null[null_cut:], alternative[alternative_cut:], threshold, alpha / 2)


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

    Guarantee: A2 (bounds.md).
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
    return max(0.0, _normal_gap(*_split_rates(scores_null, scores_alternative, alpha, _normal_gap)))


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

    Guarantee: A3 (bounds.md).
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

    def gap(true_positive: float, false_positive: float) -> float:
        return _log_ratio(true_positive, false_positive, delta)

    return gap(*_split_rates(scores_null, scores_alternative, alpha, gap))
