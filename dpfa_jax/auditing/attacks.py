"""Attacks: the worst neighbouring pair of a map, and the best test between two known inputs.

Which statement this makes true: `sensitivity_ascent` returns a pair of neighbours that was really
evaluated, so its distance is a lower bound on the sensitivity; `two_point_scores` is the most
powerful statistic between two Gaussians. Generic NumPy float64; the map under attack comes in as a
callable and nothing of what is audited is imported.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpfa_jax import _check

type Array = NDArray[np.float64]
type Pair = tuple[Array, Array]

_PATIENCE = 40


class Worst(NamedTuple):
    """The most distant neighbours that an ascent found.

    Attributes:
      distance: how far the map moves between them.
      left: one data set.
      right: its neighbour.
    """

    distance: float
    left: Array
    right: Array


def _euclidean(difference: Array) -> float:
    return float(np.linalg.norm(difference))


def _finite_difference(objective: Callable[[Array, Array], float], left: Array, right: Array):
    gradients = []
    for side in (left, right):
        gradient = np.zeros_like(side)
        flat, slopes = side.reshape(-1), gradient.reshape(-1)
        for index in range(flat.size):
            centre = flat[index]
            step = 1e-6 * max(1.0, abs(centre))
            flat[index] = centre + step
            above = objective(left, right)
            flat[index] = centre - step
            below = objective(left, right)
            flat[index] = centre
            slopes[index] = (above - below) / (2 * step)
        gradients.append(gradient)
    return gradients[0], gradients[1]


def sensitivity_ascent(
    fn: Callable[[Array], ArrayLike],
    sample_pair: Callable[[np.random.Generator], Pair],
    project: Callable[[Array, Array], Pair],
    *,
    measure: Callable[[Array], float] = _euclidean,
    gradient: Callable[[Array, Array], Pair] | None = None,
    restarts: int = 8,
    steps: int = 200,
    seed: int = 0,
) -> Worst:
    """The most distant outputs on neighbouring inputs that projected gradient ascent can find.

    Each restart draws a pair, projects it, and climbs measure(fn(left) − fn(right)) with a step
    that doubles after a success and halves after a failure. Every other step moves single
    coordinates at random instead, which leaves the flat spots and kinks (caps, clips) where the
    gradient vanishes. A restart ends early after 40 steps without a relative gain of 10⁻⁵.

    Args:
      fn: the map, from one data set (a float64 array of any fixed shape) to an array.
      sample_pair: draws a starting pair of data sets; need not be neighbours yet.
      project: maps any two arrays to neighbours inside the domain (ties unchanged rows, clips).
      measure: what is maximised, of the difference of the two outputs. The L2 norm by default.
      gradient: of the objective in (left, right); central differences of float64 by default.
      restarts: random starting pairs, ≥ 1.
      steps: ascent steps per restart, ≥ 1.
      seed: of the NumPy generator; the attack is deterministic.

    Returns:
      The worst pair found, as evaluated. Its distance is a lower bound on the sensitivity of fn.

    Raises:
      ValueError: if fn gives a non-finite difference on a valid pair, which is itself a finding.

    Example:
      >>> def clip(left, right):
      ...     return np.clip(left, -1, 1), np.clip(right, -1, 1)
      >>> worst = sensitivity_ascent(
      ...     lambda x: 3 * x, lambda rng: (rng.normal(size=1), rng.normal(size=1)), clip)
      >>> round(worst.distance, 9)
      6.0
    """
    restarts = _check.integer("restarts", restarts, low=1)
    steps = _check.integer("steps", steps, low=1)
    rng = np.random.default_rng(seed)

    def distance(left: Array, right: Array) -> float:
        moved = np.asarray(fn(left), np.float64) - np.asarray(fn(right), np.float64)
        value = float(measure(moved))
        if not np.isfinite(value):
            raise ValueError(f"Expected fn to be finite on neighbouring data, got {value}.")
        return value

    def settle(left: Array, right: Array) -> Pair:
        left, right = project(left, right)
        return np.array(left, np.float64), np.array(right, np.float64)

    best: Worst | None = None
    for _ in range(restarts):
        left, right = settle(*sample_pair(rng))
        value, step, reach = distance(left, right), 1.0, 1.0
        mark, gained = value, 0
        for index in range(steps):
            if value > mark * (1 + 1e-5):
                mark, gained = value, index
            if index - gained > _PATIENCE:
                break
            if index % 2 == 0:
                slopes = (
                    gradient(left, right)
                    if gradient is not None
                    else _finite_difference(distance, left, right)
                )
                length = float(np.hypot(np.linalg.norm(slopes[0]), np.linalg.norm(slopes[1])))
                if length == 0:
                    continue
                trial = settle(left + step * slopes[0] / length, right + step * slopes[1] / length)
            else:
                moves = [
                    reach * rng.normal(size=side.shape) * (rng.random(side.shape) < 2 / side.size)
                    for side in (left, right)
                ]
                trial = settle(left + moves[0], right + moves[1])
            found = distance(*trial)
            better = found > value
            if better:
                (left, right), value = trial, found
            if index % 2 == 0:
                step = min(step * 2, 1e3) if better else max(step / 2, 1e-7)
            else:
                reach = min(reach * 1.5, 1e2) if better else max(reach * 0.9, 1e-4)
        if best is None or value > best.distance:
            best = Worst(value, left, right)
    assert best is not None
    return best


def two_point_direction(shift: ArrayLike, covariance: ArrayLike) -> tuple[Array, float]:
    """The direction of the most powerful test between N(0, V) and N(shift, V), and its μ.

    Args:
      shift: how far the mean moves between the two inputs, shape (M,).
      covariance: V as one variance for all coordinates, a variance per coordinate (M,), or a
        positive definite matrix (M, M).

    Returns:
      (direction, μ): a release y has score direction·(y − mean on the first input), which is
      N(0, 1) there and N(μ, 1) on the other, μ = √(shiftᵀV⁻¹shift). Equality.

    Raises:
      ValueError: if the shift is zero or the shapes disagree.

    Example:
      >>> direction, mu = two_point_direction([3.0, 4.0], 4.0)
      >>> mu
      2.5
    """
    moved = np.asarray(shift, np.float64)
    spread = np.asarray(covariance, np.float64)
    if moved.ndim != 1 or spread.shape not in ((), moved.shape, moved.shape * 2):
        raise ValueError(
            f"Expected shift of shape (M,) and covariance of shape (), (M,) or (M, M), got "
            f"{moved.shape} and {spread.shape}."
        )
    whitened = np.linalg.solve(spread, moved) if spread.ndim == 2 else moved / spread
    mu = float(np.sqrt(moved @ whitened))
    if not (np.isfinite(mu) and mu > 0):
        raise ValueError(f"Expected a non-zero shift and a positive covariance, got mu {mu}.")
    return whitened / mu, mu


def two_point_scores(
    releases: ArrayLike, *, reference: ArrayLike, shift: ArrayLike, covariance: ArrayLike
) -> Array:
    """The most powerful statistic of each release between two known noiseless answers.

    Args:
      releases: N released vectors, shape (N, M).
      reference: the noiseless answer on the first input, shape (M,).
      shift: the noiseless answer on the neighbour minus `reference`, shape (M,).
      covariance: of the noise: one variance, (M,) or (M, M).

    Returns:
      N scores, larger on the neighbour: N(0, 1) on the first input and N(μ, 1) on the neighbour
      if the noise is N(0, covariance). Feed them to `bounds.mu_lower_bound`.

    Raises:
      ValueError: if shapes disagree or the shift is zero.

    Example:
      >>> two_point_scores([[1.0], [3.0]], reference=[1.0], shift=[2.0], covariance=4.0)
      array([0., 1.])
    """
    direction, _ = two_point_direction(shift, covariance)
    answers = np.asarray(releases, np.float64)
    centre = np.asarray(reference, np.float64)
    if answers.ndim != 2 or answers.shape[1:] != direction.shape or centre.shape != direction.shape:
        raise ValueError(
            f"Expected releases (N, {direction.size}) and reference ({direction.size},), got "
            f"{answers.shape} and {centre.shape}."
        )
    return (answers - centre) @ direction
