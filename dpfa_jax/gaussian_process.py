"""Attention sums with Gaussian-process noise: one covariance for all queries of a memory.

The statement (S5 in sensitivity.md) leaves no room for rounding in the directions where the noise
is small, so everything here is float64, whatever the surrounding code uses, and the sums meet the
noise before any cast. In unit-diagonal form: with the public radius R of the keys,

    F(q) = Σ_j u_j e^{−γ‖q̂−k̂_j‖²/2} (v_j, c),   u_j = min(e^{γ(‖k̂_j‖²−R²)/2}, C/‖(v_j, c)‖),

which is theory's Σ u κ(q̂, k̂) a times the public constants e^{−γ‖q̂‖²/2} and e^{−γR²/2}. Record j
has norm u_j‖a_j‖ ≤ C in the process's own norm and the noise has covariance e^{−γ‖q̂−q̂'‖²/2}.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from dpfa_jax import _primitives, clipping, random
from dpfa_jax._typing import Operands
from dpfa_jax.doubleword import add_word, grid_step

MAX_SQUARE = 1e4
"""Rows with γ‖row‖² beyond this are NULL (keys) or answered with NaN (queries): float64 would
lose the digits that `weight_error` promises."""

TILE = 512
"""Keys in one tile of the float64 sums."""


@dataclasses.dataclass(frozen=True)
class Process:
    """The public parameters of one Gaussian-process release.

    Attributes:
      gamma: γ > 0, the factor of the scores.
      key_scale: t > 0; keys are multiplied by it and queries divided.
      key_bound: public norm of keys that enter with weight 1, in the unit of the keys.
      value_bound: Cv of the answer's projection.
      denominator_weight: c ≥ 0.
      noise_std: standard deviation of the process at one query, in the unit of the values.
      jitter: λ > 0 on the diagonal.
      jitter_error: largest allowed Frobenius norm of LLᵀ − (K + λI).
      floor: smallest denominator of the answer.
    """

    gamma: float
    key_scale: float
    key_bound: float
    value_bound: float
    denominator_weight: float
    noise_std: float
    jitter: float
    jitter_error: float
    floor: float

    @property
    def clip_norm(self) -> float:
        """C: the bound on every record's norm in the process's own norm."""
        return math.hypot(self.value_bound, self.denominator_weight)


def weight_error(width: int) -> float:
    """Relative error of a float64 weight, for rows within `MAX_SQUARE` and of the given width.

    The exponent is a sum of three products of `width` terms, each at most MAX_SQUARE in magnitude,
    and a logarithm.
    """
    return 4 * MAX_SQUARE * (width + 8) * 2.0**-53


def squares(rows: jax.Array, gamma: float) -> jax.Array:
    """γ‖row‖², without the last axis, in the rows' dtype."""
    return gamma * jnp.sum(jnp.square(rows), axis=-1)


def log_record_weights(key: jax.Array, value: jax.Array, process: Process) -> jax.Array:
    """log u_j in unit-diagonal form, in the dtype of `key`; −∞ for keys beyond `MAX_SQUARE`.

    Args:
      key: finite (..., S, H), already multiplied by `key_scale`.
      value: finite (..., S, h).
      process: the parameters.
    """
    square = squares(key, process.gamma)
    limit = process.gamma * (process.key_scale * process.key_bound) ** 2
    width = jnp.full((*value.shape[:-1], 1), process.denominator_weight, value.dtype)
    norms = clipping.log_row_norms(jnp.concatenate([value, width], axis=-1))
    weights = jnp.minimum((square - limit) / 2, math.log(process.clip_norm) - norms)
    return jnp.where(square <= MAX_SQUARE, weights, -jnp.inf)


def kernel(left: jax.Array, right: jax.Array, gamma: float) -> jax.Array:
    """e^{−γ‖x−y‖²/2} for rows x of left (..., m, H) and y of right (..., n, H)."""
    product = gamma * jnp.einsum("...mh,...nh->...mn", left, right, precision=lax.Precision.HIGHEST)
    exponent = product - squares(left, gamma)[..., :, None] / 2
    return jnp.exp(jnp.minimum(exponent - squares(right, gamma)[..., None, :] / 2, 0.0))


def factor(gram: jax.Array, process: Process) -> tuple[jax.Array, jax.Array]:
    """L with LLᵀ ⪰ K, and whether the certificate ‖LLᵀ − (K + λI)‖_F ≤ jitter_error holds.

    Args:
      gram: float64 (..., m, m) with unit diagonal.
      process: the parameters.
    """
    regular = gram + process.jitter * jnp.eye(gram.shape[-1], dtype=gram.dtype)
    lower = jnp.linalg.cholesky(regular, symmetrize_input=False)
    product = jnp.einsum("...ik,...jk->...ij", lower, lower, precision=lax.Precision.HIGHEST)
    error = jnp.sqrt(jnp.sum(jnp.square(product - regular), axis=(-2, -1)))
    return lower, error <= process.jitter_error  # a NaN is no certificate


def sums(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_weights: jax.Array,
    process: Process,
    same: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """F(q_i) = Σ_j u_j e^{−γ‖q̂_i−k̂_j‖²/2} (v_j, 1), float64 (..., m, h+1).

    Args:
      query: float64 (..., m, H), divided by `key_scale`.
      key: float64 (..., S, H), multiplied by it.
      value: float64 (..., S, h).
      log_weights: float64 (..., S), −∞ for NULL.
      process: the parameters.
      same: segments of the queries (..., m) and keys (..., S); only equal ones meet.
    """
    keys = key.shape[-2]
    tiles = -(-max(keys, 1) // TILE)
    extra = tiles * TILE - keys
    ones = jnp.ones((*value.shape[:-1], 1), value.dtype)
    value = jnp.concatenate([value, ones], axis=-1)

    def tiled(array, axis, fill=0.0):
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, extra)
        array = jnp.pad(array, widths, constant_values=fill)
        axis = axis % array.ndim
        split = (*array.shape[:axis], tiles, TILE, *array.shape[axis + 1 :])
        return jnp.moveaxis(array.reshape(split), axis, 0)

    parts = (tiled(key, -2), tiled(value, -2), tiled(log_weights, -1, -jnp.inf))
    segments = None if same is None else tiled(same[1], -1, -1)

    def step(total, part):
        (key, value, log_weights), segment = part
        product = process.gamma * jnp.einsum(
            "...mh,...nh->...mn", query, key, precision=lax.Precision.HIGHEST
        )
        exponent = product - squares(query, process.gamma)[..., :, None] / 2
        exponent = exponent - squares(key, process.gamma)[..., None, :] / 2
        visible = log_weights[..., None, :] > -jnp.inf
        if same is not None:
            visible &= same[0][..., :, None] == segment[..., None, :]
        bounded = (
            jnp.minimum(exponent, 0.0)
            + jnp.where(log_weights > -jnp.inf, log_weights, 0.0)[..., None, :]
        )
        weights = jnp.where(visible, jnp.exp(bounded), 0.0)
        part = jnp.einsum("...mn,...nh->...mh", weights, value, precision=lax.Precision.HIGHEST)
        return add_word(total[0], total[1], part), None

    start = jnp.zeros((*query.shape[:-1], value.shape[-1]), query.dtype)
    (start, *_) = _primitives.vary_alike(start, query, key, value, log_weights)
    (high, low), _ = lax.scan(step, (start, start), (parts, segments))
    return high + low


def released(total: jax.Array, noise: jax.Array, process: Process) -> jax.Array:
    """The sums (..., h+1) with their noise on the public grid, all float64.

    Args:
      total: the exact sums; the last column is the denominator.
      noise: the process at the queries with standard deviation 1, a column for each.
      process: the parameters. Without a denominator weight the last column becomes the floor.
    """
    weight = process.denominator_weight
    columns = [process.noise_std] * (total.shape[-1] - 1)
    spread = jnp.array([*columns, process.noise_std / weight if weight > 0 else 1.0], total.dtype)
    steps = [grid_step(std) for std in columns]
    step = jnp.array([*steps, grid_step(process.noise_std / (weight or 1.0))], total.dtype)
    noisy = jnp.round((total + spread * noise) / step) * step
    return noisy if weight > 0 else noisy.at[..., -1].set(process.floor)


def _by_memory(array: jax.Array, kv_heads: int, memories: int) -> jax.Array:
    """(B, T, N, ...) to (memories, K, queries, ...)."""
    batch, length, heads, *rest = array.shape
    array = array.reshape(memories, batch // memories, length, kv_heads, heads // kv_heads, *rest)
    array = jnp.moveaxis(array, 3, 1)
    return array.reshape(memories, kv_heads, -1, *rest)


def _by_query(array: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """(memories, K, queries, ...) back to (B, T, N, ...)."""
    batch, length, heads = shape
    memories, kv_heads, _, *rest = array.shape
    array = array.reshape(memories, kv_heads, batch // memories, length, heads // kv_heads, *rest)
    return jnp.moveaxis(array, 1, 3).reshape(batch, length, heads, *rest)


def forward(operands: Operands, process: Process) -> tuple[jax.Array, jax.Array]:
    """Noisy sums of one call, rounded to float32 after the noise: (N, D) in unit-diagonal form.

    Args:
      operands: sanitised arrays; reads `base_log_weights`, and makes the record weights itself.
      process: the parameters.

    Returns:
      N (B, T, N, h) and D (B, T, N); NaN for a query beyond `MAX_SQUARE`, and for every query of a
      memory whose covariance has no certificate.
    """
    return _primitives.wide(_wide_forward, operands, process)  # pyright: ignore


def _wide_forward(operands: Operands, process: Process) -> tuple[jax.Array, jax.Array]:
    shape = operands.query.shape[:3]
    kv_heads, memories = operands.key.shape[2], operands.key.shape[0]
    columns = operands.value.shape[3] + 1
    rows = shape[0] * shape[1] * shape[2] // (memories * kv_heads)
    unit = random.matrix_normals(
        operands.noise_key,
        jnp.arange(memories)[:, None, None],
        jnp.arange(kv_heads)[None, :, None],
        jnp.arange(rows)[None, None, :],
        columns,
    )
    wide = jnp.float64
    query = _by_memory(operands.query.astype(wide), kv_heads, memories) / process.key_scale
    key = jnp.swapaxes(operands.key.astype(wide), 1, 2) * process.key_scale
    value = jnp.swapaxes(operands.value.astype(wide), 1, 2)
    usable = squares(query, process.gamma) <= MAX_SQUARE
    query = jnp.where(usable[..., None], query, 0.0)
    log_weights = log_record_weights(key, value, process)
    log_weights += jnp.swapaxes(operands.base_log_weights.astype(wide), 1, 2)
    gram = kernel(query, query, process.gamma)
    same = None
    if operands.query_segments is not None:
        segments = jnp.broadcast_to(operands.query_segments[:, :, None], shape)
        segments = _by_memory(segments, kv_heads, memories)
        gram = jnp.where(segments[..., :, None] == segments[..., None, :], gram, 0.0)
        keys = operands.key_segments[:, None, :]
        same = (segments, jnp.broadcast_to(keys, (memories, kv_heads, keys.shape[2])))
    lower, certified = factor(gram, process)
    noise = jnp.einsum(
        "...ij,...jc->...ic", lower, unit.astype(wide), precision=lax.Precision.HIGHEST
    )
    total = sums(query, key, value, log_weights, process, same)
    noisy = released(total, noise, process)
    good = usable & certified[..., None]
    noisy = jnp.where(good[..., None], noisy, jnp.nan)
    noisy = _by_query(noisy, shape).astype(jnp.float32)
    return noisy[..., :-1], noisy[..., -1]
