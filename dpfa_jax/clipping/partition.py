"""Parameters in parts: which shard of a mesh holds which part of an array, inside `shard_map`.

Which statement this makes true: the parts of all shards are the array once each, cut where its
PartitionSpec says, and a spec that contradicts what JAX tracks of the array is an error.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dpfa_jax import _primitives

type Axes = tuple[tuple[str, ...], ...]


def _axes_of(spec: Any, ndim: int, where: str) -> Axes:
    """The manual mesh axes that split each dimension of one leaf, the major one first."""
    if not isinstance(spec, PartitionSpec):
        raise TypeError(
            f"Expected partition_specs to be a prefix tree of PartitionSpecs, got {spec!r} for "
            f"{where}. Use PartitionSpec() for what is whole on every shard."
        )
    if len(spec) > ndim:
        raise ValueError(
            f"Expected a PartitionSpec of at most {ndim} entries for {where}, got {spec}. Give the "
            "specs that the parameters have in shard_map's in_specs."
        )
    manual, known = _primitives.manual_axes(), jax.sharding.get_abstract_mesh().axis_names
    axes, seen = [], []
    for entry in (*spec, *(None,) * (ndim - len(spec))):
        names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        for name in names:
            if not isinstance(name, str) or (manual and name not in known) or name in seen:
                raise ValueError(
                    f"Expected mesh axes out of {tuple(known)}, each once, in the PartitionSpec of "
                    f"{where}, got {spec}."
                )
            seen.append(name)
        axes.append(tuple(name for name in names if name in manual))
    return tuple(axes)


def split_axes(tree: Any, partition_specs: Any) -> tuple[Axes, ...]:
    """The manual mesh axes that split each dimension of each leaf.

    Args:
      tree: arrays, or their parts inside `shard_map`.
      partition_specs: a prefix tree of it with PartitionSpecs; None: nothing is split.

    Returns:
      One entry per leaf: for each dimension a tuple of axis names, the major one first, empty where
      it is whole. Outside `shard_map` nothing is split.

    Raises:
      TypeError: for anything but PartitionSpecs.
      ValueError: for a spec longer than its leaf's shape, axes that the mesh does not have, or a
        tree that is no prefix.

    Guarantee: CL10 (partition.md).
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if partition_specs is None:
        return tuple(((),) * jnp.ndim(leaf) for _, leaf in leaves)

    def is_leaf(node):
        return node is None or isinstance(node, PartitionSpec)

    specs = jax.tree.leaves(jax.tree.broadcast(partition_specs, tree, is_leaf), is_leaf=is_leaf)
    return tuple(
        _axes_of(spec, jnp.ndim(leaf), jax.tree_util.keystr(path) or "the root")
        for spec, (path, leaf) in zip(specs, leaves, strict=True)
    )


def names_of(axes: Axes) -> frozenset[str]:
    """The mesh axes that a leaf is split over.

    Args:
      axes: of `split_axes`.

    Returns:
      Their names.

    Guarantee: CL10 (partition.md).
    """
    return frozenset(name for names in axes for name in names)


def whole_shape(part: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    """The shape of the array that equal parts make up.

    Args:
      part: shape of one shard's part.
      axes: of `split_axes`.

    Returns:
      Equality: every dimension times the sizes of the mesh axes that split it.

    Guarantee: CL10 (partition.md).
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(
        length * math.prod(sizes[name] for name in names)
        for length, names in zip(part, axes, strict=True)
    )


def first_index(part: tuple[int, ...], axes: Axes) -> tuple[Any, ...]:
    """The index in the whole array of the first entry of this shard's part.

    Args:
      part: shape of one shard's part.
      axes: of `split_axes`.

    Returns:
      Per dimension a traced uint32 scalar, or 0 where it is whole.

    Guarantee: CL10 (partition.md).
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    found: list[Any] = []
    for length, names in zip(part, axes, strict=True):
        index: Any = 0
        for name in names:
            index = index * sizes[name] + jax.lax.axis_index(name).astype(jnp.uint32)
        found.append(index * length)
    return tuple(found)


def check_parts(leaf: Any, axes: Axes) -> None:
    """An error unless a leaf differs along the mesh axes that split it, and along no other.

    Args:
      leaf: this shard's part of an array.
      axes: of `split_axes`.

    Raises:
      ValueError: where specs and what JAX tracks disagree.

    Guarantee: CL10 (partition.md).
    """
    given, expected = _primitives.varying(leaf), names_of(axes)
    if given != expected:
        raise ValueError(
            f"Expected an array that differs along the mesh axes {sorted(expected)} of its "
            f"PartitionSpec, got one of shape {jnp.shape(leaf)} that differs along "
            f"{sorted(given)}. Give the specs that it has in shard_map's in_specs, and keep "
            "check_vma=True."
        )


def gather(params: Any, partition_specs: Any) -> Any:
    """The whole parameters of which every shard holds a part; inside `shard_map`.

    For `clipped_grad`, which wants them equal on all shards: the norm that is clipped is then that
    of the whole gradient. `Clipped.psum(axis, partition_specs)` makes parts of the sum again.

    Args:
      params: this shard's parts.
      partition_specs: a prefix tree of them, as in shard_map's in_specs.

    Returns:
      Equality: the whole arrays, known to be equal on all shards.

    Raises:
      TypeError: for anything but PartitionSpecs.
      ValueError: for specs that contradict what JAX tracks of the parts.

    Guarantee: CL10 (partition.md).

    Example:
      >>> gather({"w": jnp.ones(3)}, PartitionSpec("data"))["w"].shape  # one device: it is whole
      (3,)
    """
    leaves, structure = jax.tree.flatten(params)
    whole = []
    for leaf, axes in zip(leaves, split_axes(params, partition_specs), strict=True):
        check_parts(leaf, axes)
        for dimension, names in enumerate(axes):
            for name in reversed(names):  # the minor axis first: its parts are neighbours
                leaf = jax.lax.all_gather(leaf, name, axis=dimension, tiled=True, to="invarying")
        whole.append(leaf)
    return jax.tree.unflatten(structure, whole)


def sum_parts(tree: Any, names: tuple[str, ...], split: tuple[Axes, ...]) -> Any:
    """This shard's parts of the sum of the shards' trees.

    Args:
      tree: whole arrays, a summand each on every shard of the axes `names`, the same on all others.
      names: mesh axes to sum over.
      split: of `split_axes`, how the sum is cut.

    Returns:
      The parts.

    Raises:
      ValueError: where a dimension is not a multiple of its parts, or an array differs along an
        axis that cuts it and is not summed over.

    Guarantee: CL10 (partition.md).
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    leaves, structure = jax.tree.flatten(tree)
    parts = []
    for leaf, axes in zip(leaves, split, strict=True):
        for dimension, name in ((d, name) for d, cut in enumerate(axes) for name in cut):
            length, rest = divmod(leaf.shape[dimension], sizes[name])
            if rest or (name not in names and name in _primitives.varying(leaf)):
                raise ValueError(
                    f"Expected a sum over all shards with a dimension {dimension} that {name!r} "
                    f"cuts into {sizes[name]} equal parts, got shape {leaf.shape}. Sum over every "
                    "axis that the batch is split over, and name an axis that divides."
                )
            if name in names:
                leaf = jax.lax.psum_scatter(leaf, name, scatter_dimension=dimension, tiled=True)
            else:
                first = jax.lax.axis_index(name) * length
                leaf = jax.lax.dynamic_slice_in_dim(leaf, first, length, dimension)
        left = tuple(name for name in names if name not in names_of(axes))
        parts.append(jax.lax.psum(leaf, left) if left else leaf)
    return jax.tree.unflatten(structure, parts)
