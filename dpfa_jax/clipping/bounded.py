"""Per-unit gradients cut to their bounds, and sums of them that rounding cannot inflate.

Which statement this makes true: what one unit adds to the sum has norm ≤ C_g in group g, whatever
its gradient was, NaN and infinity included; and the float32 sum moves by no more than the
certificate says.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax import _check, doubleword
from dpfa_jax.clipping.groups import Groups
from dpfa_jax.clipping.rows import stable_sum

BLOCK = 64
"""Contributions that are summed pairwise before they enter the double word."""

_MARGIN = 1 - 2.0**-12


def shrinkage(units: int, shards: int = 1) -> float:
    """How much shorter than its bound a contribution is kept, to pay for all rounding.

    Args:
      units: contributions in one shard's sum, ≥ 0; padding counts.
      shards: shards whose sums are added in float32 afterwards, ≥ 1.

    Returns:
      Upper bound on the factor, in (0, 1): (1 − 2⁻¹²)/(1 + 2·R·N·2⁻²⁴) with N = units·shards and
      R = min(6, ⌈log₂ units⌉) + 1 + shards. 256 units: 0.99951, 4096: 0.9959.

    Guarantee: CL2 (bounded.md).

    Example:
      >>> round(shrinkage(256), 5)
      0.99951
    """
    units = _check.integer("units", units, low=0)
    shards = _check.integer("shards", shards, low=1)
    depth = min(int(math.log2(BLOCK)), math.ceil(math.log2(max(units, 1)))) + 1 + shards
    return _MARGIN / (1 + 2 * depth * units * shards * 2.0**-24)


def _unit_of(largest: jax.Array) -> jax.Array:
    """2^k with 2^k·largest in [2³⁰, 2³¹) where −98 ≤ k ≤ 63 allows it: exact, by its bits.

    No larger k: of constants XLA makes (x·u)·(x·u) into (x·x)·(u·u), so u·u has to be finite.
    """
    exponent = (jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23) - 127
    power = jnp.clip(30 - exponent, -98, 63)
    return jax.lax.bitcast_convert_type((power + 127) << 23, jnp.float32)


def _along(vector: jax.Array, leaf: jax.Array) -> jax.Array:
    return vector.reshape(vector.shape + (1,) * (leaf.ndim - 1))


def _column(label: Any, leaf: jax.Array) -> np.ndarray:
    """The label with as many axes as one unit's part of the leaf."""
    numbers = np.asarray(label)
    return numbers.reshape((1,) * (leaf.ndim - 1 - numbers.ndim) + numbers.shape)


def _parts(leaf: jax.Array, label: Any) -> tuple[jax.Array, np.ndarray]:
    """(units, parts, entries) of a leaf, one part per index its label tells apart; their labels."""
    units, shape = leaf.shape[0], leaf.shape[1:]
    numbers = _column(label, leaf)
    kept = [i for i in range(len(shape)) if numbers.shape[i] == shape[i] and shape[i] > 1]
    summed = [i for i in range(len(shape)) if i not in kept]
    moved = leaf.transpose(0, *(1 + i for i in kept), *(1 + i for i in summed))
    count = math.prod(shape[i] for i in kept)
    return moved.reshape(units, count, math.prod(shape[i] for i in summed)), numbers.reshape(-1)


def _by_group(
    leaves: Sequence[jax.Array], groups: Groups, reduce: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`reduce` over the last axis of what belongs to each group: (units, groups)."""
    parts, labels = zip(
        *(_parts(leaf, label) for leaf, label in zip(leaves, groups.labels, strict=True)),
        strict=True,
    )
    table, numbers = jnp.concatenate([reduce(part) for part in parts], 1), np.concatenate(labels)
    members = [np.flatnonzero(numbers == group) for group in range(len(groups.clip_norms))]
    index = np.full((len(members), max(len(each) for each in members) or 1), table.shape[1])
    for row, each in zip(index, members, strict=True):
        row[: len(each)] = each
    table = jnp.pad(table, ((0, 0), (0, 1)))  # the last column, 0, stands for nobody
    return reduce(table[:, index])


def _largest(entries: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(entries), axis=-1, initial=0.0)


def group_squares(squares: Sequence[jax.Array], groups: Groups) -> jax.Array:
    """Squared norms of each unit's gradient in each group.

    Args:
      squares: the squared entries, one float32 array (units, ...) per leaf.
      groups: which group each entry belongs to.

    Returns:
      float32 (units, groups), each within a relative 2⁻¹² of the exact sum.

    Guarantee: CL2 (bounded.md).
    """
    return _by_group(squares, groups, stable_sum)


def factors(
    norms: jax.Array,
    unit: jax.Array,
    groups: Groups,
    *,
    shrink: float,
    normalize: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Whether each unit's part is over its bound, and bound/norm, which then cuts it.

    Args:
      norms: float32 (units, groups), norms times `unit`.
      unit: float32 (units, groups), powers of two.
      groups: with the bounds C_g.
      shrink: as in `contributions`.
      normalize: as in `contributions`.

    Returns:
      bool and float32 arrays (units, groups). A bound that is not a positive finite number gives
      True and NaN, never an unclipped gradient.

    Guarantee: CL2 (bounded.md).
    """
    bounds = jnp.stack([jnp.asarray(norm, jnp.float32) for norm in groups.clip_norms])
    bounds = jnp.where((bounds > 0) & jnp.isfinite(bounds), bounds, jnp.nan)
    bounds = bounds * jnp.float32(shrink)
    if normalize is not None:
        return jnp.ones(norms.shape, bool), bounds / (norms + normalize * unit)
    return ~(norms <= bounds * unit), bounds / jnp.where(norms == 0, 1, norms)


def contributions(
    gradients: Sequence[jax.Array],
    present: jax.Array,
    groups: Groups,
    *,
    shrink: float,
    normalize: float | None = None,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """What each unit adds to the sum: its gradient cut to norm ≤ shrink·C_g in group g.

    Args:
      gradients: one array (units, ...) per parameter leaf, anything in it.
      present: bool (units,); a unit that is not present contributes 0.
      groups: which bound each entry is under.
      shrink: factor of every bound, in (0, 1], from `shrinkage`.
      normalize: γ > 0 for gradients of length C_g·‖g‖/(‖g‖ + γ), in the unit of the gradient;
        None for min(‖g‖, C_g).

    Returns:
      The float32 contributions, and two bool arrays (units,): present units that were longer than
      some bound, and present units with an entry that is not finite, which contribute 0.

    Guarantee: CL2 (bounded.md).
    Source: Bu, Wang, Zha and Karypis 2022, arXiv:2206.07136 (automatic clipping, `normalize`).
    """
    leaves = [leaf.astype(jnp.float32) for leaf in gradients]
    finite = present
    for leaf in leaves:
        finite = finite & jnp.all(jnp.isfinite(leaf.reshape(leaf.shape[0], -1)), axis=1)
    leaves = [jnp.where(_along(finite, leaf), leaf, 0.0) for leaf in leaves]
    # One power of two per unit and group: with one per unit, a huge entry in one group would flush
    # the squares of another to zero, and that group would pass for short.
    unit = _unit_of(_by_group(leaves, groups, _largest))
    columns = [_column(label, leaf) for label, leaf in zip(groups.labels, leaves, strict=True)]
    scaled = [leaf * unit[:, column] for leaf, column in zip(leaves, columns, strict=True)]
    norms = jnp.sqrt(group_squares([jnp.square(leaf) for leaf in scaled], groups))
    over, factor = factors(norms, unit, groups, shrink=shrink, normalize=normalize)
    cut = [
        jnp.where(over[:, column], wide * factor[:, column], leaf)
        for leaf, wide, column in zip(leaves, scaled, columns, strict=True)
    ]
    return cut, finite & jnp.any(over, axis=1), present & ~finite


def _pairwise(array: jax.Array) -> jax.Array:
    """The sum over axis 1."""
    while array.shape[1] > 1:
        half = -(-array.shape[1] // 2)
        widths = [(0, 0), (0, 2 * half - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
        array = jnp.pad(array, widths)
        array = array[:, :half] + array[:, half:]
    return array[:, 0]


def add_contributions(
    total: tuple[jax.Array, jax.Array], terms: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A double-word sum with more contributions in it.

    Args:
      total: (high, low), float32 arrays of a leaf's shape.
      terms: float32 contributions (units, ...).

    Returns:
      The new (high, low).

    Guarantee: CL2 (bounded.md).
    """
    units, shape = terms.shape[0], terms.shape[1:]
    if units <= BLOCK:
        return doubleword.add_word(*total, _pairwise(terms[None])[0])
    terms = jnp.pad(terms, [(0, -units % BLOCK)] + [(0, 0)] * len(shape))
    blocks = _pairwise(terms.reshape(-1, BLOCK, *shape))
    return jax.lax.scan(lambda pair, word: (doubleword.add_word(*pair, word), None), total, blocks)[
        0
    ]
