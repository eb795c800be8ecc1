"""One private step from several microbatches: sums are added up, and noised once.

Which statement this makes true: what rounding between the microbatches adds to one unit's effect is
in the sensitivity of the sum that is noised.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpfa_jax import _check, _primitives, doubleword
from dpfa_jax.clipping import Clipped
from dpfa_jax.optim import noise

_MOST = 1 << 12


class AccumulateState(NamedTuple):
    """The state of `accumulate`.

    Attributes:
      inner: state of the transformation inside.
      total: float32, the clipped sums since the last step. Private: no noise is on it.
      rest: float32, what `total` lacks for a double word. Private too.
      step: int32, how many microbatches it holds.
      clip_norm: float32, the largest clip norm among them.
      reach: float32, public bound on the norm of `total`: units times clip norm, of all of them.
    """

    inner: Any
    total: Any
    rest: Any
    step: Any
    clip_norm: Any
    reach: Any


def accumulate(
    tx: optax.GradientTransformationExtraArgs, every: int
) -> optax.GradientTransformationExtraArgs:
    """One step of `tx` for every `every` calls, of the sum of their certificates.

    In the place of `optax.MultiSteps`, which hands a mean on. The calls between give zero updates
    and release nothing. The microbatches of one step must be parts of one drawn batch
    (`Batch.split(every)`): a record, or a unit with all its rows, stands in one of them only. Noise
    grows by a factor 1 + 2⁻²³·(units of the whole batch), which pays for the rounding of their sum.

    Args:
      tx: a chain that begins with `privatize`.
      every: microbatches of a step, in [1, 4096].

    Returns:
      A transformation called as `privatize` is: `update(c.tree, state, params, clipped=c)`.

    Raises:
      ValueError: for `every` out of its range; in `update` for a certificate that does not say how
        many units its sum may hold.

    Guarantee: O4 (accumulation.md).

    Example:
      >>> from dpfa_jax.sampling import Poisson
      >>> sampler = Poisson(records=100, sampling_rate=0.1)
      >>> tx = noise.privatize(
      ...     noise_multiplier=2.0, sampling=sampler, rng=jax.random.key(0))
      >>> state = accumulate(optax.chain(tx, optax.sgd(0.1)), 4).init({"w": jnp.zeros(3)})
      >>> int(state.step)
      0
    """
    every = _check.integer("every", every, low=1, high=_MOST)

    def init(params: Any) -> AccumulateState:
        def zeros():
            return jax.tree.map(
                lambda leaf: _like(jnp.zeros(jnp.shape(leaf), jnp.float32), leaf, jnp.float32),
                params,
            )

        empty = jnp.float32(0.0)
        return AccumulateState(tx.init(params), zeros(), zeros(), jnp.int32(0), empty, empty)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        clipped: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, AccumulateState]:
        if extra_args:
            raise TypeError(f"Expected no further arguments, got {sorted(extra_args)}.")
        certificate = noise.check_certificate(updates, clipped)
        norm, reach = _upward(certificate.clip_norm), _reach(certificate)
        words = [
            doubleword.add_word(*each)
            for each in zip(
                *map(jax.tree.leaves, (state.total, state.rest, certificate.tree)), strict=True
            )
        ]
        structure = jax.tree.structure(certificate.tree)
        before = AccumulateState(
            state.inner,
            jax.tree.unflatten(structure, [high for high, _ in words]),
            jax.tree.unflatten(structure, [low for _, low in words]),
            state.step + 1,
            _larger(norm, state.clip_norm),
            # Rounded to nearest 4096 times at most, and then some more.
            (state.reach + reach) * jnp.float32(1.0 + 2.0**-22),
        )

        def apply(operands):
            held, params = operands
            whole = _certificate(certificate, held)
            out, inner = tx.update(whole.tree, held.inner, params, clipped=whole)
            zeros = jax.tree.map(jnp.zeros_like, held)
            return out, jax.tree.map(_like, zeros._replace(inner=inner), held)

        def hold(operands):
            held, _ = operands
            shapes, _ = jax.eval_shape(apply, operands)
            return jax.tree.map(_zeros, shapes), held

        full = before.step >= every
        return jax.lax.cond(full, apply, hold, (before, params))

    return optax.GradientTransformationExtraArgs(init, update)


def _like(new: Any, old: Any, dtype: Any = None) -> Any:
    """The new value with the old one's dtype, marked as varying over the mesh axes it does."""
    new = jnp.asarray(new, jnp.result_type(old) if dtype is None else dtype)
    return _primitives.vary_alike(new, old)[0]


def _zeros(spec: Any) -> jax.Array:
    zeros = jnp.zeros(spec.shape, spec.dtype)
    axes = tuple(sorted(spec.manual_axis_type.varying)) if spec.manual_axis_type else ()
    return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros


def _upward(value: Any) -> jax.Array:
    """A number as float32, rounded up; a traced one is one already."""
    if isinstance(value, float):
        rounded = np.float32(value)
        value = rounded if float(rounded) >= value else np.nextafter(rounded, np.float32(np.inf))
    return jnp.asarray(value, jnp.float32)


def _larger(given: jax.Array, held: jax.Array) -> jax.Array:
    """The larger of two clip norms; NaN where one is NaN."""
    return jnp.where(given >= held, given, jnp.where(given < held, held, jnp.nan))


def _reach(clipped: Clipped) -> jax.Array:
    """Bound on the norm of a certificate's sum."""
    if clipped.units is None:
        raise ValueError(
            "Expected a certificate that says how many units its sum may hold, which decides what "
            "its rounding may move, got units=None. Take it from clipping.clipped_grad."
        )
    return _upward(clipped.clip_norm) * _upward(float(clipped.units)) * (1.0 + 2.0**-22)


def _certificate(last: Clipped, held: AccumulateState) -> Clipped:
    """The certificate of the sum: a unit is in one microbatch, clipped to the largest at most."""
    # The counts of one microbatch are not those of the step; nothing here reads them.
    counts = dict.fromkeys(("examples", "clipped", "nonfinite"), jnp.int32(0))
    rounding = held.reach * jnp.float32(2.0**-23 * (1.0 + 2.0**-8))
    return dataclasses.replace(
        last,
        tree=held.total,
        traced_clip_norm=(held.clip_norm + rounding) * jnp.float32(1.0 + 2.0**-22),
        static_clip_norm=None,
        units=None,
        groups=(),
        **counts,
    )
