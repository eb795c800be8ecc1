"""The maps and laws under test, written from their definitions in float64 NumPy.

Nothing here is imported from the library or copied from it: no formula of a bound, no sampler, no
kernel. A data set is n rows; `present` says which of them are NULL.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

type Array = NDArray[np.float64]


def softmax_outputs(
    scores: Array, values: Array, *, public_weight: float = 0.0, public_value: Array | None = None
) -> Array:
    """Softmax attention of m queries over n rows and a public part: (m, n), (n, d) to (m, d)."""
    weights = np.exp(scores)
    numerator = weights @ values
    if public_value is not None:
        numerator = numerator + public_weight * public_value
    return numerator / (weights.sum(1) + public_weight)[:, None]


def records(values: Array, denominator_weight: float) -> Array:
    """The record vectors (v_j, c)."""
    return np.concatenate([values, np.full((len(values), 1), denominator_weight)], 1)


def attention_sums(
    scores: Array, values: Array, present: Array, *, cap: float, denominator_weight: float
) -> Array:
    """Σ_j exp(min(s, τ) − τ) (v_j, c) over the rows that are present: (m, d+1)."""
    weights = np.exp(np.minimum(scores, cap) - cap) * present
    return weights @ records(values, denominator_weight)


def clipped_contributions(
    scores: Array,
    values: Array,
    present: Array,
    *,
    cap: float,
    denominator_weight: float,
    clip_norm: float,
) -> Array:
    """The same sums with each record's contribution to all queries clipped to one norm."""
    weights = np.exp(np.minimum(scores, cap) - cap)
    contributions = weights.T[:, :, None] * records(values, denominator_weight)[:, None, :]
    norms = np.sqrt((contributions**2).sum((1, 2)))
    factors = np.minimum(1.0, clip_norm / np.maximum(norms, 1e-300))
    return np.einsum("j,jmc->mc", factors * present, contributions)


def kernel_sums(
    queries: Array,
    keys: Array,
    values: Array,
    present: Array,
    *,
    gamma: float,
    denominator_weight: float,
    clip_norm: float,
) -> Array:
    """Σ_j u_j e^(γ⟨q, k_j⟩) (v_j, c) with u_j e^(γ‖k_j‖²/2)‖(v_j, c)‖ ≤ C: (m, d+1)."""
    vectors = records(values, denominator_weight)
    norms = np.exp(gamma * (keys**2).sum(1) / 2) * np.linalg.norm(vectors, axis=1)
    factors = np.minimum(1.0, clip_norm / np.maximum(norms, 1e-300)) * present
    return np.exp(gamma * queries @ keys.T) @ (factors[:, None] * vectors)


def random_feature_sums(
    frequencies: Array,
    keys: Array,
    values: Array,
    present: Array,
    *,
    gamma: float,
    denominator_weight: float,
    clip_norm: float,
) -> Array:
    """Σ_j u_j e^(γ‖k_j‖²/2) φ(k_j) (v_j, c)ᵀ, each term clipped in Frobenius norm."""
    angles = keys @ frequencies.T
    features = np.concatenate([np.cos(angles), np.sin(angles)], 1) / np.sqrt(len(frequencies))
    vectors = records(values, denominator_weight)
    terms = np.exp(gamma * (keys**2).sum(1) / 2)[:, None, None] * (
        features[:, :, None] * vectors[:, None, :]
    )
    norms = np.sqrt((terms**2).sum((1, 2)))
    factors = np.minimum(1.0, clip_norm / np.maximum(norms, 1e-300)) * present
    return np.einsum("j,jfc->fc", factors, terms)


def log_softmax(scores: Array) -> Array:
    """Log-probabilities of one index drawn from softmax(scores)."""
    shifted = scores - scores.max()
    return shifted - np.log(np.exp(shifted).sum())


def renyi_divergence(left: Array, right: Array, order: float) -> float:
    """D_α(left ‖ right) of two finite distributions, α > 1 (α = 1: Kullback-Leibler)."""
    logs = np.log(left) - np.log(right)
    if order == 1:
        return float((left * logs).sum())
    return float(np.log((left * np.exp((order - 1) * logs)).sum()) / (order - 1))


def into_ball(rows: Array, radius: float) -> Array:
    """Rows scaled down to the ball of the given radius."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows * np.minimum(1.0, radius / np.maximum(norms, 1e-300))


def neighbours(
    changed: int, *, removed: bool, valid: Callable[[Array], Array]
) -> Callable[[Array, Array], tuple[Array, Array]]:
    """Projection of two data sets onto neighbours: row r and later tied, the last column `present`.

    Args:
      changed: how many leading rows differ.
      removed: whether those rows are NULL on the right (ZERO_OUT, GROUP) or replaced.
      valid: projects the columns before `present` onto the domain.
    """

    def project(left: Array, right: Array) -> tuple[Array, Array]:
        left, right = valid(left[:, :-1]), valid(right[:, :-1])
        right[changed:] = left[changed:] = valid((left[changed:] + right[changed:]) / 2)
        here = np.ones((len(left), 1))
        there = here.copy()
        if removed:
            there[:changed] = 0
        return np.concatenate([left, here], 1), np.concatenate([right, there], 1)

    return project


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Knuth's exact sum of two arrays of one float format as a rounded sum and its error."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def join_tiles(tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of tiles (k, ...) in a double word: two_sum, add the low word, fast two_sum."""
    high = np.zeros_like(tiles[0])
    low = np.zeros_like(tiles[0])
    for tile in tiles:
        total, error = two_sum(high, tile)
        error = low + error
        high = total + error
        low = error - (high - total)
    return high, low
