"""Which calls are admitted, with how much noise, and which of their records count how much."""

import dataclasses
import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from dpfa_jax import _check, clipping, float8, releases
from dpfa_jax._typing import Operands, Spec


def is_private(mechanism: Any, rng: Any, queries: str) -> bool:
    """Whether a call is a private one, once its mechanism, key and promise fit together.

    Args:
      mechanism: what the caller passed.
      rng: the key, or None.
      queries: "public" or "private".

    Raises:
      TypeError: for what is no mechanism, and for a private call without a key.
      ValueError: for private queries of a mechanism that protects records alone.
    """
    if not isinstance(mechanism, releases.Mechanism):
        raise TypeError(
            f"Expected mechanism to be a mechanism of dpfa_jax, such as IndependentNoise(...), got "
            f"{mechanism!r}."
        )
    private = not isinstance(mechanism, releases.NonPrivate)
    if private and rng is None:
        raise TypeError(
            "Expected rng to be a typed JAX key, got None. There is no default key: pass "
            "dpfa_jax.random.secure_key(), a new one for every call."
        )
    _check.choice("queries", queries, ("public", "private"))
    if queries == "private" and private and not isinstance(mechanism, releases.SequenceRelease):
        raise ValueError(
            f"{type(mechanism).__name__} protects the records that public queries read; with "
            "queries='private' (self-attention over private tokens) each token is also a query, "
            "whose own answer moves by the full value bound. Use SequenceRelease."
        )
    return private


def reads_any_rows(module: ModuleType, mechanism: Any) -> bool:
    """Whether the backend leaves out by itself what is not finite.

    Args:
      module: the backend.
      mechanism: of the call.
    """
    # ClippedContributions takes norms of its own, of rows that have to be finite.
    contributions = isinstance(mechanism, releases.ClippedContributions)
    return getattr(module, "READS_ANY_ROWS", False) and not contributions


def sanitised(operands: Operands, mechanism: Any) -> Operands:
    """Rows that are not finite become zero, such records NULL; value rows bounded by weights.

    Args:
      operands: the call's arrays, `log_weights` the caller's alone.
      mechanism: of the call.
    """
    query, key, value, base = operands[:4]
    query_ok = clipping.finite_rows(query)
    record_ok = jnp.all(clipping.finite_rows(key) & clipping.finite_rows(value), axis=-1)
    query = jnp.where(query_ok[..., None], query, jnp.zeros((), query.dtype))
    key = jnp.where(record_ok[..., None, None], key, jnp.zeros((), key.dtype))
    value = jnp.where(record_ok[..., None, None], value, jnp.zeros((), value.dtype))
    if not isinstance(mechanism, releases.SoftmaxNoise):
        base = jnp.where(record_ok[..., None], base, -jnp.inf)
    bound = _record_bound(mechanism)
    if bound is not None:
        base = base + clipping.log_row_weights(value, bound)
    return _scaled(
        operands._replace(query=query, key=key, value=value, log_weights=base), mechanism
    )


def weighted(
    module: ModuleType, operands: Operands, mechanism: Any, spec: Spec, *, judges: bool = True
) -> tuple[Operands, Spec]:
    """The same for a backend that leaves out what is not finite by itself: no copy is made.

    Args:
      module: the backend.
      operands: the call's arrays, `log_weights` the caller's alone.
      mechanism: of the call.
      spec: of the call, of which the noise need not be set yet.
      judges: whether what the backend does next can tell of keys: `forward` can, `sums` cannot.

    Returns:
      The operands, and `spec` that says who judges the keys.
    """
    bound, records = _record_bound(mechanism), (operands.key, operands.value)
    found = None
    if spec.float8_scores and hasattr(module, "narrow_records"):
        *found, narrow = module.narrow_records(*records, bound)
        operands = operands._replace(narrow_key=narrow)
    elif judges and hasattr(module, "value_log_weights"):
        found = module.value_log_weights(operands.value, bound)
        spec = dataclasses.replace(spec, judge_keys=found is not None)
    weights, flags = module.record_log_weights(*records, bound) if found is None else found
    operands = operands._replace(log_weights=operands.log_weights + weights, flags=flags)
    return _scaled(operands, mechanism), spec


def as_scored(module: ModuleType, operands: Operands, spec: Spec) -> Operands:
    """The call with rows of query and key as they are scored, where the backend does not see to it.

    Args:
      module: the backend.
      operands: of the call.
      spec: of the call.
    """
    if not spec.float8_scores or getattr(module, "FLOAT8_SCORES", False):
        return operands
    query, key = float8.through(operands.query), float8.through(operands.key)
    return operands._replace(query=query, key=key)


def score_precision(precision: Any, mechanism: Any) -> dict[str, Any]:
    """The fields of `Spec` that the caller's `precision` sets.

    Args:
      precision: None, "fp8", or as `jax.lax` takes it.
      mechanism: of the call.

    Returns:
      Keyword arguments.

    Raises:
      ValueError: for eight bits where noise is drawn for the rows as they are.
    """
    if precision != "fp8":
        return {"precision": jax.lax.Precision.HIGHEST if precision is None else precision}
    if isinstance(mechanism, releases.GaussianProcessNoise):
        raise ValueError(
            "GaussianProcessNoise does not take precision='fp8': its noise is correlated as the "
            "scores of the rows themselves are. Pass precision=None."
        )
    return {"float8_scores": True}


def _scaled(operands: Operands, mechanism: Any) -> Operands:
    """The value rows scaled to the bound, where no record weight does it."""
    if not _bounds_values(mechanism) or _record_bound(mechanism) is not None:
        return operands
    return operands._replace(value=clipping.clip_rows(operands.value, mechanism.value_bound))


def _bounds_values(mechanism: Any) -> bool:
    return isinstance(mechanism, releases.IndependentNoise | releases.ClippedContributions)


def _record_bound(mechanism: Any) -> float | None:
    """The norm to which record weights bound the value rows, or None.

    A record weight shrinks a row's denominator too. Two rows that replace each other may then
    differ by 2Cv in the numerator and by c in the denominator at once, so under REPLACE_ONE the
    row itself is scaled and its denominator stays (S2 in sensitivity.md).
    """
    if not _bounds_values(mechanism) or mechanism.adjacency.kind == "REPLACE_ONE":
        return None
    return mechanism.value_bound


def sums_noise_std(mechanism: Any, call: releases.Call, rounding: float) -> float:
    """The noise of a call of S2 or S3 whose sums one backend makes of all records.

    Args:
      mechanism: IndependentNoise or ClippedContributions.
      call: its shape.
      rounding: of the backend, for so many keys.

    Returns:
      In the unit of the values. Upper bound of noise_multiplier times the distance of two
      neighbours' computed sums.

    Guarantee: S2, S3 (sensitivity.md).
    """
    return mechanism.noise_multiplier * mechanism.l2_sensitivity(call) * (1 + rounding)


def noisy_spec(spec: Spec, mechanism: Any, call: releases.Call, noise_std: float) -> Spec:
    """The call of S2 or S3 with noise of this standard deviation on its sums.

    Args:
      spec: scale and masks.
      mechanism: IndependentNoise or ClippedContributions.
      call: its shape.
      noise_std: of the numerator's noise, in the unit of the values.
    """
    weight = mechanism.weight(call)
    return dataclasses.replace(
        spec,
        score_cap=mechanism.score_cap,
        noise="sums",
        noise_std=noise_std,
        denominator_std=noise_std / weight if weight > 0 else math.inf,
        floor=mechanism.smallest_denominator(call, noise_std),
        ball=mechanism.value_bound,
    )


def clip_contributions(
    module: ModuleType,
    operands: Operands,
    spec: Spec,
    mechanism: Any,
    call: releases.Call,
    *,
    axes: tuple[str, ...] = (),
) -> Operands:
    """The call with each record's contribution clipped, where the mechanism is S3.

    The weights are log u_j = log min(1, C/‖φ_j‖), φ_j over all queries and heads of the call.

    Args:
      module: the backend that will sum.
      operands: the call's arrays as they will be summed: `column_squares` knows the scores of these
        alone. All of its queries and all or some of its keys; with `axes` this shard's part of the
        queries and all keys.
      spec: of that call.
      mechanism: IndependentNoise or ClippedContributions.
      call: its shape.
      axes: mesh axes over which the queries are sharded.
    """
    if not isinstance(mechanism, releases.ClippedContributions):
        return operands
    frozen = jax.lax.stop_gradient(operands)
    squares = module.column_squares(frozen, spec)  # (B, S, K)
    if call.memories == 1:
        squares = clipping.stable_sum(squares, axis=0)[None]
    if axes:
        squares = jax.lax.psum(squares, axes)
    weight = mechanism.weight(call)
    width = jnp.full((*frozen.value.shape[:-1], 1), weight, jnp.float32)
    rows = jnp.concatenate([frozen.value.astype(jnp.float32), width], axis=-1)
    norms = clipping.log_row_norms(rows)  # ‖(v_j, c)‖ per head
    used = squares > 0
    log_squares = jnp.log(jnp.where(used, squares, 1.0)) + 2 * norms
    log_squares = jnp.where(used, log_squares, -jnp.inf)
    total = jax.nn.logsumexp(log_squares, axis=-1, keepdims=True)
    limit = math.log(mechanism.row_clip_norm(call))
    weights = jnp.minimum(0.0, limit - 0.5 * total)
    return operands._replace(log_weights=operands.log_weights + weights)
