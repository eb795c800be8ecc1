"""What every memory does with its operands first: shapes named, rows that are not finite made NULL.

A memory is one set of records, key (S, K, H) and value (S, K, h), that all queries read; several
memories are several values, or one under `jax.vmap`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from dpfa_jax import accounting, clipping, releases
from dpfa_jax.accounting.event import Event

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def _array(name: str, value: Any) -> jax.Array:
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(f"Expected {name} to be an array, got {type(value).__name__}.")
    array = jnp.asarray(value)
    if array.dtype not in _DTYPES:
        raise TypeError(
            f"Expected {name} in float32, bfloat16 or float16, got {array.dtype} of shape "
            f"{array.shape}. Cast it with .astype(jnp.float32)."
        )
    return array


def records(key: Any, value: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The records of a memory in float32, a row with a NaN or an infinity in any head being NULL.

    Args:
      key: (S, K, H).
      value: (S, K, h).

    Returns:
      key and value with zeros where a record is NULL, and log-weights (S, K): 0, or −∞ for NULL.

    Raises:
      TypeError: for anything but float32, bfloat16 or float16 arrays.
      ValueError: naming the shapes that do not fit.
    """
    key, value = _array("key", key), _array("value", value)
    shapes = f"key {key.shape} and value {value.shape}"
    if key.ndim == 4 and value.ndim == 4:
        raise ValueError(
            f"Expected one memory, key (S, K, H) and value (S, K, h), got {shapes}. Pass key[0] "
            "and value[0], or jax.vmap over memories and split keys."
        )
    if key.ndim != 3 or value.ndim != 3 or key.shape[:2] != value.shape[:2]:
        raise ValueError(
            f"Expected key (S, K, H) and value (S, K, h) with one value row for each key row, got "
            f"{shapes}."
        )
    if min(key.shape[1:]) < 1 or value.shape[2] < 1:
        raise ValueError(f"Expected no empty axis but that of the records, got {shapes}.")
    key, value = key.astype(jnp.float32), value.astype(jnp.float32)
    present = jnp.all(clipping.finite_rows(key) & clipping.finite_rows(value), axis=-1)
    key = jnp.where(present[:, None, None], key, 0.0)
    value = jnp.where(present[:, None, None], value, 0.0)
    log_weights = jnp.where(present, 0.0, -jnp.inf).astype(jnp.float32)
    return key, value, jnp.broadcast_to(log_weights[:, None], key.shape[:2])


@dataclasses.dataclass(frozen=True)
class Life:
    """The public numbers of a memory's whole life.

    Attributes:
      mechanism: what noise it adds.
      call: the call that its life is charged as.
      scale: factor of the scores.
    """

    mechanism: Any
    call: releases.Call
    scale: float

    @property
    def event(self) -> Event:
        """What the life is charged as."""
        call = self.call
        records = (1, call.keys, call.kv_heads)
        return self.mechanism.event(
            (1, call.queries, call.heads, call.query_dim),
            (*records, call.query_dim),
            (*records, call.value_dim),
        )


def lifetime(key: jax.Array, value: jax.Array, capacity: int) -> releases.Call:
    """The call that a memory's whole life is charged as: `capacity` queries of every kv head.

    Args:
      key: (S, K, H).
      value: (S, K, h).
      capacity: queries per kv head, ≥ 1.
    """
    keys, kv_heads, width = key.shape
    return releases.Call(1, capacity, kv_heads, 1, keys, kv_heads, width, value.shape[2])


def queries(query: Any, *, kv_heads: int, width: int) -> tuple[jax.Array, jax.Array]:
    """The queries of one call as (B, T, N, H) in their own dtype, and which rows are finite.

    Args:
      query: (T, N, H) or (B, T, N, H).
      kv_heads: K; N is a multiple.
      width: H.

    Returns:
      The queries, zero where they are not finite, and a boolean (B, T, N).

    Raises:
      TypeError: for anything but a float32, bfloat16 or float16 array.
      ValueError: naming the shape that does not fit.
    """
    query = _array("query", query)
    fits = query.ndim in (3, 4) and query.shape[-1] == width and min(query.shape) >= 1
    if not fits or query.shape[-2] % kv_heads:
        raise ValueError(
            f"Expected query (T, N, H) or (B, T, N, H) with N a multiple of {kv_heads}, H = "
            f"{width} and no empty axis, got {query.shape}."
        )
    query = query.reshape((1,) * (4 - query.ndim) + query.shape)
    finite = clipping.finite_rows(query)
    return jnp.where(finite[..., None], query, jnp.zeros((), query.dtype)), finite


def check_room(count: jax.Array, asked: int, capacity: int) -> None:
    """Refuses queries that a memory has no room for, as far as that is known on the host.

    Args:
      count: queries per kv head answered so far; may be traced.
      asked: queries per kv head of this call.
      capacity: queries per kv head of the memory's life.

    Raises:
      ValueError: if they do not fit.
    """
    used = 0 if isinstance(count, Tracer) else int(count)
    if used + asked > capacity:
        raise ValueError(
            f"Expected at most {capacity - used} more queries per kv head, got {asked}: the "
            f"memory's capacity is {capacity}. Create it with a larger one; its noise is set for "
            "that many, and a second memory is a second charge."
        )


def sentence(memory: Any, mechanism: Any, life: str, delta: float | None) -> str:
    """The guarantee of a memory's life.

    Args:
      memory: it has an event.
      mechanism: whose repr is its statement.
      life: what it answers and from what, a sentence without its end.
      delta: δ at which ε is stated, or None.
    """
    said = f"{type(memory).__name__} of {mechanism!r} {life}, and all of them together are charged"
    said += f" once, as: {memory.event}."
    if delta is not None:
        epsilon = accounting.epsilon(memory.event, delta)
        said += f" Alone it is (ε = {epsilon:.4g}, δ = {delta:g})."
    return (
        f"{said} Each further line of use of one memory value (a fork, an old checkpoint asked "
        "something else) costs the same again."
    )
