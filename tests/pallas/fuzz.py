"""Random calls of a kernel backend, and what the definition says of them in float64.

Plain NumPy, so that a thousand shapes cost no compilation; shares nothing with the library but the
meaning of `Operands` and `Spec`, and the unit noise.
"""

import jax.numpy as jnp
import numpy as np

from dpfa_jax._typing import Operands, Spec
from tests.pallas import suite

LARGEST = {"batch": 3, "length": 299, "heads": 9, "width": 256}
"""Of the noise that `case` may ask for: that of a smaller call is its corner."""


def case(seed: int) -> tuple[Operands, Spec, np.ndarray]:
    """A random call: operands, spec and cotangent."""
    source = np.random.default_rng(seed)

    def pick(*options):
        return options[source.integers(len(options))]

    batch, kv_heads, group = source.integers(1, 4), source.integers(1, 4), pick(1, 1, 2, 3)
    queries = int(pick(1, 16, 64, 128, source.integers(1, 300)))
    keys = int(pick(queries, 1, 64, source.integers(1, 300), source.integers(300, 1500)))
    width, value_width = (8 * int(pick(8, 16, source.integers(1, 33))) for _ in range(2))
    value_width = pick(width, value_width)
    memories = pick(batch, 1)
    heads = kv_heads * group
    dtype = pick("bfloat16", "float16", "float32")
    query, key, value, cotangent = (
        jnp.asarray(source.normal(size=shape), dtype)
        for shape in (
            (batch, queries, heads, width),
            (memories, keys, kv_heads, width),
            (memories, keys, kv_heads, value_width),
            (batch, queries, heads, value_width),
        )
    )
    weights = -source.exponential(size=(memories, keys, kv_heads)).astype(np.float32)
    weights[source.random(weights.shape) < 0.1] = -np.inf
    extra = {}
    if source.random() < 0.2:
        shape = (pick(1, batch), pick(1, heads), pick(1, queries), keys)
        extra["mask"] = jnp.asarray(source.random(shape) < 0.8)
    if source.random() < 0.2:
        extra["query_segments"] = jnp.asarray(source.integers(0, 3, (batch, queries)), jnp.int32)
        extra["key_segments"] = jnp.asarray(source.integers(0, 3, (memories, keys)), jnp.int32)
    if source.random() < 0.2:
        extra["key_lengths"] = jnp.asarray(source.integers(0, keys + 1, batch), jnp.int32)
    noise = pick("none", "sums", "sums", "rows")
    capped = noise == "sums" or pick(True, False)
    spec = Spec(
        scale=width**-0.5,
        score_cap=float(source.uniform(0, 3)) if capped else None,
        is_causal=pick(True, False),
        window=pick(None, None, (int(source.integers(0, 100)), int(source.integers(0, 100)))),
        noise=noise,
        noise_std=0.01,
        denominator_std=pick(0.01, float("inf")) if noise == "sums" else 0.0,
        # Denominators that lie on one side of it in one format, on the other in another, are rare.
        floor=0.05 if capped else 1e-30,
        row_clip=1.0 if noise == "rows" else None,
    )
    operands = Operands(
        query, key, value, jnp.asarray(weights), noise_key=jnp.asarray(suite.KEY_DATA), **extra
    )
    return operands, spec, np.asarray(cotangent, np.float64)


def _visible(operands: Operands, spec: Spec) -> np.ndarray:
    """Boolean (B, N, T, S)."""
    batch, length, heads, _ = operands.query.shape
    keys = operands.key.shape[1]
    rows, columns = np.arange(length)[:, None], np.arange(keys)[None, :]
    seen = np.ones((batch, heads, length, keys), bool)
    if spec.is_causal:
        seen &= columns <= rows
    if spec.window is not None:
        seen &= (columns >= rows - spec.window[0]) & (columns <= rows + spec.window[1])
    if operands.mask is not None:
        seen &= np.asarray(operands.mask)
    if operands.query_segments is not None:
        ours, theirs = np.asarray(operands.query_segments), np.asarray(operands.key_segments)
        seen &= (ours[:, :, None] == theirs[:, None, :])[:, None]
    if operands.key_lengths is not None:
        seen &= (columns < np.asarray(operands.key_lengths)[:, None, None])[:, None]
    return seen


def definition(operands: Operands, spec: Spec, cotangent: np.ndarray, noise: tuple) -> tuple:
    """Answer and gradients in query, key, value and log_weights, all float64.

    Args:
      operands: from `case`.
      spec: from `case`.
      cotangent: (B, T, N, h).
      noise: unit noise of N and of D, in the corners of arrays (B, T, N, h) and (B, T, N).
    """
    batch, length, heads, _ = operands.query.shape
    memories, _, kv_heads, _ = operands.key.shape
    group = heads // kv_heads

    def wide(array):
        array = np.asarray(array, np.float64)
        array = np.broadcast_to(array, (batch, *array.shape[1:]))
        return np.repeat(np.moveaxis(array, 2, 1), group, axis=1)  # (B, N, S, ...)

    def narrow(array):
        array = array.reshape(batch, kv_heads, group, *array.shape[2:]).sum(2)
        array = np.moveaxis(array, 1, 2)
        return array if memories == batch else array.sum(0, keepdims=True)

    query = np.moveaxis(np.asarray(operands.query, np.float64), 2, 1)
    key, value, extra = wide(operands.key), wide(operands.value), wide(operands.log_weights)
    cotangent = np.moveaxis(cotangent, 2, 1)
    seen = _visible(operands, spec) & (extra > -np.inf)[:, :, None, :]
    scores = spec.scale * query @ np.swapaxes(key, 2, 3)
    if spec.score_cap is None:
        best = np.max(np.where(seen, scores, -np.inf), -1, keepdims=True)
        level = scores - np.where(np.isfinite(best), best, 0.0)
    else:
        level = np.minimum(scores, spec.score_cap) - spec.score_cap
    level = level + np.where(extra > -np.inf, extra, 0.0)[:, :, None, :]
    weights = np.exp(np.where(seen, level, -np.inf))
    top, mass = weights @ value, weights.sum(-1)
    matrix, row = (np.moveaxis(z[:batch, :length, :heads], 2, 1).astype(np.float64) for z in noise)
    matrix = matrix[..., : value.shape[3]]
    if spec.noise == "sums":
        top = top + spec.noise_std * matrix
        if spec.denominator_std < np.inf:
            mass = mass + spec.denominator_std * row
    released = spec.denominator_std < np.inf
    below = np.maximum(mass, spec.floor) if released else np.full_like(mass, spec.floor)
    ratio = top / below[..., None]
    answer, d_ratio = ratio, cotangent
    if spec.row_clip is not None:
        norm = np.maximum(np.linalg.norm(ratio, axis=-1, keepdims=True), 1e-300)
        factor, unit = np.minimum(1.0, spec.row_clip / norm), ratio / norm
        answer = ratio * factor
        along = np.sum(unit * cotangent, -1, keepdims=True) * unit
        d_ratio = factor * np.where(norm > spec.row_clip, cotangent - along, cotangent)
    if spec.noise == "rows":
        answer = answer + spec.noise_std * matrix
    d_top = d_ratio / below[..., None]
    d_mass = -np.sum(d_top * ratio, -1) * (released & (mass > spec.floor))
    d_level = weights * (d_top @ np.swapaxes(value, 2, 3) + d_mass[..., None])
    d_scores = d_level * spec.scale
    if spec.score_cap is not None:
        d_scores = d_scores * (scores < spec.score_cap)
    swapped = np.swapaxes(d_scores, 2, 3)
    return (
        np.moveaxis(answer, 1, 2),
        np.moveaxis(d_scores @ key, 1, 2),
        narrow(swapped @ query),
        narrow(np.swapaxes(weights, 2, 3) @ d_top),
        narrow(d_level.sum(2)),
    )
