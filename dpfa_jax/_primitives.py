"""JAX primitives that keep noise, accounts and precision right under transformations.

`stream_key`, on key data of shape (..., 8): the key of one call. Under `vmap` an unbatched key
would give every example the same noise, and the difference of two outputs would cancel it. This
primitive sees the call's operands: when any of them is batched and the key is not, it folds the
example's index into the key. A key that is itself batched is taken as it is, so `vmap` over split
keys equals a loop over them.

`private_release`: the identity, with the event that the value is charged as, so that
`accounting.events` finds the releases in a jaxpr and knows how often each happens.

`wide`: a float64 computation inside float32 code. Tracing under `jax.enable_x64` alone is not
enough: `vmap` of a jitted function rewrites its jaxpr outside that context and JAX then truncates
products to float32, with a warning, which for S5 is a broken guarantee. A primitive stays closed
until it is lowered.

`closed`: a computation that the types of mesh axes do not look into, for interpreted kernels.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.interpreters.partial_eval import DynamicJaxprTracer

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


def stream_key(data: jax.Array, *operands: jax.Array, shared: Sequence[str] = ()) -> jax.Array:
    """Key data of this call: distinct for every vmapped example and every manual shard.

    Args:
      data: uint32[8] key data given by the caller.
      *operands: every array the call's output depends on.
      shared: mesh axes whose shards make one call together, and so have one key.

    Returns:
      uint32[8] key data. Fold nothing into it again: backward passes take it from the residuals.
    """
    for name in manual_axes():
        if name in shared:
            continue
        index = jax.lax.axis_index(name)
        tracked = name in varying(index)
        # With varying axes tracked, operands that are equal on all shards are one call, not many.
        if not tracked or any(name in varying(x) for x in (data, *operands)):
            data = random.fold_in_data(data, index.astype(jnp.uint32))
    # The key has no derivative, and the primitive no rule for one.
    return stream_key_p.bind(data, *jax.lax.stop_gradient(operands))


# keys that repeat -------------------------------------------------------------------------------


def _without_derivatives(value: Any) -> Any:
    """The value under vmap's and grad's wrappers, which run a function once."""
    while isinstance(value, jax.core.Tracer) and not isinstance(value, DynamicJaxprTracer):
        inner = getattr(value, "val", None)
        inner = getattr(value, "primal", None) if inner is None else inner
        if inner is None:
            break
        value = inner
    return value


def innermost_trace() -> Any:
    """The trace that records the function being traced, or None where code runs as written."""
    probe = _without_derivatives(jax.lax.add(np.uint32(0), np.uint32(0)))
    return probe._trace if isinstance(probe, jax.core.Tracer) else None


def is_constant(value: jax.Array) -> bool:
    """Whether the value is a constant of the function being traced: the same in all its runs."""
    trace = innermost_trace()
    if trace is None:
        return False
    inner = _without_derivatives(value)
    return not (isinstance(inner, jax.core.Tracer) and inner._trace is trace)


def refuse_constant(value: jax.Array, advice: str) -> None:
    """An error if the key data or key is a constant of the function being traced.

    A key repeats its noise when it is a constant of a function that runs more than once: closed
    over by a jitted function, or broadcast into a scan. Tracing shows it, because such a key does
    not belong to the trace that uses it.

    Args:
      value: the key, or its data.
      advice: what to do instead, in the words of the caller's API.

    Raises:
      ValueError: with the advice.
    """
    if is_constant(value):
        raise ValueError(
            "Expected the key of the privacy stream to be an argument of the function being "
            "traced, got a constant of it: every call of a jitted function and every step of a "
            f"scan would add the same noise. {advice}"
        )


# private_release --------------------------------------------------------------------------------


def _release_batch(operands, dims, *, event, count, shared):
    (operand,), (dim,) = operands, dims
    size = operand.shape[dim]
    return private_release_p.bind(operand, event=event, count=count * size, shared=shared), dim


def _release_jvp(primals, tangents, **params):
    # The tangent is not a release: nothing private may be published from it.
    return private_release_p.bind(*primals, **params), tangents[0]


private_release_p.def_impl(_same)
private_release_p.def_abstract_eval(_same)
batching.primitive_batchers[private_release_p] = _release_batch
ad.primitive_jvps[private_release_p] = _release_jvp
mlir.register_lowering(private_release_p, mlir.lower_fun(_same, multiple_results=False))


def private_release(value: Any, event: Hashable, shared: Sequence[str] = ()) -> jax.Array:
    """The value itself, marked in the jaxpr as one release charged as `event`.

    Args:
      value: the released array. Along mesh axes where it is known to be equal on all shards, they
        release one thing together.
      event: a frozen accounting event.
      shared: more mesh axes of which that holds: `event` is what all of their shards cost.
    """
    own = varying(value)
    same = [
        name
        for name in manual_axes()
        if name not in own and name in varying(jax.lax.axis_index(name))  # else nobody knows
    ]
    shared = tuple(sorted({*shared, *same}))
    return private_release_p.bind(value, event=event, count=1, shared=shared)


# wide -------------------------------------------------------------------------------------------

wide_p = Primitive("private_wide")
wide_p.multiple_results = True


def _wide_run(*leaves, fun, static, tree, depth):
    def one(*leaves):
        return tuple(jax.tree.leaves(fun(jax.tree.unflatten(tree, leaves), static)))

    for _ in range(depth):
        one = jax.vmap(one)
    return one(*leaves)


def _wide_abstract(*avals, **params):
    with jax.enable_x64(True):
        specs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        shapes = jax.eval_shape(partial(_wide_run, **params), *specs)
    return [_alike(avals[0], shape) for shape in shapes]


def _alike(aval, shape):
    """An abstract result that varies over the mesh axes over which an operand does."""
    spec = jax.sharding.PartitionSpec(*(None,) * len(shape.shape))
    sharding = jax.sharding.NamedSharding(aval.sharding.mesh, spec)
    return aval.update(shape=shape.shape, dtype=shape.dtype, weak_type=False, sharding=sharding)


def _wide_lower(context, *args, **params):
    with jax.enable_x64(True):
        return mlir.lower_fun(partial(_wide_run, **params))(context, *args)


def _batch_closed(primitive, operands, dims, *, depth, **params):
    size = next(x.shape[dim] for x, dim in zip(operands, dims, strict=True) if dim is not None)
    operands = [
        jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        for x, dim in zip(operands, dims, strict=True)
    ]
    out = primitive.bind(*operands, depth=depth + 1, **params)
    return out, [0] * len(out)


@lru_cache(maxsize=64)
def _wide_jitted(params):
    return jax.jit(lambda *leaves: wide_p.bind(*leaves, **dict(params)))


wide_p.def_impl(lambda *leaves, **params: _wide_jitted(tuple(params.items()))(*leaves))
wide_p.def_abstract_eval(_wide_abstract)
batching.primitive_batchers[wide_p] = partial(_batch_closed, wide_p)
mlir.register_lowering(wide_p, _wide_lower)


def wide(fun: Callable, operands: Any, static: Hashable) -> tuple:
    """The leaves of fun(operands, static), computed where float64 means float64.

    Args:
      fun: a module-level function that casts what it needs to float64 and returns float32 or
        integer arrays only.
      operands: a pytree of arrays of at most 32 bits an element.
      static: a hashable argument.

    Returns:
      The output's leaves. They have no derivative: call it inside a `custom_vjp`, or on operands
      behind `stop_gradient`.
    """
    leaves, tree = jax.tree.flatten(operands)
    leaves = vary_alike(*leaves)
    return tuple(wide_p.bind(*leaves, fun=fun, static=static, tree=tree, depth=0))


# closed -----------------------------------------------------------------------------------------

closed_p = Primitive("private_closed")
closed_p.multiple_results = True


def _closed_run(*leaves, fun, depth):
    for _ in range(depth):
        fun = jax.vmap(fun)
    return tuple(fun(*leaves))


def _closed_abstract(*avals, **params):
    specs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    shapes = jax.eval_shape(partial(_closed_run, **params), *specs)
    return [_alike(avals[0], shape) for shape in shapes]


def _closed_lower(context, *args, **params):
    def plain(avals):
        return [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in avals]

    context = context.replace(avals_in=plain(context.avals_in), avals_out=plain(context.avals_out))
    return mlir.lower_fun(partial(_closed_run, **params))(context, *args)


closed_p.def_abstract_eval(_closed_abstract)
batching.primitive_batchers[closed_p] = partial(_batch_closed, closed_p)
mlir.register_lowering(closed_p, _closed_lower)


def closed(fun: Callable, *operands: jax.Array) -> tuple:
    """fun(*operands), which is traced as if no operand varied over a mesh axis.

    JAX's interpreter of Pallas kernels writes constants that vary over no axis beside operands that
    do, and is refused for it inside `shard_map`.

    Args:
      fun: of arrays, returns a tuple of arrays; it uses no mesh axis. It has no derivative.
      *operands: its arrays; results vary over the axes over which any of them does.
    """
    if not any(varying(x) for x in operands):
        return tuple(fun(*operands))
    return tuple(closed_p.bind(*vary_alike(*operands), fun=fun, depth=0))
