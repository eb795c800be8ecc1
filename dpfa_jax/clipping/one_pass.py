"""Clipped sums from one backward pass that keeps what gradients are made of.

Which statement this makes true: norms and sums come from the same operands and cotangents, so that
what is summed is what was measured, each group under its own bound.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax import per_example
from dpfa_jax.clipping.bounded import factors, group_squares
from dpfa_jax.clipping.groups import Groups
from dpfa_jax.clipping.two_pass import Passes, checked_bounds


def _squares(passes: Passes, found: dict[Any, Any], leaf: int) -> jax.Array:
    """Squared norms (rows,) of one parameter with a rule."""
    uses = passes.plan.uses
    places = sorted(path for path, use in uses.items() if use.leaf == leaf)
    lines = [per_example.equation_at(passes.row.jaxpr, path) for path in places]
    sides = [uses[path].side for path in places]
    tables = [line.invars[side].aval for line, side in zip(lines, sides, strict=True)]

    def one(*pairs):
        total = jnp.float32(0.0)
        for line, side, table, pair in zip(lines, sides, tables, pairs, strict=True):
            total = total + per_example.pair_norm(line, side, pair[0], pair[1], table)
        if len(pairs) == 2:
            cross = per_example.pair_cross(lines[0], lines[1], sides[1], *pairs, tables[0])
            total = total + 2.0 * cross
        return jnp.maximum(total, 0.0)

    return jax.vmap(one)(*(found[path] for path in places))


def _wide(good: jax.Array, leaf: jax.Array) -> jax.Array:
    return good.reshape(-1, *(1,) * (leaf.ndim - 1))


def terms(
    passes: Passes,
    leaves: list[jax.Array],
    public: list[Any],
    rows: list[jax.Array],
    present: jax.Array,
    groups: Groups,
    shrink: float,
    normalize: float | None,
) -> tuple[list[jax.Array], jax.Array, jax.Array, jax.Array, list[Any]]:
    """The clipped sum of some rows.

    Args:
      passes: the prepared loss.
      leaves: of the parameters.
      public: arguments without a batch axis, leaves.
      rows: leaves of the rows, batch axis first.
      present: bool, which rows count.
      groups: the bounds; each parameter is in one group.
      shrink: as in `bounded.contributions`.
      normalize: as in `bounded.contributions`.

    Returns:
      float32 sums per leaf; bool arrays of the rows that are present, clipped and not finite; aux
      leaves.

    Guarantee: CL9 (one_pass.md).
    """
    groups, shrink = checked_bounds(groups), passes.shrunk(shrink)
    plan, labels = passes.plan, [int(np.ravel(label)[0]) for label in groups.labels]
    axes = [None] * len(public) + [0] * len(rows)
    one = per_example.pairs(passes.row, plan)
    found, full, out = jax.vmap(lambda *others: one(leaves, list(others)), axes)(*public, *rows)
    full = dict(zip(sorted(plan.reasons), [leaf.astype(jnp.float32) for leaf in full], strict=True))
    squares = []
    for leaf in range(len(leaves)):
        if leaf in full:
            whole = full[leaf].reshape(present.size, -1)
            squares.append(jnp.sum(jnp.square(whole), axis=1))
        else:
            squares.append(_squares(passes, found, leaf))
    whole = Groups(tuple(labels), groups.clip_norms, groups.names)
    table = group_squares(squares, whole)
    good = present & jnp.all(jnp.isfinite(table), axis=1)
    norms = jnp.sqrt(jnp.where(good[:, None], table, 0.0))
    over, factor = factors(norms, jnp.ones_like(norms), groups, shrink=shrink, normalize=normalize)
    weights = jnp.where(good[:, None], jnp.where(over, factor, 1.0), 0.0)
    # 0 times a NaN is a NaN: a row that does not count is set to 0 where it was kept.
    clean = {
        path: tuple(jnp.where(_wide(good, each), each, 0) for each in pair)
        for path, pair in found.items()
    }
    placed = {}
    for path, use in plan.uses.items():
        line = per_example.equation_at(passes.row.jaxpr, path)
        met, dy = clean[path]
        placed[path] = per_example.pair_sum(
            line, use.side, met, dy, weights[:, labels[use.leaf]], line.invars[use.side].aval
        )
    first = [*public, *(leaf[0] for leaf in rows)]
    known = per_example.pull_back(passes.row, plan)(leaves, first, placed)
    sums = dict(zip(sorted(plan.rules), known, strict=True))
    for leaf, gradient in full.items():
        kept = jnp.where(_wide(good, gradient), gradient, 0.0)
        sums[leaf] = jnp.sum(kept * _wide(weights[:, labels[leaf]], gradient), axis=0)
    clipped = good & jnp.any(over, axis=1)
    return [sums[i] for i in range(len(leaves))], present, clipped, present & ~good, list(out[1:])
