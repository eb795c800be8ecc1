"""The mechanisms of private attention as frozen values: fields, event and guarantee sentence.

A release knows what it adds and what that costs before it sees data, from the public shape of the
call alone; `count` says how many queries a call is charged for.
"""

import dataclasses
import math
from typing import ClassVar

from dpfa_jax import _check, accounting, gaussian_process, sensitivity
from dpfa_jax.adjacency import REPLACE_ONE, ZERO_OUT, Adjacency
from dpfa_jax.arguments import Call as Call
from dpfa_jax.guarantee import Mechanism as Mechanism
from dpfa_jax.guarantee import check_adjacency

_MEMORY = (
    "Not protected: the queries, the number and positions of the records, gradients through the "
    "call, K/V that earlier layers mixed over records, and anything computed from the rows "
    "elsewhere."
)


class _SumsMechanism(Mechanism):
    """What S2 and S3 share: a public score cap, a denominator column, noise on the sums."""

    def weight(self, call: Call) -> float:
        """c, the public weight of the denominator column; 0 says that it is not released."""
        chosen = self.denominator_weight  # pyright: ignore
        if chosen is not None:
            return chosen
        return sensitivity.default_denominator_weight(
            value_bound=self.value_bound,  # pyright: ignore
            value_dim=call.value_dim,
            adjacency=self.adjacency,  # pyright: ignore
        )

    def _event(self, call):
        released = self.weight(call) > 0
        return accounting.Gaussian(
            self.noise_multiplier,  # pyright: ignore
            call.coordinates(released),
        )

    def smallest_denominator(self, call: Call, noise_std: float) -> float:
        """The floor: the caller's, or one standard deviation of the denominator's noise."""
        weight = self.weight(call)
        if self.floor is not None:  # pyright: ignore
            return self.floor  # pyright: ignore
        return noise_std / weight if weight > 0 else 1.0


@dataclasses.dataclass(frozen=True, repr=False)
class IndependentNoise(_SumsMechanism):
    """Independent Gaussian noise on numerator and denominator of every query.

    Best for one query or few. The answer is Ñ/max(D̃, floor), projected to the ball of radius
    `value_bound`.

    Attributes:
      noise_multiplier: σ/Δ > 0; the call is 1/noise_multiplier-GDP.
      value_bound: Cv > 0. Value rows beyond it are weighted down (ZERO_OUT, GROUP) or scaled
        (REPLACE_ONE).
      score_cap: public reference τ: weights are exp(min(s, τ) − τ). Data must not choose it.
      denominator_weight: c ≥ 0; None takes Cv·h^(−1/4), or √3·Cv under REPLACE_ONE; 0 releases no
        denominator, for when only the argmax is wanted.
      floor: smallest denominator, > 0; None takes one standard deviation of its noise.
      adjacency: ZERO_OUT, REPLACE_ONE or GROUP(rows).
      disjoint_batch: True promises that no person has rows in the memories of two batch elements.

    Guarantee: S2 (sensitivity.md).
    """

    noise_multiplier: float
    value_bound: float
    score_cap: float
    denominator_weight: float | None = None
    floor: float | None = None
    adjacency: Adjacency = ZERO_OUT
    disjoint_batch: bool = False

    statement: ClassVar[str] = (
        "Gaussian noise on the sums of every query, independent between queries (S2)."
    )
    protects: ClassVar[str] = _MEMORY
    _positive: ClassVar[tuple[str, ...]] = ("noise_multiplier", "value_bound")

    def __post_init__(self):
        super().__post_init__()
        check_adjacency(self.adjacency, ("ZERO_OUT", "REPLACE_ONE", "GROUP"), type(self).__name__)
        _check.real("score_cap", self.score_cap)

    def l2_sensitivity(self, call: Call) -> float:
        """Δ of the exact sums, in the unit of the values.

        Args:
          call: the shape of the call.

        Returns:
          Equality.
        """
        return sensitivity.attention_sums(
            value_bound=self.value_bound,
            denominator_weight=self.weight(call),
            queries=call.reads(self.disjoint_batch),
            adjacency=self.adjacency,
        )


@dataclasses.dataclass(frozen=True, repr=False)
class ClippedContributions(_SumsMechanism):
    """Gaussian noise on sums in which each record's whole contribution is clipped.

    One record's contributions to all queries and heads of the call are scaled to norm ≤
    `clip_norm` together, so the noise does not grow with the number of queries; records that many
    queries attend to count less.

    Attributes:
      noise_multiplier: σ/Δ > 0; the call is 1/noise_multiplier-GDP.
      value_bound: Cv > 0, as in IndependentNoise.
      score_cap: public reference τ.
      clip_norm: C > 0, public, in the unit of the values. A statistic of the data is a leak.
      denominator_weight: c ≥ 0, as in IndependentNoise.
      floor: smallest denominator, > 0; None takes one standard deviation of its noise.
      adjacency: ZERO_OUT, REPLACE_ONE or GROUP(rows).
      disjoint_batch: True promises that no person has rows in the memories of two batch elements;
        without it each row of a batch of B memories is clipped to clip_norm/√B.

    Guarantee: S3 (sensitivity.md).
    """

    noise_multiplier: float
    value_bound: float
    score_cap: float
    clip_norm: float
    denominator_weight: float | None = None
    floor: float | None = None
    adjacency: Adjacency = ZERO_OUT
    disjoint_batch: bool = False

    statement: ClassVar[str] = (
        "Gaussian noise on sums in which each record's contribution to all queries is clipped (S3)."
    )
    protects: ClassVar[str] = _MEMORY
    _positive: ClassVar[tuple[str, ...]] = ("noise_multiplier", "value_bound", "clip_norm")

    def __post_init__(self):
        super().__post_init__()
        check_adjacency(self.adjacency, ("ZERO_OUT", "REPLACE_ONE", "GROUP"), type(self).__name__)
        _check.real("score_cap", self.score_cap)

    def row_clip_norm(self, call: Call) -> float:
        """The norm to which one row of one memory is clipped.

        Args:
          call: the shape of the call.

        Returns:
          In the unit of the values.
        """
        shared = call.memories > 1 and not self.disjoint_batch
        return self.clip_norm / math.sqrt(call.memories) if shared else self.clip_norm

    def l2_sensitivity(self, call: Call) -> float:
        """Δ of the exact sums, in the unit of the values.

        Args:
          call: the shape of the call.

        Returns:
          Equality.
        """
        return sensitivity.clipped_contributions(
            clip_norm=self.clip_norm,
            value_bound=self.value_bound,
            denominator_weight=self.weight(call),
            adjacency=self.adjacency,
        )


@dataclasses.dataclass(frozen=True, repr=False)
class GaussianProcessNoise(Mechanism):
    """Noise correlated between queries like the attention weights themselves.

    All queries of the call cost as much as one. There is no score cap, and no mask may depend on
    the query.

    Attributes:
      noise_multiplier: σ/Δ > 0; the call is 1/noise_multiplier-GDP.
      value_bound: Cv > 0, the norm of values that enter with weight 1.
      key_bound: public norm of keys that enter with weight 1, > 0: shorter keys have the weight
        their score says, longer ones are weighted down.
      denominator_weight: c ≥ 0, as in IndependentNoise.
      key_scale: t > 0, public: keys times t, queries over t. √(typical query norm/key norm)
        balances them.
      jitter: λ > 0 added to the unit-diagonal covariance; None takes the λ that costs least.
      floor: smallest denominator, > 0; None takes one standard deviation of its noise.
      adjacency: ZERO_OUT, REPLACE_ONE or GROUP(rows).
      disjoint_batch: True promises that no person has rows in the memories of two batch elements.

    Guarantee: S5 (sensitivity.md).
    """

    noise_multiplier: float
    value_bound: float
    key_bound: float
    denominator_weight: float | None = None
    key_scale: float = 1.0
    jitter: float | None = None
    floor: float | None = None
    adjacency: Adjacency = ZERO_OUT
    disjoint_batch: bool = False

    statement: ClassVar[str] = (
        "Gaussian-process noise with the covariance of the attention weights; any number of "
        "queries costs as much as one (S5). Rounding that the statement does not forgive is "
        "charged: Δ grows by 1 + η√(m/λ) (F2)."
    )
    protects: ClassVar[str] = _MEMORY
    _positive: ClassVar[tuple[str, ...]] = (
        "noise_multiplier",
        "value_bound",
        "key_bound",
        "key_scale",
    )

    def __post_init__(self):
        super().__post_init__()
        check_adjacency(self.adjacency, ("ZERO_OUT", "REPLACE_ONE", "GROUP"), type(self).__name__)
        if self.jitter is not None:
            jitter = _check.real("jitter", self.jitter, low=0, open_low=True)
            object.__setattr__(self, "jitter", jitter)

    weight = _SumsMechanism.weight

    def _event(self, call):
        released = self.weight(call) > 0
        return accounting.Gaussian(self.noise_multiplier, call.coordinates(released))

    def processes(self, call: Call) -> int:
        """Independent processes that one record may enter: kv heads times memories.

        Args:
          call: the shape of the call.

        Returns:
          A count ≥ 1.
        """
        memories = 1 if self.disjoint_batch else call.memories
        return call.kv_heads * memories

    def process(self, call: Call, *, gamma: float) -> gaussian_process.Process:
        """The numbers of the call's process, rounding included.

        Args:
          call: its shape.
          gamma: γ > 0, the factor of the scores.
        """
        gamma = _check.real("scale", gamma, low=0, open_low=True)
        queries = call.batch * call.queries * call.heads // (call.memories * call.kv_heads)
        return self.process_for(
            gamma=gamma,
            queries=queries,
            keys=call.keys,
            processes=self.processes(call),
            query_dim=call.query_dim,
            weight=self.weight(call),
        )

    def process_for(
        self,
        *,
        gamma: float,
        queries: int,
        keys: int,
        processes: int,
        query_dim: int,
        weight: float,
    ) -> gaussian_process.Process:
        """The numbers of a process that answers up to `queries` queries in all.

        Args:
          gamma: γ > 0, the factor of the scores.
          queries: m, queries of one process, ≥ 1.
          keys: S, rows of one memory.
          processes: independent processes that one record may enter.
          query_dim: H.
          weight: c of the denominator column.

        Returns:
          The parameters, rounding charged to the noise.
        """
        weight_error = gaussian_process.weight_error(query_dim)
        sum_error = sensitivity.summation_rounding(
            keys=max(keys, 1),
            tile=gaussian_process.TILE,
            unit_roundoff=2.0**-53,
            one_word=True,
        )
        jitter = self.jitter
        if jitter is None:
            # Minimises (1 + e√(m/λ))·√(1 + λ) up to lower order; never so small that the float64
            # factorisation of a singular Gram matrix could miss its certificate.
            error = (weight_error + sum_error) * math.sqrt(queries)
            jitter = max(error ** (2 / 3), 1e-6)
        jitter_error = jitter / 16
        growth = sensitivity.gaussian_process_rounding(
            queries=queries,
            jitter=jitter,
            jitter_error=jitter_error,
            weight_error=weight_error,
            sum_error=sum_error,
            adjacency=self.adjacency,
        )
        delta = growth * sensitivity.gaussian_process(
            clip_norm=math.hypot(self.value_bound, weight),
            value_bound=self.value_bound,
            denominator_weight=weight,
            adjacency=self.adjacency,
            memories=processes,
        )
        noise_std = self.noise_multiplier * delta
        floor = self.floor
        if floor is None:
            floor = noise_std / weight if weight > 0 else 1.0
        return gaussian_process.Process(
            gamma=gamma,
            key_scale=self.key_scale,
            key_bound=self.key_bound,
            value_bound=self.value_bound,
            denominator_weight=weight,
            noise_std=noise_std,
            jitter=jitter,
            jitter_error=jitter_error,
            floor=floor,
        )


@dataclasses.dataclass(frozen=True, repr=False)
class SoftmaxNoise(Mechanism):
    """Ordinary softmax attention with noise on the answer: a reference, useless on real data.

    Scores are clipped to [−score_bound, score_bound] and every row counts: a row that is not
    finite is a zero row, not NULL. Masks are refused, since the count of visible rows is part of
    the bound.

    Attributes:
      noise_multiplier: σ/Δ > 0; the call is 1/noise_multiplier-GDP.
      value_bound: Cv > 0.
      score_bound: B > 0, public.
      adjacency: REPLACE_ONE only: the noise depends on the number of rows, which add or remove
        would make private.
      disjoint_batch: True promises that no person has rows in the memories of two batch elements.

    Guarantee: S1 (sensitivity.md).
    """

    noise_multiplier: float
    value_bound: float
    score_bound: float
    adjacency: Adjacency = REPLACE_ONE
    disjoint_batch: bool = False

    statement: ClassVar[str] = "Gaussian noise on the rows of a softmax with bounded scores (S1)."
    protects: ClassVar[str] = _MEMORY
    _positive: ClassVar[tuple[str, ...]] = ("noise_multiplier", "value_bound", "score_bound")

    def __post_init__(self):
        super().__post_init__()
        check_adjacency(self.adjacency, ("REPLACE_ONE",), type(self).__name__)

    def l2_sensitivity(self, call: Call) -> float:
        """Δ of the exact answers, in the unit of the values.

        Args:
          call: the shape of the call.

        Returns:
          Equality for one query, upper bound for more.

        Raises:
          ValueError: for an empty memory.
        """
        if call.keys < 1:
            raise ValueError("Expected at least one record for SoftmaxNoise, got an empty memory.")
        one = sensitivity.softmax_output(
            value_bound=self.value_bound, score_bound=self.score_bound, rows=call.keys
        )
        return one * math.sqrt(call.reads(self.disjoint_batch)) * (1 + 2.0**-50)

    def _event(self, call):
        return accounting.Gaussian(self.noise_multiplier, call.coordinates(False))


@dataclasses.dataclass(frozen=True, repr=False)
class SequenceRelease(Mechanism):
    """The whole answer, clipped and noised: what may leave a trusted side.

    Queries, keys and values may all be private; the whole input is the unit of privacy. What is
    protected is this answer alone: a residual branch around it leaks.

    Attributes:
      noise_multiplier: σ/Δ > 0; the call is 1/noise_multiplier-GDP.
      clip_norm: C > 0: bound on the Frobenius norm of one batch element's answer, or of each row
        (query, head) with clip "row", when Δ grows with √(T·N).
      clip: "sequence" or "row".
      disjoint_batch: True promises that each batch element is one person's input; otherwise the
        whole batch is one.

    Guarantee: S7 (sensitivity.md).
    """

    noise_multiplier: float
    clip_norm: float
    clip: str = "sequence"
    disjoint_batch: bool = False

    statement: ClassVar[str] = (
        "Gaussian noise on the clipped answer; the whole input is replaced (SEQUENCE, S7)."
    )
    protects: ClassVar[str] = (
        "Not protected: shapes and padding, the residual branch, gradients through the call, and "
        "anything else computed from the sequence."
    )
    _positive: ClassVar[tuple[str, ...]] = ("noise_multiplier", "clip_norm")

    def __post_init__(self):
        super().__post_init__()
        _check.choice("clip", self.clip, ("sequence", "row"))

    def l2_sensitivity(self, call: Call) -> float:
        """Δ of the exact answer, in its unit.

        Args:
          call: the shape of the call.

        Returns:
          Equality.
        """
        rows = call.queries * call.heads if self.clip == "row" else 1
        # One key batch of 1 feeds every batch element, so the batch is one input there.
        batches = 1 if self.disjoint_batch and call.memories == call.batch else call.batch
        bound = self.clip_norm * math.sqrt(rows * batches) * (1 + 2.0**-50)
        return sensitivity.sequence_release(clip_norm=bound)

    def _event(self, call):
        return accounting.Gaussian(self.noise_multiplier, call.coordinates(False))


@dataclasses.dataclass(frozen=True, repr=False)
class NonPrivate(Mechanism):
    """No noise and no guarantee: plain softmax attention, charged as infinity.

    Named so that its use is visible in code and in every account.
    """

    statement: ClassVar[str] = "no noise, no guarantee; ε = ∞."

    def _event(self, call):
        del call
        return accounting.NonPrivate()
