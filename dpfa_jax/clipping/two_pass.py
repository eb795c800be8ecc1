"""Clipped sums from norms: no gradient per row where a rule gives its norm.

Which statement this makes true: the weights of the second pass are those of the clip, computed from
the norm of each row's whole gradient.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from dpfa_jax import per_example
from dpfa_jax.clipping import _batch
from dpfa_jax.clipping.bounded import factors
from dpfa_jax.clipping.groups import Groups

_NARROW = (jnp.bfloat16, jnp.float16)
_NARROW_MARGIN = 1 - 2.0**-6
_SMALLEST = 1e-9


@dataclasses.dataclass(frozen=True)
class Report:
    """How each parameter's norm would be found, and at what modelled cost.

    Costs are those a row beyond the plain gradient, in multiplications; a byte moved counts 64 of
    them where operands have 16 bits, and 8 where they have 32.

    Attributes:
      rules: path -> rule, for parameters whose norm needs no gradient.
      full: path -> reason, for parameters whose gradient is made for every row.
      in_full: paths with a rule whose gradients "one_pass" makes all the same: they are cheaper.
      entries_in_full: entries of the parameters in `full` together: the memory a row takes.
      one_pass_bytes: what "one_pass" keeps of a row: operands and cotangents, or gradients.
      vmap_cost: of gradients in full, clipped as method "vmap" does.
      two_pass_cost: of a second pass and the rules.
      one_pass_cost: of the rules, or gradients in full, whichever is less.
    """

    rules: Mapping[str, str]
    full: Mapping[str, str]
    in_full: tuple[str, ...]
    entries_in_full: int
    one_pass_bytes: int
    vmap_cost: float
    two_pass_cost: float
    one_pass_cost: float

    def cheapest(self, methods: Iterable[str]) -> str:
        """The method with the smallest modelled cost.

        Args:
          methods: names of those that can do the call.

        Returns:
          One of them; of equals the first.
        """
        costs = {
            "vmap": self.vmap_cost,
            "one_pass": self.one_pass_cost,
            "two_pass": self.two_pass_cost,
        }
        return min(methods, key=lambda name: costs[name])

    @property
    def choice(self) -> str:
        """What "auto" takes where every method can do the call."""
        return self.cheapest(("vmap", "one_pass", "two_pass"))

    def __str__(self):
        lines = [f"{path}: {rule}" for path, rule in self.rules.items()]
        lines += [f"{path}: in full, {reason}" for path, reason in self.full.items()]
        lines += [f"{path}: in full for one_pass, cheaper than its rule" for path in self.in_full]
        lines.append(
            f"auto takes {self.choice}: modelled cost a row {self.one_pass_cost:.3g} for one_pass, "
            f"{self.two_pass_cost:.3g} for two_pass, {self.vmap_cost:.3g} for vmap"
        )
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Passes:
    """Both passes over some rows.

    Attributes:
      row: closed jaxpr of one row's loss and aux leaves.
      plan: of `row`.
      is_narrow: whether the loss computes in a 16-bit dtype anywhere.
      public: how many inputs behind the parameters are public.
    """

    row: Any
    plan: per_example.Plan
    is_narrow: bool
    public: int

    def shrunk(self, shrink: float) -> float:
        """The factor of every bound, smaller where 16-bit arithmetic rounds the backward pass.

        Args:
          shrink: as in `bounded.contributions`.

        Returns:
          The factor.
        """
        return shrink * _NARROW_MARGIN if self.is_narrow else shrink

    def in_full(self, sizes: list[int]) -> frozenset[int]:
        """The parameters with a rule whose gradients "one_pass" makes all the same.

        Args:
          sizes: entries of each parameter leaf.

        Returns:
          Their numbers: those whose gradients are cheaper than their norms by rule.

        Guarantee: CL7 (two_pass.md); either way a norm is that of what is summed.
        """
        found = per_example.costs(self.plan, sizes)
        return frozenset(cost.leaf for cost in found if cost.in_full < cost.norm)

    def _batched(self, leaves: list[Any], others: list[Any]) -> tuple[Any, per_example.Plan]:
        """The jaxpr of all rows at once, and its plan for the parameters with a rule."""
        fixed = len(leaves) + self.public
        axes = [None] * fixed + [0] * (len(leaves) + len(others) - fixed)
        run = jax.vmap(core.jaxpr_as_fun(self.row), axes)
        closed = jax.make_jaxpr(run)(*leaves, *others)
        made = per_example.plan(closed.jaxpr, len(leaves))
        return closed, per_example.without(made, made.rules.keys() - self.plan.rules.keys(), "")

    def terms(
        self,
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
          leaves: of the parameters.
          public: arguments without a batch axis, leaves.
          rows: leaves of the rows, batch axis first.
          present: bool, which rows count.
          groups: the one group and its bound.
          shrink: as in `bounded.contributions`.
          normalize: as in `bounded.contributions`.

        Returns:
          float32 sums per leaf; bool arrays of the rows that are present, clipped and not finite;
          aux leaves.

        Guarantee: CL7 (two_pass.md).
        """
        groups, shrink = checked_bounds(groups), self.shrunk(shrink)
        axes = [None] * len(public) + [0] * len(rows)
        closed, made = self._batched(leaves, [*public, *rows])
        plan = per_example.without(
            self.plan, self.plan.rules.keys() - made.rules.keys(), "not found again under vmap"
        )
        one = per_example.squared_norms(self.row, plan)
        squares, full, out = jax.vmap(lambda *others: one(leaves, list(others)), axes)(
            *public, *rows
        )
        full = [leaf.astype(jnp.float32) for leaf in full]
        for leaf in full:
            squares = squares + jax.vmap(per_example.sum_of_squares)(leaf)
        good = present & jnp.isfinite(squares)
        norms = jnp.sqrt(jnp.where(good, squares, 0.0))[:, None]
        over, factor = factors(
            norms, jnp.ones_like(norms), groups, shrink=shrink, normalize=normalize
        )
        weights = jnp.where(good, jnp.where(over, factor, 1.0)[:, 0], 0.0)
        # 0 times a NaN is a NaN: in the place of a row that does not count stands one that does.
        place = jnp.where(good, jnp.arange(good.size), jnp.argmax(good))
        others = [*public, *(leaf[place] for leaf in rows)]
        total = per_example.weighted_sum(closed, made)(leaves, others, weights)
        total = [jnp.where(jnp.any(good), leaf, 0.0) for leaf in total]
        for leaf in full:
            wide = (-1, *(1,) * (leaf.ndim - 1))
            kept = jnp.where(good.reshape(wide), leaf, 0.0)
            total.append(jnp.sum(kept * weights.reshape(wide), axis=0))
        order = [*sorted(made.rules), *sorted(plan.reasons)]
        sums = [total[order.index(number)] for number in range(len(leaves))]
        return sums, present, good & over[:, 0], present & ~good, list(out[1:])


def prepare(loss_fn: Callable[..., Any], batch: _batch.Batch, has_aux: bool) -> Passes:
    """The loss of one row, traced and planned.

    Args:
      loss_fn: as `clipped_grad` takes it.
      batch: the arguments.
      has_aux: whether the loss returns (loss, aux).

    Returns:
      What computes both passes.
    """
    loss = _batch.row_loss(loss_fn, batch, has_aux)
    leaves, tree = jax.tree.flatten(batch.params)

    def flat(leaves, public, row):
        value, aux = loss(jax.tree.unflatten(tree, leaves), public, row)
        return value, *jax.tree.leaves(aux)

    closed = jax.make_jaxpr(flat)(leaves, batch.public, _batch.first_row(batch))
    made = per_example.plan(closed.jaxpr, len(leaves))
    return Passes(closed, made, _is_narrow(closed.jaxpr), len(batch.public))


def _is_narrow(jaxpr: Any) -> bool:
    variables = [*jaxpr.invars, *(each for line in jaxpr.eqns for each in line.outvars)]
    if any(getattr(each.aval, "dtype", None) in _NARROW for each in variables):
        return True
    return any(_is_narrow(each) for line in jaxpr.eqns for each in _batch.inner_jaxprs(line))


def checked_bounds(groups: Groups) -> Groups:
    """The groups, with traced bounds that are too short for squares in float32 as NaN.

    Args:
      groups: the bounds.

    Returns:
      Groups whose sums are NaN for a bound that cannot be kept.

    Guarantee: CL7 (two_pass.md).
    """
    bounds = [
        bound if isinstance(bound, float) else jnp.where(bound >= _SMALLEST, bound, jnp.nan)
        for bound in groups.clip_norms
    ]
    return dataclasses.replace(groups, clip_norms=tuple(bounds))


def unfit(method: str, groups: Groups, unit: int | None) -> str | None:
    """Why norms by rule cannot do it, or None.

    Args:
      method: "two_pass" or "one_pass".
      groups: the bounds.
      unit: how many units share rows, or None.

    Returns:
      A sentence for the error.
    """
    if method == "two_pass" and len(groups.clip_norms) > 1:
        return (
            f'Expected one group for method "two_pass", got {len(groups.clip_norms)}: one weight a '
            'row cuts the whole gradient. Use method "one_pass" or "vmap".'
        )
    if any(np.size(label) > 1 for label in groups.labels):
        return (
            f'Expected groups of whole parameters for method "{method}", got one that splits a '
            'parameter: a norm by rule is that of the whole. Use method "vmap".'
        )
    if unit is not None:
        return (
            f'Expected no unit for method "{method}": the norm of a sum of rows is not that of '
            'rows. Use method "vmap".'
        )
    short = [each for each in groups.clip_norms if isinstance(each, float) and each < _SMALLEST]
    if short:
        return (
            f'Expected clip_norm >= {_SMALLEST} for method "{method}", got {short[0]}: squares of '
            'shorter gradients vanish in float32. Use method "vmap", or scale the loss.'
        )
    return None


def report(passes: Passes, params: Any) -> Report:
    """What `explain` says.

    Args:
      passes: the prepared loss.
      params: the parameters, for their paths and sizes.

    Returns:
      The report.
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    sizes = [leaf.size for _, leaf in flat]
    table = list(per_example.costs(passes.plan, sizes))
    made = passes.in_full(sizes)
    return Report(
        {paths[number]: rule for number, rule in sorted(passes.plan.rules.items())},
        {paths[number]: why for number, why in sorted(passes.plan.reasons.items())},
        tuple(paths[number] for number in sorted(made)),
        sum(sizes[number] for number in passes.plan.reasons),
        sum(cost.made if cost.leaf in made else cost.kept for cost in table),
        sum(cost.vmap for cost in table),
        sum(cost.again + cost.norm for cost in table),
        sum(min(cost.in_full, cost.norm) for cost in table),
    )
