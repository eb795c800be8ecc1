"""The arguments of one call of a clipped gradient, sorted, checked, and traced for one row."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from dpfa_jax import _check, _primitives

_LOCAL_NAMES = frozenset({"pvary", "pcast", "axis_index"})


@dataclasses.dataclass(frozen=True)
class Batch:
    """The arguments of one call, sorted by what they are.

    Attributes:
      params: tuple of the arguments at `argnums`.
      rows: leaves with a batch axis, moved to the front.
      public: leaves without one.
      join: (params, public, leaves of one row) -> the arguments of the loss.
      size: rows in the batch.
    """

    params: tuple[Any, ...]
    rows: list[jax.Array]
    public: list[Any]
    join: Callable[..., tuple[Any, ...]]
    size: int


def _leaf_axes(batch_axes: Any, rest: tuple[Any, ...]) -> list[int | None]:
    if batch_axes is None:
        batch_axes = 0
    if isinstance(batch_axes, int):
        batch_axes = (batch_axes,) * len(rest)
    if not isinstance(batch_axes, tuple) or len(batch_axes) != len(rest):
        raise ValueError(
            f"Expected batch_axes to name the batch axis of each of the {len(rest)} arguments that "
            f"are not parameters, got {batch_axes!r}. None says that an argument is public."
        )
    axes: list[int | None] = []

    def collect(axis, part):
        axes.extend([axis] * len(jax.tree.leaves(part)))

    jax.tree.map(collect, batch_axes, rest, is_leaf=lambda each: each is None)
    return axes


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def _check_public(name: str, leaf: Any, size: int) -> None:
    if size > 1 and not _is_key(leaf) and jnp.ndim(leaf) and jnp.shape(leaf)[0] == size:
        raise ValueError(
            f"Expected {name} without a batch axis, got shape {jnp.shape(leaf)} for a batch of "
            f"{size}. An undeclared batch axis lets every row see all others: declare it in "
            "batch_axes. If the array is public and of that length by chance, close over it."
        )
    if isinstance(leaf, jax.Array) and not _is_key(leaf) and _primitives.varying(leaf):
        raise ValueError(
            f"Expected {name}, which has no batch axis, to be equal on all shards, got a value "
            f"that varies over {sorted(_primitives.varying(leaf))}. Declare its batch axis."
        )


def sort_arguments(args: tuple[Any, ...], argnums: tuple[int, ...], batch_axes: Any) -> Batch:
    for number in argnums:
        _check.integer("argnums", number, low=0, high=len(args) - 1)
    others = [i for i in range(len(args)) if i not in argnums]
    rest = tuple(args[i] for i in others)
    leaves, tree = jax.tree.flatten(rest)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(rest)]
    axes = _leaf_axes(batch_axes, rest)
    sizes = {}
    for axis, path, leaf in zip(axes, paths, leaves, strict=True):
        if axis is not None:
            _check.integer("batch_axes", axis, low=-jnp.ndim(leaf), high=jnp.ndim(leaf) - 1)
            sizes.setdefault(jnp.shape(leaf)[axis], path)
    if len(sizes) != 1:
        raise ValueError(
            f"Expected one batch size, got {sorted(sizes)} (argument leaves "
            f"{sorted(sizes.values())}). Check batch_axes."
        )
    size = next(iter(sizes))
    for axis, path, leaf in zip(axes, paths, leaves, strict=True):
        if axis is None:
            _check_public(f"the argument leaf {path}", leaf, size)
    rows = [
        jnp.moveaxis(jnp.asarray(leaf), axis, 0)
        for axis, leaf in zip(axes, leaves, strict=True)
        if axis is not None
    ]
    public = [leaf for axis, leaf in zip(axes, leaves, strict=True) if axis is None]

    def join(params, public, row):
        public, row = iter(public), iter(row)
        merged = [next(public if axis is None else row) for axis in axes]
        rest = iter(jax.tree.unflatten(tree, merged))
        given = dict(zip(argnums, params, strict=True))
        return tuple(given[i] if i in given else next(rest) for i in range(len(args)))

    return Batch(tuple(args[i] for i in argnums), rows, public, join, size)


def collectives(jaxpr: Any) -> Iterator[str]:
    """Names of equations that talk to other shards of a mesh axis that encloses them."""
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        named = [params.get(key) for key in ("axes", "axis_name", "axis_index_groups")]
        words = [each if isinstance(each, tuple | list) else (each,) for each in named]
        if name not in _LOCAL_NAMES and any(isinstance(w, str) for each in words for w in each):
            yield name
        for inner in inner_jaxprs(equation):
            yield from collectives(inner)


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """The jaxprs inside an equation's parameters."""
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each


def vary_over(values: Any, axes: frozenset) -> Any:
    def mark(value):
        missing = tuple(sorted(axes - _primitives.varying(value)))
        return jax.lax.pcast(value, missing, to="varying") if missing else value

    return jax.tree.map(mark, values)


def own_shard(batch: Batch, mask: jax.Array, ids: jax.Array | None) -> tuple[Batch, frozenset]:
    """The batch with parameters marked as this shard's own, and the axes it varies over.

    Where parameters are replicated over a mesh axis and rows are not, `jax.grad` would sum the
    gradient over the shards, before any clipping.
    """
    given = [*batch.rows, mask, *([] if ids is None else [ids])]
    axes = frozenset().union(*(_primitives.varying(each) for each in given))
    for leaf in jax.tree.leaves(batch.params):
        sharded = _primitives.varying(leaf)
        if sharded:
            raise NotImplementedError(
                f"Expected parameters that are equal on all shards, got ones that vary over "
                f"{sorted(sharded)}. Gather them outside clipped_grad (clipping.gather), so that "
                "the norm of the whole gradient is clipped, and give the PartitionSpecs to psum."
            )
    params = vary_over(jax.tree.map(jnp.asarray, batch.params), axes)
    public = [
        each if _is_key(each) else vary_over(jnp.asarray(each), axes) for each in batch.public
    ]
    return dataclasses.replace(batch, params=params, public=public), axes


@dataclasses.dataclass(frozen=True)
class RowGradient:
    """The gradient of one row's loss, traced once.

    Attributes:
      run: leaves of one row -> (gradient leaves, aux leaves).
      aux: shapes and dtypes of one row's aux leaves.
      aux_tree: their structure.
    """

    run: Callable[[list[Any]], tuple[list[Any], list[Any]]]
    aux: list[Any]
    aux_tree: Any


def row_loss(loss_fn: Callable[..., Any], batch: Batch, has_aux: bool) -> Callable[..., Any]:
    """(params, public, row) -> (scalar loss of one row, aux), its result checked."""

    def loss(params, public, row):
        out = loss_fn(*batch.join(params, public, row))
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(f"Expected loss_fn to return (loss, aux) with has_aux, got {out!r}.")
        value: Any = out[0] if has_aux else out
        aux: Any = out[1] if has_aux else None
        if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise ValueError(
                f"Expected loss_fn to return a float scalar for one row, got shape "
                f"{jnp.shape(value)} of {jnp.result_type(value)}. It is called without the batch "
                "axis; a loss that keeps one has mixed rows, or an axis was not declared."
            )
        return value, aux

    return loss


def first_row(batch: Batch) -> list[Any]:
    """Something of one row's shapes and types to trace with."""
    if batch.size:
        return [leaf[0] for leaf in batch.rows]
    return [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in batch.rows]


def refuse_collectives(jaxpr: Any) -> None:
    """An error if the gradient of one row talks to other shards."""
    mixing = sorted(set(collectives(jaxpr)))
    if mixing:
        raise ValueError(
            f"Expected a loss of one row that talks to no other shard, got the collectives "
            f"{mixing} in its gradient: they would add up gradients before they are clipped. Move "
            "them out of the loss; parameters sharded over a mesh axis are gathered before."
        )


def row_gradient(loss_fn: Callable[..., Any], batch: Batch, has_aux: bool) -> RowGradient:
    """The gradient of one row with respect to the parameters."""
    loss, trees = row_loss(loss_fn, batch, has_aux), []

    def gradient(params, public, row):
        grads, aux = jax.grad(loss, has_aux=True)(params, public, row)
        leaves, tree = jax.tree.flatten(aux)
        trees.append(tree)
        return jax.tree.leaves(grads), leaves

    closed = jax.make_jaxpr(gradient)(batch.params, batch.public, first_row(batch))
    refuse_collectives(closed.jaxpr)
    fixed = jax.tree.leaves((batch.params, batch.public))
    count = len(jax.tree.leaves(batch.params))

    def run(row):
        out = core.jaxpr_as_fun(closed)(*fixed, *row)
        return list(out[:count]), list(out[count:])

    return RowGradient(run, list(closed.out_avals[count:]), trees[-1])


def checked_mask(mask: Any, size: int) -> jax.Array:
    if mask is None:
        return jnp.ones(size, bool)
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_ or mask.shape != (size,):
        raise TypeError(
            f"Expected mask in bool of shape ({size},), True for rows that count, got "
            f"{mask.dtype} of shape {mask.shape}."
        )
    return mask


def checked_ids(unit: int | None, unit_ids: Any, size: int) -> jax.Array | None:
    if (unit is None) != (unit_ids is None):
        raise ValueError(
            f"Expected unit_ids in the call exactly where clipped_grad got unit=, got "
            f"unit={unit} and {'no ' if unit_ids is None else ''}unit_ids."
        )
    if unit_ids is None:
        return None
    ids = jnp.asarray(unit_ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.shape != (size,):
        raise TypeError(
            f"Expected unit_ids as integers of shape ({size},), got {ids.dtype} of shape "
            f"{ids.shape}."
        )
    return ids


def blocks(leaf: jax.Array, rows: int) -> jax.Array:
    """(microbatches, rows, ...), the last one filled up with False or copies of the last row."""
    missing = -leaf.shape[0] % rows
    if missing:
        last = jnp.zeros_like(leaf[-1:]) if leaf.dtype == jnp.bool_ else leaf[-1:]
        leaf = jnp.concatenate([leaf, jnp.broadcast_to(last, (missing, *leaf.shape[1:]))])
    return leaf.reshape(-1, rows, *leaf.shape[1:])
