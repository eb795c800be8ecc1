"""Fixed-reference attention in plain XLA: the definition that every kernel is held against.

Keys are read in tiles of 128 at fixed positions, so that one record changes one tile only. Tiles
are float32 dot products; the running sums are double words (an unevaluated sum of two float32), to
which the noise is added before anything is rounded to one word (F1 in sensitivity.md). Nothing of
size T×S is held.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dpfa_jax import _primitives, clipping, random, sensitivity
from dpfa_jax._typing import Operands, Spec
from dpfa_jax.doubleword import add_word, grid_step, round_after, to_grid

TILE = 128
"""Keys in one tile."""

WEIGHT_ERROR = 2.0**-13
"""Relative excess of a record's contribution over its bound: norms of up to 2³² terms summed in
blocks of 1024 (6.3e-5 of the square, half of it of the norm) and of up to 128 shards (7.6e-6),
their logarithms (magnitude ≤ 180 at 2⁻²⁴), scores that round otherwise (`_SCORES_APART`), and the
exponential."""

_SCORES_APART = 2.0**-15
"""By which a score may be larger than that of which a record's norm was made."""


def supports(operands: Operands, spec: Spec) -> str | None:
    """Why this backend cannot take the call, or None: the definition takes all of them."""
    del operands, spec
    return None


def rounding(keys: int) -> float:
    """Relative growth of a sensitivity by this backend's arithmetic, for a memory of `keys` rows.

    Returns:
      Upper bound of the weights' and the sums' share together.

    Guarantee: F1 (sensitivity.md).
    """
    sums = sensitivity.summation_rounding(keys=max(keys, 1), tile=TILE)
    return (1 + WEIGHT_ERROR) * (1 + sums) - 1


def pad_keys(operands: Operands) -> tuple[Operands, int]:
    """The call with NULL keys added up to a whole number of tiles, and that number."""
    keys = operands.key.shape[1]
    tiles = -(-max(keys, 1) // TILE)
    extra = tiles * TILE - keys

    def pad(array, axis, fill: Any = 0):
        if array is None or array.shape[axis] != keys:
            return array
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, extra)
        return jnp.pad(array, widths, constant_values=fill)

    if extra == 0:
        return operands, tiles
    mask = operands.mask
    if mask is not None and mask.shape[3] == keys:
        mask = pad(mask, 3, False)
    padded = operands._replace(
        key=pad(operands.key, 1),
        value=pad(operands.value, 1),
        log_weights=pad(operands.log_weights, 1, -jnp.inf),
        key_segments=pad(operands.key_segments, 1, -1),
        mask=mask,
    )
    return padded, tiles


def _slice(array, start, axis):
    return lax.dynamic_slice_in_dim(array, start, TILE, axis)


def visible(operands: Operands, spec: Spec, start: Any, size: int) -> jax.Array:
    """Which keys start..start+size each query may see: boolean, broadcasts to (B, N, T, size)."""
    length = operands.query.shape[1]
    rows = jnp.arange(length)[:, None]
    columns = start + jnp.arange(size)[None, :]
    if operands.key_offset is not None:
        columns += operands.key_offset
    allowed = jnp.ones((1, 1, length, size), bool)
    if spec.is_causal:
        allowed &= columns <= rows
    if spec.window is not None:
        left, right = spec.window
        allowed &= (columns >= rows - left) & (columns <= rows + right)
    if operands.key_lengths is not None:
        allowed &= columns < operands.key_lengths[:, None, None, None]
    if operands.key_segments is not None:
        keys = lax.dynamic_slice_in_dim(operands.key_segments, start, size, 1)
        allowed &= (operands.query_segments[:, :, None] == keys[:, None, :])[:, None]
    if operands.mask is not None:
        mask = operands.mask
        if mask.shape[3] != 1:
            mask = lax.dynamic_slice_in_dim(mask, start, size, 3)
        allowed &= mask
    return allowed


def _grouped(query: jax.Array, kv_heads: int) -> jax.Array:
    batch, length, heads, width = query.shape
    return query.astype(jnp.float32).reshape(batch, length, kv_heads, heads // kv_heads, width)


def _tile(operands: Operands, spec: Spec, query: jax.Array, index: jax.Array):
    """Scores (B, K, G, T, tile) and visibility of one tile of keys."""
    start = index * TILE
    batch = query.shape[0]
    key = _slice(operands.key, start, 1).astype(jnp.float32)
    key = jnp.broadcast_to(key, (batch, *key.shape[1:]))
    scores = jnp.einsum("btkgh,bskh->bkgts", query, key, precision=spec.precision) * spec.scale
    allowed = visible(operands, spec, start, TILE)
    heads = allowed.shape[1]
    if heads == 1:
        allowed = allowed[:, :, None]
    else:
        allowed = allowed.reshape(
            allowed.shape[0], query.shape[2], query.shape[3], *allowed.shape[2:]
        )
    # Finite rows may overflow: to ∞, which is a very large score, or to ∞ − ∞, which is none.
    allowed &= ~jnp.isnan(scores)
    scores = jnp.clip(scores, -1e38, 1e38)
    log_weights = _slice(operands.log_weights, start, 1)
    log_weights = jnp.swapaxes(log_weights, 1, 2)[:, :, None, None, :]
    allowed &= log_weights > -jnp.inf
    return key, scores, allowed, jnp.where(log_weights > -jnp.inf, log_weights, 0.0)


def tile_scores(operands: Operands, spec: Spec, index: jax.Array) -> jax.Array:
    """Scores (B, T, N, TILE) of one tile of padded keys; NaN where a pair is not finite."""
    query = _grouped(operands.query, operands.key.shape[2])
    _, scores, _, _ = _tile(operands, spec, query, index)
    batch, length, heads, _ = operands.query.shape
    return jnp.moveaxis(scores, 3, 1).reshape(batch, length, heads, TILE)


def _weights(spec: Spec, scores, allowed, log_weights, reference):
    level = scores
    if spec.score_low is not None:
        level = jnp.maximum(level, spec.score_low)
    if spec.score_cap is not None:
        level = jnp.minimum(level, spec.score_cap)
    return jnp.where(allowed, jnp.exp((level - reference) + log_weights), 0.0)


def row_maximum(operands: Operands, spec: Spec) -> jax.Array:
    """The largest visible score of each query, (B, K, G, T) float32; 0 where it sees nothing."""
    operands, tiles = pad_keys(operands)
    query = _grouped(operands.query, operands.key.shape[2])
    batch, length, kv_heads, group, _ = query.shape

    def step(best, index):
        _, scores, allowed, _ = _tile(operands, spec, query, index)
        return jnp.maximum(best, jnp.max(jnp.where(allowed, scores, -jnp.inf), -1)), None

    start = jnp.full((batch, kv_heads, group, length), -jnp.inf)
    (start, *_) = _primitives.vary_alike(start, *operands)
    best, _ = lax.scan(step, start, jnp.arange(tiles))
    return jnp.where(jnp.isfinite(best), best, 0.0)


def _reference(operands: Operands, spec: Spec):
    if operands.query_reference is not None:
        kv_heads = operands.key.shape[2]
        batch, length, heads = operands.query_reference.shape
        grouped = operands.query_reference.reshape(batch, length, kv_heads, heads // kv_heads)
        return jnp.moveaxis(grouped, 1, 3)[..., None]
    if spec.score_cap is not None:
        return spec.score_cap
    return row_maximum(operands, spec)[..., None]


@functools.partial(jax.jit, static_argnames="spec")
def sums(operands: Operands, spec: Spec) -> tuple[tuple, tuple]:
    """N = Σ_j w_ij v_j and D = Σ_j w_ij without noise, each as a double word.

    Args:
      operands: the call's arrays.
      spec: scale, cap and masks; its noise is not used.

    Returns:
      ((N high, N low), (D high, D low)), float32 of shapes (B, T, N, h) and (B, T, N).
    """
    reference = _reference(operands, spec)
    operands, tiles = pad_keys(operands)
    query = _grouped(operands.query, operands.key.shape[2])
    batch, length, kv_heads, group, _ = query.shape
    width = operands.value.shape[3]

    def step(carry, index):
        n, d = carry
        _, scores, allowed, log_weights = _tile(operands, spec, query, index)
        weights = _weights(spec, scores, allowed, log_weights, reference)
        value = _slice(operands.value, index * TILE, 1).astype(jnp.float32)
        value = jnp.broadcast_to(value, (batch, *value.shape[1:]))
        # Never a reduced-precision product: its error would count against the guarantee.
        part = jnp.einsum("bkgts,bskh->btkgh", weights, value, precision=lax.Precision.HIGHEST)
        mass = jnp.moveaxis(jnp.sum(weights, axis=-1), 3, 1)
        return (add_word(n[0], n[1], part), add_word(d[0], d[1], mass)), None

    zero_n = jnp.zeros((batch, length, kv_heads, group, width))
    zero_d = jnp.zeros((batch, length, kv_heads, group))
    zero_n, zero_d, *_ = _primitives.vary_alike(zero_n, zero_d, *operands)
    carry, _ = lax.scan(step, ((zero_n, zero_n), (zero_d, zero_d)), jnp.arange(tiles))
    heads = kv_heads * group
    numerator = tuple(word.reshape(batch, length, heads, width) for word in carry[0])
    denominator = tuple(word.reshape(batch, length, heads) for word in carry[1])
    return numerator, denominator


@functools.partial(jax.jit, static_argnames="spec")
def plain_column_squares(operands: Operands, spec: Spec) -> jax.Array:
    """Σ_i w_ij² over the queries and heads that read key j: (B, S, K) float32.

    The batch axis is the queries' one even where the key batch is 1; the caller adds it up. Of
    scores as they round here.
    """
    reference = _reference(operands, spec)
    keys = operands.key.shape[1]
    operands, tiles = pad_keys(operands)
    query = _grouped(operands.query, operands.key.shape[2])

    def step(_, index):
        _, scores, allowed, log_weights = _tile(operands, spec, query, index)
        weights = _weights(spec, scores, allowed, log_weights, reference)
        return None, jnp.sum(clipping.stable_sum(jnp.square(weights), axis=3), axis=2)

    _, squares = lax.scan(step, None, jnp.arange(tiles))
    squares = jnp.moveaxis(squares, 0, 2)  # (B, K, tiles, tile)
    squares = squares.reshape(*squares.shape[:2], -1)[..., :keys]
    return jnp.swapaxes(squares, 1, 2)


@functools.partial(jax.jit, static_argnames="spec")
def column_squares(operands: Operands, spec: Spec) -> jax.Array:
    """At least Σ_i w_ij² of the weights that `sums` has: (B, S, K) float32.

    The compiler may order the additions of a product otherwise here and there, by its shape or by
    what is done with it. Where that could move a score by so much that the excess of a norm is not
    in `WEIGHT_ERROR`, the squares are raised by as much; never above those of the largest weights,
    which count where a score could move by 1 or more, as for keys made so long that their scores
    are rounding errors.
    """
    squares = plain_column_squares(operands, spec)
    batch, length, heads, width = operands.query.shape
    kv_heads = operands.key.shape[2]
    # Two evaluations, each within (H+2)·2⁻²⁴ of ‖q‖‖k‖, and as much again for units that make a
    # float32 product of narrower ones; rows may be rounded to bfloat16 for precisions below.
    unit = (width + 2) * 2.0**-22
    if spec.precision != lax.Precision.HIGHEST:
        unit += 2.0**-7
    lengths = clipping.log_row_norms(operands.query.astype(jnp.float32))
    lengths = lengths.reshape(batch, length, kv_heads, heads // kv_heads)
    longest = jnp.max(lengths, axis=(1, 3), initial=-jnp.inf)[:, None, :]
    key_lengths = clipping.log_row_norms(operands.key.astype(jnp.float32))
    apart = unit * abs(spec.scale) * jnp.exp(longest + key_lengths)
    raised = jnp.where(apart <= _SCORES_APART, squares, squares * jnp.exp(2 * apart))
    most = length * (heads // kv_heads) * jnp.exp(2 * operands.log_weights)
    # Not so for NaN either. Below 1 no weight is lost to underflow that could be more than e⁻⁸⁶.
    return jnp.where(apart < 1, jnp.minimum(raised, most), most)


@functools.partial(jax.jit, static_argnames=("batch", "length", "heads", "width"))
def noise_field(
    data: jax.Array, batch: int, length: int, heads: int, width: int, first: Any = None
) -> tuple:
    """The unit noise of one call: (B, T, N, h) for the rows and (B, T, N) for the denominators.

    From row `first` on where there is one.
    """
    batches = jnp.arange(batch)[:, None, None]
    rows = jnp.arange(length)[None, :, None]
    rows = rows if first is None else rows + first
    heads_ = jnp.arange(heads)[None, None, :]
    matrix = random.matrix_normals(data, batches, heads_, rows, width)
    row = random.row_normals(data, batches[:, :, 0], heads_[:, 0], length, first)  # (B, N, T)
    return matrix, jnp.swapaxes(row, 1, 2)


def answer(spec: Spec, numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """What is made of the sums: ratio, floor, projection; clipped rows where `row_clip` says so."""
    if spec.denominator_std == float("inf"):
        ratio = numerator / spec.floor
    else:
        if spec.noise != "sums":
            # A query that sees nothing is answered by 0, whose gradient is 0, not 0·∞. With noise 0
            # is a denominator like others.
            numerator = jnp.where(denominator[..., None] != 0, numerator, 0.0)
        # Not a maximum: its derivative multiplies by 0 what may have overflowed.
        safe = jnp.where(denominator > spec.floor, denominator, spec.floor)
        ratio = numerator / safe[..., None]
    bound = spec.ball if spec.ball is not None else spec.row_clip
    return ratio if bound is None else clipping.clip_rows(ratio, bound)


@functools.partial(jax.jit, static_argnames="spec")
def forward(operands: Operands, spec: Spec) -> tuple[jax.Array, tuple]:
    """The answer (B, T, N, h) in float32, and the residuals that `backward` wants.

    Args:
      operands: the call's arrays; `noise_key` is needed unless `spec.noise` is "none".
      spec: the static description.

    Returns:
      The answer, and (noisy) sums from which the gradient's coefficients are recomputed.
    """
    (high, low), (mass_high, mass_low) = sums(operands, spec)
    if spec.noise == "none":
        residuals = (high + low, mass_high + mass_low)
        return answer(spec, *residuals), residuals
    matrix, row = noise_field(operands.noise_key, *high.shape, operands.noise_row)
    if spec.noise == "rows":
        residuals = (high + low, mass_high + mass_low)
        return _released(spec, answer(spec, *residuals), spec.noise_std, matrix), residuals
    return finish(spec, *noisy_sums(spec, (high, low), (mass_high, mass_low), matrix, row))


def noisy_sums(
    spec: Spec, numerator: tuple, denominator: tuple, matrix: jax.Array, row: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sums with their noise, rounded to one word after it.

    Args:
      spec: says how much noise.
      numerator: (B, T, N, h), two words.
      denominator: (B, T, N), two words.
      matrix: unit noise (B, T, N, h).
      row: unit noise (B, T, N).
    """
    high, low = numerator
    noisy = _released(spec, high, spec.noise_std, matrix, low)
    high, low = denominator
    if spec.denominator_std == float("inf"):
        return noisy, jnp.zeros_like(high)
    return noisy, _released(spec, high, spec.denominator_std, row, low)


def finish(spec: Spec, numerator: jax.Array, denominator: jax.Array) -> tuple[jax.Array, tuple]:
    """The answer made of noisy sums, and the residuals that `backward` wants.

    Args:
      spec: of the call.
      numerator: (B, T, N, h).
      denominator: (B, T, N).
    """
    return answer(spec, numerator, denominator), (numerator, denominator)


def _released(spec, high, noise_std, unit, low=None):
    noise = noise_std * unit
    noisy = high + noise if low is None else round_after(high, low, noise)
    return to_grid(noisy, grid_step(noise_std)) if spec.on_grid else noisy


@functools.partial(jax.jit, static_argnames="spec")
def backward(operands: Operands, spec: Spec, residuals: tuple, cotangent: jax.Array) -> tuple:
    """Gradients of the answer in query, key, value and log_weights, the noise held fixed.

    Not a release: a gradient through a private answer is computed from the private rows.

    Args:
      operands: as in `forward`.
      spec: as in `forward`.
      residuals: what `forward` returned: the sums after the noise.
      cotangent: (B, T, N, h) float32.

    Returns:
      (d query, d key, d value, d log_weights, d query_reference), float32, in the operands'
      shapes; the last is None where the call has none.
    """
    _, pull = jax.vjp(lambda n, d: answer(spec, n, d), *residuals)
    d_numerator, d_denominator = pull(cotangent.astype(jnp.float32))
    shape = operands.key.shape[0], operands.key.shape[1]
    reference = _reference(operands, spec)
    operands, tiles = pad_keys(operands)
    kv_heads = operands.key.shape[2]
    query = _grouped(operands.query, kv_heads)
    batch, length, _, group, width = query.shape
    d_numerator = d_numerator.reshape(batch, length, kv_heads, group, -1)
    d_denominator = jnp.moveaxis(d_denominator.reshape(batch, length, kv_heads, group), 1, 3)

    def step(carry, index):
        d_query, d_reference = carry
        key, scores, allowed, log_weights = _tile(operands, spec, query, index)
        weights = _weights(spec, scores, allowed, log_weights, reference)
        value = _slice(operands.value, index * TILE, 1).astype(jnp.float32)
        value = jnp.broadcast_to(value, (batch, *value.shape[1:]))
        d_weights = jnp.einsum("btkgh,bskh->bkgts", d_numerator, value, precision=spec.precision)
        d_level = weights * (d_weights + d_denominator[..., None])
        d_scores = d_level
        if spec.score_cap is not None:
            d_scores = jnp.where(scores < spec.score_cap, d_scores, 0.0)
        if spec.score_low is not None:
            d_scores = jnp.where(scores > spec.score_low, d_scores, 0.0)
        d_scores = d_scores * spec.scale
        d_query += jnp.einsum("bkgts,bskh->btkgh", d_scores, key, precision=spec.precision)
        d_key = jnp.einsum("bkgts,btkgh->bskh", d_scores, query, precision=spec.precision)
        d_value = jnp.einsum("bkgts,btkgh->bskh", weights, d_numerator, precision=spec.precision)
        d_reference -= jnp.sum(d_level, axis=-1)
        d_log_weights = jnp.swapaxes(jnp.sum(d_level, axis=(2, 3)), 1, 2)
        return (d_query, d_reference), (d_key, d_value, d_log_weights)

    zero = (jnp.zeros_like(query), jnp.zeros_like(d_denominator))
    zero = _primitives.vary_alike(*zero, *operands, d_numerator)[:2]
    (d_query, d_reference), parts = lax.scan(step, zero, jnp.arange(tiles))

    def join(part):
        part = jnp.moveaxis(part, 0, 1)
        part = part.reshape(batch, tiles * TILE, *part.shape[3:])[:, : shape[1]]
        return part if shape[0] == batch else jnp.sum(part, axis=0, keepdims=True)

    heads = kv_heads * group
    d_query = d_query.reshape(batch, length, heads, width)
    if operands.query_reference is None:
        return (d_query, *map(join, parts), None)
    d_reference = jnp.moveaxis(d_reference, 3, 1).reshape(batch, length, heads)
    return (d_query, *map(join, parts), d_reference)
