"""GPT-2 as a Flax user writes it: bfloat16 arithmetic, float32 parameters, tied embedding."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Size:
    """Shape of a model: layers, width, heads, symbols of its vocabulary."""

    layers: int
    width: int
    heads: int
    vocabulary: int


class Block(nn.Module):
    size: Size
    attention: Literal["xla", "cudnn"]

    @nn.compact
    def __call__(self, x):
        size, dtype = self.size, jnp.bfloat16
        y = nn.Dense(3 * size.width, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x))
        heads = (*x.shape[:-1], size.heads, size.width // size.heads)
        query, key, value = (part.reshape(heads) for part in jnp.split(y, 3, axis=-1))
        y = jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation=self.attention
        )
        x = x + nn.Dense(size.width, dtype=dtype)(y.reshape(x.shape))
        y = nn.Dense(4 * size.width, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x))
        return x + nn.Dense(size.width, dtype=dtype)(nn.gelu(y))


class Model(nn.Module):
    size: Size
    length: int
    remat: bool
    attention: Literal["xla", "cudnn"]

    @nn.compact
    def __call__(self, tokens):
        size, dtype, small = self.size, jnp.bfloat16, nn.initializers.normal(0.02)
        embed = nn.Embed(size.vocabulary, size.width, dtype=dtype, embedding_init=small)
        place = self.param("place", small, (self.length, size.width), jnp.float32)
        x = embed(tokens) + place.astype(dtype)
        block = nn.remat(Block) if self.remat else Block
        for number in range(size.layers):
            x = block(size, self.attention, name=f"block_{number}")(x)
        return embed.attend(nn.LayerNorm(dtype=dtype)(x)).astype(jnp.float32)


def create(
    size: Size, length: int, remat: bool, attention: Literal["xla", "cudnn"]
) -> tuple[Callable[[jax.Array], Any], Callable[[Any, jax.Array], jax.Array]]:
    """(initializer, loss): the loss is the mean over all tokens of one row, or of several.

    Args:
      size: of the model.
      length: tokens of a row that are predicted; a row has one more.
      remat: whether blocks are computed again in the backward pass.
      attention: implementation of `jax.nn.dot_product_attention`.
    """
    model = Model(size, length, remat, attention)

    def loss(params, tokens):
        logits: Any = model.apply({"params": params}, tokens[..., :-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[..., 1:]))

    return lambda rng: model.init(rng, jnp.zeros(length, jnp.int32))["params"], loss
