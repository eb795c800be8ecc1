"""Attention as its definition says, the whole T×S matrix at once, in the dtype of its inputs.

Shares nothing with the library but the meaning of the arguments. Run in float64 it is the truth; in
float32 it is the plain code whose error a backend may double.
"""

import jax
import jax.numpy as jnp


def weights(
    query,
    key,
    log_weights,
    *,
    scale,
    cap=None,
    low=None,
    causal=False,
    window=None,
    mask=None,
    segments=None,
    lengths=None,
):
    """w_ij as (B, N, T, S), and which pairs are visible."""
    batch, length, heads, _ = query.shape
    keys, kv_heads = key.shape[1], key.shape[2]
    key = jnp.repeat(jnp.broadcast_to(key, (batch, *key.shape[1:])), heads // kv_heads, axis=2)
    scores = scale * jnp.einsum("btnh,bsnh->bnts", query, key, precision="highest")
    rows, columns = jnp.arange(length)[:, None], jnp.arange(keys)[None, :]
    seen = jnp.ones((batch, heads, length, keys), bool)
    if causal:
        seen &= columns <= rows
    if window is not None:
        seen &= (columns >= rows - window[0]) & (columns <= rows + window[1])
    if mask is not None:
        seen &= mask
    if segments is not None:
        seen &= (segments[0][:, :, None] == segments[1][:, None, :])[:, None]
    if lengths is not None:
        seen &= (columns < lengths[:, None, None])[:, None]
    log_weights = jnp.broadcast_to(log_weights, (batch, *log_weights.shape[1:]))
    log_weights = jnp.repeat(jnp.swapaxes(log_weights, 1, 2), heads // kv_heads, axis=1)
    seen &= log_weights[:, :, None, :] > -jnp.inf
    if low is not None:
        scores = jnp.maximum(scores, low)
    if cap is None:
        best = jnp.max(jnp.where(seen, scores, -jnp.inf), axis=-1, keepdims=True)
        reference = jnp.where(jnp.isfinite(best), best, 0.0)
    else:
        scores, reference = jnp.minimum(scores, cap), cap
    extra = jnp.where(log_weights > -jnp.inf, log_weights, 0.0)[:, :, None, :]
    exponent = jnp.where(seen, scores - reference + extra, 0.0)
    return jnp.where(seen, jnp.exp(exponent), 0.0), seen


def sums(query, key, value, log_weights, **options):
    """N (B, T, N, h) and D (B, T, N)."""
    batch, heads, kv_heads = query.shape[0], query.shape[2], key.shape[2]
    w, _ = weights(query, key, log_weights, **options)
    value = jnp.broadcast_to(value, (batch, *value.shape[1:]))
    value = jnp.repeat(value, heads // kv_heads, axis=2)
    numerator = jnp.einsum("bnts,bsnh->btnh", w, value, precision="highest")
    return numerator, jnp.swapaxes(jnp.sum(w, -1), 1, 2)


def answer(query, key, value, log_weights, noise, *, floor, ball=None, **options):
    """The ratio after noise = (for N, for D) and floor, projected to the ball."""
    numerator, denominator = sums(query, key, value, log_weights, **options)
    out = (numerator + noise[0]) / jnp.maximum(denominator + noise[1], floor)[..., None]
    if ball is None:
        return out
    norm = jnp.sqrt(jnp.sum(out**2, axis=-1, keepdims=True))
    return out * jnp.minimum(1.0, ball / norm)


def gradients(query, key, value, log_weights, noise, cotangent, **options):
    """Gradients of ⟨answer, cotangent⟩ in query, key, value and log_weights."""

    def loss(*args):
        return jnp.sum(answer(*args, noise, **options) * cotangent)

    return jax.grad(loss, argnums=(0, 1, 2, 3))(query, key, value, log_weights)
