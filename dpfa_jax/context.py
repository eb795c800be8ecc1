"""context_parallel_attention: private attention over records that lie on many devices.

Inside `jax.shard_map` every shard holds a part of the records. It sums over its own, without noise;
the sums are added over the shards as integers (lattice.py), and the noise of the one release they
make together is drawn from the one key they share. What comes out is what `private_attention` makes
of all records, up to rounding: the same noise words, the same charge.
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
)
from dpfa_jax._typing import Operands, Spec

_SUPPORTED = (releases.IndependentNoise, releases.ClippedContributions)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static about one call: how each shard sums, and how the sums become an answer."""

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
    matrix, row = _noise(plan, noise_key, numerator[0].shape)
    sums = reference.noisy_sums(plan.spec, numerator, denominator, matrix, row)
    return module.finish(plan.spec, *sums)[0], (operands, sums)


def _noise(plan: _Plan, noise_key: jax.Array, shape: tuple) -> tuple[jax.Array, jax.Array]:
    """The unit noise of this shard's queries: words of the whole call's field."""
    batch, length, heads, width = shape
    if not plan.gathered:
        return reference.noise_field(noise_key, batch, length, heads, width)
    first = lax.axis_index(plan.axes) * length
    batches, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, None, :]
    rows = (first + jnp.arange(length))[None, :, None]
    matrix = random.matrix_normals(noise_key, batches, head, rows, width)
    whole = length * lax.axis_size(plan.axes)
    row = random.row_normals(noise_key, batches[:, :, 0], head[:, 0], whole)  # (B, N, T)
    row, start = _primitives.vary_alike(row, first)
    row = lax.dynamic_slice_in_dim(row, start, length, axis=2)
    return matrix, jnp.swapaxes(row, 1, 2)


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
def _readers(axes: tuple[str, ...], gathered: bool, query: jax.Array) -> jax.Array:
    """All queries, on every shard. Their gradient is added over the shards in float32."""
    if gathered:
        return lax.all_gather(query, axes, axis=1, tiled=True)
    return lax.pcast(query, axes, to="varying")


def _readers_forward(axes, gathered, query):
    return _readers(axes, gathered, query), None


def _readers_backward(axes, gathered, _, cotangent):
    wide = cotangent.astype(jnp.float32)
    if gathered:
        wide = lax.psum_scatter(wide, axes, scatter_dimension=1, tiled=True)
    else:
        wide = lax.psum(wide, axes)
    return (wide.astype(cotangent.dtype),)


_readers.defvjp(_readers_forward, _readers_backward)


def _axes(axis_name: str | Sequence[str]) -> tuple[str, ...]:
    """The mesh axes named, each checked to be one that runs once per shard and is tracked."""
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    known = _primitives.manual_axes()
    for name in names:
        if name not in known:
            raise ValueError(
                f"Expected axis_name to be a manual mesh axis, got {name!r} where there are "
                f"{list(known)}. Call this inside jax.shard_map over that axis."
            )
        if name not in _primitives.varying(lax.axis_index(name)):
            raise ValueError(
                f"Expected a jax.shard_map that knows what differs between shards, got one with "
                f"check_vma=False over {name!r}. Pass check_vma=True: whether every record lies on "
                "one shard, and whether the key is the same on all, cannot be seen otherwise."
            )
    shards = lax.axis_size(names)
    if not names or len(set(names)) < len(names) or shards > lattice.SHARDS:
        raise ValueError(
            f"Expected different mesh axes of at most {lattice.SHARDS} shards together, got "
            f"{names} with {shards}."
        )
    return names


def _check_sharding(axes: tuple[str, ...], sharded: dict[str, Any], shared: dict[str, Any]) -> None:
    for name, value in sharded.items():
        for axis in axes:
            if axis not in _primitives.varying(value):
                raise ValueError(
                    f"Expected {name} to be a part of its own on every shard of {axis!r}, got the "
                    f"same on all of them, shape {value.shape}. Shard its sequence axis over "
                    f"{axis!r} in in_specs: what all shards have would count once for each."
                )
    for name, value in shared.items():
        for axis in axes:
            if value is not None and axis in _primitives.varying(value):
                raise ValueError(
                    f"Expected {name} to be the same on all shards of {axis!r}, got one that may "
                    f"differ, shape {value.shape}. Leave {axis!r} out of its in_specs."
                )


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
    all of them. Answers equal its answers up to rounding.

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
      shard_queries: whether the query axis T is sharded over the same axis. All queries are then
        gathered, (B, P·T, N, H) on each shard, and so are the sums before they are added and
        scattered back; each shard answers its own T queries.
      scale: factor of the scores; None is 1/√H.
      is_causal: query i of all queries sees records at positions j ≤ i of all records.
      local_window_size: as in `private_attention`, in those positions.
      mask: boolean, broadcasts to (B, N, all queries, S): this shard's records.
      segment_ids: integers (B, T) for both, or (query ids, key ids), sharded as query and key are.
      key_value_seq_lengths: integers (B,), lengths of the whole sequences, the same on all shards.
      key_log_weights: (S,), (B, S) or (B, S, K), this shard's part.
      precision: as in `private_attention`.
      backend: "auto", "xla", "triton", or "mosaic_gpu", which takes no mask by position: neither
        is_causal, local_window_size nor key_value_seq_lengths.

    Returns:
      (B, T, N, h) in the query's dtype: the same on all shards of the axis, or with shard_queries
      this shard's part.

    Raises:
      TypeError, ValueError: for arguments that do not fit, for records that are the same on all
        shards, for a key that is not, and inside `shard_map(check_vma=False)`, where neither shows.
      NotImplementedError: for other mechanisms, and if a named backend cannot do the call.

    Guarantee: CP1 (context.md): `mechanism.guarantee` of the shapes of the whole call. It counts
      once in `accounting.events`, whatever the number of shards. S2 and S3 (sensitivity.md).

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
    axes = _axes(axis_name)
    shards = lax.axis_size(axes)
    _check.flag("shard_queries", shard_queries)
    query, key, value = (
        arguments.floating("query", query),
        arguments.floating("key", key),
        arguments.floating("value", value),
    )
    call = releases.Call.of(query.shape, key.shape, value.shape)
    query_segments, key_segments = arguments.segments(segment_ids, call)
    query_ok = clipping.finite_rows(query)
    sharded, shared = {"key": key, "value": value}, {"rng": rng}
    (sharded if shard_queries else shared)["query"] = query
    _check_sharding(axes, sharded, shared)
    readers: Any = jnp.where(query_ok[..., None], query, jnp.zeros((), query.dtype))
    readers = _readers(axes, shard_queries, readers)
    if shard_queries and query_segments is not None:
        query_segments = lax.all_gather(query_segments, axes, axis=1, tiled=True)
    call = releases.Call.of(readers.shape, key.shape, value.shape)
    mask = arguments.boolean_mask(mask, call)
    lengths = arguments.lengths(key_value_seq_lengths, call)
    base = arguments.base_log_weights(key_log_weights, call)
    _check_sharding(axes, {}, {"key_value_seq_lengths": lengths})
    _check.flag("is_causal", is_causal)
    window = arguments.window(local_window_size)
    scale = _check.real("scale", 1 / math.sqrt(call.query_dim) if scale is None else scale)

    data = random.key_data(rng)
    _primitives.refuse_constant(rng, "Pass the key as an argument of that function.")
    masks = (mask, query_segments, key_segments, lengths)
    given = (readers, key, value, base, *(x for x in masks if x is not None))
    data = _primitives.stream_key(data, *given, shared=axes)
    placed = is_causal or window is not None or lengths is not None
    offset = lax.axis_index(axes) * call.keys if placed else None
    operands = Operands(readers, key, value, base, *masks, key_offset=offset)
    spec = Spec(
        scale=scale,
        score_cap=mechanism.score_cap,
        is_causal=is_causal,
        on_grid=True,
        window=window,
        **admission.score_precision(precision, mechanism),
    )
    name = attention.choose_backend(backend, operands, spec)
    module = attention.module_of(name)
    if admission.reads_any_rows(module, mechanism):
        operands, spec = admission.weighted(module, operands, mechanism, spec, judges=False)
    else:
        operands = admission.sanitised(operands, mechanism)
    operands = admission.as_scored(module, operands, spec)
    whole = dataclasses.replace(call, keys=call.keys * shards)
    std = noise_std(mechanism, whole, shards=shards, rounding=module.rounding)
    spec = admission.noisy_spec(spec, mechanism, whole, std)
    operands = admission.clip_contributions(module, operands, spec, mechanism, whole)
    operands = Operands(*_primitives.vary_alike(*operands))
    bounds = lattice.bounds(whole.keys, mechanism.value_bound)
    plan = _Plan(name, spec, axes, shard_queries, bounds)
    out: Any = _attend(plan, operands, data)
    out = jnp.where(query_ok[..., None], out, jnp.nan).astype(query.dtype)
    shapes = ((whole.batch, whole.queries, whole.heads, whole.query_dim),)
    shapes += tuple((x.shape[0], whole.keys, *x.shape[2:]) for x in (key, value))
    return _primitives.private_release(out, mechanism.event(*shapes), shared=axes)


def _reason(mechanism: releases.Mechanism) -> str:
    if isinstance(mechanism, releases.GaussianProcessNoise):
        return (
            "Its noise has directions in which it is small, where float32 sums added over devices "
            "would err by more than it hides (S5, F2 in sensitivity.md)."
        )
    if isinstance(mechanism, releases.SoftmaxNoise | releases.SequenceRelease):
        return "Its noise belongs on the normalised answer, whose sums are not public in size."
    return "It has no noise that would have to be drawn once."
