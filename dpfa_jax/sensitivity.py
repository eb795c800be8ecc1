"""How far one neighbour moves a release: S1-S8 as functions of public numbers.

Which statement this makes true: every function returns an upper bound on the L2 distance (for S8:
on the log-ratio) between the same release computed on two neighbouring data sets. Proofs are in
sensitivity.md, one note per function, tied to it by a digest. Host float64, no JAX.

Each function rounds its result up by 2⁻⁴⁴ of itself, more than all roundings inside it together.
"""

import collections
import math
from collections.abc import Sequence

from dpfa_jax import _check
from dpfa_jax.adjacency import Adjacency

_ROUND_UP = 1 + 2.0**-44


def _up(bound: float) -> float:
    return math.nextafter(bound * _ROUND_UP, math.inf) if bound > 0 else bound


def _changed(adjacency: Adjacency) -> int | None:
    """The number of rows that become NULL, or None where one row is replaced instead."""
    if not isinstance(adjacency, Adjacency):
        raise TypeError(f"Expected adjacency to be an Adjacency, got {adjacency!r}.")
    if adjacency.kind == "SEQUENCE":
        raise ValueError(
            "Expected adjacency ZERO_OUT, REPLACE_ONE or GROUP(rows), got SEQUENCE. Only "
            "sequence_release (S7) covers a whole sequence."
        )
    return None if adjacency.kind == "REPLACE_ONE" else adjacency.rows


def softmax_output(
    *,
    value_bound: float,
    score_bound: float,
    rows: int | Sequence[int],
    changed_rows: int = 1,
    public_weight: float = 0.0,
) -> float:
    """L2 sensitivity of softmax attention outputs whose scores lie in [−B, B].

    Args:
      value_bound: Cv, bound on the norm of every value row, > 0.
      score_bound: B, bound on every |score|, ≥ 0.
      rows: n, how many rows each released output sees, the changed ones included: one count per
        (query, head), or one int for a single output. A count is public and a lower bound on the
        rows that are not NULL: where records may be missing or not finite, it is not the length of
        the array.
      changed_rows: r, how many rows one neighbour changes or removes, ≥ 1.
      public_weight: W₀ ≥ 0, softmax weight of a public part with mean of norm ≤ Cv.

    Returns:
      2·√(Σ (Cv·π)²) with π = r/(r + W₀e^(−B) + (n−r)e^(−2B)). Equality under REPLACE_ONE of r
      rows whose scores are free in the box; upper bound where rows become NULL.

    Guarantee: S1 (sensitivity.md).

    Example:
      >>> round(softmax_output(value_bound=1.0, score_bound=0.0, rows=1000), 9)
      0.002
    """
    value_bound = _check.real("value_bound", value_bound, low=0, open_low=True)
    score_bound = _check.real("score_bound", score_bound, low=0)
    public_weight = _check.real("public_weight", public_weight, low=0)
    changed_rows = _check.integer("changed_rows", changed_rows, low=1)
    visible = [rows] if not hasattr(rows, "__len__") else list(rows)  # type: ignore[arg-type]
    shares = []
    for n, outputs in collections.Counter(visible).items():
        n = _check.integer("rows", n, low=0)
        if n == 0:
            continue
        r = min(changed_rows, n)
        others = public_weight * math.exp(-score_bound) + (n - r) * math.exp(-2 * score_bound)
        shares.append(math.sqrt(outputs) * (r / (r + others)))
    return _up(2 * value_bound * math.hypot(*shares))


def attention_sums(
    *, value_bound: float, denominator_weight: float, queries: int, adjacency: Adjacency
) -> float:
    """L2 sensitivity of the sums Σ_j w_ij (v_j, c) with weights in [0, 1].

    Args:
      value_bound: Cv, bound on the norm of every value row, > 0.
      denominator_weight: c ≥ 0, the public weight of the denominator column.
      queries: m, queries that read this memory, summed over kv heads with these bounds:
        batch x time x query heads of the group.
      adjacency: ZERO_OUT, REPLACE_ONE or GROUP(rows).

    Returns:
      √m·√(Cv²+c²); REPLACE_ONE √m·max(2Cv, √(Cv²+c²)); GROUP(r) r times the first. Equality.

    Guarantee: S2 (sensitivity.md).

    Example:
      >>> from dpfa_jax.adjacency import REPLACE_ONE
      >>> round(attention_sums(
      ...     value_bound=1, denominator_weight=1, queries=4, adjacency=REPLACE_ONE), 9)
      4.0
    """
    value_bound = _check.real("value_bound", value_bound, low=0, open_low=True)
    denominator_weight = _check.real("denominator_weight", denominator_weight, low=0)
    queries = _check.integer("queries", queries, low=1)
    nulled = _changed(adjacency)
    record = math.hypot(value_bound, denominator_weight)
    worst = max(2 * value_bound, record) if nulled is None else nulled * record
    return _up(math.sqrt(queries) * worst)


def clipped_contributions(
    *, clip_norm: float, value_bound: float, denominator_weight: float, adjacency: Adjacency
) -> float:
    """L2 sensitivity of sums in which each record's whole contribution has norm ≤ C.

    Args:
      clip_norm: C, bound on ‖u_j φ_j‖ over all queries and heads of the release, > 0.
      value_bound: Cv, bound on the norm of every value row, > 0.
      denominator_weight: c ≥ 0, the public weight of the denominator column. Where heads differ,
        pass the head with the largest Cv/c.
      adjacency: ZERO_OUT, REPLACE_ONE or GROUP(rows).

    Returns:
      C; REPLACE_ONE C·√(2(1+κ)), κ = (Cv²−c²)₊/(Cv²+c²); GROUP(r) r·C. Equality.

    Guarantee: S3 (sensitivity.md).

    Example:
      >>> from dpfa_jax.adjacency import ZERO_OUT
      >>> round(clipped_contributions(
      ...     clip_norm=3, value_bound=1, denominator_weight=1, adjacency=ZERO_OUT), 9)
      3.0
    """
    clip_norm = _check.real("clip_norm", clip_norm, low=0, open_low=True)
    value_bound = _check.real("value_bound", value_bound, low=0, open_low=True)
    denominator_weight = _check.real("denominator_weight", denominator_weight, low=0)
    nulled = _changed(adjacency)
    if nulled is not None:
        return _up(nulled * clip_norm)
    ratio = min(denominator_weight / value_bound, 1.0)
    opposition = (1 - ratio**2) / (1 + ratio**2)
    return _up(clip_norm * math.sqrt(2 * (1 + opposition)))


def gaussian_process(
    *,
    clip_norm: float,
    value_bound: float,
    denominator_weight: float,
    adjacency: Adjacency,
    memories: int = 1,
) -> float:
    """Sensitivity in the Gaussian process's own norm, for any number of adaptive queries.

    Args:
      clip_norm: C, bound on u_j·e^(γ‖k̂_j‖²/2)·‖a_j‖, > 0.
      value_bound: Cv, bound on the norm of every value row, > 0.
      denominator_weight: c ≥ 0, the public weight of the denominator column.
      adjacency: ZERO_OUT, REPLACE_ONE or GROUP(rows).
      memories: how many memories with independent processes (kv heads, layers) one record
        enters, each clipped to C on its own.

    Returns:
      √memories times C; REPLACE_ONE C·√(2(1+κ)); GROUP(r) r·C. Upper bound, approached as the
      queries approach the record's key. Divided by the process's std it is μ of the whole
      interaction.

    Guarantee: S5 (sensitivity.md).

    Example:
      >>> from dpfa_jax.adjacency import ZERO_OUT
      >>> round(gaussian_process(clip_norm=2, value_bound=1, denominator_weight=1,
      ...     adjacency=ZERO_OUT, memories=4), 9)
      4.0
    """
    memories = _check.integer("memories", memories, low=1)
    record = clipped_contributions(
        clip_norm=clip_norm,
        value_bound=value_bound,
        denominator_weight=denominator_weight,
        adjacency=adjacency,
    )
    return _up(math.sqrt(memories) * record)


def random_features(*, clip_norm: float, adjacency: Adjacency, memories: int = 1) -> float:
    """L2 sensitivity of a random-feature memory Σ_j u_j φ(k_j) a_jᵀ.

    Args:
      clip_norm: C, bound on each record's term in Frobenius norm, > 0.
      adjacency: ZERO_OUT, REPLACE_ONE or GROUP(rows).
      memories: how many memories (kv heads, layers) one record enters, each clipped to C.

    Returns:
      √memories times C; REPLACE_ONE 2C (features may point in opposite directions); GROUP(r) r·C.
      Equality over all features, for any fixed public feature matrix an upper bound.

    Guarantee: S6 (sensitivity.md).

    Example:
      >>> from dpfa_jax.adjacency import REPLACE_ONE
      >>> round(random_features(clip_norm=1, adjacency=REPLACE_ONE), 9)
      2.0
    """
    clip_norm = _check.real("clip_norm", clip_norm, low=0, open_low=True)
    memories = _check.integer("memories", memories, low=1)
    nulled = _changed(adjacency)
    return _up(math.sqrt(memories) * (2 if nulled is None else nulled) * clip_norm)


def sequence_release(*, clip_norm: float) -> float:
    """L2 sensitivity of a whole clipped sequence under SEQUENCE: twice the clip norm.

    Args:
      clip_norm: C, bound on the Frobenius norm of the released matrix, > 0. With T rows clipped
        to C_r each, pass C_r·√T.

    Returns:
      2C. Equality.

    Guarantee: S7 (sensitivity.md).

    Example:
      >>> round(sequence_release(clip_norm=1.5), 9)
      3.0
    """
    clip_norm = _check.real("clip_norm", clip_norm, low=0, open_low=True)
    return _up(2 * clip_norm)


def sampled_attention(*, score_bound: float, candidates: int) -> float:
    """Pure-DP epsilon of one index drawn from softmax(scores), one score replaced.

    Args:
      score_bound: B, bound on every |score|, ≥ 0.
      candidates: n, the public number of candidates, ≥ 1.

    Returns:
      2B + ln((n−1+e^(−2B))/n) < 2B, and 0 for n = 1. Equality. REPLACE_ONE only.

    Guarantee: S8 (sensitivity.md).

    Example:
      >>> sampled_attention(score_bound=3.0, candidates=1)
      0.0
    """
    score_bound = _check.real("score_bound", score_bound, low=0)
    candidates = _check.integer("candidates", candidates, low=1)
    if candidates == 1:
        return 0.0
    return _up(2 * score_bound + math.log1p(math.expm1(-2 * score_bound) / candidates))


def sampled_attention_zcdp(*, score_bound: float) -> float:
    """The zCDP cost ρ of one index drawn from softmax(scores), one score replaced.

    Args:
      score_bound: B, bound on every |score|, ≥ 0.

    Returns:
      B²/2. Upper bound, for any number of candidates. REPLACE_ONE only.

    Guarantee: S8 (sensitivity.md).
    Source: Cesar, Rogers 2021, arXiv:2004.07223, Lemma 3.4 (bounded range).

    Example:
      >>> round(sampled_attention_zcdp(score_bound=1.0), 9)
      0.5
    """
    score_bound = _check.real("score_bound", score_bound, low=0)
    return _up(score_bound * score_bound / 2)


def default_denominator_weight(
    *, value_bound: float, value_dim: int, adjacency: Adjacency
) -> float:
    """The denominator weight c that suits a value width: a choice, not a bound.

    Args:
      value_bound: Cv, bound on the norm of every value row, > 0.
      value_dim: d, the width of a value row, ≥ 1.
      adjacency: ZERO_OUT, REPLACE_ONE or GROUP(rows).

    Returns:
      Cv·d^(−1/4), which minimises the linearised error of the ratio; REPLACE_ONE √3·Cv, the
      largest c that costs nothing.

    Example:
      >>> from dpfa_jax.adjacency import ZERO_OUT
      >>> default_denominator_weight(value_bound=1.0, value_dim=16, adjacency=ZERO_OUT)
      0.5
    """
    value_bound = _check.real("value_bound", value_bound, low=0, open_low=True)
    value_dim = _check.integer("value_dim", value_dim, low=1)
    if _changed(adjacency) is None:
        return math.sqrt(3) * value_bound
    return value_bound * value_dim**-0.25


def summation_rounding(
    *, keys: int, tile: int = 128, unit_roundoff: float = 2.0**-24, one_word: bool = False
) -> float:
    """Relative growth of a sensitivity when the sums are floating-point tiles.

    Tiles at fixed positions, each one dot product of at most `tile` keys summed in any order that
    does not depend on the data; tiles added to a double word (two_sum, add the low word,
    fast_two_sum).

    Args:
      keys: n, the number of key rows summed, ≥ 1.
      tile: b, keys in one tile, ≥ 1.
      unit_roundoff: u of the accumulating format, 2⁻²⁴ for float32.
      one_word: whether the double word is rounded to one word BEFORE the noise is added. False
        needs the noise added to both words (two_sum of the high word and the noise, then the two
        low words), so that the only rounding to one word comes after the noise.

    Returns:
      R such that the sums move by at most (1+R) times the exact-sum sensitivity of S2, S3 or S6:
      2b·γ_(b+1) + 2n(1+γ)((1+2u²)^(tiles+1) − 1), plus 2n·u(1+γ) for one word. Upper bound. About
      0.2 % at b = 128, n = 10⁶ and u = 2⁻²⁴; one word adds 12 % there.

    Raises:
      ValueError: if (tile+1)·u is 1 or more, where no bound of this form holds.

    Guarantee: F1 (sensitivity.md).
    Source: Joldes, Muller, Popescu 2017, doi:10.1145/3121432, Algorithm 4 (double word + word).

    Example:
      >>> summation_rounding(keys=10**6) < 0.01
      True
    """
    keys = _check.integer("keys", keys, low=1)
    tile = min(_check.integer("tile", tile, low=1), keys)
    u = _check.real("unit_roundoff", unit_roundoff, low=0, high=2.0**-4)
    one_word = _check.flag("one_word", one_word)
    if not (tile + 1) * u < 1:
        raise ValueError(
            f"Expected (tile + 1)·unit_roundoff < 1, got tile {tile} and unit_roundoff {u}. Use "
            "smaller tiles or a wider accumulator."
        )
    gamma = (tile + 1) * u / (1 - (tile + 1) * u)
    tiles = -(-keys // tile)
    joined = math.expm1((tiles + 1) * math.log1p(2 * u**2))
    bound = 2 * tile * gamma + 2 * keys * (1 + gamma) * joined
    if one_word:
        bound += 2 * keys * (1 + gamma) * (1 + joined) * u
    return _up(bound)


def gaussian_process_rounding(
    *,
    queries: int,
    jitter: float,
    jitter_error: float,
    weight_error: float,
    sum_error: float,
    adjacency: Adjacency,
) -> float:
    """Factor by which rounding grows the sensitivity of a Gaussian-process release.

    Unlike the other releases, S5's noise is small in some directions (variance λ), and a rounding
    error may point there.

    Args:
      queries: m, all queries the memory will ever answer, ≥ 1.
      jitter: λ > 0 added to the unit-diagonal Gram matrix K.
      jitter_error: the enforced bound on ‖LLᵀ − (K+λI)‖₂, ≥ 0 and < jitter. What it takes from λ
        is no longer there to absorb rounding.
      weight_error: η ≥ 0, relative error of each weight w̃_ij against the kernel of the stored
        rows.
      sum_error: E_b ≥ 0, the norm of one query's summation error in units of C, on one data set:
        half of what `summation_rounding` returns.
      adjacency: ZERO_OUT, REPLACE_ONE or GROUP(rows).

    Returns:
      1 + (η+2E_b)·√(m/(λ−jitter_error)), to be multiplied with `gaussian_process`; REPLACE_ONE
      1 + √2(η+E_b)·√(m/(λ−jitter_error)). Upper bound.

    Raises:
      ValueError: if jitter_error is not below jitter: nothing is left to absorb any rounding.

    Guarantee: F2 (sensitivity.md).

    Example:
      >>> from dpfa_jax.adjacency import ZERO_OUT
      >>> round(gaussian_process_rounding(queries=450, jitter=0.05, jitter_error=0.01,
      ...     weight_error=0.0, sum_error=0.0, adjacency=ZERO_OUT), 9)
      1.0
    """
    queries = _check.integer("queries", queries, low=1)
    jitter = _check.real("jitter", jitter, low=0, open_low=True)
    jitter_error = _check.real("jitter_error", jitter_error, low=0, high=jitter, open_high=True)
    weight_error = _check.real("weight_error", weight_error, low=0)
    sum_error = _check.real("sum_error", sum_error, low=0)
    nulled = _changed(adjacency)
    amplification = math.sqrt(queries / (jitter - jitter_error))
    if nulled is None:
        per_clip_norm = math.sqrt(2) * (weight_error + sum_error)
    else:
        per_clip_norm = weight_error + 2 * sum_error
    return _up(1 + per_clip_norm * amplification)
