"""The private releases inside a function, read from its jaxpr."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from dpfa_jax.accounting import event as events_lib
from dpfa_jax.accounting.event import Event

RELEASE = "private_release"

# Primitives that run each of their jaxprs at most once per call.
_ONCE = frozenset(
    {
        "jit",
        "closed_call",
        "composite",
        "remat2",
        "custom_jvp_call",
        "custom_vjp_call",
        "cond",  # every branch is charged: an upper bound
    }
)


def _inner(value: Any) -> Iterator[Any]:
    """Jaxprs inside one parameter of an equation."""
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _inner(each)


# A release and the mesh axes whose shards share it.
_Found = dict[tuple[Event, frozenset[str]], int]


def _shards(params: dict[str, Any], shared: frozenset[str]) -> int:
    """How many shards of a shard_map run its body, each with noise of its own.

    Shards of the `shared` axes release one thing together.
    """
    mesh = params["mesh"]
    return math.prod(mesh.shape[axis] for axis in set(params["newly_manual_axes"]) - shared)


def _repetitions(name: str, params: dict[str, Any], shared: frozenset[str]) -> int | None:
    """How often a primitive runs its jaxprs per call; None where nobody knows beforehand."""
    if name in _ONCE:
        return 1
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return _shards(params, shared)
    return None


def _collect(jaxpr: Any, found: _Found) -> None:
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == RELEASE:
            event = events_lib.check_event("the event of a release", params["event"])
            key = event, frozenset(params["shared"])
            found[key] = found.get(key, 0) + params["count"]
            continue
        inside: _Found = {}
        for each in _inner(tuple(params.values())):
            _collect(each, inside)
        for (event, shared), count in inside.items():
            repetitions = _repetitions(name, params, shared)
            if repetitions is None:
                advice = (
                    "Use jax.lax.scan or fori_loop with a static length"
                    if name == "while"
                    else ("Call the release outside it")
                )
                raise ValueError(
                    f"Expected every private release to happen a number of times known beforehand, "
                    f"got one inside `{name}`. {advice}, so that its cost can be stated."
                )
            # An axis of the same name farther out is another axis.
            left = shared - set(params.get("newly_manual_axes", ()))
            found[event, left] = found.get((event, left), 0) + repetitions * count


def events(fn: Callable[..., Any], *specs: Any, **keyword_specs: Any) -> Event:
    """The event that one call of a function is charged as, read without running it.

    A release in a scan counts once per step, in a vmapped function once per example, in a shard_map
    or pmap once per shard; but once for all shards along a mesh axis where the value is known to be
    equal on them (a sum after `psum`), or that make it together (`context_parallel_attention`, or
    `optim.privatize` of parameters in parts). With check_vma=False nothing is known. All branches
    of a cond are charged. Recomputation (`jax.checkpoint` under `grad`) is charged again, though
    the noise is the same.

    Args:
      fn: a function that JAX can trace.
      *specs: its positional arguments: arrays, or `jax.ShapeDtypeStruct`s, pytrees of them.
      **keyword_specs: its keyword arguments, likewise.

    Returns:
      Upper bound: everything released by one call, or `NoRelease()`. Noise that did not come from a
      private call of this library is not seen.

    Raises:
      ValueError: if a release sits in a while loop, or in a primitive that may repeat it.

    Guarantee: T1 (trace.md).

    Example:
      >>> import jax.numpy as jnp
      >>> str(events(jnp.sin, jax.ShapeDtypeStruct((3,), "float32")))
      'no release'
    """
    closed = jax.make_jaxpr(fn)(*specs, **keyword_specs)
    found: _Found = {}
    _collect(closed.jaxpr, found)
    counts: dict[Event, int] = {}
    for (event, _), count in found.items():
        counts[event] = counts.get(event, 0) + count
    parts = tuple(
        event if count == 1 else events_lib.Repeated(event, count)
        for event, count in counts.items()
        if count
    )
    if not parts:
        return events_lib.NoRelease()
    return parts[0] if len(parts) == 1 else events_lib.Composed(parts)
