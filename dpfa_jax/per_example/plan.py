"""Which parameters have their gradient norms by rule, read from the jaxpr of one row's loss.

Which statement this makes true: a parameter has a rule only if every way from it to the loss passes
a place where the rule stands; all others are named with the reason.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from jax.extend import core

_KEEP_NORMS = frozenset(
    {"convert_element_type", "reshape", "transpose", "squeeze", "expand_dims", "copy", "name"}
)
INLINE = frozenset({"jit", "pjit", "closed_call"})
REMAT = frozenset({"remat2", "checkpoint", "remat"})
BYTE_COST = MappingProxyType({2: 64.0, 4: 8.0})
"""Modelled cost of one byte moved, in multiplications of operands of so many bytes."""

VMAP_PASSES = 24.0
"""How often method "vmap" reads or writes gradients of rows, in their 16 bits or as float32: found,
scaled, squared, cut, added. Fitted to 37 ms more than "one_pass" of GPT-2 with two layers."""

type Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a parameter meets the row.

    Attributes:
      leaf: the parameter's number.
      rule: "matrix product" or "look-up".
      side: which operand of the equation the parameter is.
      axes: the axes of the leaf that a product contracts, or those that a look-up sees, in order;
        None after a reshape.
      in_remat: whether the place is recomputed in the backward pass.
      rows: how often the parameter is used per entry: the length that the gradient sums over.
      contracted: entries of the parameter that one sum of the product runs over; of a look-up, the
        entries of one row.
      itemsize: bytes of an entry of the cotangent.
    """

    leaf: int
    rule: str
    side: int
    axes: tuple[int, ...] | None
    in_remat: bool
    rows: int
    contracted: int
    itemsize: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which parameters have their norms by rule, and why the others do not.

    Attributes:
      uses: the places replaced, by their position in the jaxpr.
      rules: leaf number -> name of its rule, for the parameters without per-example gradients.
      reasons: leaf number -> why its gradient is made in full for every row.
    """

    uses: Mapping[Path, Use]
    rules: Mapping[int, str]
    reasons: Mapping[int, str]


@dataclasses.dataclass(frozen=True)
class _View:
    """A parameter behind operations that keep its gradient's norm."""

    leaf: int
    axes: tuple[int, ...] | None


def inner(equation: Any) -> tuple[Any, list[Any]]:
    """The jaxpr that an equation calls, and its constants.

    Args:
      equation: of jit or jax.checkpoint.

    Returns:
      (jaxpr, constants).

    Guarantee: CL8 (plan.md).
    """
    called = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    if isinstance(called, core.ClosedJaxpr):
        return called.jaxpr, list(called.consts)
    return called, []


def equation_at(jaxpr: Any, path: Path) -> Any:
    """The equation at a position, jaxprs inside equations followed.

    Args:
      jaxpr: of one row's loss.
      path: a key of `Plan.uses`.

    Returns:
      The equation.
    """
    equation = jaxpr.eqns[path[0]]
    return equation_at(inner(equation)[0], path[1:]) if path[1:] else equation


def _is_zero(equation: Any) -> bool:
    """Whether nothing differentiable comes out: no gradient passes."""
    return not any(jnp.issubdtype(each.aval.dtype, jnp.floating) for each in equation.outvars)


def _matrix_product(equation: Any, side: int) -> str | None:
    """Why a dot_general has no rule, or None."""
    (_, _), (left, right) = equation.params["dimension_numbers"]
    if left or right:
        return "a batched matrix product"
    if not jnp.issubdtype(equation.invars[1 - side].aval.dtype, jnp.floating):
        return "a matrix product with integers"
    return None


def _look_up(equation: Any, side: int) -> str | None:
    """Why a gather has no rule, or None: rows of the first axis, whole."""
    numbers, table = equation.params["dimension_numbers"], equation.invars[0].aval
    sizes, out = equation.params["slice_sizes"], equation.outvars[0].aval
    whole = (
        side == 0
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.start_index_map) == (0,)
        and not numbers.operand_batching_dims
        and tuple(sizes) == (1, *table.shape[1:])
        and tuple(numbers.offset_dims) == tuple(range(out.ndim - table.ndim + 1, out.ndim))
    )
    return None if whole else "a gather of something else than whole rows"


def _next_view(equation: Any, view: _View) -> _View | None:
    """The parameter behind one more operation, or None if that may change the gradient's norm."""
    name = equation.primitive.name
    before, after = equation.invars[0].aval, equation.outvars[0].aval
    if name == "broadcast_in_dim" and before.size == after.size and len(equation.invars) == 1:
        return _View(view.leaf, None)
    if name not in _KEEP_NORMS or not jnp.issubdtype(after.dtype, jnp.floating):
        return None
    if name == "transpose" and view.axes is not None:
        return _View(view.leaf, tuple(view.axes[i] for i in equation.params["permutation"]))
    return _View(view.leaf, view.axes if before.shape == after.shape else None)


class _Analysis:
    """One walk over the jaxpr of a row's loss."""

    def __init__(self):
        self.uses: dict[Path, Use] = {}
        self.reasons: dict[int, str] = {}

    def refuse(self, leaf: int, reason: str) -> None:
        self.reasons.setdefault(leaf, reason)

    def site(self, equation: Any, side: int, view: _View, path: Path, in_remat: bool) -> None:
        rules = {"dot_general": _matrix_product, "gather": _look_up}
        name, axes = equation.primitive.name, view.axes
        if name not in rules:
            self.refuse(view.leaf, f"used in `{name}`")
            return
        reason = rules[name](equation, side)
        if reason:
            self.refuse(view.leaf, f"used in {reason}")
            return
        if name == "gather":
            rows, rule = equation.invars[1].aval.size, "look-up"
            entries = equation.invars[0].aval.size // max(1, equation.invars[0].aval.shape[0])
        else:
            own, contracted = equation.params["dimension_numbers"][0][:: 1 if side == 0 else -1]
            axes = None if axes is None else tuple(axes[i] for i in own)
            other = equation.invars[1 - side].aval
            rows = math.prod(n for i, n in enumerate(other.shape) if i not in contracted)
            rule = "matrix product"
            entries = math.prod(n for i, n in enumerate(other.shape) if i in contracted)
        itemsize = equation.outvars[0].aval.dtype.itemsize
        self.uses[path] = Use(view.leaf, rule, side, axes, in_remat, rows, entries, itemsize)

    def walk(
        self, jaxpr: Any, views: list[_View | None], path: Path, in_remat: bool
    ) -> list[_View | None]:
        """What the outputs are, given what the inputs are; None is anything else."""
        known = dict(zip(jaxpr.invars, views, strict=True))

        def read(atom):
            return None if isinstance(atom, core.Literal) else known.get(atom)

        for number, equation in enumerate(jaxpr.eqns):
            given = [read(atom) for atom in equation.invars]
            here, name = (*path, number), equation.primitive.name
            met = [(side, view) for side, view in enumerate(given) if view is not None]
            out: list[_View | None] = [None] * len(equation.outvars)
            if not met or _is_zero(equation):
                pass
            elif name in INLINE or name in REMAT:
                called, _ = inner(equation)
                out = self.walk(called, given, here, in_remat or name in REMAT)
            elif len(met) == 1 and (following := _next_view(equation, met[0][1])) is not None:
                out = [following]
            elif len(met) > 1:
                for _, view in met:
                    self.refuse(view.leaf, f"meets another parameter in `{name}`")
            else:
                self.site(equation, *met[0], here, in_remat)
            known.update(zip(equation.outvars, out, strict=True))
        return [read(atom) for atom in jaxpr.outvars]


def plan(jaxpr: Any, leaves: int) -> Plan:
    """How the norm of each parameter's gradient is found.

    Args:
      jaxpr: of (parameter leaves, anything else) -> (scalar loss of one row, anything else).
      leaves: how many parameter leaves there are.

    Returns:
      The plan: a parameter has a rule if it is used once, by a rule; or twice, in a look-up and
      later in a matrix product that contracts its second axis (a tied embedding).

    Guarantee: CL8 (plan.md).
    """
    analysis = _Analysis()
    views = [_View(i, tuple(range(v.aval.ndim))) for i, v in enumerate(jaxpr.invars[:leaves])]
    rest: list[_View | None] = [None] * (len(jaxpr.invars) - leaves)
    out = analysis.walk(jaxpr, [*views, *rest], (), False)
    if out[0] is not None:
        analysis.refuse(out[0].leaf, "is the loss")
    rules: dict[int, str] = {}
    for leaf in range(leaves):
        places = {path: use for path, use in analysis.uses.items() if use.leaf == leaf}
        uses = [use for _, use in sorted(places.items())]
        if len(uses) == 1:
            rules[leaf] = uses[0].rule
        elif _is_tied(uses):
            rules[leaf] = "tied embedding"
        elif uses:
            analysis.refuse(leaf, f"used {len(uses)} times")
        else:
            analysis.refuse(leaf, "not used by a rule")
    rules = {leaf: rule for leaf, rule in rules.items() if leaf not in analysis.reasons}
    kept = {path: use for path, use in analysis.uses.items() if use.leaf in rules}
    return Plan(kept, rules, {i: analysis.reasons[i] for i in range(leaves) if i not in rules})


def _is_tied(uses: list[Use]) -> bool:
    """A look-up of whole rows, then a product over the embedding's second axis."""
    return (
        [use.rule for use in uses] == ["look-up", "matrix product"]
        and uses[0].axes == (0, 1)
        and uses[1].axes == (1,)
        and not any(use.in_remat for use in uses)
    )


def without(made: Plan, leaves: Iterable[int], reason: str) -> Plan:
    """The plan with some parameters taken out of it.

    Args:
      made: a plan.
      leaves: numbers of parameter leaves.
      reason: why their gradients are made in full.

    Returns:
      The smaller plan.
    """
    gone = set(leaves) & set(made.rules)
    return Plan(
        {path: use for path, use in made.uses.items() if use.leaf not in gone},
        {leaf: rule for leaf, rule in made.rules.items() if leaf not in gone},
        {**made.reasons, **dict.fromkeys(gone, reason)},
    )


@dataclasses.dataclass(frozen=True)
class Cost:
    """Modelled extra cost of one row's gradient of one parameter with a rule, in multiplications.

    Attributes:
      leaf: the parameter's number.
      in_full: the gradient is written, read for its norm, and read for the sum.
      norm: its norm by the rule, and weights on the narrower of the operands of the sum.
      again: one more forward and backward pass without parameter gradients; twice the products,
        which is what GPT-2's took on an H200.
      vmap: the gradient is clipped by itself, in several passes over it.
      kept: bytes of what the gradient is made of.
      made: bytes of the gradient.
    """

    leaf: int
    in_full: float
    norm: float
    again: float
    vmap: float
    kept: int
    made: int


def _product_cost(use: Use, size: int) -> tuple[float, float, float, int]:
    """(in_full, norm, again, kept) of one matrix product."""
    byte = BYTE_COST[2 if use.itemsize <= 2 else 4]
    other = size // max(1, use.contracted)
    both, less = use.contracted + other, min(use.contracted, other)
    gram = use.rows**2 * (both + 8.0 * byte)
    direct = use.rows * size + 8.0 * size * byte
    norm = min(gram, direct) + 2.0 * use.rows * less * use.itemsize * byte
    in_full = 3.0 * size * use.itemsize * byte
    return in_full, norm, 4.0 * use.rows * size, use.rows * both * use.itemsize


def costs(made: Plan, sizes: list[int]) -> list[Cost]:
    """Modelled costs for each parameter with a rule.

    Args:
      made: the plan.
      sizes: entries of each parameter leaf.

    Returns:
      One `Cost` per parameter, in order. What any way has to do is left out: the passes that plain
      gradients take, and look-ups, whose rule never needs a gradient.
    """
    table = []
    for leaf in sorted(made.rules):
        uses = [use for use in made.uses.values() if use.leaf == leaf]
        found = [_product_cost(use, sizes[leaf]) for use in uses if use.rule == "matrix product"]
        in_full, norm, again, kept = found[0] if found else (math.inf, 0.0, 0.0, 0)
        itemsize = max(use.itemsize for use in uses)
        entries = sizes[leaf] * itemsize
        vmap = VMAP_PASSES * entries * BYTE_COST[2 if itemsize <= 2 else 4]
        table.append(Cost(leaf, in_full, norm, again, vmap, kept, entries))
    return table
