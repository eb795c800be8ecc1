"""A memory whose every record stops answering when its own budget is spent (S4).

Each record keeps what it has spent; a query uses of it what is left. What a record spends is an
integer in units of C²/2³¹ and always rounded up, so that no number of small queries is free: in
float32 .5 + 2⁻²⁶ is .5 for ever.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpfa_jax import (
    _check,
    _primitives,
    clipping,
    random,
    reference,
    releases,
    sensitivity,
)
from dpfa_jax._typing import Operands, Spec
from dpfa_jax.accounting.event import Event
from dpfa_jax.memory import history, rows

UNITS = 2**31
"""What one record may spend, as an integer: C² is this many units."""

FILTER_ERROR = 2.0**-11
"""Relative excess of a record's contribution over the root of what it was charged: two sums of up
to 2³² squares (3.2e-5 each of a norm), ten logarithms and their sums (magnitude ≤ 180 at 2⁻²⁴, 1e-5
each), two exponentials (1e-5 each)."""


class FilteredState(NamedTuple):
    """The arrays of a memory: what a checkpoint keeps. As private as the records.

    Attributes:
      private_key: (S, K, H) float32, zero where NULL.
      private_value: (S, K, h) float32.
      private_log_weights: (S, K) float32 ≤ 0, −∞ for NULL.
      private_spent: (S,) uint32 in units of C²/2³¹. It says which queries a record matched: never
        publish it, nor a statistic of it.
      secret_key: uint32[8] key data.
      secret_history: uint32[8], all queries so far under that key.
      count: int32, queries answered per kv head.
    """

    private_key: Any
    private_value: Any
    private_log_weights: Any
    private_spent: Any
    secret_key: Any
    secret_history: Any
    count: Any

    def __repr__(self):
        return f"{type(self).__name__}(private)"


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("state",), meta_fields=("settings",)
)
@dataclasses.dataclass(frozen=True, repr=False)
class FilteredMemory:
    """Records with a budget each: adaptive queries under independent noise, one price for all.

    Noise does not grow with the number of queries; records that many queries attend to run out and
    are silent from then on. An immutable pytree: `attend` returns the next memory, and the old one
    must not be used again (outside `jit` that is an error; where it cannot be seen, each further
    line of use costs one more `event`: M1).

    Attributes:
      state: the arrays; private, what each record has spent included.
      settings: the public numbers.

    Guarantee: S4 (filtered.md), M1 (history.md).

    Example:
      >>> import jax, jax.numpy as jnp, dpfa_jax
      >>> noise = dpfa_jax.ClippedContributions(
      ...     noise_multiplier=1.0, value_bound=1.0, score_cap=1.0, clip_norm=2.0)
      >>> rows = jnp.ones((9, 1, 4))
      >>> memory = FilteredMemory.create(
      ...     rows, rows, mechanism=noise, rng=jax.random.key(0), capacity=8)
      >>> answer, memory = memory.attend(jnp.ones((2, 1, 4)))
      >>> answer.shape, memory.state
      ((2, 1, 4), FilteredState(private))
    """

    state: Any
    settings: Any

    @classmethod
    def create(
        cls,
        key: jax.Array,
        value: jax.Array,
        *,
        mechanism: releases.ClippedContributions,
        rng: jax.Array,
        capacity: int,
        scale: float | None = None,
    ) -> "FilteredMemory":
        """A memory that has answered nothing yet. This is what is charged, not its answers.

        `accounting.events` counts one `event` here and none at `attend`. Under `vmap` every
        memory has its own noise, even with an unbatched key.

        Args:
          key: (S, K, H); row j must depend on record j alone. Not finite: the record is NULL.
          value: (S, K, h).
          mechanism: ClippedContributions; its clip_norm C bounds what one record contributes to
            all answers of the memory's life together.
          rng: one typed key, never used for another memory.
          capacity: queries per kv head that the memory will ever answer, ≥ 1. The noise does not
            depend on it; the cut-off of the noise, charged to δ, does.
          scale: factor of the scores, finite; None is 1/√H.

        Raises:
          TypeError, ValueError: for arguments that do not fit, saying what to pass.
        """
        if not isinstance(mechanism, releases.ClippedContributions):
            raise TypeError(f"Expected mechanism to be ClippedContributions, got {mechanism!r}.")
        capacity = _check.integer("capacity", capacity, low=1)
        data = random.key_data(rng)
        _primitives.refuse_constant(rng, "Pass the key as an argument of that function.")
        key, value, log_weights = rows.records(key, value)
        call = rows.lifetime(key, value, capacity)
        scale = _check.real("scale", call.query_dim**-0.5 if scale is None else scale)
        settings = rows.Life(mechanism, call, scale)
        data = _primitives.stream_key(data, key, value, log_weights)
        if mechanism.adjacency.kind == "REPLACE_ONE":
            value = clipping.clip_rows(value, mechanism.value_bound)
        else:
            log_weights = log_weights + clipping.log_row_weights(value, mechanism.value_bound)
        state = FilteredState(
            private_key=key,
            private_value=value,
            private_log_weights=log_weights,
            private_spent=jnp.zeros(call.keys, jnp.uint32),
            secret_key=data,
            secret_history=_primitives.private_release(history.start(data), settings.event),
            count=jnp.zeros((), jnp.int32),
        )
        return cls(FilteredState(*_primitives.vary_alike(*state)), settings)

    @property
    def event(self) -> Event:
        """What the memory's whole life is charged as, however few queries are asked."""
        return self.settings.event

    @property
    def capacity(self) -> int:
        """Queries per kv head that the memory may answer in its life."""
        return self.settings.call.queries

    def attend(self, query: jax.Array) -> tuple[jax.Array, "FilteredMemory"]:
        """The answers to some queries, and the memory that has answered them.

        Each call is one step: a record's contribution to all its queries and heads is scaled by one
        weight to what the record has left.

        Args:
          query: (T, N, H) or (B, T, N, H), public or chosen from answers already released. All
            batch elements and the N/K query heads of a group read the same memory.

        Returns:
          Answers (T, N, h) or (B, T, N, h) in the query's dtype, and the next memory. A query that
          is not finite has a NaN answer of its own. Where the capacity is exceeded inside `jit`,
          all answers are NaN and the memory is the old one.

        Raises:
          ValueError: if the memory is full, used, captured by a traced function, or queries are
            batched or sharded where it is not; if the shape does not fit.

        Guarantee: S4 (filtered.md), M1 (history.md).
        """
        call = self.settings.call
        history.check_unused(self.state.secret_history, query)
        shaped, finite = rows.queries(query, kv_heads=call.kv_heads, width=call.query_dim)
        asked = shaped.shape[0] * shaped.shape[1] * shaped.shape[2] // call.kv_heads
        rows.check_room(self.state.count, asked, self.capacity)
        answer, state = _attend(self.state, shaped, finite, self.settings)
        history.use(self.state.secret_history)
        answer = answer.reshape(*query.shape[:-1], call.value_dim)
        return answer, dataclasses.replace(self, state=state)

    def fork(self) -> tuple["FilteredMemory", "FilteredMemory"]:
        """Two memories that continue from here on their own, for one more `event`.

        Returns:
          Two memories; this one is used up.

        Guarantee: M1 (history.md).
        """
        first, second = history.fork(self.state.secret_history, self.event)
        left = dataclasses.replace(self, state=self.state._replace(secret_history=first))
        return left, dataclasses.replace(self, state=self.state._replace(secret_history=second))

    def guarantee(self, *, delta: float | None = None) -> str:
        """The guarantee of the memory's whole life as sentences.

        Args:
          delta: δ ∈ (0, 1) at which ε is stated, or None.
        """
        call = self.settings.call
        life = (
            f"Each of {call.keys:,} records contributes at most clip_norm to all answers of the "
            f"memory's life (S4), at most {call.queries:,} queries for each of {call.kv_heads} kv "
            "heads"
        )
        return rows.sentence(self, self.settings.mechanism, life, delta)

    def __repr__(self):
        return self.guarantee()


def _log_norms(operands: Operands, spec: Spec, weight: float) -> jax.Array:
    """log ‖φ_j‖² of each record over all queries and heads of one step, (S,); −∞ for none."""
    squares = clipping.stable_sum(reference.column_squares(operands, spec), axis=0)  # (S, K)
    value = operands.value[0]
    width = jnp.full((*value.shape[:-1], 1), weight, jnp.float32)
    norms = clipping.log_row_norms(jnp.concatenate([value, width], axis=-1))
    used = (squares > 0) & (norms > -jnp.inf)
    logs = jnp.log(jnp.where(used, squares, 1.0)) + 2 * jnp.where(used, norms, 0.0)
    return jax.nn.logsumexp(jnp.where(used, logs, -jnp.inf), axis=-1)


def spend(
    spent: jax.Array, log_squares: jax.Array, present: jax.Array, clip_norm: float
) -> tuple[jax.Array, jax.Array]:
    """What each record may contribute to one step, and what it has spent after it.

    Args:
      spent: (S,) uint32, units of C²/2³¹ spent so far, ≤ 2³¹.
      log_squares: (S,) float32, log ‖φ_j‖² of the step's unscaled contributions; −∞ for none.
      present: (S,) boolean, False for records that are NULL for ever.
      clip_norm: C > 0.

    Returns:
      log u_j ≤ 0 (−∞ where nothing is left) and the new units spent. The charge is an upper bound
      on u_j²‖φ_j‖² up to FILTER_ERROR, at least one unit, and never takes a record beyond 2³¹.

    Guarantee: S4 (filtered.md).
    """
    log_bound = 2 * math.log(clip_norm)
    left = jnp.uint32(UNITS) - spent
    has = left > 0
    log_left = jnp.log(jnp.where(has, left, 1).astype(jnp.float32)) - math.log(UNITS)
    seen = log_squares > -jnp.inf
    log_squares = jnp.where(seen, log_squares - log_bound, 0.0)
    log_weights = jnp.where(seen, jnp.minimum(0.0, (log_left - log_squares) / 2), 0.0)
    share = jnp.where(seen, jnp.exp(2 * log_weights + log_squares), 0.0)
    # Up to 2⁻²⁰ more than computed, then up to the next unit: never down, never nothing.
    units = jnp.floor(share * ((1 + 2.0**-20) * UNITS)).astype(jnp.uint32) + 1
    charge = jnp.where(present, jnp.minimum(units, left), 0)
    return jnp.where(has, log_weights, -jnp.inf), spent + charge


@functools.partial(jax.jit, static_argnames="settings")
def _attend(state, query, finite, settings):
    mechanism, call = settings.mechanism, settings.call
    weight = mechanism.weight(call)
    growth = sensitivity.summation_rounding(keys=max(call.keys, 1), tile=reference.TILE)
    growth = (1 + FILTER_ERROR) * (1 + growth)
    noise_std = mechanism.noise_multiplier * mechanism.l2_sensitivity(call) * growth
    spec = Spec(
        scale=settings.scale,
        score_cap=mechanism.score_cap,
        noise="sums",
        on_grid=True,
        noise_std=noise_std,
        denominator_std=noise_std / weight if weight > 0 else math.inf,
        floor=mechanism.smallest_denominator(call, noise_std),
        ball=mechanism.value_bound,
    )
    batch, length, heads, _ = query.shape
    wide = query.astype(jnp.float32)
    before = history.guard(state.secret_history, wide)
    after = history.extend(state.secret_key, before, wide)
    operands = Operands(
        wide,
        state.private_key[None],
        state.private_value[None],
        state.private_log_weights[None],
        noise_key=after,
    )
    operands = Operands(*_primitives.vary_alike(*operands))
    present = jnp.any(state.private_log_weights > -jnp.inf, axis=-1)
    log_squares = _log_norms(operands, spec, weight)
    log_share, spent = spend(state.private_spent, log_squares, present, mechanism.clip_norm)
    operands = operands._replace(log_weights=operands.log_weights + log_share[None, :, None])
    answer, _ = reference.forward(operands, spec)

    new = batch * length * heads // call.kv_heads
    good = state.count + new <= call.queries
    state = state._replace(
        private_spent=jnp.where(good, spent, state.private_spent),
        secret_history=jnp.where(good, after, before),
        count=jnp.where(good, state.count + new, state.count),
    )
    answer = jnp.where((good & finite)[..., None], answer, jnp.nan)
    return answer.astype(query.dtype), state
