"""What a memory has been asked, as a key: histories that part ways get noise of their own.

A memory that answers adaptive queries is a value, and a value can be used twice: a restored
checkpoint, a forgotten return value, a shard. If the noise of the i-th query were a function of the
key and i alone, two such forks would answer different queries under one noise, whose difference
cancels it. Here it is a function of the key and of every query bit asked so far, step by step:
forks share the noise of the steps they have in common and nothing else, and a fork costs as much as
one more memory, no more (M1 in history.md).

Forks that can be seen are refused: an old value used again outside `jit`, a memory captured by a
traced function, queries batched by `vmap` or sharded where the memory is not.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from dpfa_jax import _primitives, random

_DOMAIN = 8  # of ChaCha addresses; random.py uses 1 to 7
_DIGEST = 0
_START = 1

_CHAIN = (
    "Use the memory that the last attend returned, pass it to a jitted function as an argument and "
    "return the new one, and put queries that belong together on the B axis of (B, T, N, H) "
    "instead of jax.vmap. memory.fork() makes a second memory on purpose, at the price of one."
)


def _absorb(data: jax.Array, words: jax.Array) -> jax.Array:
    """Key data (..., 8) after three message words (..., 3)."""
    key = tuple(data[..., i] for i in range(8))
    address = (words[..., 0], words[..., 1], words[..., 2], jnp.uint32(_DOMAIN << 24))
    return jnp.stack(random.chacha_block(key, address)[:8], axis=-1)


def start(data: jax.Array) -> jax.Array:
    """The history of a memory that has answered nothing.

    Args:
      data: uint32[8] key data of the memory.

    Returns:
      uint32[8].

    Guarantee: M1 (history.md).
    """
    return random.fold_in_data(data, jnp.uint32(_START))


def extend(data: jax.Array, history: jax.Array, query: jax.Array) -> jax.Array:
    """The history after one step: every bit of its queries, and their shape.

    Args:
      data: uint32[8] key data of the memory.
      history: uint32[8], before the step.
      query: float32 (B, T, N, H), all that is asked in the step.

    Returns:
      uint32[8], a key that no other history of this memory has. The noise of the step is drawn
      from it, and it is the history to keep.

    Guarantee: M1 (history.md).
    """
    *shape, width = query.shape
    count = math.prod(shape)
    words = lax.bitcast_convert_type(query.reshape(count, width), jnp.uint32)
    # The same rows asked in other shapes are another step: its rounding is its own.
    words = jnp.pad(words, ((0, 0), (0, -width % 3)))
    sizes = jnp.broadcast_to(jnp.array(shape, jnp.uint32), (count, 3))
    words = jnp.concatenate([sizes, words], axis=1).reshape(count, -1, 3)
    digest = random.fold_in_data(data, jnp.uint32(_DIGEST))
    digest = jnp.broadcast_to(digest, (count, 8))
    digest, words, history = _primitives.vary_alike(digest, words, history)

    def step(carry, part):
        return _absorb(carry, part), None

    # Rows side by side first, then their digests one after the other.
    digest, _ = lax.scan(step, digest, jnp.swapaxes(words, 0, 1))
    parts = jnp.pad(digest, ((0, 0), (0, 1))).reshape(-1, 3)
    return lax.scan(step, history, parts)[0]


# the guard --------------------------------------------------------------------------------------

_history_p = Primitive("private_history")


def _same(history, _):
    return history


def _batch(operands, dims):
    (history, query), (dim, query_dim) = operands, dims
    if dim is None:
        raise ValueError(f"Expected one history of this memory, got vmapped queries. {_CHAIN}")
    # An enclosing vmap must see the call as well: bind again on one example's query.
    sample = query if query_dim is None else jnp.take(query, 0, axis=query_dim)
    return _history_p.bind(jnp.moveaxis(history, dim, 0), sample), 0


def _jvp(primals, tangents):
    if any(type(tangent) is not ad.Zero for tangent in tangents):
        raise ValueError(
            "Expected no derivative through attend of a memory that records its queries. Pass "
            "jax.lax.stop_gradient(query), or use private_attention, which has one."
        )
    return _history_p.bind(*primals), tangents[0]


_history_p.def_impl(_same)
_history_p.def_abstract_eval(_same)
batching.primitive_batchers[_history_p] = _batch
ad.primitive_jvps[_history_p] = _jvp
mlir.register_lowering(_history_p, mlir.lower_fun(_same, multiple_results=False))


def _is_traced(value: Any) -> bool:
    return isinstance(value, Tracer)


def check_unused(history: jax.Array, query: jax.Array) -> None:
    """Refuses what would fork a memory, as far as that can be seen on the host.

    Args:
      history: the memory's history as the caller holds it.
      query: the queries.

    Raises:
      ValueError: if the memory has been used, is stacked, or was captured by a traced function.
    """
    if not _is_traced(history):
        if isinstance(history, jax.Array) and history.is_deleted():
            raise ValueError(f"Expected a memory that was not used yet. {_CHAIN}")
        if _is_traced(query):
            raise ValueError(
                f"Expected the memory as an argument of the traced function, got one from outside "
                f"of it. {_CHAIN}"
            )
    if history.ndim != 1:
        raise ValueError(
            f"Expected one memory, got a stack of them (a history of shape {history.shape}). Use "
            "jax.vmap over memories and queries together."
        )


def guard(history: jax.Array, query: jax.Array) -> jax.Array:
    """The history, where transformations that would fork it under one name are errors.

    Args:
      history: uint32[8].
      query: what it will be extended by.

    Returns:
      The history.

    Raises:
      ValueError: if the query varies over a mesh axis over which the memory does not, or over one
        whose variation JAX does not track.

    Guarantee: M1 (history.md).
    """
    for name in _primitives.manual_axes():
        if name not in _primitives.varying(lax.axis_index(name)):
            raise ValueError(
                f"Expected a mesh axis whose variation is tracked, got {name!r}. Use "
                "jax.shard_map with check_vma=True."
            )
        forks = name in _primitives.varying(query) and name not in _primitives.varying(history)
        if forks:
            raise ValueError(
                f"Expected queries that are equal on all shards of {name!r}, as the memory is. "
                "Gather them first with jax.lax.all_gather."
            )
    return _history_p.bind(history, query)


def use(history: jax.Array) -> None:
    """Marks a history as used: outside of transformations, a second attend of it is an error.

    Args:
      history: the one that an attend has extended.
    """
    if isinstance(history, jax.Array) and not _is_traced(history):
        history.delete()


def fork(history: jax.Array, event: Any) -> tuple[jax.Array, jax.Array]:
    """Two copies of a history, the second charged as one more memory.

    Args:
      history: uint32[8]; used up.
      event: what the memory's life is charged as.

    Returns:
      The copies, in buffers of their own.

    Guarantee: M1 (history.md).
    """
    check_unused(history, history)
    copies = jnp.copy(history), _primitives.private_release(jnp.copy(history), event)
    use(history)
    return copies
