"""Over which mesh axes a release is sharded, and what must lie on which shard."""

from collections.abc import Sequence
from typing import Any

from jax import lax

from dpfa_jax import _primitives, lattice


def axes(axis_name: str | Sequence[str]) -> tuple[str, ...]:
    """The mesh axes named, each checked to be one that runs once per shard and is tracked.

    Args:
      axis_name: of one axis, or of several.

    Returns:
      Their names, at least one.

    Raises:
      ValueError: for what is no such axis, and for more shards than `lattice.SHARDS`.
    """
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    known = _primitives.manual_axes()
    for name in names:
        if name not in known:
            raise ValueError(
                f"Expected axis_name to be a manual mesh axis, got {name!r} where there are "
                f"{list(known)}. Call this inside jax.shard_map over that axis."
            )
        if name not in _primitives.varying(lax.axis_index(name)):
            raise ValueError(
                f"Expected a jax.shard_map that knows what differs between shards, got one with "
                f"check_vma=False over {name!r}. Pass check_vma=True: whether every record lies on "
                "one shard, and whether the key is the same on all, cannot be seen otherwise."
            )
    parts = lax.axis_size(names)
    if not names or len(set(names)) < len(names) or parts > lattice.SHARDS:
        raise ValueError(
            f"Expected different mesh axes of at most {lattice.SHARDS} shards together, got "
            f"{names} with {parts}."
        )
    return names


def check(names: tuple[str, ...], sharded: dict[str, Any], shared: dict[str, Any]) -> None:
    """Refuses arrays that do not lie on the shards as they have to.

    Args:
      names: of the axes.
      sharded: by name, what must be known to differ between the shards of each axis.
      shared: by name, what must be known to be the same on all; None is left out.

    Raises:
      ValueError: saying how `in_specs` should be.
    """
    for name, value in sharded.items():
        for axis in names:
            if axis not in _primitives.varying(value):
                raise ValueError(
                    f"Expected {name} to be a part of its own on every shard of {axis!r}, got the "
                    f"same on all of them, shape {value.shape}. Shard its sequence axis over "
                    f"{axis!r} in in_specs: records that all shards have would count once for each."
                )
    for name, value in shared.items():
        for axis in names:
            if value is not None and axis in _primitives.varying(value):
                raise ValueError(
                    f"Expected {name} to be the same on all shards of {axis!r}, got one that may "
                    f"differ, shape {value.shape}. Leave {axis!r} out of its in_specs."
                )
