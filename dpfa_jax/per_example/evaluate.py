"""A row's loss evaluated with rules in the places of a plan: squared norms, and weighted sums.

Which statement this makes true: `squared_norms` is the squared norm of the whole gradient of one
row's loss; `weighted_sum` is the gradient of a weighted sum of the rows' losses.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from dpfa_jax import _primitives
from dpfa_jax.per_example import keep, rules
from dpfa_jax.per_example.norms import not_below_0
from dpfa_jax.per_example.plan import INLINE, REMAT, Path, Plan, equation_at, inner

type _Replace = Callable[[Path, Any, list[Any]], Any]


class _Known:
    """A parameter with a rule, or a view of it, in float32 whatever dtype the loss casts it to."""

    def __init__(self, value: jax.Array):
        self.value = value


def _is_float(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating)


def _is_literal(atom: Any) -> bool:
    return isinstance(atom, core.Literal)


def _read(values: dict[Any, Any], atom: Any) -> Any:
    return atom.val if _is_literal(atom) else values[atom]


class _Evaluation:
    """One evaluation of a jaxpr; `replace` says what stands in the places of the plan."""

    def __init__(
        self,
        made: Plan,
        replace: _Replace,
        recompute: bool = True,
        parts: keep.Parts | None = None,
    ):
        self.plan, self.replace, self.recompute = made, replace, recompute
        self.parts = parts or keep.Parts({}, frozenset())

    def run(self, jaxpr: Any, constants: list[Any], inputs: list[Any], path: Any) -> list[Any]:
        values = dict(zip(jaxpr.constvars, constants, strict=True))
        values.update(zip(jaxpr.invars, inputs, strict=True))
        whole = (keep.Part(tuple(range(len(jaxpr.eqns))), False),)
        for part in self.parts.of.get(path, whole):
            if part.is_light:
                self.again(jaxpr, part, values, path)
            else:
                for number in part.numbers:
                    self.step(jaxpr.eqns[number], values, (*path, number))
        return [_read(values, atom) for atom in jaxpr.outvars]

    def again(self, jaxpr: Any, part: keep.Part, values: dict[Any, Any], path: Any) -> None:
        """Some equations whose light work is done again by a backward pass."""
        lines = [jaxpr.eqns[number] for number in part.numbers]
        made = {each for line in lines for each in line.outvars}
        met = {each for line in lines for each in line.invars if not _is_literal(each)} - made
        inside = set(part.numbers)
        others = [line for number, line in enumerate(jaxpr.eqns) if number not in inside]
        wanted = {each for line in others for each in line.invars if not _is_literal(each)}
        wanted |= {each for each in jaxpr.outvars if not _is_literal(each)}
        before = [each for each in values if each in met]
        after = [each for line in lines for each in line.outvars if each in wanted]

        def body(*given):
            known = dict(zip(before, given, strict=True))
            for number, line in zip(part.numbers, lines, strict=True):
                self.step(line, known, (*path, number))
            return [known[each] for each in after]

        out = jax.checkpoint(body, policy=keep.is_kept)(*(values[each] for each in before))
        values.update(zip(after, out, strict=True))

    def step(self, equation: Any, values: dict[Any, Any], here: Path) -> None:
        """One equation."""
        name = equation.primitive.name
        operands = [_read(values, atom) for atom in equation.invars]
        held = any(isinstance(each, _Known) for each in operands)
        inside = any(each[: len(here)] == here for each in self.plan.uses)
        if here in self.plan.uses:
            out = [self.replace(here, equation, operands)]
        elif (inside or held) and name in (INLINE if self.recompute else INLINE | REMAT):
            out = self.run(*inner(equation), operands, here)
        elif inside:
            out = self.remat(equation, operands, here)
        elif held and name == "convert_element_type" and _is_float(equation.outvars[0].aval):
            out = operands
        else:
            with equation.ctx.manager:
                plain = [each.value if isinstance(each, _Known) else each for each in operands]
                out = rules.bind(equation, *plain)
            out = out if equation.primitive.multiple_results else [out]
            out = [keep.marked(each) for each in out] if here in self.parts.sums else out
            # All that takes a known parameter and is no place keeps its entries.
            out = [_Known(each) if held and _is_float(each) else each for each in out]
        values.update(zip(equation.outvars, out, strict=True))

    def remat(self, equation: Any, operands: list[Any], path: Any) -> list[Any]:
        """An equation of jax.checkpoint: what it recomputes is recomputed here."""
        known = [isinstance(each, _Known) for each in operands]

        def body(*plain):
            values = [_Known(x) if k else x for x, k in zip(plain, known, strict=True)]
            return self.run(*inner(equation), values, path)

        keep = {key: equation.params[key] for key in ("policy", "prevent_cse")}
        plain = [each.value if isinstance(each, _Known) else each for each in operands]
        return jax.checkpoint(body, **keep)(*plain)


def _norm_places(made: Plan, probe: jax.Array) -> _Replace:
    carried: dict[int, tuple[jax.Array, jax.Array]] = {}

    def replace(here, equation, operands):
        use = made.uses[here]
        theta, row = operands[use.side], operands[1 - use.side]
        theta = jax.lax.stop_gradient(theta)
        if use.rule == "look-up":
            out, carrier = rules.look_up_norm_site(equation)(row, theta, probe)
            carried[use.leaf] = (rules.read_indices(equation, row, theta.shape[0])[0], carrier)
            return out
        indices, carrier = carried.get(use.leaf, (None, None))
        return rules.product_norm_site(equation, use.side)(row, theta, probe, indices, carrier)

    return replace


def squared_norms(
    closed: Any, made: Plan
) -> Callable[[list[Any], list[Any]], tuple[jax.Array, list[jax.Array], list[Any]]]:
    """A function for the squared norm of one row's gradient with respect to all parameters.

    Args:
      closed: the closed jaxpr of (parameter leaves, anything else) -> (loss of one row, ...).
      made: its plan.

    Returns:
      (parameter leaves, other inputs) -> (float32 squared norm over the parameters with a rule,
      gradients of the other parameters in order, the jaxpr's outputs). Under `vmap` over rows,
      nothing of the size of rows times a parameter with a rule is made, unless `product_norm`
      finds that cheaper than Gram matrices.

    Guarantee: CL6 (evaluate.md).
    """
    full = sorted(made.reasons)

    def one(params, others):
        def loss(some, probe):
            inputs = [*params, *others]
            for number, leaf in zip(full, some, strict=True):
                inputs[number] = leaf
            evaluation = _Evaluation(made, _norm_places(made, probe))
            out = evaluation.run(closed.jaxpr, list(closed.consts), inputs, ())
            return out[0], out

        probe = _primitives.vary_alike(jnp.float32(0.0), *params, *others)[0]
        (some, square), out = jax.grad(loss, argnums=(0, 1), has_aux=True)(
            [params[number] for number in full], probe
        )
        return not_below_0(square), some, out

    return one


def _sum_places(made: Plan) -> _Replace:
    def replace(here, equation, operands):
        use = made.uses[here]
        theta, row = operands[use.side].value, operands[1 - use.side]
        if use.rule == "look-up":
            return rules.look_up_sum_site(equation)(row, theta)
        return rules.product_sum_site(equation, use.side)(row, theta)

    return replace


def weighted_sum(
    closed: Any, made: Plan
) -> Callable[[list[Any], list[Any], jax.Array], list[jax.Array]]:
    """A function for the gradient of a weighted sum of losses, summed in float32.

    Args:
      closed: the closed jaxpr of (parameter leaves, anything else) -> (losses of rows, ...).
      made: its plan.

    Returns:
      (parameter leaves, other inputs, weights of the rows) -> float32 gradients of the parameters
      with a rule, in the order of the leaves.

    Guarantee: CL6 (evaluate.md).
    """
    known = sorted(made.rules)

    def total(params, others, weights):
        def loss(some):
            inputs = [*params, *others]
            for number, leaf in zip(known, some, strict=True):
                inputs[number] = _Known(leaf)
            evaluation = _Evaluation(made, _sum_places(made))
            losses = evaluation.run(closed.jaxpr, list(closed.consts), inputs, ())[0]
            return jnp.sum(weights * losses.astype(jnp.float32))

        return jax.grad(loss)([params[number].astype(jnp.float32) for number in known])

    return total


def pairs(
    closed: Any, made: Plan
) -> Callable[[list[Any], list[Any]], tuple[dict[Path, Any], list[jax.Array], list[Any]]]:
    """A function for what the gradients of one row are made of, from one backward pass.

    Args:
      closed: the closed jaxpr of (parameter leaves, anything else) -> (loss of one row, ...).
      made: its plan.

    Returns:
      (parameter leaves, other inputs) -> (for each place: what the parameter met, and the cotangent
      of what came out; gradients of the parameters without a rule, in order; the jaxpr's outputs).
      What jax.checkpoint computes again is computed again, unless a look-up with a rule is in one;
      outside, light work is (`keep.parts`).

    Guarantee: CL6 (evaluate.md), CL13 (keep.md).
    """
    full = sorted(made.reasons)
    recompute = not any(u.in_remat and u.rule == "look-up" for u in made.uses.values())
    parts = keep.parts(closed.jaxpr, made)

    def taps_of(path, *anything):
        use, line = made.uses[path], equation_at(closed.jaxpr, path)
        like = [line.outvars[0].aval]
        if use.rule != "look-up":
            like = [line.invars[1 - use.side].aval, *like]
        return tuple(
            _primitives.vary_alike(jnp.zeros(aval.shape, aval.dtype), *anything)[0] for aval in like
        )

    def one(params, others):
        def loss(some, taps):
            read = {}

            def replace(here, equation, operands):
                use = made.uses[here]
                row, theta = operands[1 - use.side], jax.lax.stop_gradient(operands[use.side])
                if use.rule == "look-up":
                    read[here] = row
                    return rules.place(equation, use.side, row, theta) + taps[here][0]
                return rules.pair_site(equation, use.side)(row, theta, *taps[here])

            inputs = [*params, *others]
            for number, leaf in zip(full, some, strict=True):
                inputs[number] = leaf
            evaluation = _Evaluation(made, replace, recompute, parts)
            out = evaluation.run(closed.jaxpr, list(closed.consts), inputs, ())
            return out[0], (read, out)

        taps = {path: taps_of(path, *params, *others) for path in made.uses}
        (some, cotangents), (read, out) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
            [params[number] for number in full], taps
        )
        found = {
            path: (read[path], pair[0]) if path in read else pair
            for path, pair in cotangents.items()
        }
        return found, some, out

    return one


def pull_back(
    closed: Any, made: Plan
) -> Callable[[list[Any], list[Any], dict[Path, jax.Array]], list[jax.Array]]:
    """A function from gradients of the operands in the places to gradients of the parameters.

    Args:
      closed: the closed jaxpr of (parameter leaves, anything else) -> (loss of one row, ...).
      made: its plan.

    Returns:
      (parameter leaves, other inputs, float32 gradient at each place) -> float32 gradients of the
      parameters with a rule, in the order of the leaves. The other inputs lend their shapes.

    Guarantee: CL6 (evaluate.md).
    """
    known = sorted(made.rules)

    def run(params, others, gradients):
        def views(some):
            found = {}

            def replace(here, equation, operands):
                found[here] = operands[made.uses[here].side].value
                aval = equation.outvars[0].aval
                zeros = jnp.zeros(aval.shape, aval.dtype)
                return _primitives.vary_alike(zeros, found[here])[0]

            inputs = [*params, *others]
            for number, leaf in zip(known, some, strict=True):
                inputs[number] = _Known(leaf)
            evaluation = _Evaluation(made, replace, recompute=False)
            evaluation.run(closed.jaxpr, list(closed.consts), inputs, ())
            return found

        _, pull = jax.vjp(views, [params[number].astype(jnp.float32) for number in known])
        return pull(gradients)[0]

    return run
