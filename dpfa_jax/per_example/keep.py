"""What a backward pass keeps of its forward pass, and what it computes again.

Which statement this makes true: no value is changed, only held or computed again. Activations and
layer norms cost a read of what is kept anyway; products, attention, sums over an axis, random bits
and loops cost more and are kept.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from dpfa_jax.per_example.plan import INLINE, REMAT, Path, Plan, inner

_SHAPES = frozenset({"reshape", "transpose", "squeeze", "expand_dims", "copy", "name"})
_VIEWS = _SHAPES | {"convert_element_type"}
_LIGHT = _VIEWS | frozenset(
    "abs add add_any and atan2 broadcast_in_dim cbrt ceil clamp cos div eq erf erf_inv erfc exp"
    " exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not"
    " one_minus_square or pow rem round rsqrt select_n sign sin sqrt square sub tan tanh"
    " xor".split()
)
_KEPT = "dpfa_jax.per_example.kept"


def is_kept(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Whether the backward pass finds what a primitive returns: a policy of `jax.checkpoint`.

    Args:
      primitive: of an equation.
      *operands: what it takes, which does not matter.
      **params: its parameters.

    Returns:
      True for all but light work, one pass over the entries of its operands; of that, True for
      what carries the name that `marked` gives.

    Guarantee: CL13 (keep.md).
    """
    del operands
    if primitive.name == "name" and params.get("name") == _KEPT:
        return True
    return primitive.name not in _LIGHT


def marked(value: Any) -> Any:
    """The value, kept for the backward pass.

    Args:
      value: an array.

    Returns:
      It, under a name that `is_kept` knows.

    Guarantee: CL13 (keep.md).
    """
    return checkpoint_name(value, _KEPT)


@dataclasses.dataclass(frozen=True)
class Part:
    """Equations that are evaluated together.

    Attributes:
      numbers: their positions in their jaxpr, in order.
      is_light: whether light work in them is done again by the backward pass.
    """

    numbers: tuple[int, ...]
    is_light: bool


@dataclasses.dataclass(frozen=True)
class Parts:
    """How a jaxpr is cut.

    Attributes:
      of: position of a jaxpr, () for the whole, -> its parts in an order of evaluation; what is not
        in it is evaluated as it stands.
      sums: positions of the additions that are kept instead of what they add.
    """

    of: Mapping[Path, tuple[Part, ...]]
    sums: frozenset[Path]


def _is_light(equation: Any) -> bool:
    if equation.primitive.name in (*INLINE, "custom_jvp_call"):
        return all(_is_light(each) or _is_small(each) for each in inner(equation)[0].eqns)
    return equation.primitive.name in _LIGHT


def _is_small(equation: Any) -> bool:
    """Sums and maxima over an axis, and what holds no floats: kept, and no reason for a cut."""
    is_float = any(jnp.issubdtype(each.aval.dtype, jnp.floating) for each in equation.outvars)
    return not is_float or equation.primitive.name.startswith("reduce_")


class _Cut:
    """The parts of one jaxpr while they are found."""

    def __init__(self):
        self.parts: list[Part] = []
        self.numbers: list[int] = []
        self.is_light = self.is_over = False

    def alone(self, number: int) -> None:
        self.parts.append(Part((number,), False))

    def light(self, number: int) -> None:
        if self.is_over:
            self.close()
        self.numbers.append(number)
        self.is_light = True

    def close(self) -> None:
        # Light work that no product takes, as a loss, has nothing to give: it stays as it stands.
        if self.numbers:
            self.parts.append(Part(tuple(self.numbers), self.is_light and self.is_over))
        self.numbers, self.is_light, self.is_over = [], False, False


class _Cutter:
    """One walk over the jaxpr of a row's loss, with a state of each value.

    It is None if the value is made of parameters alone, True if it is kept or a view of what is,
    False if it is light work.
    """

    def __init__(self, made: Plan):
        self.made = made
        self.of: dict[Path, tuple[Part, ...]] = {}
        self.sums: set[Path] = set()

    def walk(self, jaxpr: Any, given: list[bool | None], path: Path) -> list[bool | None]:
        states, cut = dict(zip(jaxpr.invars, given, strict=True)), _Cut()

        def read(atom):
            return None if isinstance(atom, core.Literal) else states.get(atom)

        for number, equation in enumerate(jaxpr.eqns):
            here, name = (*path, number), equation.primitive.name
            met = [read(atom) for atom in equation.invars]
            seen = [each for each in met if each is not None]
            out: list[bool | None] = [None] * len(equation.outvars)
            if not seen:
                cut.alone(number)
            elif self.stands_alone(here, name):
                cut.close()
                cut.alone(number)
                called = self.walk(inner(equation)[0], met, here) if name in INLINE else None
                out = called or [True] * len(out)
            else:
                is_sum = name == "add" and all(seen)
                if is_sum:
                    self.sums.add(here)
                is_held = is_sum or not _is_light(equation) or (name in _VIEWS and seen[0])
                if not is_held or name == "convert_element_type":
                    cut.light(number)
                else:
                    cut.numbers.append(number)
                    cut.is_over |= not (name in _SHAPES or _is_small(equation))
                out = [is_held] * len(out)
            states.update(zip(equation.outvars, out, strict=True))
        cut.close()
        self.of[path] = tuple(cut.parts)
        return [read(atom) for atom in jaxpr.outvars]

    def stands_alone(self, here: Path, name: str) -> bool:
        if here in self.made.uses:
            return self.made.uses[here].rule == "look-up"
        is_around = any(each[: len(here)] == here for each in self.made.uses)
        return is_around and name in INLINE | REMAT


def parts(jaxpr: Any, made: Plan) -> Parts:
    """Where a backward pass may do light work again, and what it then needs.

    A part is light work and the products that take its results: kept are the products, and what
    the light work began with. A sum of kept values and parameters alone is kept and its terms need
    not be: a product with its bias, the stream that residual blocks add to. Without the latter a
    backward pass would begin such a stream anew.

    Args:
      jaxpr: of (parameter leaves, anything else) -> anything.
      made: its plan.

    Returns:
      The parts of it and of the jaxprs inside jit that hold places. Inside jax.checkpoint, what
      the caller wanted stays.

    Guarantee: CL13 (keep.md).
    """
    leaves = len(made.rules) + len(made.reasons)
    cutter = _Cutter(made)
    cutter.walk(jaxpr, [*[None] * leaves, *[True] * (len(jaxpr.invars) - leaves)], ())
    return Parts(cutter.of, frozenset(cutter.sums))
