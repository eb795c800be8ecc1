"""Parts of the parameters that are clipped by themselves: per layer, per block, per head.

Which statement this makes true: every entry of every parameter lies in exactly one group, so a unit
whose part in group g has norm ≤ C_g moves the whole sum by at most √(Σ C_g²).
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax import _check
from dpfa_jax.clipping.certificate import Group, joint_clip_norm

_SMALLEST, _LARGEST = 1e-15, 1e30


@dataclasses.dataclass(frozen=True)
class Groups:
    """Which group each parameter entry belongs to, and each group's bound.

    Attributes:
      labels: one entry per parameter leaf, in the order of `jax.tree.leaves`: a number of a group,
        or an integer array that broadcasts to the leaf.
      clip_norms: C_g per group: numbers in [1e-15, 1e30], or traced float32 scalars.
      names: of the groups, for people.
    """

    labels: tuple[Any, ...]
    clip_norms: tuple[Any, ...]
    names: tuple[str, ...]

    def __post_init__(self):
        if not self.clip_norms or len(self.names) != len(self.clip_norms):
            raise ValueError(
                f"Expected one name for each of at least one clip_norm, got {len(self.names)} for "
                f"{len(self.clip_norms)}."
            )
        norms = tuple(check_bound(norm) for norm in self.clip_norms)
        object.__setattr__(self, "clip_norms", norms)
        for label in self.labels:
            numbers = np.asarray(label)
            inside = numbers.size and 0 <= numbers.min() and numbers.max() < len(norms)
            if not (np.issubdtype(numbers.dtype, np.integer) and inside):
                raise ValueError(
                    f"Expected labels to be numbers of {len(norms)} groups, got {label!r}."
                )

    @property
    def is_traced(self) -> bool:
        """Whether some bound is known only while running."""
        return any(not isinstance(norm, float) for norm in self.clip_norms)

    def joint(self) -> Any:
        """Bound on the whole contribution of one unit: a float, or traced where some bound is.

        Returns:
          Equality: √(Σ C_g²), rounded up.
        """
        if not self.is_traced:
            return joint_clip_norm(self.clip_norms)
        norms = jnp.stack([jnp.asarray(norm, jnp.float32) for norm in self.clip_norms])
        if len(self.clip_norms) == 1:
            return norms[0]
        largest = jnp.max(norms)
        # In any order a sum of G rounded squares errs by at most (G + 1)·2⁻²⁴ of itself.
        up = 1 + 2.0**-23 * (4 + len(self.clip_norms))
        return up * largest * jnp.sqrt(jnp.sum(jnp.square(norms / largest)))

    def public(self) -> tuple[Group, ...]:
        """What the certificate says of the groups.

        Returns:
          One `Group` each, its bound None where it is traced.
        """
        pairs = zip(self.names, self.clip_norms, strict=True)
        return tuple(Group(name, norm if isinstance(norm, float) else None) for name, norm in pairs)


def check_bound(value: Any) -> Any:
    """A bound as it is kept: a float in [1e-15, 1e30], or a traced float32 scalar.

    Args:
      value: a number or a scalar array.

    Returns:
      The checked bound.

    Raises:
      TypeError: for anything but a number or a floating-point scalar.
      ValueError: outside the range.
    """
    if isinstance(value, jax.Array):
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                f"Expected a traced clip_norm to be a float scalar, got {value.dtype} of shape "
                f"{value.shape}. Several bounds are a prefix tree of the parameters, or `Groups`."
            )
        return value.astype(jnp.float32)
    return _check.real("clip_norm", value, low=_SMALLEST, high=_LARGEST)


def _paths(params: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def label_groups(
    params: Any,
    label: Callable[[str, Any], Any],
    clip_norm: float | Mapping[Any, float],
) -> Groups:
    """Groups by a function of each parameter's path.

    Args:
      params: the parameters, or their shapes.
      label: takes a path like "params/Dense_0/kernel" and the leaf, and gives the group's name, or
        (name, axis) to make every index along that axis a group of its own; index i of all leaves
        with one name is one group, so heads of query, key, value and output share a bound.
      clip_norm: C of everything, shared out equally (C/√G each), or C_g by group name. The groups
        of a split axis all take the bound of their name.

    Returns:
      The groups, in order of first occurrence.

    Raises:
      ValueError: for a mapping without a name that occurs, an axis that a leaf does not have, or
        axes of different lengths under one name.

    Example:
      >>> params = {"a": {"w": jnp.ones((4, 2, 3)), "b": jnp.ones(3)}}
      >>> made = label_groups(params, lambda path, x: ("head", 1) if x.ndim == 3 else "rest", 2.0)
      >>> made.names
      ('rest', 'head[0]', 'head[1]')
    """
    numbers: dict[str, int] = {}
    owners: list[Hashable] = []
    lengths: dict[Hashable, int | None] = {}
    labels: list[Any] = []

    def number(name: str, owner: Hashable) -> int:
        if name not in numbers:
            numbers[name] = len(numbers)
            owners.append(owner)
        return numbers[name]

    for path, leaf in _paths(params):
        given = label(path, leaf)
        name, axis = given if isinstance(given, tuple) else (given, None)
        if axis is None:
            length = None
        else:
            axis = _check.integer("axis", axis, low=-leaf.ndim, high=leaf.ndim - 1) % leaf.ndim
            length = leaf.shape[axis]
        if lengths.setdefault(name, length) != length:
            raise ValueError(
                f"Expected every leaf of the group {name!r} to be split alike, got {path} of shape "
                f"{leaf.shape} with {length} parts beside {lengths[name]}."
            )
        if axis is None:
            labels.append(number(str(name), name))
        else:
            parts = [number(f"{name}[{i}]", name) for i in range(leaf.shape[axis])]
            labels.append(np.reshape(parts, [-1 if i == axis else 1 for i in range(leaf.ndim)]))
    if not owners:
        raise ValueError("Expected parameters with at least one leaf, got none.")
    if isinstance(clip_norm, Mapping):
        missing = [name for name in owners if name not in clip_norm]
        if missing:
            raise ValueError(f"Expected a clip_norm for every group, got none for {missing}.")
        norms = [clip_norm[name] for name in owners]
    else:
        total = _check.real("clip_norm", clip_norm, low=_SMALLEST, high=_LARGEST)
        norms = [total / math.sqrt(len(owners)) * (1 - 2.0**-50)] * len(owners)
    return Groups(tuple(labels), tuple(norms), tuple(numbers))


def per_layer(params: Any, clip_norm: float) -> Groups:
    """One group per layer: the leaves that share a path up to its last step.

    Args:
      params: the parameters, or their shapes.
      clip_norm: C of everything; each of G layers gets C/√G.

    Returns:
      The groups.

    Example:
      >>> per_layer({"a": {"w": jnp.ones(3), "b": jnp.ones(3)}, "c": {"w": jnp.ones(2)}}, 1.0).names
      ('a', 'c')
    """
    return label_groups(params, lambda path, _: path.rpartition("/")[0], clip_norm)


def resolve(clip_norm: Any, params: Any) -> Groups:
    """The groups that a `clip_norm` argument means for these parameters.

    Args:
      clip_norm: a number, a scalar array, `Groups`, a prefix tree of `params` with a number for
        every subtree, or a function from the parameters to any of these.
      params: the parameters.

    Returns:
      The groups; a single one for a single number.

    Raises:
      ValueError: where labels and parameters do not match.
      TypeError: for parameters that are not real floating-point arrays.
    """
    paths = _paths(params)
    for path, leaf in paths:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"Expected parameters of real floating-point dtypes, got {jnp.result_type(leaf)} "
                f"at {path or 'the root'}. Close over what is not trained."
            )
    if not paths:
        raise ValueError("Expected parameters with at least one leaf, got none.")
    if callable(clip_norm):
        clip_norm = clip_norm(params)
    if isinstance(clip_norm, Groups):
        if len(clip_norm.labels) != len(paths):
            raise ValueError(
                f"Expected one label per parameter leaf, got {len(clip_norm.labels)} labels for "
                f"{len(paths)} leaves."
            )
        for label, (path, leaf) in zip(clip_norm.labels, paths, strict=True):
            shape = np.shape(label)
            whole = (1,) * (np.ndim(leaf) - len(shape)) + shape
            fits = len(whole) == np.ndim(leaf) and all(
                size in (1, length) for size, length in zip(whole, np.shape(leaf), strict=True)
            )
            if not fits:
                raise ValueError(
                    f"Expected a label that broadcasts to {path} of shape {np.shape(leaf)}, got "
                    f"one of shape {shape}."
                )
        return clip_norm
    flat, tree = jax.tree_util.tree_flatten_with_path(clip_norm)
    if tree.num_leaves == 1 and jax.tree_util.treedef_is_leaf(tree):
        return Groups((0,) * len(paths), (clip_norm,), ("all parameters",))
    counts = jax.tree.leaves(
        jax.tree.map(lambda _, part: len(jax.tree.leaves(part)), clip_norm, params)
    )
    labels = [group for group, count in enumerate(counts) for _ in range(count)]
    if len(labels) != len(paths):
        raise ValueError(
            f"Expected clip_norm to be a prefix tree of the parameters, got bounds for "
            f"{len(labels)} of {len(paths)} leaves."
        )
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    return Groups(tuple(labels), tuple(norm for _, norm in flat), tuple(names))
