"""Clipped sums from one backward pass that keeps what gradients are made of.

Which statement this makes true: norms and sums come from the same operands and cotangents, so that
what is summed is what was measured, each group under its own bound.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax import per_example
from dpfa_jax.clipping.bounded import factors, group_squares
from dpfa_jax.clipping.groups import Groups
from dpfa_jax.clipping.two_pass import Passes, checked_bounds

type _Pair = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class _Place:
    """One place where a parameter meets the rows."""

    line: Any
    side: int
    theta: Any

    def norm(self, pair: _Pair) -> jax.Array:
        return per_example.pair_norm(self.line, self.side, *pair, self.theta)


def _places(passes: Passes) -> dict[Any, _Place]:
    plan = passes.plan
    lines = {path: per_example.equation_at(passes.row.jaxpr, path) for path in plan.uses}
    return {
        path: _Place(lines[path], use.side, lines[path].invars[use.side].aval)
        for path, use in plan.uses.items()
    }


def _squares(
    places: dict[Any, _Place], found: dict[Any, _Pair], made: dict[Any, jax.Array], paths: list[Any]
) -> jax.Array:
    """Squared norms (rows,) of one parameter with a rule, which is used in these places."""

    def one(pairs, whole):
        total = jnp.float32(0.0)
        for path in paths:
            if path in whole:
                total = total + per_example.sum_of_squares(whole[path])
            else:
                total = total + places[path].norm(pairs[path])
        if len(paths) == 2:
            look_up, product = paths
            total = total + 2.0 * per_example.pair_cross(
                places[look_up].line,
                places[product].line,
                places[product].side,
                pairs[look_up],
                pairs[product],
                places[look_up].theta,
                whole.get(product),
            )
        return per_example.not_below_0(total)

    return jax.vmap(one)(
        {path: found[path] for path in paths}, {path: made[path] for path in paths if path in made}
    )


def _wide(good: jax.Array, leaf: jax.Array) -> jax.Array:
    return good.reshape(-1, *(1,) * (leaf.ndim - 1))


def _cleaned(found: dict[Any, _Pair], good: jax.Array, finite: jax.Array) -> dict[Any, _Pair]:
    """What was kept, 0 in rows that are not good where any row is not finite: 0·NaN is a NaN.

    A loop of at most one round works in place: where all rows are finite nothing is written.
    """
    flat = {id(each): each for pair in found.values() for each in pair}
    if not flat:
        return {}

    def clean(state):
        dirty, arrays = state
        zeroed = {key: jnp.where(_wide(good, each), each, 0) for key, each in arrays.items()}
        return jnp.zeros_like(dirty), zeroed

    dirty = ~jnp.all(finite)
    _, flat = jax.lax.while_loop(lambda state: state[0], clean, (dirty, flat))
    return {path: (flat[id(met)], flat[id(dy)]) for path, (met, dy) in found.items()}


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
    labels = [int(np.ravel(label)[0]) for label in groups.labels]
    plan, in_full = passes.plan, passes.in_full([leaf.size for leaf in leaves])
    axes = [None] * len(public) + [0] * len(rows)
    one = per_example.pairs(passes.row, plan)
    found, full, out = jax.vmap(lambda *others: one(leaves, list(others)), axes)(*public, *rows)
    full = dict(zip(sorted(plan.reasons), full, strict=True))
    places = _places(passes)
    made = {
        path: jax.vmap(
            lambda *pair, at=places[path]: per_example.pair_product(at.line, at.side, *pair)
        )(*found[path])
        for path, use in plan.uses.items()
        if use.leaf in in_full and use.rule == "matrix product"
    }
    squares = []
    for leaf in range(len(leaves)):
        if leaf in full:
            squares.append(jax.vmap(per_example.sum_of_squares)(full[leaf]))
        else:
            paths = sorted(path for path, use in plan.uses.items() if use.leaf == leaf)
            squares.append(_squares(places, found, made, paths))
    whole = Groups(tuple(labels), groups.clip_norms, groups.names)
    table = group_squares(squares, whole)
    finite = jnp.all(jnp.isfinite(table), axis=1)
    good = present & finite
    norms = jnp.sqrt(jnp.where(good[:, None], table, 0.0))
    over, factor = factors(norms, jnp.ones_like(norms), groups, shrink=shrink, normalize=normalize)
    weights = jnp.where(good[:, None], jnp.where(over, factor, 1.0), 0.0)
    kept = {
        path: found[path]
        for path, use in plan.uses.items()
        if path not in made and use.rule == "matrix product"
    }
    clean = {**found, **_cleaned(kept, good, finite)}
    placed = {}
    for path, use in plan.uses.items():
        at, weight = places[path], weights[:, labels[use.leaf]]
        if path in made:
            placed[path] = per_example.product_sum(at.line, at.side, made[path], weight, at.theta)
        else:
            met, dy = clean[path]
            placed[path] = per_example.pair_sum(at.line, at.side, met, dy, weight, at.theta)
    first = [*public, *(leaf[0] for leaf in rows)]
    known = per_example.pull_back(passes.row, plan)(leaves, first, placed)
    sums = dict(zip(sorted(plan.rules), known, strict=True))
    for leaf, gradient in full.items():
        weight = _wide(weights[:, labels[leaf]], gradient)
        cut = jnp.where(_wide(good, gradient), gradient.astype(jnp.float32), 0.0) * weight
        sums[leaf] = jnp.sum(cut, axis=0)
    clipped = good & jnp.any(over, axis=1)
    return [sums[i] for i in range(len(leaves))], present, clipped, present & ~good, list(out[1:])
