"""Which records of a call count, and how much, before any backend sees them."""

from types import ModuleType
from typing import Any

import jax.numpy as jnp

from dpfa_jax import clipping, releases
from dpfa_jax._typing import Operands


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


def weighted(module: ModuleType, operands: Operands, mechanism: Any) -> Operands:
    """The same for a backend that leaves out what is not finite by itself: no copy is made.

    Args:
      module: the backend.
      operands: the call's arrays, `log_weights` the caller's alone.
      mechanism: of the call.
    """
    bound = _record_bound(mechanism)
    weights, flags = module.record_log_weights(operands.key, operands.value, bound)
    operands = operands._replace(log_weights=operands.log_weights + weights, flags=flags)
    return _scaled(operands, mechanism)


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
