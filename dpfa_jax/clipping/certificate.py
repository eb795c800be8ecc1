"""What a clipped sum vouches for: how far one unit may have moved it.

Which statement this makes true: the sensitivity of a `Clipped` is a function of the clip norms it
was made with, never of the data, and the noise that is added to it is scaled by that function.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpfa_jax import _check, _primitives
from dpfa_jax.adjacency import Adjacency
from dpfa_jax.clipping import partition


@dataclasses.dataclass(frozen=True)
class Group:
    """One part of the parameters whose gradient is clipped by itself.

    Attributes:
      name: what the part is, for people.
      clip_norm: C_g, bound on the norm of one unit's contribution to this part, > 0; None where it
        is traced.
    """

    name: str
    clip_norm: float | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clipped:
    """The sum of per-unit gradients, each clipped, and what they were clipped to.

    Only `tree` may be released, and only with noise scaled by `sensitivity`. THE COUNTS ARE NOT
    PRIVATE: they are exact numbers about the data, for debugging on public data only; releasing
    them, or deciding anything by them, is outside every guarantee of this library.

    The certificate vouches for `tree` as `clipped_grad` made it. `jax.tree.map` over a `Clipped`
    changes the sum and not what is said of it: change the tree after the noise.

    Attributes:
      tree: the float32 sum, of the structure of the parameters. A sum, never a mean.
      examples: int32, rows that took part (not padding). NOT PRIVATE.
      clipped: int32, units whose gradient was longer than its bound in some group. NOT PRIVATE.
      nonfinite: int32, units that contribute 0 because of a NaN or an infinity. NOT PRIVATE.
      traced_clip_norm: float32 scalar where the clip norm is traced (a schedule, an adaptive
        threshold), else None.
      static_clip_norm: the clip norm where it is a number known before tracing, else None.
      groups: the parts that were clipped by themselves, one for all where there is no other.
      unit: whose contribution is bounded: "example", or "unit" where rows share unit ids.
      method: how the sum was computed.
      units: how many units the sum may hold at most, public: rows, or slots of unit ids, of all
        shards that were added up; None where nobody said.
      split: for a sum that is in parts on the shards of a mesh, the mesh axes that cut each
        dimension of each leaf; None where every shard has the whole.
    """

    tree: Any
    examples: Any
    clipped: Any
    nonfinite: Any
    traced_clip_norm: Any = None
    static_clip_norm: float | None = dataclasses.field(default=None, metadata=dict(static=True))
    groups: tuple[Group, ...] = dataclasses.field(default=(), metadata=dict(static=True))
    unit: str = dataclasses.field(default="example", metadata=dict(static=True))
    method: str = dataclasses.field(default="vmap", metadata=dict(static=True))
    units: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    split: tuple[partition.Axes, ...] | None = dataclasses.field(
        default=None, metadata=dict(static=True)
    )

    @property
    def clip_norm(self) -> Any:
        """Bound on the L2 norm of one unit's whole contribution, √(Σ C_g²) over the groups.

        A float where it is static, else the traced float32 scalar.
        """
        if self.static_clip_norm is not None:
            return _check.real("clip_norm", self.static_clip_norm, low=0, open_low=True)
        if self.traced_clip_norm is None:
            raise ValueError("Expected a certificate with a clip norm, got one without.")
        norm = jnp.asarray(self.traced_clip_norm, jnp.float32)
        return jnp.where((norm > 0) & jnp.isfinite(norm), norm, jnp.nan)

    def sensitivity(self, adjacency: Adjacency) -> Any:
        """L2 sensitivity of `tree` when one unit changes.

        Args:
          adjacency: ZERO_OUT (one unit is there or NULL), REPLACE_ONE, or GROUP(r) for r units.

        Returns:
          Upper bound: C, 2C or r·C for C = `clip_norm`. A float for a static clip norm; for a
          traced one a traced float32 scalar, NaN unless C is positive and finite, so that noise
          scaled by it is NaN as well. noise_std / sensitivity is then a static number still.

        Raises:
          TypeError: if adjacency is not an Adjacency.
          ValueError: for SEQUENCE, where one unit's clipped gradient is not what changes.

        Guarantee: CL1 (certificate.md).
        """
        if not isinstance(adjacency, Adjacency):
            raise TypeError(f"Expected adjacency to be an Adjacency, got {adjacency!r}.")
        if adjacency.kind == "SEQUENCE":
            raise ValueError(
                "Expected adjacency ZERO_OUT, REPLACE_ONE or GROUP(rows), got SEQUENCE. A sum over "
                "units has no sensitivity where all of them change."
            )
        factor = 2 if adjacency.kind == "REPLACE_ONE" else adjacency.rows
        return factor * self.clip_norm

    def psum(self, axis_name: str | Sequence[str], partition_specs: Any = None) -> "Clipped":
        """The sum over the shards of a mesh axis, every unit being on one shard only.

        Args:
          axis_name: of the mesh axis or axes, as `jax.lax.psum` takes it.
          partition_specs: a prefix tree of PartitionSpecs where parameters are in parts: each shard
            then gets its part of the sum (a reduce-scatter). None: all shards get the whole.

        Raises:
          ValueError: if the sum is the same on all shards of an axis: added up there before, or of
            rows that every shard has. Its units would count once for each shard. Also for parts,
            which may not be added to each other, and for specs that do not fit.

        Guarantee: CL1 (certificate.md), CL10 (partition.md).
        """
        names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
        cut = frozenset().union(*(partition.names_of(axes) for axes in self.split or ()))
        if cut & set(names) or (self.split is not None and partition_specs is not None):
            raise ValueError(
                f"Expected whole sums, got parts along {sorted(cut)}: added up, different "
                "parameters would meet. Call psum once, with all axes and partition_specs."
            )
        for name in names:
            tracked = name in _primitives.varying(jax.lax.axis_index(name))
            leaves = jax.tree.leaves(self.tree)
            if tracked and not any(name in _primitives.varying(leaf) for leaf in leaves):
                raise ValueError(
                    f"Expected a sum that differs between the shards of {name!r}, got one that is "
                    "the same on all of them. Call psum once, and give every shard rows of its own."
                )
        split = self.split
        if partition_specs is None:
            tree = jax.lax.psum(self.tree, names)
        else:
            split = partition.split_axes(self.tree, partition_specs)
            tree = partition.sum_parts(self.tree, names, split)
            split = split if any(map(partition.names_of, split)) else None
        counts = jax.lax.psum((self.examples, self.clipped, self.nonfinite), names)
        norm = self.traced_clip_norm
        if norm is not None and jax.typeof(norm).manual_axis_type.varying & set(names):
            norm = jax.lax.pmax(norm, names)
        examples, clipped, nonfinite = counts
        shards = math.prod(jax.lax.axis_size(name) for name in names)
        return dataclasses.replace(
            self,
            tree=tree,
            examples=examples,
            clipped=clipped,
            nonfinite=nonfinite,
            traced_clip_norm=norm,
            units=None if self.units is None else self.units * shards,
            split=split,
        )


def joint_clip_norm(clip_norms: Sequence[float]) -> float:
    """Bound on the whole contribution of a unit whose groups are clipped one by one.

    Args:
      clip_norms: C_g of each group, > 0; at least one.

    Returns:
      Equality: √(Σ C_g²), rounded up.

    Raises:
      ValueError: for no group, or a bound that is not positive and finite.

    Guarantee: CL1 (certificate.md).

    Example:
      >>> round(joint_clip_norm([3.0, 4.0]), 9)
      5.0
    """
    if not len(clip_norms):
        raise ValueError("Expected at least one clip_norm, got none.")
    checked = [_check.real("clip_norm", norm, low=0, open_low=True) for norm in clip_norms]
    if len(checked) == 1:
        return checked[0]
    return math.nextafter(math.hypot(*checked), math.inf)
