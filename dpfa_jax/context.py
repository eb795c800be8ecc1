"""context_parallel_attention: private attention over records that lie on many devices.

Inside `jax.shard_map` every shard holds a part of the records. Either it sums over its own, without
noise, and the sums are added over the shards as integers (lattice.py); or, where queries are
sharded too, it reads the records of all shards and answers its own queries. The noise of the one
release they make together is drawn from the one key they share. What comes out is what
`private_attention` makes of all records, up to rounding: the same noise words, the same charge.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from dpfa_jax import (
    _check,
    _primitives,
    admission,
    arguments,
    attention,
    clipping,
    lattice,
    random,
    reference,
    releases,
    shards,
)
from dpfa_jax._typing import Operands, Spec

_ROWS = 16
"""Rows of queries that share a block of noise words (random.py)."""

_SUPPORTED = (releases.IndependentNoise, releases.ClippedContributions)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static where sums are sent: how each shard sums, and how sums become an answer."""

    backend: str
    spec: Spec
    axes: tuple[str, ...]
    gathered: bool
    bounds: tuple[float, float]


def noise_std(
    mechanism: Any, call: releases.Call, *, shards: int, rounding: Callable[[int], float]
) -> float:
    """The noise of one call whose records lie on several shards, rounding included.

    Args:
      mechanism: IndependentNoise or ClippedContributions.
      call: the shape of the whole call, the keys of all shards together.
      shards: how many, ≥ 1; each has as many keys.
      rounding: the backend's, of a number of keys.

    Returns:
      In the unit of the values. Upper bound of noise_multiplier times the distance of two
      neighbours' computed sums.

    Guarantee: CP1 (context.md).
    """
    growth = 1 + rounding(call.keys // shards)
    whole = 1 + rounding(call.keys)
    if whole < math.inf:
        # No less noise than the unsharded call has, where the backend has that.
        growth = max(growth, whole)
    added = lattice.shard_rounding(
        keys=max(call.keys, 1),
        rows=call.batch * call.queries * call.heads,
        width=call.value_dim,
        value_bound=mechanism.value_bound,
        denominator_weight=mechanism.weight(call),
    )
    # Each changed record may lie on a shard of its own.
    changed = mechanism.adjacency.rows
    return mechanism.noise_multiplier * (mechanism.l2_sensitivity(call) * growth + changed * added)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, operands: Operands, noise_key: jax.Array) -> jax.Array:
    return _attend_forward(plan, operands, noise_key)[0]


def _attend_forward(plan, operands, noise_key):
    module = attention.module_of(plan.backend)
    integers = [
        lattice.to_integers(high, low, bound)
        for (high, low), bound in zip(module.sums(operands, plan.spec), plan.bounds, strict=True)
    ]
    if plan.gathered:
        # Each shard gets the sums of its own queries.
        integers = [
            lax.psum_scatter(x, plan.axes, scatter_dimension=1, tiled=True) for x in integers
        ]
    else:
        integers = lax.psum(integers, plan.axes)
    numerator, denominator = (
        lattice.to_words(x, bound) for x, bound in zip(integers, plan.bounds, strict=True)
    )
    shape = numerator[0].shape
    # Words of the whole call's field.
    first = lax.axis_index(plan.axes) * shape[1] if plan.gathered else None
    matrix, row = reference.noise_field(noise_key, *shape, first)
    sums = reference.noisy_sums(plan.spec, numerator, denominator, matrix, row)
    return module.finish(plan.spec, *sums)[0], (operands, sums)


def _attend_backward(plan, saved, cotangent):
    operands, sums = saved
    if plan.gathered:
        sums, cotangent = lax.all_gather((sums, cotangent), plan.axes, axis=1, tiled=True)
    module = attention.module_of(plan.backend)
    _, residuals = module.finish(plan.spec, *sums)
    leaves, tree = jax.tree.flatten((operands, residuals, cotangent))
    operands, residuals, cotangent = jax.tree.unflatten(tree, _primitives.vary_alike(*leaves))
    grads = module.backward(operands, plan.spec, residuals, cotangent)
    return attention.cotangents(operands, grads), None


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _on_all(axes: tuple[str, ...], gathered: bool, rows: jax.Array) -> jax.Array:
    """All rows, on every shard; parts of their gradient, of their dtype, are added in float32."""
    if gathered:
        return lax.all_gather(rows, axes, axis=1, tiled=True)
    return lax.pcast(rows, axes, to="varying")


def _on_all_forward(axes, gathered, rows):
    return _on_all(axes, gathered, rows), None


def _on_all_backward(axes, gathered, _, cotangent):
    wide = cotangent.astype(jnp.float32)
    if gathered:
        wide = lax.psum_scatter(wide, axes, scatter_dimension=1, tiled=True)
    else:
        wide = lax.psum(wide, axes)
    return (wide.astype(cotangent.dtype),)


_on_all.defvjp(_on_all_forward, _on_all_backward)


def _of_all(axes: tuple[str, ...], array: jax.Array | None) -> jax.Array | None:
    """An array of one number a row, or more, of all shards."""
    if array is None:
        return None
    # Devices send bytes, whatever they mean.
    narrow = array.dtype.itemsize == 1
    sent = lax.bitcast_convert_type(array, jnp.uint8) if narrow else array
    sent = lax.all_gather(sent, axes, axis=1, tiled=True)
    return lax.bitcast_convert_type(sent, array.dtype) if narrow else sent


def _facing_all(operands: Operands, spec: Spec, axes: tuple[str, ...], gathered: bool) -> Operands:
    """All queries before this shard's own records."""
    segments = operands.query_segments
    operands = operands._replace(
        query=_on_all(axes, gathered, operands.query),
        query_segments=_of_all(axes, segments) if gathered else segments,
    )
    first = lax.axis_index(axes) * operands.key.shape[1]
    if _by_position(spec):
        return operands._replace(key_offset=first)
    if operands.key_lengths is None:
        return operands
    # Counted from these keys, lengths need no kernel that knows of positions.
    return operands._replace(key_lengths=operands.key_lengths - first)


def _by_position(spec: Spec) -> bool:
    return spec.is_causal or spec.window is not None


def _from_sums(operands, spec, mechanism, whole, axes, name, gathered) -> jax.Array:
    """The answers from sums that each shard makes of its own records."""
    module, parts = attention.module_of(name), lax.axis_size(axes)
    query, data = operands.query, operands.noise_key
    query_ok = clipping.finite_rows(query)
    query = jnp.where(query_ok[..., None], query, jnp.zeros((), query.dtype))
    operands = _facing_all(operands._replace(query=query, noise_key=None), spec, axes, gathered)
    if admission.reads_any_rows(module, mechanism):
        operands, spec = admission.weighted(module, operands, mechanism, spec, judges=False)
    else:
        operands = admission.sanitised(operands, mechanism)
    operands = admission.as_scored(module, operands, spec)
    std = noise_std(mechanism, whole, shards=parts, rounding=module.rounding)
    spec = admission.noisy_spec(spec, mechanism, whole, std)
    operands = admission.clip_contributions(module, operands, spec, mechanism, whole)
    operands = Operands(*_primitives.vary_alike(*operands))
    bounds = lattice.bounds(whole.keys, mechanism.value_bound)
    out: Any = _attend(_Plan(name, spec, axes, gathered, bounds), operands, data)
    return jnp.where(query_ok[..., None], out, jnp.nan)


def _from_records(operands, spec, mechanism, whole, axes, name) -> jax.Array:
    """This shard's rows of what `private_attention` would answer from the records of all."""
    module = attention.module_of(name)
    query_ok = clipping.finite_rows(operands.query)
    marks = admission.reads_any_rows(module, mechanism)
    if marks:
        spec = dataclasses.replace(spec, mark_queries=True)
        operands, spec = admission.weighted(module, operands, mechanism, spec)
    else:
        operands = admission.sanitised(operands, mechanism)
    operands = admission.as_scored(module, operands, spec)
    std = admission.sums_noise_std(mechanism, whole, module.rounding(whole.keys))
    spec = admission.noisy_spec(spec, mechanism, whole, std)
    first = lax.axis_index(axes) * operands.query.shape[1]
    names = ("log_weights", "key_segments", "flags", "narrow_key")
    operands = operands._replace(
        key=_on_all(axes, True, operands.key),
        value=_on_all(axes, True, operands.value),
        noise_row=first,
        **{each: _of_all(axes, getattr(operands, each)) for each in names},
    )
    if _by_position(spec):
        # Positions count from this shard's first query.
        lengths = operands.key_lengths
        lengths = None if lengths is None else lengths - first
        operands = operands._replace(key_offset=-first, key_lengths=lengths)
    # Norms of contributions are made of the products that are summed, and added over the shards.
    # With all queries where a record lies, the same scores could round otherwise, by any amount.
    operands = admission.clip_contributions(module, operands, spec, mechanism, whole, axes=axes)
    operands = Operands(*_primitives.vary_alike(*operands))
    out: Any = attention.attend(name, spec, None, operands)
    return out if marks else jnp.where(query_ok[..., None], out, jnp.nan)


def _as_seen(operands: Operands, spec: Spec, parts: int, gathered: bool, sent: str) -> Operands:
    """Shapes of what a backend gets."""
    names = ("query", "query_segments") if gathered else ()
    if sent == "records":
        names = ("key", "value", "log_weights", "key_segments")

    def grown(array):
        if array is None:
            return None
        batch, rows, *rest = array.shape
        return jax.ShapeDtypeStruct((batch, rows * parts, *rest), array.dtype)

    offset = jax.ShapeDtypeStruct((), jnp.int32) if _by_position(spec) else None
    changed = {name: grown(getattr(operands, name)) for name in names}
    return operands._replace(key_offset=offset, **changed)


def _route(
    exchange: str, backend: str, operands: Operands, spec: Spec, parts: int, gathered: bool
) -> tuple[str, str]:
    """What is sent to other shards, "sums" or "records", and the backend."""

    def chosen(sent):
        seen = _as_seen(operands, spec, parts, gathered, sent)
        return attention.choose_backend(backend, seen, spec)

    rows, reason = operands.query.shape[1], None
    if not gathered:
        reason = "every shard answers all queries; pass shard_queries=True and a part of them"
    elif operands.mask is not None:
        reason = "a mask has the pairs of each shard's own records alone"
    elif rows % _ROWS:
        reason = f"noise goes by {_ROWS} rows, and a shard has {rows} queries"
    if exchange == "records":
        if reason is not None:
            raise ValueError(
                f"Expected a call whose records can be sent to all shards, got one where {reason}. "
                "Pass exchange='auto' or 'sums'."
            )
        return "records", chosen("records")
    if exchange == "sums" or reason is not None or not _records_are_less(operands):
        return "sums", chosen("sums")
    try:
        name = chosen("records")
    except NotImplementedError:
        return "sums", chosen("sums")
    if backend == "auto":
        order, other = list(attention.BACKENDS), chosen("sums")
        if order.index(other) < order.index(name):
            return "sums", other
    return "records", name


def _records_are_less(operands: Operands) -> bool:
    """Whether this shard's records take fewer bytes than its part of all sums and its queries.

    Forward. Keys of eight bits are not counted: not every backend sends them instead of its own.
    """
    query, key, value, weights = operands[:4]
    records = sum(math.prod(x.shape) * x.dtype.itemsize for x in (key, value, weights))
    rows = math.prod(query.shape[:3])
    sums = rows * (8 * (value.shape[3] + 1) + query.shape[3] * query.dtype.itemsize)
    return records <= sums


def context_parallel_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    axis_name: str | Sequence[str],
    mechanism: releases.Mechanism,
    rng: Any,
    queries: str,
    shard_queries: bool = False,
    exchange: str = "auto",
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: Any = None,
    mask: ArrayLike | None = None,
    segment_ids: Any = None,
    key_value_seq_lengths: ArrayLike | None = None,
    key_log_weights: ArrayLike | None = None,
    precision: Any = None,
    backend: str = "auto",
) -> jax.Array:
    """`private_attention` for records sharded along their sequence over a mesh axis: one release.

    To be called inside `jax.shard_map`. Shard s of P holds the records at positions s·S to
    (s+1)·S − 1 of the P·S of the whole call, S of them per shard; where a shard has fewer, mask the
    rest (`key_value_seq_lengths`, `key_log_weights` of −∞), and they still have positions. Each
    shard sums over its own records. The sums of all, two int32 numbers a coordinate, are added by
    one `psum`, and noise of one call is added to them, the same on every shard: the words that
    `private_attention` would draw from this key for all records at once, with the noise scaled for
    all of them. Or, with sharded queries, rows of key and value are gathered instead, and each
    shard answers its own queries from all records, the noise drawn in the kernel. Answers equal
    those of `private_attention` up to rounding.

    Args:
      query: (B, T, N, H), the same on all shards of the axis; or this shard's part of the queries,
        with shard_queries.
      key: (B, S, K, H) or (1, S, K, H), this shard's part. A record lies on exactly one shard:
        an array gathered from others looks like a part and is none.
      value: (B or 1, S, K, h), this shard's part.
      axis_name: the mesh axis, or axes, over which the records are sharded.
      mechanism: IndependentNoise or ClippedContributions.
      rng: one typed key, the same on all shards of the axis. Other mesh axes over which anything
        varies are calls of their own, with noise of their own.
      queries: "public", as in `private_attention`.
      shard_queries: whether the query axis T is sharded over the same axis; each shard answers its
        own T queries.
      exchange: what shards, all of them trusted, send each other. "sums": rows of records stay on
        their shard, and sums without noise leave it; sharded queries are gathered, (B, P·T, N, H)
        on each shard, and sums of all of these are added and scattered back. "records": keys,
        values and their weights are gathered, (B, P·S, K, H + h) on each shard; for sharded
        queries, T a multiple of 16, and no `mask`. "auto": what are fewer bytes forward, where
        both can be done by as fast a backend.
      scale: factor of the scores; None is 1/√H.
      is_causal: query i of all queries sees records at positions j ≤ i of all records.
      local_window_size: as in `private_attention`, in those positions.
      mask: boolean, broadcasts to (B, N, all queries, S): this shard's records.
      segment_ids: integers (B, T) for both, or (query ids, key ids), sharded as query and key are.
      key_value_seq_lengths: integers (B,), lengths of the whole sequences, the same on all shards.
      key_log_weights: (S,), (B, S) or (B, S, K), this shard's part.
      precision: as in `private_attention`.
      backend: "auto", "xla", "triton", or "mosaic_gpu", which takes neither is_causal nor
        local_window_size here.

    Returns:
      (B, T, N, h) in the query's dtype: the same on all shards of the axis, or with shard_queries
      this shard's part.

    Raises:
      TypeError, ValueError: for arguments that do not fit (an exchange too), for records that are
        the same on all shards, for a key that is not, and inside `shard_map(check_vma=False)`,
        where neither shows.
      NotImplementedError: for other mechanisms, and if a named backend cannot do the call.

    Guarantee: CP1, and CP2 where records are sent (context.md): `mechanism.guarantee` of the shapes
      of the whole call. It counts once in `accounting.events`, whatever the number of shards. S2
      and S3 (sensitivity.md).

    Example:
      >>> import dpfa_jax
      >>> mesh = jax.make_mesh((1,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> spec, one = jax.P(None, "seq"), jax.P()
      >>> noise = dpfa_jax.IndependentNoise(noise_multiplier=1.0, value_bound=1.0, score_cap=2.0)
      >>> attend = functools.partial(
      ...     context_parallel_attention, axis_name="seq", mechanism=noise, queries="public")
      >>> sharded = jax.jit(jax.shard_map(
      ...     lambda q, k, v, rng: attend(q, k, v, rng=rng), mesh=mesh,
      ...     in_specs=(one, spec, spec, one), out_specs=one))
      >>> q, k = jnp.ones((1, 2, 1, 4)), jnp.ones((1, 9, 1, 4))
      >>> sharded(q, k, k, jax.random.key(0)).shape
      (1, 2, 1, 4)
    """
    admission.is_private(mechanism, rng, queries)
    if not isinstance(mechanism, _SUPPORTED):
        raise NotImplementedError(
            f"{type(mechanism).__name__} is not offered over shards. {_reason(mechanism)} Use "
            "IndependentNoise or ClippedContributions, or private_attention on gathered records."
        )
    axes = shards.axes(axis_name)
    parts = lax.axis_size(axes)
    _check.flag("shard_queries", shard_queries)
    _check.choice("exchange", exchange, ("auto", "records", "sums"))
    query, key, value = (
        arguments.floating("query", query),
        arguments.floating("key", key),
        arguments.floating("value", value),
    )
    call = releases.Call.of(query.shape, key.shape, value.shape)
    if not call.keys:
        raise ValueError(
            f"Expected at least one record on every shard, got key {key.shape}. Pass one that is "
            "masked, with key_log_weights of −inf."
        )
    query_segments, key_segments = arguments.segments(segment_ids, call)
    sharded, shared = {"key": key, "value": value}, {"rng": rng}
    (sharded if shard_queries else shared)["query"] = query
    shards.check(axes, sharded, shared)
    answered = dataclasses.replace(call, queries=call.queries * (parts if shard_queries else 1))
    mask = arguments.boolean_mask(mask, answered)
    lengths = arguments.lengths(key_value_seq_lengths, call)
    base = arguments.base_log_weights(key_log_weights, call)
    shards.check(axes, {}, {"key_value_seq_lengths": lengths})
    _check.flag("is_causal", is_causal)
    window = arguments.window(local_window_size)
    scale = _check.real("scale", 1 / math.sqrt(call.query_dim) if scale is None else scale)

    data = random.key_data(rng)
    _primitives.refuse_constant(rng, "Pass the key as an argument of that function.")
    masks = (mask, query_segments, key_segments, lengths)
    given = (query, key, value, base, *(x for x in masks if x is not None))
    data = _primitives.stream_key(data, *given, shared=axes)
    operands = Operands(query, key, value, base, *masks, noise_key=data)
    spec = Spec(
        scale=scale,
        score_cap=mechanism.score_cap,
        is_causal=is_causal,
        on_grid=True,
        window=window,
        **admission.score_precision(precision, mechanism),
    )
    whole = dataclasses.replace(answered, keys=call.keys * parts)
    sent, name = _route(exchange, backend, operands, spec, parts, shard_queries)
    given = operands, spec, mechanism, whole, axes, name
    out: Any = _from_records(*given) if sent == "records" else _from_sums(*given, shard_queries)
    shapes = ((whole.batch, whole.queries, whole.heads, whole.query_dim),)
    shapes += tuple((x.shape[0], whole.keys, *x.shape[2:]) for x in (key, value))
    return _primitives.private_release(
        out.astype(query.dtype), mechanism.event(*shapes), shared=axes
    )


def _reason(mechanism: releases.Mechanism) -> str:
    if isinstance(mechanism, releases.GaussianProcessNoise):
        return (
            "Its noise has directions in which it is small, where float32 sums added over devices "
            "would err by more than it hides (S5, F2 in sensitivity.md)."
        )
    if isinstance(mechanism, releases.SoftmaxNoise | releases.SequenceRelease):
        return "Its noise belongs on the normalised answer, whose sums are not public in size."
    return "It has no noise that would have to be drawn once."
