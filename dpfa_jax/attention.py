"""private_attention: validation, the record weights, the choice of backend, the one custom_vjp.

What happens to private rows, in order: rows that are not finite become NULL; value rows are bounded
by record weights; the backend sums, adds noise and divides; everything after that is
post-processing. Everything that sets the noise is a Python number known before the data is touched.
"""

import dataclasses
import functools
import importlib
import math
from types import MappingProxyType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dpfa_jax import (
    _check,
    _primitives,
    accounting,
    admission,
    arguments,
    clipping,
    gaussian_process,
    mechanisms,
    random,
    reference,
    releases,
    sensitivity,
)
from dpfa_jax._typing import Operands, Spec
from dpfa_jax.doubleword import grid_step, to_grid

BACKENDS = MappingProxyType(
    {"mosaic_gpu": "dpfa_jax.pallas.mosaic_gpu", "triton": "dpfa_jax.pallas.triton"}
    | {"xla": "dpfa_jax.reference"}
)
"""Modules that export forward, backward, sums, finish, rounding, column_squares and
supports(operands, spec) -> reason | None, fastest first; each is loaded when it is first used."""

_NAMED = ("xla", "triton", "mosaic_gpu", "auto")


def module_of(name: str) -> ModuleType:
    """The module of a backend.

    Args:
      name: a key of `BACKENDS`.
    """
    return importlib.import_module(BACKENDS[name])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(
    backend: str, spec: Spec, process: gaussian_process.Process | None, operands: Operands
) -> jax.Array:
    """What a backend answers, with its gradients.

    Args:
      backend: a key of `BACKENDS`.
      spec: of the call, its noise set.
      process: of the call's noise where that is correlated, else None.
      operands: all of them varying over the mesh axes that any varies over.

    Returns:
      (B, T, N, h) in float32 or the query's dtype.
    """
    return _attend_forward(backend, spec, process, operands)[0]


def _attend_forward(backend, spec, process, operands):
    if process is None:
        out, residuals = module_of(backend).forward(operands, spec)
    else:
        residuals = gaussian_process.forward(operands, process)
        out = reference.answer(spec, *residuals)
    # Gradients are of the rows themselves.
    return out, (operands._replace(narrow_key=None), residuals)


def _attend_backward(backend, spec, process, saved, cotangent):
    operands, residuals = saved
    module = reference if process is not None else module_of(backend)
    return (cotangents(operands, module.backward(operands, spec, residuals, cotangent)),)


def cotangents(operands: Operands, grads: tuple) -> Operands:
    """What a backend's `backward` returned, in the places and dtypes of the operands.

    Args:
      operands: of the call.
      grads: in query, key, value, log_weights and query_reference; None where there is none.
    """
    names = ("query", "key", "value", "log_weights", "query_reference")
    known = {
        name: None if grad is None else grad.astype(getattr(operands, name).dtype)
        for name, grad in zip(names, grads, strict=True)
    }
    return Operands(**{name: known.get(name) for name in Operands._fields})


attend.defvjp(_attend_forward, _attend_backward)


def _is_preferred(backend: str, keys: int) -> bool:
    """Whether "auto" looks at a backend: kernels only where they are compiled, for a GPU."""
    if backend == "xla":
        return True
    return jax.default_backend() == "gpu" and module_of(backend).preferred(keys)


def choose_backend(name: str, operands: Operands, spec: Spec) -> str:
    """The name of the backend that does a call: the caller's, or the fastest one for "auto".

    Args:
      name: what the caller passed.
      operands: the call's arrays.
      spec: the static description, of which the noise need not be set yet.

    Returns:
      A key of `BACKENDS`.

    Raises:
      ValueError: for an unknown name.
      NotImplementedError: with the reason why a named backend cannot do the call.
    """
    _check.choice("backend", name, _NAMED)

    def lacking(kind):
        return module_of(kind).supports(operands, spec)

    if name == "auto":
        keys = operands.key.shape[1]
        return next(k for k in BACKENDS if _is_preferred(k, keys) and lacking(k) is None)
    if name not in BACKENDS:
        raise NotImplementedError(
            f"backend={name!r} is not part of this version. Pass backend='auto', which takes the "
            "fastest backend that can do the call, or backend='xla'."
        )
    reason = lacking(name)
    if reason is not None:
        raise NotImplementedError(
            f"backend={name!r} cannot do this call: {reason}. Pass backend='auto'."
        )
    return name


def _refuse_masks(mechanism, *, everything: bool, **given) -> None:
    named = [name for name, value in given.items() if value is not None and value is not False]
    if named:
        what = "any mask" if everything else "a mask that depends on the query"
        raise ValueError(
            f"{type(mechanism).__name__} does not take {what}, got {', '.join(named)}: its "
            "guarantee would not hold. Use IndependentNoise or ClippedContributions."
        )


def _asked(operands: Operands, spec: Spec, mechanism: releases.Mechanism) -> tuple:
    """Operands and spec as the backend will get them, as far as `supports` looks at them."""
    match mechanism:
        case releases.SoftmaxNoise():
            bound = mechanism.score_bound
            spec = dataclasses.replace(spec, score_cap=bound, score_low=-bound)
        case releases.IndependentNoise() | releases.ClippedContributions():
            spec = dataclasses.replace(spec, score_cap=mechanism.score_cap)
        case releases.GaussianProcessNoise():
            operands = operands._replace(query_reference=operands.query[..., 0])
    return operands, spec


def private_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    mechanism: releases.Mechanism,
    rng: Any,
    queries: str,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: Any = None,
    mask: ArrayLike | None = None,
    segment_ids: Any = None,
    key_value_seq_lengths: ArrayLike | None = None,
    key_log_weights: ArrayLike | None = None,
    precision: Any = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> jax.Array:
    """Attention whose answer is a differentially private release of the key/value records.

    The noise is a function of `rng` and the element index alone: under `vmap` every example has
    its own, even with an unbatched key, under `shard_map` and `pmap` every shard has. Calling twice
    with one key releases twice under the same noise, whose difference is exact: split keys. A key
    that a jitted function or a scan closes over would do that at every call, and is refused.

    The GPU backends answer a memory with rows that are not finite by a second kernel ("triton"), or
    take longer over the whole call ("mosaic_gpu"): that there are such rows, not which, shows in
    the timing. Backend "xla" takes as long as ever.

    Args:
      query: (B, T, N, H) in float32, bfloat16 or float16.
      key: (B, S, K, H), or (1, S, K, H) for one memory read by the whole batch; N a multiple of K.
      value: (B or 1, S, K, h). Row j of key and value is record j and must depend on that record
        alone: K and V of a transformer layer above the first do not.
      mechanism: IndependentNoise, ClippedContributions, GaussianProcessNoise, SequenceRelease,
        SoftmaxNoise or NonPrivate.
      rng: one typed key (`dpfa_jax.random.secure_key()`); None only for NonPrivate.
      queries: "public" promises that no query depends on a private record except through released
        answers; the promise is printed in the guarantee. "private" allows only SequenceRelease and
        NonPrivate.
      scale: factor of the scores, finite; None is 1/√H.
      is_causal: query i sees keys j ≤ i.
      local_window_size: w or (left, right) ≥ 0: query i sees i − left ≤ j ≤ i + right.
      mask: boolean, broadcasts to (B, N, T, S), True attends; a public or row-local value.
      segment_ids: integers (B, T), or (query ids, key ids); queries see keys of their own segment.
      key_value_seq_lengths: integers (B,); keys at positions ≥ the length are not seen.
      key_log_weights: (S,), (B, S) or (B, S, K): logarithms of row weights, public or row-local;
        values above 0 count as 0, NaN as −∞.
      precision: of the score product, as in `jax.lax.dot`; None is the highest. "fp8" rounds rows
        of query and key to float8_e4m3fn (three bits of mantissa, clipped to ±448) for the scores
        alone: record by record, so that it costs no privacy, and faster on "mosaic_gpu". The value
        product always has the highest, since its error counts against the guarantee.
      deterministic: whether gradients must be the same bits on every run (always so but
        on "mosaic_gpu", where it takes slower kernels).
      backend: "auto", "mosaic_gpu" (NVIDIA, compute capability 9.0), "triton" (8.0 and up;
        interpreted on a CPU, for tests) or "xla"; a named backend never falls back to another.

    Returns:
      (B, T, N, h) in the query's dtype, the noise added in float32 or better before the cast. A
      record with a NaN or an infinity in any head is NULL. A query with one gets a NaN row of its
      own (a zero row under SequenceRelease, where queries may be private).

    Raises:
      TypeError, ValueError: for arguments that do not fit, saying what to pass; ValueError for a
        bound and noise multiplier whose noise float32 does not hold.
      NotImplementedError: if a named backend cannot do the call.

    Guarantee: `mechanism.guarantee(query.shape, key.shape, value.shape)`; S1, S2, S3, S5 and S7
      (sensitivity.md). Gradients through the call are not a release and not private.

    Example:
      >>> import jax, jax.numpy as jnp, dpfa_jax
      >>> q, k = jnp.ones((1, 2, 1, 4)), jnp.ones((1, 9, 1, 4))
      >>> noise = dpfa_jax.IndependentNoise(noise_multiplier=1.0, value_bound=1.0, score_cap=2.0)
      >>> private_attention(
      ...     q, k, k, mechanism=noise, rng=jax.random.key(0), queries="public").shape
      (1, 2, 1, 4)
    """
    private = admission.is_private(mechanism, rng, queries)
    query, key, value = (
        arguments.floating("query", query),
        arguments.floating("key", key),
        arguments.floating("value", value),
    )
    call = releases.Call.of(query.shape, key.shape, value.shape)
    scale = _check.real("scale", 1 / math.sqrt(call.query_dim) if scale is None else scale)
    _check.flag("is_causal", is_causal)
    _check.flag("deterministic", deterministic)
    window = arguments.window(local_window_size)
    mask = arguments.boolean_mask(mask, call)
    query_segments, key_segments = arguments.segments(segment_ids, call)
    lengths = arguments.lengths(key_value_seq_lengths, call)
    base = arguments.base_log_weights(key_log_weights, call)
    if isinstance(mechanism, releases.SoftmaxNoise):
        _refuse_masks(
            mechanism,
            everything=True,
            is_causal=is_causal,
            local_window_size=window,
            mask=mask,
            segment_ids=segment_ids,
            key_value_seq_lengths=lengths,
            key_log_weights=key_log_weights,
        )
    if isinstance(mechanism, releases.GaussianProcessNoise):
        by_query = mask is not None and (mask.shape[1] > 1 or mask.shape[2] > 1)
        shared = call.memories == 1 and call.batch > 1
        _refuse_masks(
            mechanism,
            everything=False,
            is_causal=is_causal,
            local_window_size=window,
            mask=by_query or (mask is not None and shared and mask.shape[0] > 1),
            key_value_seq_lengths=lengths is not None and shared,
        )

    data = None
    if private:
        assert rng is not None
        data = random.key_data(rng)
        _primitives.refuse_constant(rng, "Pass the key as an argument of that function.")
        masks = (mask, query_segments, key_segments, lengths)
        data = _primitives.stream_key(
            data, query, key, value, base, *(x for x in masks if x is not None)
        )
    operands = Operands(
        query, key, value, base, mask, query_segments, key_segments, lengths, noise_key=data
    )
    spec = Spec(
        scale=scale,
        score_cap=None,
        is_causal=is_causal,
        on_grid=True,
        window=window,
        deterministic=deterministic,
        **admission.score_precision(precision, mechanism),
    )
    marked = not isinstance(mechanism, releases.SequenceRelease)
    name = choose_backend(backend, *_asked(operands, spec, mechanism))
    if admission.reads_any_rows(module_of(name), mechanism):
        spec = dataclasses.replace(spec, mark_queries=marked)
        operands, spec = admission.weighted(module_of(name), operands, mechanism, spec)
        out = _release(operands, spec, mechanism, call, name)
    else:
        query_ok = clipping.finite_rows(query)
        out = _release(admission.sanitised(operands, mechanism), spec, mechanism, call, name)
        out = jnp.where(query_ok[..., None], out, jnp.nan) if marked else out
    # Where what it is made of varies over shards, each of them makes a release, whatever a backend
    # says of its answer.
    out, *_ = _primitives.vary_alike(out.astype(query.dtype), *operands)
    return _primitives.private_release(out, mechanism.event(query.shape, key.shape, value.shape))


def _release(operands, spec, mechanism, call, name) -> jax.Array:
    """The released answer in float32."""
    operands = admission.as_scored(module_of(name), operands, spec)
    growth = 1 + module_of(name).rounding(call.keys)

    def run(spec, operands, process=None) -> Any:
        operands = Operands(*_primitives.vary_alike(*operands))
        return attend(name, spec, process, operands)

    def replace(**changes):
        return Spec(**{**spec.__dict__, **changes})

    match mechanism:
        case releases.NonPrivate():
            return run(spec, operands)
        case releases.SequenceRelease():
            bound = mechanism.l2_sensitivity(call) * (1 + reference.WEIGHT_ERROR)
            noise_std = mechanism.noise_multiplier * bound
            if mechanism.clip == "row":
                clipped = replace(noise="rows", noise_std=noise_std, row_clip=mechanism.clip_norm)
                return run(clipped, operands)
            data = operands.noise_key
            out = run(spec, operands._replace(noise_key=None))
            flat = clipping.clip_rows(out.reshape(call.batch, -1), mechanism.clip_norm)
            noise, _ = reference.noise_field(data, *out.shape)
            noisy = flat.reshape(out.shape) + noise_std * noise
            return to_grid(noisy, grid_step(noise_std))
        case releases.SoftmaxNoise():
            # No product of rows this short overflows: every pair has a score, and every row counts.
            operands = operands._replace(
                query=clipping.clip_rows(operands.query, 1e18),
                key=clipping.clip_rows(operands.key, 1e18),
                value=clipping.clip_rows(operands.value, mechanism.value_bound),
            )
            # The answer is rounded to float32 before its noise: four roundings of a row ≤ Cv.
            rounded = 2.0**-20 * mechanism.value_bound * math.sqrt(call.batch * call.queries)
            rounded *= math.sqrt(call.heads)
            bound = mechanism.l2_sensitivity(call) * growth + rounded
            bounded = replace(
                score_cap=mechanism.score_bound,
                score_low=-mechanism.score_bound,
                noise="rows",
                noise_std=mechanism.noise_multiplier * bound,
            )
            return run(bounded, operands)
        case releases.IndependentNoise() | releases.ClippedContributions():
            module = module_of(name)
            noise_std = admission.sums_noise_std(mechanism, call, module.rounding(call.keys))
            noisy = admission.noisy_spec(spec, mechanism, call, noise_std)
            operands = admission.clip_contributions(module, operands, noisy, mechanism, call)
            return run(noisy, operands)
        case releases.GaussianProcessNoise():
            return _gaussian_process(operands, spec, mechanism, call, run, replace)
    raise TypeError(f"No rule for the mechanism {type(mechanism).__name__}.")


def _gaussian_process(operands, spec, mechanism, call, run, replace) -> jax.Array:
    process = mechanism.process(call, gamma=spec.scale)
    if mechanism.adjacency.kind == "REPLACE_ONE":
        value = clipping.clip_rows(operands.value, mechanism.value_bound)
        operands = operands._replace(value=value)
    base = operands.log_weights
    # Masks that depend on the key alone are weights; `forward` knows no others.
    if operands.key_lengths is not None:
        seen = jnp.arange(call.keys)[None, :] < operands.key_lengths[:, None]
        base = jnp.where(seen[: call.memories, :, None], base, -jnp.inf)
    if operands.mask is not None:
        seen = operands.mask[:, 0, 0, :, None]
        base = jnp.where(seen, base, -jnp.inf)
    key = operands.key.astype(jnp.float32) * mechanism.key_scale
    query = operands.query.astype(jnp.float32) / mechanism.key_scale
    weights = gaussian_process.log_record_weights(key, operands.value.astype(jnp.float32), process)
    weights -= gaussian_process.squares(key, process.gamma) / 2
    operands = operands._replace(
        mask=None,
        key_lengths=None,
        log_weights=jnp.where(base > -jnp.inf, base + weights, -jnp.inf),
        base_log_weights=jax.lax.stop_gradient(base),
        query_reference=gaussian_process.squares(query, process.gamma) / 2,
    )
    return run(
        replace(noise="sums", floor=process.floor, ball=mechanism.value_bound), operands, process
    )


def sampled_attention(
    query: ArrayLike,
    key: ArrayLike,
    *,
    rng: Any,
    score_bound: float,
    scale: float | None = None,
) -> jax.Array:
    """One sampled key index per query and head: attention as an exponential mechanism.

    Args:
      query: (B, T, N, H), public.
      key: (B or 1, S, K, H), S ≥ 1; the candidates' positions are public, their rows private.
      rng: one typed key.
      score_bound: B ≥ 0, public: scores are clipped to [−B, B].
      scale: factor of the scores; None is 1/√H.

    Returns:
      int32 (B, T, N) indices into S, each drawn with probability ∝ e^score. Returning the private
      value at the index is not private and no function here does it.

    Raises:
      TypeError, ValueError: for arguments that do not fit.

    Guarantee: S8 (sensitivity.md), REPLACE_ONE, per query and head.
    """
    query, key = arguments.floating("query", query), arguments.floating("key", key)
    call = releases.Call.of(query.shape, key.shape)
    if call.keys < 1:
        raise ValueError("Expected at least one candidate, got an empty key axis.")
    score_bound = _check.real("score_bound", score_bound, low=0)
    scale = _check.real("scale", 1 / math.sqrt(call.query_dim) if scale is None else scale)
    spec = Spec(scale=scale, score_cap=None)
    rows = jnp.zeros((call.memories, call.keys, call.kv_heads))
    operands, tiles = reference.pad_keys(Operands(query, key, rows[..., None], rows))

    def score_block(operands, index):
        # A row that is not finite is still a candidate, at the lowest score: NULL it may not be.
        candidates = index * reference.TILE + jnp.arange(reference.TILE) < call.keys
        return reference.tile_scores(operands, spec, index), candidates

    index = mechanisms.exponential(
        rng, score_block, operands, blocks=tiles, score_bound=score_bound
    )
    return _primitives.private_release(index, _sampling_event(call, score_bound))


def _sampling_event(call: releases.Call, score_bound: float) -> accounting.Event:
    bound = mechanisms.exponential_score_bound(score_bound=score_bound)
    one = accounting.ExponentialMechanism(
        epsilon=sensitivity.sampled_attention(score_bound=bound, candidates=call.keys),
        zcdp=sensitivity.sampled_attention_zcdp(score_bound=bound),
    )
    # Every query and head draws once, and the replaced record is a candidate in all of them.
    return accounting.Repeated(one, call.batch * call.queries * call.heads)
