"""What both Flax APIs need: arguments as Flax passes them, and keys that cannot repeat unseen.

Which keys repeat, `_primitives.is_constant` tells from the trace. Nothing here imports Flax.
"""

import hashlib
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from dpfa_jax import _check, attention, random, releases
from dpfa_jax._primitives import is_constant as is_constant
from dpfa_jax._primitives import refuse_constant as refuse_constant


def named_key(rng: jax.Array, *names: str | int) -> jax.Array:
    """The key for a name, by 128 bits of its SHA-256: two names never share noise.

    Flax itself derives keys from 32 bits of a hash in which ("ab", "c") equals ("a", "bc").
    """
    text = "\0".join(f"{type(name).__name__}:{name}" for name in ("dpfa_jax", *names))
    digest = hashlib.sha256(text.encode()).digest()
    data = random.key_data(rng)
    for start in range(0, 16, 4):
        data = random.fold_in_data(data, jnp.uint32(int.from_bytes(digest[start : start + 4])))
    return random.wrap_key_data(data)


def boolean_mask(mask: Any) -> jax.Array | None:
    """Flax's 0/1 masks as booleans: True where the mask is exactly 1.

    Raises:
      ValueError: if a concrete mask holds anything but 0 and 1. A traced one attends nowhere else.
    """
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype == jnp.bool_:
        return mask
    if not isinstance(mask, jax.core.Tracer):
        host = np.asarray(mask, np.float64)
        if not np.all((host == 0) | (host == 1)):
            raise ValueError(
                "Expected mask to hold only 0 and 1 (or False and True), got other values. An "
                "additive mask that depends on the key alone goes to key_log_weights."
            )
    return mask == 1


def refuse_options(
    *, bias: Any, dropout_rate: float, deterministic: bool, module: Any, **einsums: Any
) -> None:
    """An error for what Flax may pass to an attention function and privacy does not allow.

    Raises:
      ValueError: naming the argument and what to do instead.
    """
    if bias is not None:
        raise ValueError(
            f"Expected bias to be None, got shape {jnp.shape(bias)}: a score that a bias raises "
            "breaks the bound on its weight. Where it depends on the key alone, pass it as "
            "key_log_weights (values <= 0) of PrivateCrossAttention or private_attention."
        )
    if dropout_rate > 0 and not deterministic:
        raise ValueError(
            f"Expected dropout_rate = 0, got {dropout_rate}: dropped attention weights are scaled "
            "up by 1/(1 - rate), beyond the bound that the noise is made for. Pass "
            "dropout_rate=0.0 and put nnx.Dropout or nn.Dropout behind the attention layer."
        )
    if module is not None:
        raise ValueError(
            "Expected sow_weights=False: attention weights are functions of the private keys, and "
            "no noise is on them."
        )
    for name, einsum in einsums.items():
        if einsum is not None:
            raise ValueError(
                f"Expected {name} to be None, got {einsum!r}: the rounding of another product is "
                "not charged."
            )


def refuse_self_attention(inputs_q: Any, memory: Any, queries: str) -> None:
    """An error where one array is both the public queries and the private memory.

    Raises:
      ValueError: saying which mechanism takes private queries.
    """
    if inputs_q is memory and queries == "public":
        raise ValueError(
            "Expected public queries and private memory rows, got one array as both: each row's "
            'own query moves with it. Use SequenceRelease with queries="private".'
        )


def head_width(features: int, heads: int, kv_heads: int) -> int:
    """The width of one head.

    Raises:
      ValueError: if heads do not divide the features, or kv heads the heads.
    """
    features = _check.integer("qkv_features", features, low=1)
    _check.integer("num_kv_heads", kv_heads, low=1)
    if features % heads or heads % kv_heads:
        raise ValueError(
            "Expected num_heads to divide qkv_features and num_kv_heads to divide num_heads, got "
            f"{heads}, {features} and {kv_heads}."
        )
    return features // heads


def _as_batch(name: str, array: jax.Array, lead: tuple[int, ...]) -> jax.Array:
    own = array.shape[:-3]
    if own != lead and any(size != 1 for size in own):
        raise ValueError(
            f"Expected {name} of batch shape {lead} (or of ones, for one memory), got {own}."
        )
    return array.reshape(-1, *array.shape[-3:])


def _mask_as_batch(mask: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
    full = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
    fits = mask.ndim == len(full) and all(
        a in (1, b) for a, b in zip(mask.shape, full, strict=True)
    )
    if not fits:
        raise ValueError(
            f"Expected mask of shape (batch..., heads, queries, keys) = {full} with 1 where it is "
            f"the same for all, got {mask.shape}. Write the axes that are missing as 1."
        )
    lead = len(full) - 3
    if any(size != 1 for size in mask.shape[:lead]):
        mask = jnp.broadcast_to(mask, (*full[:lead], *mask.shape[lead:]))
    return mask.reshape(-1, *mask.shape[lead:])


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mechanism: releases.Mechanism,
    dtype: Any,
    mask: Any,
    **options: Any,
) -> jax.Array:
    """`private_attention` on arrays (batch..., length, heads, width) with Flax's mask and dtype."""
    if min(query.ndim, key.ndim, value.ndim) < 3:
        raise ValueError(
            "Expected query, key and value of shape (batch..., length, heads, width), got "
            f"{query.shape}, {key.shape} and {value.shape}."
        )
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    query, key, value = (array.astype(dtype) for array in (query, key, value))
    mask = boolean_mask(mask)
    lead = query.shape[:-3]
    if key.ndim == 3 and value.ndim == 3:
        key, value = key[None], value[None]
    out = attention.private_attention(
        _as_batch("query", query, lead),
        _as_batch("key", key, lead),
        _as_batch("value", value, lead),
        mechanism=mechanism,
        mask=None if mask is None else _mask_as_batch(mask, query, key),
        **options,
    )
    return out.reshape(*lead, *out.shape[1:])
