"""Two JAX primitives that keep noise and accounts right under transformations.

`stream_key`, on key data of shape (..., 8): the key of one call. Under `vmap` an unbatched key
would give every example the same noise, and the difference of two outputs would cancel it. This
primitive sees the call's operands: when any of them is batched and the key is not, it folds the
example's index into the key. A key that is itself batched is taken as it is, so `vmap` over split
keys equals a loop over them.

`private_release`: the identity, with the event that the value is charged as, so that
`accounting.events` finds the releases in a jaxpr and knows how often each happens.
"""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from dpfa_jax import random

stream_key_p = Primitive("private_stream_key")
private_release_p = Primitive("private_release")


def _same(value, *_, **__):
    return value


# stream_key -------------------------------------------------------------------------------------


def _stream_batch(operands, dims, **_):
    size = next(
        operand.shape[dim] for operand, dim in zip(operands, dims, strict=True) if dim is not None
    )
    # An enclosing vmap must see the call as well: bind again on one example's operands.
    sample = [
        operand if dim is None else jnp.take(operand, 0, axis=dim)
        for operand, dim in zip(operands[1:], dims[1:], strict=True)
    ]
    data, dim = operands[0], dims[0]
    if dim is not None:
        return stream_key_p.bind(jnp.moveaxis(data, dim, 0), *sample), 0
    data = stream_key_p.bind(data, *sample)
    index = jnp.arange(size, dtype=jnp.uint32).reshape(size, *(1,) * (data.ndim - 1))
    return random.fold_in_data(data, index), 0


stream_key_p.def_impl(_same)
stream_key_p.def_abstract_eval(_same)
batching.primitive_batchers[stream_key_p] = _stream_batch
mlir.register_lowering(stream_key_p, mlir.lower_fun(_same, multiple_results=False))


def varying(value: Any) -> frozenset:
    """Names of the manual mesh axes over which a value is known to differ between shards."""
    return frozenset(jax.typeof(value).manual_axis_type.varying)


def manual_axes() -> tuple[str, ...]:
    """Names of the mesh axes over which the code being traced runs once per shard."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def vary_alike(*values: Any) -> tuple:
    """The values, each marked as varying over every manual mesh axis over which any of them does.

    Loops and custom derivatives inside `shard_map` want operands that vary alike; the transpose of
    the mark is the sum over shards that a replicated operand's gradient needs.
    """
    axes = frozenset().union(*(varying(x) for x in values if x is not None))

    def mark(value):
        missing = () if value is None else tuple(sorted(axes - varying(value)))
        return jax.lax.pcast(value, missing, to="varying") if missing else value

    return tuple(mark(value) for value in values)


def stream_key(data: jax.Array, *operands: jax.Array) -> jax.Array:
    """Key data of this call: distinct for every vmapped example and every manual shard.

    Args:
      data: uint32[8] key data given by the caller.
      *operands: every array the call's output depends on.

    Returns:
      uint32[8] key data. Fold nothing into it again: backward passes take it from the residuals.
    """
    for name in manual_axes():
        index = jax.lax.axis_index(name)
        tracked = name in varying(index)
        # With varying axes tracked, operands that are equal on all shards are one call, not many.
        if not tracked or any(name in varying(x) for x in (data, *operands)):
            data = random.fold_in_data(data, index.astype(jnp.uint32))
    # The key has no derivative, and the primitive no rule for one.
    return stream_key_p.bind(data, *jax.lax.stop_gradient(operands))


# private_release --------------------------------------------------------------------------------


def _release_batch(operands, dims, *, event, count):
    (operand,), (dim,) = operands, dims
    size = operand.shape[dim]
    return private_release_p.bind(operand, event=event, count=count * size), dim


def _release_jvp(primals, tangents, *, event, count):
    # The tangent is not a release: nothing private may be published from it.
    return private_release_p.bind(*primals, event=event, count=count), tangents[0]


private_release_p.def_impl(_same)
private_release_p.def_abstract_eval(_same)
batching.primitive_batchers[private_release_p] = _release_batch
ad.primitive_jvps[private_release_p] = _release_jvp
mlir.register_lowering(private_release_p, mlir.lower_fun(_same, multiple_results=False))


def private_release(value: Any, event: Hashable) -> jax.Array:
    """The value itself, marked in the jaxpr as one release charged as `event`.

    Args:
      value: the released array.
      event: a frozen accounting event.
    """
    return private_release_p.bind(value, event=event, count=1)
