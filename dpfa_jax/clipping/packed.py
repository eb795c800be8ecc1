"""Packed rows, cut up: one row for each piece, so that pieces of different units never meet.

Which statement this makes true: a row that comes out holds entries of one segment only, so that its
clipped gradient is that segment's own, whatever the loss does.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpfa_jax import _check


class Unpacked(NamedTuple):
    """The segments of packed rows, one a row.

    Attributes:
      rows: pytree of arrays (batch·segments, length, ...); zeros where there is no entry.
      present: bool (batch·segments, length), which entries are the segment's: for the loss, which
        has to leave the others out.
      mask: bool (batch·segments,), which rows hold a segment: for `clipped_grad`.
    """

    rows: Any
    present: jax.Array
    mask: jax.Array


def unpack(rows: Any, segment_ids: jax.Array, *, segments: int, length: int) -> Unpacked:
    """One row for each segment of rows that hold several, for `clipped_grad`.

    A row whose positions belong to several people has no norm that bounds one of them, and a loss
    that keeps them apart cannot be told from one that does not. So they are taken apart before the
    loss sees them. Where people own several segments, let an array of their ids (batch, positions)
    be among the rows, and give `unit_ids=made.rows["id"][:, 0]`.

    Args:
      rows: pytree of arrays (batch, positions, ...).
      segment_ids: integers (batch, positions): 1 to `segments` within each row, 0 for padding, as
        packers write them. A segment's positions may lie anywhere in its row.
      segments: most segments of a row, ≥ 1; positions with larger numbers are left out.
      length: most positions of a segment, in [1, positions]; those after it are left out.

    Returns:
      `Unpacked`: row b·segments + k − 1 is segment k of row b, its entries in order from the left.

    Raises:
      TypeError: for segment ids that are no integers.
      ValueError: for shapes that do not agree, or numbers out of range.

    Guarantee: CL14 (packed.md).

    Example:
      >>> made = unpack(
      ...     jnp.array([[5, 6, 7, 8]]), jnp.array([[1, 2, 2, 0]]), segments=2, length=3)
      >>> made.rows.tolist(), made.mask.tolist()
      ([[5, 0, 0], [6, 7, 0]], [True, True])
    """
    ids = jnp.asarray(segment_ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"Expected segment_ids as integers, got {ids.dtype}.")
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, rows))
    if ids.ndim != 2 or not leaves or any(leaf.shape[:2] != ids.shape for leaf in leaves):
        raise ValueError(
            f"Expected rows (batch, positions, ...) and segment_ids (batch, positions), got "
            f"{[leaf.shape for leaf in leaves]} and {ids.shape}."
        )
    segments = _check.integer("segments", segments, low=1)
    length = _check.integer("length", length, low=1, high=ids.shape[1])
    belongs = ids[:, None, :] == jnp.arange(1, segments + 1, dtype=ids.dtype)[:, None]
    belongs = belongs.reshape(-1, ids.shape[1])  # (batch·segments, positions)
    order = jnp.argsort(~belongs, axis=1, stable=True)[:, :length]
    present = jnp.take_along_axis(belongs, order, axis=1)
    source = jnp.arange(belongs.shape[0])[:, None] // segments

    def take(leaf):
        kept = present.reshape(*present.shape, *(1,) * (leaf.ndim - 2))
        return jnp.where(kept, leaf[source, order], jnp.zeros((), leaf.dtype))

    return Unpacked(
        jax.tree.unflatten(structure, [take(leaf) for leaf in leaves]),
        present,
        jnp.any(present, axis=1),
    )
