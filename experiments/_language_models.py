"""A byte-level transformer of nanoGPT's size on this library's attention, in linen and in nnx.

Attention carries no noise here: privacy comes from the optimizer, and the library is the backend.
Embeddings are looked up in float32, so that their gradients, which thousands of equal bytes share,
are added in float32 too: on GPUs sums of bfloat16 at one place are slow as well as inexact.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import _text
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import dpfa_jax as dp
from dpfa_jax.linen import PrivateAttention
from dpfa_jax.nnx import PrivateAttention as NnxAttention

_SYMBOLS = 256
"""Bytes. Byte 0, which no text has, stands before the first one and for padding."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Shape of a model: layers, width, heads, and what it computes in."""

    layers: int
    width: int
    heads: int
    dtype: str
    backend: str


def shifted(tokens: jax.Array) -> jax.Array:
    """What the model reads: the window one symbol later, padding as byte 0."""
    clean = jnp.maximum(tokens.astype(jnp.int32), 0)
    return jnp.concatenate([jnp.zeros_like(clean[..., :1]), clean[..., :-1]], -1)


def scores(x: jax.Array, embedding: jax.Array) -> jax.Array:
    """Logits in float32 of a tied embedding, multiplied in the dtype of x."""
    return jnp.dot(x, embedding.astype(x.dtype).T).astype(jnp.float32)


class LinenBlock(nn.Module):
    size: Size

    @nn.compact
    def __call__(self, x):
        size = self.size
        attend = PrivateAttention(
            dp.NonPrivate(), queries="private", is_causal=True, backend=size.backend
        )
        y = nn.LayerNorm(dtype=size.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(
            num_heads=size.heads, dtype=size.dtype, attention_fn=attend, deterministic=True
        )(y)
        y = nn.Dense(4 * size.width, dtype=size.dtype)(nn.LayerNorm(dtype=size.dtype)(x))
        return x + nn.Dense(size.width, dtype=size.dtype)(nn.gelu(y))


class LinenModel(nn.Module):
    size: Size

    @nn.compact
    def __call__(self, tokens):
        size = self.size
        small = nn.initializers.normal(0.02)
        embed = nn.Embed(_SYMBOLS, size.width, embedding_init=small)
        place = self.param("place", small, (_text.WIDTH, size.width), jnp.float32)
        x = (embed(shifted(tokens)) + place[: tokens.shape[-1]]).astype(size.dtype)
        for _ in range(size.layers):
            x = LinenBlock(size)(x)
        return scores(nn.LayerNorm(dtype=size.dtype)(x), embed.embedding)


class NnxBlock(nnx.Module):
    def __init__(self, size: Size, rngs: nnx.Rngs):
        attend = NnxAttention(
            dp.NonPrivate(), queries="private", is_causal=True, backend=size.backend, rngs=rngs
        )
        self.before = nnx.LayerNorm(size.width, dtype=size.dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            size.heads,
            size.width,
            dtype=size.dtype,
            attention_fn=attend,
            decode=False,
            deterministic=True,
            rngs=rngs,
        )
        self.between = nnx.LayerNorm(size.width, dtype=size.dtype, rngs=rngs)
        self.up = nnx.Linear(size.width, 4 * size.width, dtype=size.dtype, rngs=rngs)
        self.down = nnx.Linear(4 * size.width, size.width, dtype=size.dtype, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.before(x))
        return x + self.down(nnx.gelu(self.up(self.between(x))))


class NnxModel(nnx.Module):
    def __init__(self, size: Size, rngs: nnx.Rngs):
        small = nnx.initializers.normal(0.02)
        self.dtype = size.dtype
        self.embed = nnx.Embed(_SYMBOLS, size.width, embedding_init=small, rngs=rngs)
        self.place = nnx.Param(small(rngs.params(), (_text.WIDTH, size.width)))
        self.blocks = nnx.List([NnxBlock(size, rngs) for _ in range(size.layers)])
        self.after = nnx.LayerNorm(size.width, dtype=size.dtype, rngs=rngs)

    def __call__(self, tokens):
        place = self.place[: tokens.shape[-1]]
        x = (self.embed(shifted(tokens)) + place).astype(self.dtype)
        for block in self.blocks:
            x = block(x)
        return scores(self.after(x), self.embed.embedding[...])


def create(size: Size, rng: jax.Array, api: str) -> tuple[Any, Callable[[Any, jax.Array], Any]]:
    """(parameters, logits): the start of training, and the function of parameters and tokens.

    Args:
      size: of the model.
      rng: of the first parameters, public.
      api: "linen" or "nnx".
    """
    window = jnp.zeros(_text.WIDTH, jnp.int16)
    if api == "linen":
        model = LinenModel(size)
        params = jax.jit(model.init)(rng, window)["params"]
        return params, lambda params, tokens: model.apply({"params": params}, tokens)
    made = NnxModel(size, nnx.Rngs(params=rng, privacy=dp.random.fold_in(rng, 1)))
    graph, params, rest = nnx.split(made, nnx.Param, ...)
    return nnx.to_pure_dict(params), lambda params, tokens: nnx.merge(
        graph, _refill(params, nnx.Param), rest
    )(tokens)


def _refill(tree: Any, kind: Any) -> Any:
    """Plain arrays as an nnx state again."""
    return jax.tree.map(kind, tree)


def record_nats(
    logits: Callable[[Any, jax.Array], Any], params: Any, tokens: jax.Array
) -> jax.Array:
    """Mean −ln p of the bytes of each record of (records, windows, bytes), padding left out."""
    windows = tokens.reshape(-1, tokens.shape[-1])
    found, wanted = logits(params, windows), jnp.maximum(windows.astype(jnp.int32), 0)
    # A sum over all symbols instead of a look-up: its derivative needs no scatter.
    own = jnp.where(jnp.arange(found.shape[-1]) == wanted[..., None], found, 0.0)
    losses = jax.nn.logsumexp(found, -1) - jnp.sum(own, -1)
    losses, present = (x.reshape(len(tokens), -1) for x in (losses, windows >= 0))
    return jnp.sum(jnp.where(present, losses, 0.0), -1) / jnp.maximum(jnp.sum(present, -1), 1)


def nats(logits: Callable[[Any, jax.Array], Any], params: Any, tokens: jax.Array) -> jax.Array:
    """Mean −ln p of the bytes of one record's windows, padding left out."""
    return record_nats(logits, params, tokens[None])[0]
