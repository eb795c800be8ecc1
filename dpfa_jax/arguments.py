"""What callers pass, checked: the shapes of a call and the arrays that go with them.

Errors name the argument and its shape, and say what to pass instead.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dpfa_jax import _check


@dataclasses.dataclass(frozen=True)
class Call:
    """The public shape of one attention call.

    Attributes:
      batch: B, query batch.
      queries: T, queries per batch element.
      heads: N, query heads.
      memories: 1 or B, the key batch.
      keys: S, rows of one memory.
      kv_heads: K, key/value heads; N is a multiple.
      query_dim: H.
      value_dim: h.
    """

    batch: int
    queries: int
    heads: int
    memories: int
    keys: int
    kv_heads: int
    query_dim: int
    value_dim: int

    @classmethod
    def of(cls, query_shape: Any, key_shape: Any, value_shape: Any = None) -> "Call":
        """The call with these array shapes, checked.

        Args:
          query_shape: (B, T, N, H).
          key_shape: (B or 1, S, K, H).
          value_shape: (B or 1, S, K, h); by default the key's shape.

        Raises:
          ValueError: naming the shapes that do not fit.
        """
        query_shape, key_shape = tuple(query_shape), tuple(key_shape)
        value_shape = key_shape if value_shape is None else tuple(value_shape)
        shapes = f"query {query_shape}, key {key_shape}, value {value_shape}"
        if not len(query_shape) == len(key_shape) == len(value_shape) == 4:
            raise ValueError(
                f"Expected query (B, T, N, H), key (B or 1, S, K, H) and value (B or 1, S, K, h), "
                f"got {shapes}. Add the missing axes with reshape."
            )
        batch, queries, heads, query_dim = query_shape
        memories, keys, kv_heads, key_dim = key_shape
        if min(query_shape) < 1 or min(key_shape[2:]) < 1 or value_shape[3] < 1 or memories < 1:
            raise ValueError(f"Expected no empty axis but the keys', got {shapes}.")
        if key_dim != query_dim:
            raise ValueError(f"Expected query and key of one width, got {shapes}.")
        if value_shape[:3] != key_shape[:3]:
            raise ValueError(f"Expected one value row for each key row, got {shapes}.")
        if memories not in (1, batch):
            raise ValueError(f"Expected a key batch of 1 or of the query batch, got {shapes}.")
        if heads % kv_heads:
            raise ValueError(f"Expected query heads to be a multiple of kv heads, got {shapes}.")
        return cls(batch, queries, heads, memories, keys, kv_heads, query_dim, int(value_shape[3]))

    def reads(self, disjoint_batch: bool) -> int:
        """Queries that may read one record, over all kv heads: B·T·N, or T·N for disjoint ones."""
        each = self.queries * self.heads
        return each if disjoint_batch and self.memories == self.batch else each * self.batch

    def coordinates(self, denominator: bool) -> int:
        """How many noisy scalars the call releases."""
        width = self.value_dim + (1 if denominator else 0)
        return self.batch * self.queries * self.heads * width


def floating(name: str, value: Any) -> jax.Array:
    """The array in a floating dtype that kernels take, or an error that says how to cast it."""
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(f"Expected {name} to be an array, got {type(value).__name__}.")
    array = jnp.asarray(value)
    if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(
            f"Expected {name} in float32, bfloat16 or float16, got {array.dtype} of shape "
            f"{array.shape}. Cast it with .astype(jnp.float32)."
        )
    return array


_FARTHEST = 2**30
"""More keys than any sequence has."""


def window(size: Any) -> tuple[int, int] | None:
    """(left, right) of a window given as one number or two, or None."""
    if size is None:
        return None
    pair = size if isinstance(size, tuple) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"Expected local_window_size to be an int or (left, right), got {size!r}.")
    left, right = (_check.integer("local_window_size", side, low=0) for side in pair)
    # Positions are int32, and a side that reaches past them all must not overflow beside one.
    return min(left, _FARTHEST), min(right, _FARTHEST)


def boolean_mask(mask: Any, call: Call) -> jax.Array | None:
    """The mask, checked to be boolean and to broadcast to (B, N, T, S), or None."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"Expected mask to be boolean with True where attention is allowed, got {mask.dtype}. "
            "A 0/1 mask (such as flax.linen.make_causal_mask's) becomes one by mask.astype(bool); "
            "additive biases go to key_log_weights, where they depend on the key alone."
        )
    full = (call.batch, call.heads, call.queries, call.keys)
    fits = mask.ndim == 4 and all(a in (1, b) for a, b in zip(mask.shape, full, strict=True))
    if not fits:
        raise ValueError(
            f"Expected mask to be 4-dimensional and to broadcast to (B, N, T, S) = {full}, got "
            f"{mask.shape}."
        )
    return mask


def segments(segment_ids: Any, call: Call):
    """(query ids, key ids) as int32, from a pair or from one array for both, or (None, None)."""
    if segment_ids is None:
        return None, None
    pair = segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids, segment_ids)
    if len(pair) != 2:
        raise ValueError("Expected segment_ids to be an array or (query ids, key ids).")
    wanted = ((call.batch, call.queries), (call.memories, call.keys))
    arrays = []
    for name, ids, shape in zip(("query", "key"), pair, wanted, strict=True):
        ids = jnp.asarray(ids)
        if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.shape != shape:
            raise ValueError(
                f"Expected the {name} segment ids to be integers of shape {shape}, got {ids.dtype} "
                f"of shape {ids.shape}. Pass (query ids, key ids) where the two differ."
            )
        arrays.append(ids.astype(jnp.int32))
    return arrays[0], arrays[1]


def lengths(lengths: Any, call: Call):
    """Key lengths (B,) as int32, or None."""
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer) or lengths.shape != (call.batch,):
        raise ValueError(
            f"Expected key_value_seq_lengths to be integers of shape ({call.batch},), got "
            f"{lengths.dtype} of shape {lengths.shape}."
        )
    return lengths.astype(jnp.int32)


def base_log_weights(weights: Any, call: Call) -> jax.Array:
    """(B or 1, S, K) float32 ≤ 0: the caller's row weights, −∞ where they are no number."""
    full = (call.memories, call.keys, call.kv_heads)
    if weights is None:
        return jnp.zeros(full, jnp.float32)
    weights = jnp.asarray(weights)
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise TypeError(f"Expected key_log_weights to be floating point, got {weights.dtype}.")
    if weights.ndim == 1:
        weights = weights[None, :, None]
    elif weights.ndim == 2:
        weights = weights[:, :, None]
    fits = weights.ndim == 3 and all(a in (1, b) for a, b in zip(weights.shape, full, strict=True))
    if not fits or weights.shape[1] != call.keys:
        raise ValueError(
            f"Expected key_log_weights of shape (S,), (B, S) or (B, S, K) for {full}, got "
            f"{weights.shape}."
        )
    # Above 0 a record could weigh more than the bound; NaN is no weight.
    weights = jnp.minimum(weights.astype(jnp.float32), 0.0)
    weights = jnp.where(jnp.isnan(weights), -jnp.inf, weights)
    return jnp.broadcast_to(weights, full)
