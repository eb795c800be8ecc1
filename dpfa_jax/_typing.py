"""Shapes that layers agree on: one attention call's operands and its static description.

Axes as in `jax.nn.dot_product_attention`: B batch, T queries, S keys, N query heads, K key/value
heads, H query and key width, h value width. The key batch is B, or 1 for one memory that all
queries of the batch read.
"""

import dataclasses
from typing import Any, NamedTuple

import jax


class Operands(NamedTuple):
    """The arrays of one fused call: every entry is finite, or −∞ where said.

    A backend that says `READS_ANY_ROWS` takes rows of query, key and value that are not finite: the
    weight of such a record is −∞, and such a query counts as a row of zeros.

    Attributes:
      query: (B, T, N, H).
      key: (B or 1, S, K, H).
      value: (B or 1, S, K, h).
      log_weights: (B or 1, S, K) float32 ≤ 0, logarithm of the record weights; −∞ is NULL.
      mask: boolean, broadcasts to (B, N, T, S); True attends. Or None.
      query_segments: (B, T) int32, or None.
      key_segments: (B or 1, S) int32, or None.
      key_lengths: (B,) int32: keys at positions ≥ the length are masked. Or None.
      query_reference: (B, T, N) float32 public references τ_i that cap nothing, in place of
        `Spec.score_cap`; or None.
      base_log_weights: (B or 1, S, K) float32 ≤ 0: `log_weights` without the record weights that
        a Gaussian process makes itself; None elsewhere.
      noise_key: uint32[8] key data, or None without noise.
      key_offset: int32 scalar, the position of the first key among those of the whole sequence;
        None is 0. Causal masks, windows and key lengths count from there.
      flags: (B or 1, blocks) int32, not 0 where a block of keys has a key or value that is not
        finite; None where every number is.
      noise_row: int32 scalar, the row of the noise field at which the queries begin, a multiple of
        16; None is 0. For queries that are a part of a longer call's.
      narrow_key: `key` as `float8.rounded` makes it, where the backend made it beside the record
        weights; None elsewhere.
    """

    query: Any
    key: Any
    value: Any
    log_weights: Any
    mask: Any = None
    query_segments: Any = None
    key_segments: Any = None
    key_lengths: Any = None
    query_reference: Any = None
    base_log_weights: Any = None
    noise_key: Any = None
    flags: Any = None
    key_offset: Any = None
    noise_row: Any = None
    narrow_key: Any = None


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a backend computes, as numbers; it knows nothing of privacy.

    Weights are w_ij = exp(l_ij + log_weights_j), l_ij = min(s_ij, score_cap) − score_cap with
    s_ij = scale·⟨q_i, k_j⟩. Without a cap the reference is the largest score of the query's row
    (the plain softmax). The answer is N/max(D, floor), N = Σ w_ij v_j, D = Σ w_ij.

    Attributes:
      scale: factor of the scores.
      score_cap: public reference τ and cap, or None for the running maximum.
      score_low: scores are raised to at least this, or None.
      is_causal: query i sees keys j ≤ i.
      window: (left, right): query i sees i − left ≤ j ≤ i + right, or None.
      noise: "none", "sums" (added to N and D before the ratio), or "rows" (added to the answer).
      noise_std: standard deviation of the noise of N, or of the answer.
      denominator_std: standard deviation of the noise of D; math.inf says that D is not released
        and the answer is N/floor.
      on_grid: whether what carries noise is rounded to `doubleword.grid_step` of its std.
      floor: smallest denominator, > 0.
      ball: the answer is projected to this norm, or None.
      row_clip: the answer's rows are clipped to this norm before "rows" noise, or None.
      precision: of the score product, as `jax.lax` takes it.
      float8_scores: whether rows of query and key count as `float8.rounded` makes them; for
        backends that say `FLOAT8_SCORES`, the others get such rows.
      mark_queries: whether a query that is not finite is answered by NaN; only for backends that
        say `READS_ANY_ROWS`.
      judge_keys: whether the backend itself finds the keys that are not finite: `log_weights` and
        `flags` know the values alone. For backends that have `value_log_weights`.
      deterministic: whether gradients must be the same bits on every run.
    """

    scale: float
    score_cap: float | None
    score_low: float | None = None
    is_causal: bool = False
    window: tuple[int, int] | None = None
    noise: str = "none"
    noise_std: float = 0.0
    denominator_std: float = 0.0
    on_grid: bool = False
    floor: float = 1e-30
    ball: float | None = None
    row_clip: float | None = None
    precision: Any = jax.lax.Precision.HIGHEST
    float8_scores: bool = False
    mark_queries: bool = False
    judge_keys: bool = False
    deterministic: bool = False
