"""One private step from several microbatches: sums are added up, and noised once."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpfa_jax import _check
from dpfa_jax.clipping import Clipped
from dpfa_jax.optim import noise


class AccumulateState(NamedTuple):
    """The state of `accumulate`.

    Attributes:
      inner: state of the transformation inside.
      total: float32, the clipped sums since the last step. Private: no noise is on it.
      step: int32, how many microbatches it holds.
      clip_norm: float32, the largest clip norm among them.
    """

    inner: Any
    total: Any
    step: Any
    clip_norm: Any


def accumulate(
    tx: optax.GradientTransformationExtraArgs, every: int
) -> optax.GradientTransformationExtraArgs:
    """One step of `tx` for every `every` calls, of the sum of their certificates.

    In the place of `optax.MultiSteps`, which hands a mean on. The calls between give zero updates
    and release nothing. The microbatches of one step must be parts of one drawn batch
    (`Batch.split(every)`): a record, or a unit with all its rows, stands in one of them only.

    Args:
      tx: a chain that begins with `privatize`.
      every: microbatches of a step, ≥ 1.

    Returns:
      A transformation called as `privatize` is: `update(c.tree, state, params, clipped=c)`.

    Raises:
      ValueError: for every < 1.

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
    every = _check.integer("every", every, low=1)

    def init(params: Any) -> AccumulateState:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), jnp.float32), params)
        return AccumulateState(tx.init(params), zeros, jnp.int32(0), jnp.float32(0.0))

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
        total = jax.tree.map(jnp.add, state.total, certificate.tree)
        before = AccumulateState(
            state.inner, total, state.step + 1, _larger(certificate.clip_norm, state.clip_norm)
        )

        def apply(operands):
            held, params = operands
            whole = _certificate(certificate, held)
            out, inner = tx.update(whole.tree, held.inner, params, clipped=whole)
            zeros = jax.tree.map(jnp.zeros_like, held.total)
            empty = AccumulateState(inner, zeros, jnp.int32(0), jnp.float32(0.0))
            return out, jax.tree.map(_like, empty, held)

        def hold(operands):
            held, _ = operands
            shapes, _ = jax.eval_shape(apply, operands)
            return jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), shapes), held

        full = before.step >= every
        return jax.lax.cond(full, apply, hold, (before, params))

    return optax.GradientTransformationExtraArgs(init, update)


def _like(new: Any, old: Any) -> Any:
    return jnp.asarray(new, jnp.asarray(old).dtype)


def _larger(given: Any, held: Any) -> jax.Array:
    """The larger of two clip norms in float32, rounded up; NaN where one is NaN."""
    if isinstance(given, float):
        rounded = np.float32(given)
        given = rounded if float(rounded) >= given else np.nextafter(rounded, np.float32(np.inf))
    given = jnp.asarray(given, jnp.float32)
    return jnp.where(given >= held, given, jnp.where(given < held, held, jnp.nan))


def _certificate(last: Clipped, held: AccumulateState) -> Clipped:
    """The certificate of the sum: a unit is in one microbatch, clipped to the largest at most."""
    # The counts of one microbatch are not those of the step; nothing here reads them.
    counts = dict.fromkeys(("examples", "clipped", "nonfinite"), jnp.int32(0))
    return dataclasses.replace(
        last,
        tree=held.total,
        traced_clip_norm=held.clip_norm,
        static_clip_norm=None,
        groups=(),
        **counts,
    )
