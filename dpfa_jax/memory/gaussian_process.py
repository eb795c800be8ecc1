"""A memory that answers any number of adaptive queries at the price of one (S5).

The noise is one Gaussian process for the memory's whole life, sampled where it is asked: each query
appends one row to a Cholesky factor of the queries' covariance. Everything between the rows and the
noisy sums is float64; the factor is kept as two float32 words, and the certificate is checked on
the words as kept.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dpfa_jax import _check, _primitives, clipping, random, reference, releases
from dpfa_jax import gaussian_process as gp
from dpfa_jax._typing import Spec
from dpfa_jax.accounting.event import Event
from dpfa_jax.memory import history, rows


class GaussianProcessState(NamedTuple):
    """The arrays of a memory: what a checkpoint keeps. As private as the records.

    Attributes:
      private_key: (S, K, H) float32, zero where NULL.
      private_value: (S, K, h) float32.
      private_log_weights: (S, K) float32: 0, or −∞ for NULL.
      queries: (K, capacity, H) float32, bit for bit as they were asked.
      lower_high: (K, capacity, capacity) float32, the Cholesky factor's first word.
      lower_low: its second word.
      secret_noise: (K, capacity, h + 1) float32 unit normals of the queries answered.
      secret_key: uint32[8] key data.
      secret_history: uint32[8], all queries so far under that key.
      count: int32, queries answered per kv head.
      error: (K,) float32, at least the Frobenius norm of LLᵀ − (K + λI) so far.
    """

    private_key: Any
    private_value: Any
    private_log_weights: Any
    queries: Any
    lower_high: Any
    lower_low: Any
    secret_noise: Any
    secret_key: Any
    secret_history: Any
    count: Any
    error: Any

    def __repr__(self):
        return f"{type(self).__name__}(private)"


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("state",), meta_fields=("settings",)
)
@dataclasses.dataclass(frozen=True, repr=False)
class GaussianProcessMemory:
    """Records under one Gaussian process: adaptive queries, all of them at the price of one.

    An immutable pytree: `attend` returns the next memory, and the old one must not be used again
    (outside `jit` that is an error; where it cannot be seen, each further line of use costs one
    more `event`: M1). Works as an argument and result of `jit`, as a carry of `scan`, donated, and
    in checkpoints, which hold `state`; `dataclasses.replace(memory, state=restored)` is the way
    back. A query asked again gets the same answer up to the jitter.

    Attributes:
      state: the arrays; private.
      settings: the public numbers.

    Guarantee: S5 (sensitivity.md), M1 (history.md), M2 (gaussian_process.md).

    Example:
      >>> import jax, jax.numpy as jnp, dpfa_jax
      >>> noise = dpfa_jax.GaussianProcessNoise(
      ...     noise_multiplier=1.0, value_bound=1.0, key_bound=1.0)
      >>> rows = jnp.ones((9, 1, 4))
      >>> memory = GaussianProcessMemory.create(
      ...     rows, rows, mechanism=noise, rng=jax.random.key(0), capacity=8)
      >>> answer, memory = memory.attend(jnp.ones((2, 1, 4)))
      >>> answer.shape, int(memory.state.count)
      ((2, 1, 4), 2)
    """

    state: Any
    settings: Any

    @classmethod
    def create(
        cls,
        key: jax.Array,
        value: jax.Array,
        *,
        mechanism: releases.GaussianProcessNoise,
        rng: jax.Array,
        capacity: int,
        scale: float | None = None,
    ) -> "GaussianProcessMemory":
        """A memory that has answered nothing yet. This is what is charged, not its answers.

        `accounting.events` counts one `event` here and none at `attend`. Under `vmap` every
        memory has its own noise, even with an unbatched key.

        Args:
          key: (S, K, H); row j must depend on record j alone. Not finite: the record is NULL.
          value: (S, K, h).
          mechanism: GaussianProcessNoise; its noise is set for `capacity` queries.
          rng: one typed key, never used for another memory.
          capacity: queries per kv head that the memory will ever answer, ≥ 1: each call of
            (B, T, N, H) takes B·T·N/K. Memory grows with 8·K·capacity² bytes.
          scale: factor of the scores, > 0; None is 1/√H.

        Raises:
          TypeError, ValueError: for arguments that do not fit, saying what to pass.
        """
        if not isinstance(mechanism, releases.GaussianProcessNoise):
            raise TypeError(f"Expected mechanism to be GaussianProcessNoise, got {mechanism!r}.")
        capacity = _check.integer("capacity", capacity, low=1)
        data = random.key_data(rng)
        _primitives.refuse_constant(rng, "Pass the key as an argument of that function.")
        key, value, log_weights = rows.records(key, value)
        call = rows.lifetime(key, value, capacity)
        scale = call.query_dim**-0.5 if scale is None else scale
        scale = _check.real("scale", scale, low=0, open_low=True)
        settings = rows.Life(mechanism, call, scale)
        data = _primitives.stream_key(data, key, value, log_weights)
        if mechanism.adjacency.kind == "REPLACE_ONE":
            value = clipping.clip_rows(value, mechanism.value_bound)
        heads, square = call.kv_heads, (call.kv_heads, capacity, capacity)
        state = GaussianProcessState(
            private_key=key,
            private_value=value,
            private_log_weights=log_weights,
            queries=jnp.zeros((heads, capacity, call.query_dim)),
            lower_high=jnp.zeros(square),
            lower_low=jnp.zeros(square),
            secret_noise=jnp.zeros((heads, capacity, call.value_dim + 1)),
            secret_key=data,
            secret_history=_primitives.private_release(history.start(data), settings.event),
            count=jnp.zeros((), jnp.int32),
            error=jnp.zeros(heads),
        )
        return cls(GaussianProcessState(*_primitives.vary_alike(*state)), settings)

    @property
    def event(self) -> Event:
        """What the memory's whole life is charged as: `capacity` queries, however few are asked."""
        return self.settings.event

    @property
    def capacity(self) -> int:
        """Queries per kv head that the memory may answer in its life."""
        return self.settings.call.queries

    def attend(self, query: jax.Array) -> tuple[jax.Array, "GaussianProcessMemory"]:
        """The answers to some queries, and the memory that has answered them.

        Args:
          query: (T, N, H) or (B, T, N, H), public or chosen from answers already released. All
            batch elements and the N/K query heads of a group read the same memory.

        Returns:
          Answers (T, N, h) or (B, T, N, h) in the query's dtype, and the next memory. A query that
          is not finite, or too long for float64 (γ‖q̂‖² > 10⁴), has a NaN answer of its own. Where
          the capacity is exceeded inside `jit`, or the covariance has no certificate, all answers
          are NaN and the memory is the old one.

        Raises:
          ValueError: if the memory is full, used, captured by a traced function, or queries are
            batched or sharded where it is not; if the shape does not fit.

        Guarantee: S5 (sensitivity.md), M1 (history.md), M2 (gaussian_process.md).
        """
        call = self.settings.call
        history.check_unused(self.state.secret_history, query)
        shaped, finite = rows.queries(query, kv_heads=call.kv_heads, width=call.query_dim)
        asked = shaped.shape[0] * shaped.shape[1] * shaped.shape[2] // call.kv_heads
        rows.check_room(self.state.count, asked, self.capacity)
        answer, state = _attend(self.state, shaped, finite, self.settings)
        history.use(self.state.secret_history)
        return answer.reshape(*query.shape[:-1], call.value_dim), self._replace(state)

    def fork(self) -> tuple["GaussianProcessMemory", "GaussianProcessMemory"]:
        """Two memories that continue from here on their own, for one more `event`.

        Queries that both ask have one answer; where they differ their noise is independent given
        the past. `accounting.events` counts the fork.

        Returns:
          Two memories; this one is used up.

        Guarantee: M1 (history.md).
        """
        first, second = history.fork(self.state.secret_history, self.event)
        left = self._replace(self.state._replace(secret_history=first))
        return left, self._replace(self.state._replace(secret_history=second))

    def guarantee(self, *, delta: float | None = None) -> str:
        """The guarantee of the memory's whole life as sentences.

        Args:
          delta: δ ∈ (0, 1) at which ε is stated, or None.
        """
        call = self.settings.call
        life = (
            f"It answers {call.queries:,} queries in its life for each of {call.kv_heads} kv heads "
            f"over {call.keys:,} records"
        )
        return rows.sentence(self, self.settings.mechanism, life, delta)

    def __repr__(self):
        return self.guarantee()

    def _replace(self, state: GaussianProcessState) -> "GaussianProcessMemory":
        return dataclasses.replace(self, state=state)


def _append(operands: tuple, process: gp.Process) -> tuple[jax.Array, ...]:
    """One append in float64: noisy sums, the new rows of every cache, and the certificate."""
    state, query, unit = operands
    wide = jnp.float64
    capacity, new = state.queries.shape[1], query.shape[1]
    start = jnp.minimum(state.count, capacity - new)
    seen = jnp.arange(capacity) < state.count
    highest = lax.Precision.HIGHEST

    usable = gp.squares(query.astype(wide) / process.key_scale, process.gamma) <= gp.MAX_SQUARE
    query = jnp.where(usable[..., None], query, 0.0)
    asked = query.astype(wide) / process.key_scale
    past = state.queries.astype(wide) / process.key_scale
    cross = jnp.where(seen, gp.kernel(asked, past, process.gamma), 0.0)
    regular = gp.kernel(asked, asked, process.gamma) + process.jitter * jnp.eye(new, dtype=wide)
    lower = state.lower_high.astype(wide) + state.lower_low.astype(wide)
    solvable = lower + jnp.diag(jnp.where(seen, 0.0, 1.0))
    left = lax.linalg.triangular_solve(
        solvable, cross, left_side=False, lower=True, transpose_a=True
    )
    left = jnp.where(seen, left, 0.0)
    schur = regular - jnp.einsum("kic,kjc->kij", left, left, precision=highest)
    corner = jnp.linalg.cholesky(schur, symmetrize_input=False)
    block = lax.dynamic_update_slice_in_dim(left, corner, start, 2)
    high = block.astype(jnp.float32)
    low = (block - high).astype(jnp.float32)
    block = high.astype(wide) + low.astype(wide)

    # The certificate, on the words that are kept and that the noise is made with.
    crossed = jnp.einsum("kic,kjc->kij", block, lower, precision=highest) - cross
    crossed = jnp.where(seen, crossed, 0.0)
    cornered = jnp.einsum("kic,kjc->kij", block, block, precision=highest) - regular
    square = jnp.square(state.error.astype(wide)) + jnp.sum(jnp.square(cornered), axis=(1, 2))
    error = jnp.sqrt(square + 2 * jnp.sum(jnp.square(crossed), axis=(1, 2))) * (1 + 2.0**-20)
    certified = error <= process.jitter_error  # a NaN is no certificate

    units = lax.dynamic_update_slice_in_dim(state.secret_noise, unit, start, 1).astype(wide)
    noise = jnp.einsum("kij,kjc->kic", block, units, precision=highest)
    key = jnp.swapaxes(state.private_key.astype(wide), 0, 1) * process.key_scale
    value = jnp.swapaxes(state.private_value.astype(wide), 0, 1)
    log_weights = gp.log_record_weights(key, value, process)
    log_weights += jnp.swapaxes(state.private_log_weights.astype(wide), 0, 1)
    noisy = gp.released(gp.sums(asked, key, value, log_weights, process), noise, process)
    noisy = jnp.where(usable[..., None], noisy, jnp.nan).astype(jnp.float32)
    return noisy, query, high, low, error.astype(jnp.float32), certified


@functools.partial(jax.jit, static_argnames="settings")
def _attend(state, query, finite, settings):
    call = settings.call
    process = settings.mechanism.process(call, gamma=settings.scale)
    batch, length, heads, width = query.shape
    wide = query.astype(jnp.float32)
    before = history.guard(state.secret_history, wide)
    after = history.extend(state.secret_key, before, wide)
    asked = wide.reshape(batch * length, call.kv_heads, heads // call.kv_heads, width)
    asked = jnp.moveaxis(asked, 1, 0).reshape(call.kv_heads, -1, width)  # (K, m, H)
    new = asked.shape[1]
    unit = random.matrix_normals(
        after,
        jnp.uint32(0),
        jnp.arange(call.kv_heads)[:, None],
        state.count + jnp.arange(new)[None, :],
        call.value_dim + 1,
    )
    noisy, asked, high, low, error, certified = _primitives.wide(
        _append, (state, asked, unit), process
    )
    good = (state.count + new <= call.queries) & jnp.all(certified)
    start = jnp.minimum(state.count, call.queries - new)

    def write(cache, rows):
        old = lax.dynamic_slice_in_dim(cache, start, new, 1)
        return lax.dynamic_update_slice_in_dim(cache, jnp.where(good, rows, old), start, 1)

    state = state._replace(
        queries=write(state.queries, asked),
        lower_high=write(state.lower_high, high),
        lower_low=write(state.lower_low, low),
        secret_noise=write(state.secret_noise, unit),
        secret_history=jnp.where(good, after, before),
        count=jnp.where(good, state.count + new, state.count),
        error=jnp.where(good, error, state.error),
    )
    noisy = noisy.reshape(call.kv_heads, batch * length, heads // call.kv_heads, -1)
    noisy = jnp.moveaxis(noisy, 0, 1).reshape(batch, length, heads, -1)
    spec = Spec(
        scale=settings.scale,
        score_cap=None,
        noise="sums",
        floor=process.floor,
        ball=settings.mechanism.value_bound,
    )
    answer = reference.answer(spec, noisy[..., :-1], noisy[..., -1])
    answer = jnp.where((good & finite)[..., None], answer, jnp.nan)
    return answer.astype(query.dtype), state
