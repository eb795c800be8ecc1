"""The sum of clipped per-example gradients, with its certificate.

Which statement this makes true: every row of the batch reaches the sum through its own gradient,
which is cut before it meets another row's. The gradient of one row is traced by itself, so a loss
cannot mix rows, and a collective inside it is refused.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpfa_jax import _check, _primitives, doubleword
from dpfa_jax.clipping import _batch, one_pass, two_pass
from dpfa_jax.clipping import groups as groups_lib
from dpfa_jax.clipping.bounded import add_contributions, contributions, shrinkage
from dpfa_jax.clipping.certificate import Clipped
from dpfa_jax.clipping.groups import Groups
from dpfa_jax.clipping.two_pass import Report

_METHODS = ("vmap", "two_pass", "one_pass", "auto")

type _Sums = list[tuple[jax.Array, jax.Array]]


def clipped_grad(
    loss_fn: Callable[..., Any],
    *,
    clip_norm: Any,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    per_example_aux: bool = True,
    microbatch_size: int | None = None,
    unit: int | None = None,
    batch_axes: Any = None,
    normalize: float | None = None,
    method: str = "vmap",
) -> Callable[..., Any]:
    """A function for the sum of per-example gradients, each clipped, with its certificate.

    The loss is written for ONE example: it takes the parameters and the arguments without their
    batch axis and returns a scalar. Inside `shard_map` or `pmap` the result is this shard's sum;
    `Clipped.psum` adds the shards'.

    Args:
      loss_fn: (params, *example) -> scalar loss, or (loss, aux) with has_aux.
      clip_norm: C, bound on the norm of one unit's contribution, in [1e-15, 1e30]; or bounds C_g
        of groups, whose contributions are together ≤ √(Σ C_g²): a prefix tree of the parameters,
        `Groups`, or a function from the parameters to these (`per_layer`, `label_groups`). Traced
        float32 scalars (schedules, adaptive thresholds) may stand for numbers.
      argnums: which argument is the parameters, or which several; then `tree` is a tuple.
      has_aux: whether the loss returns (loss, aux).
      per_example_aux: whether aux is returned per example, stacked on axis 0; else it is summed
        over the examples that count. Either way it is NOT PRIVATE.
      microbatch_size: rows whose gradients are held at a time, ≥ 1; None for all. It changes the
        memory, and the result by rounding only.
      unit: how many units a batch may hold, public, ≥ 1, where one person's rows share an id: their
        gradients are added before the clip. Memory: that many gradients. None: each row is a unit.
      batch_axes: the batch axis of each argument that is not parameters, or a prefix tree of each;
        None for one that is public and the same for all rows. Default: axis 0 of all.
      normalize: γ > 0: contributions of length C·‖g‖/(‖g‖ + γ) instead of min(‖g‖, C).
      method: "vmap": one gradient per row. "two_pass": norms without gradients where the parameter
        is used in matrix products and look-ups (`explain` says which are), then one backward pass
        of the rows weighted by their clips; for one group, without `unit`. Its bound is that of
        exact arithmetic (CL3). "one_pass": likewise, and the sum is made of the operands and
        cotangents that the norms were made of, or of gradients where those are cheaper: one
        backward pass and the memory for them; groups of whole parameters. "auto": whichever
        `explain` expects to be fastest.

    Returns:
      A function (*args, mask=None, unit_ids=None) -> `Clipped`, or (`Clipped`, aux). `mask` is
      bool (batch,), True for rows that count; the others add exactly 0. `unit_ids` are integers
      (batch,), rows outside [0, unit) add exactly 0; all rows of one unit are in one call, on one
      shard. A row (with unit_ids: a unit) with a gradient that is not finite adds 0.

    Raises:
      TypeError: for parameters that are not real floats, or a mask or ids of another type.
      ValueError: for bounds outside their range, batch axes that do not agree or are not declared,
        a loss that is not a scalar, or one whose gradient talks to other shards.
      NotImplementedError: for parameters that differ between shards; for groups and units that
        a method does not know.

    Guarantee: CL3 (gradients.md).
    Source: Abadi et al. 2016, arXiv:1607.00133; McMahan et al. 2018, arXiv:1710.06963 (units).

    Example:
      >>> loss = lambda w, x: 0.5 * jnp.sum((w - x) ** 2)
      >>> clipped = clipped_grad(loss, clip_norm=1.0)(jnp.zeros(2), jnp.array([[3.0, 4.0]]))
      >>> (5 * clipped.tree).round(2).tolist(), clipped.clip_norm
      ([-3.0, -4.0], 1.0)
    """
    _check.choice("method", method, _METHODS)
    _check.flag("has_aux", has_aux)
    _check.flag("per_example_aux", per_example_aux)
    if microbatch_size is not None:
        _check.integer("microbatch_size", microbatch_size, low=1)
    if unit is not None:
        _check.integer("unit", unit, low=1)
    if normalize is not None:
        normalize = _check.real("normalize", normalize, low=0, high=1e30, open_low=True)
    if isinstance(clip_norm, int | float):
        clip_norm = groups_lib.check_bound(clip_norm)
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if not numbers or len(set(numbers)) != len(numbers):
        raise ValueError(f"Expected argnums to be distinct, at least one, got {argnums!r}.")

    def run(*args, mask=None, unit_ids=None):
        batch = _batch.sort_arguments(args, numbers, batch_axes)
        params = batch.params[0] if isinstance(argnums, int) else batch.params
        groups = groups_lib.resolve(clip_norm, params)
        mask = _batch.checked_mask(mask, batch.size)
        ids = _batch.checked_ids(unit, unit_ids, batch.size)
        batch, axes = _batch.own_shard(batch, mask, ids)
        row = _batch.row_gradient(loss_fn, batch, has_aux)
        cut = _Cut(groups, shrinkage(unit or batch.size, _shards()), normalize, axes)
        rows = microbatch_size or max(1, batch.size)
        chosen = _choose(method, loss_fn, batch, has_aux, groups, unit)
        if chosen in ("two_pass", "one_pass"):
            passes = two_pass.prepare(loss_fn, batch, has_aux)
            terms = functools.partial(one_pass.terms, passes)
            terms = terms if chosen == "one_pass" else passes.terms
            high, counts, aux = _sum_by_rules(terms, row, batch, mask, rows, cut, per_example_aux)
        elif ids is None:
            high, counts, aux = _sum_of_rows(row, batch, mask, rows, cut, per_example_aux)
        else:
            assert unit is not None
            inside = mask & (ids >= 0) & (ids < unit)
            place = jnp.where(inside, ids, unit)
            high, counts, aux = _sum_of_units(
                row, batch, mask, rows, cut, per_example_aux, place, unit
            )
        joint = groups.joint()
        clipped = Clipped(
            jax.tree.unflatten(jax.tree.structure(params), high),
            *counts,
            traced_clip_norm=joint if groups.is_traced else None,
            static_clip_norm=None if groups.is_traced else joint,
            groups=groups.public(),
            unit="example" if unit is None else "unit",
            method=chosen,
            units=batch.size if unit is None else unit,
        )
        return (clipped, jax.tree.unflatten(row.aux_tree, aux)) if has_aux else clipped

    return run


def _choose(method, loss_fn, batch, has_aux, groups, unit) -> str:
    """The method that is used, or an error if it cannot be."""
    if method == "vmap":
        return method
    if method == "auto":
        fit = [name for name in ("one_pass", "two_pass") if not two_pass.unfit(name, groups, unit)]
        if not fit or batch.size == 0:
            return "vmap"
        passes = two_pass.prepare(loss_fn, batch, has_aux)
        return two_pass.report(passes, batch.params).cheapest(("vmap", *fit))
    why = two_pass.unfit(method, groups, unit)
    if why:
        raise NotImplementedError(why)
    return method


def _shards() -> int:
    """How many shards of all manual mesh axes the code being traced runs on."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[name] for name in _primitives.manual_axes())


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How contributions are made and added."""

    groups: Groups
    shrink: float
    normalize: float | None
    axes: frozenset

    def zeros(self, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return _batch.vary_over(jnp.zeros(shape, dtype), self.axes)

    def nothing(self, params: Any) -> tuple[_Sums, list[jax.Array]]:
        """The empty sum, a pair of words a leaf, and the three counts."""
        zeros = [self.zeros(jnp.shape(leaf)) for leaf in jax.tree.leaves(params)]
        return [(zero, zero) for zero in zeros], [self.zeros((), jnp.int32)] * 3

    def add(
        self, sums: _Sums, counts: list[jax.Array], gradients: list[jax.Array], present: jax.Array
    ) -> tuple[_Sums, list[jax.Array]]:
        """Sums and counts with the clipped gradients of some units in them."""
        terms, over, bad = contributions(
            gradients, present, self.groups, shrink=self.shrink, normalize=self.normalize
        )
        sums = [add_contributions(pair, leaf) for pair, leaf in zip(sums, terms, strict=True)]
        more = [jnp.sum(each, dtype=jnp.int32) for each in (present, over, bad)]
        return sums, [a + b for a, b in zip(counts, more, strict=True)]


def _scan_rows(step, carry, batch, extra, rows, aux):
    """lax.scan of step(carry, (row leaves, extra)) over blocks of rows; aux per row."""
    if batch.size == 0:
        return carry, [jnp.zeros((0, *leaf.shape), leaf.dtype) for leaf in aux]
    if batch.size <= rows:
        return step(carry, (batch.rows, extra))
    blocks = jax.tree.map(lambda leaf: _batch.blocks(leaf, rows), (batch.rows, extra))
    carry, out = jax.lax.scan(step, carry, blocks)
    return carry, [leaf.reshape(-1, *leaf.shape[2:])[: batch.size] for leaf in out]


def _aux(row, aux, mask, total, is_stacked):
    """(running total of aux, what is stacked) after some rows."""
    if is_stacked:
        return total, aux
    kept = [jnp.where(mask.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0) for leaf in aux]
    return [a + jnp.sum(b, axis=0, dtype=a.dtype) for a, b in zip(total, kept, strict=True)], []


def _sum_of_rows(row, batch, mask, rows, cut, is_stacked):
    """(leaves of the sum, counts, aux leaves), where every row is a unit."""

    def step(carry, block):
        sums, counts, total = carry
        leaves, present = block
        gradients, aux = jax.vmap(row.run)(leaves)
        sums, counts = cut.add(sums, counts, gradients, present)
        total, aux = _aux(row, aux, present, total, is_stacked)
        return (sums, counts, total), aux

    total = [] if is_stacked else [cut.zeros(leaf.shape, leaf.dtype) for leaf in row.aux]
    carry = (*cut.nothing(batch.params), total)
    (sums, counts, total), aux = _scan_rows(step, carry, batch, mask, rows, row.aux)
    return [high for high, _ in sums], counts, aux if is_stacked else total


def _sum_by_rules(terms_of, row, batch, mask, rows, cut, is_stacked):
    """(leaves of the sum, counts, aux leaves), gradients only where no rule gives the norm."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(batch.params)]

    def step(carry, block):
        sums, counts, total = carry
        terms, present, over, bad, aux = terms_of(
            leaves, batch.public, *block, cut.groups, cut.shrink, cut.normalize
        )
        sums = [doubleword.add_word(*pair, leaf) for pair, leaf in zip(sums, terms, strict=True)]
        more = [jnp.sum(each, dtype=jnp.int32) for each in (present, over, bad)]
        counts = [a + b for a, b in zip(counts, more, strict=True)]
        total, aux = _aux(row, aux, present, total, is_stacked)
        return (sums, counts, total), aux

    total = [] if is_stacked else [cut.zeros(leaf.shape, leaf.dtype) for leaf in row.aux]
    carry = (*cut.nothing(batch.params), total)
    (sums, counts, total), aux = _scan_rows(step, carry, batch, mask, rows, row.aux)
    return [high for high, _ in sums], counts, aux if is_stacked else total


def _sum_of_units(row, batch, mask, rows, cut, is_stacked, place, units):
    """(leaves of the sum, counts, aux leaves), the rows of one unit added before the clip."""

    def step(carry, block):
        held, total = carry
        leaves, (present, where) = block
        gradients, aux = jax.vmap(row.run)(leaves)
        where = jnp.where(present, where, units)  # the rows that fill the last block up
        held = [
            part.at[where].add(leaf.astype(jnp.float32), mode="drop")
            for part, leaf in zip(held, gradients, strict=True)
        ]
        total, aux = _aux(row, aux, present, total, is_stacked)
        return (held, total), aux

    total = [] if is_stacked else [cut.zeros(leaf.shape, leaf.dtype) for leaf in row.aux]
    held = [cut.zeros((units, *jnp.shape(leaf))) for leaf in jax.tree.leaves(batch.params)]
    carry, aux = _scan_rows(step, (held, total), batch, (mask, place), rows, row.aux)
    held, total = carry
    seen = cut.zeros((units,), jnp.bool_).at[place].set(True, mode="drop")
    sums, counts = cut.add(*cut.nothing(batch.params), held, seen)
    return [high for high, _ in sums], counts, aux if is_stacked else total


def explain(
    loss_fn: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    batch_axes: Any = None,
) -> Report:
    """How "two_pass" would find each parameter's norm, and what "auto" would choose.

    Args:
      loss_fn: as `clipped_grad` takes it.
      *args: the arguments of a call, or their shapes.
      argnums: as `clipped_grad` takes it.
      has_aux: as `clipped_grad` takes it.
      batch_axes: as `clipped_grad` takes it.

    Returns:
      The report; `str` of it is a table.

    Example:
      >>> params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
      >>> loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"] + p["b"]))
      >>> made = explain(loss, params, jnp.ones((2, 5, 3)))
      >>> dict(made.rules), dict(made.full)
      ({'w': 'matrix product'}, {'b': 'used in `add`'})
    """
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    found: list[Report] = []

    def trace(*args):
        batch = _batch.sort_arguments(args, numbers, batch_axes)
        params = batch.params[0] if isinstance(argnums, int) else batch.params
        found.append(two_pass.report(two_pass.prepare(loss_fn, batch, has_aux), params))

    jax.eval_shape(trace, *args)
    return found[0]
