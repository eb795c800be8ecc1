"""Real Flax models with a loss of one example, and the definition of a clipped sum in float64."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

BATCH = 6
LENGTH = 5
VOCABULARY = 11
WIDTH = 8


class Language(nn.Module):
    """A causal transformer block with a tied embedding: the same table looks up and reads out."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH, name="embed")
        x = embed(tokens) + self.param("place", nn.initializers.normal(1.0), (LENGTH, WIDTH))
        mask = nn.make_causal_mask(tokens)
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(y, mask=mask)
        y = nn.RMSNorm()(x)
        x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(12)(y)))
        return embed.attend(x)


def language_loss(model, variables, tokens):
    """Mean cross entropy of the next token, of one sequence."""
    logits = model.apply(variables, tokens)[:-1]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:, None], axis=-1)
    return -jnp.mean(chosen)


class Picture(nn.Module):
    """Convolutions, strided and grouped, and a DenseGeneral head over two axes."""

    @nn.compact
    def __call__(self, image):
        x = nn.relu(nn.Conv(4, (3, 3), strides=(2, 2))(image))
        x = nn.GroupNorm(num_groups=2)(x)
        x = nn.relu(nn.Conv(4, (2, 2), feature_group_count=2, use_bias=False)(x))
        return nn.DenseGeneral(3, axis=(-2, -1))(x.mean(axis=0))


def picture_loss(model, variables, image, label):
    """Cross entropy of one picture."""
    return -jax.nn.log_softmax(model.apply(variables, image))[label]


class Sequences(nnx.Module):
    """The layers of Flax NNX: Embed, Linear, LinearGeneral, Conv, norms, attention."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=WIDTH, decode=False, rngs=rngs
        )
        self.root = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.conv = nnx.Conv(WIDTH, WIDTH, kernel_size=(3,), padding="CAUSAL", rngs=rngs)
        self.out = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x))
        x = x + self.conv(self.root(x))
        return self.out(x)


def draw_tokens(seed=0, batch=BATCH):
    """(batch, LENGTH) token ids; rows of very different frequency, so that some repeat a lot."""
    source = np.random.default_rng(seed)
    drawn = source.integers(0, VOCABULARY, (batch, LENGTH))
    drawn[0] = 3  # one token only: its embedding gradient adds up
    return jnp.asarray(drawn, jnp.int32)


@functools.cache
def problem(name):
    """(loss of one example, parameters, batched arguments) of a named model."""
    key = jax.random.key(3)
    tokens = draw_tokens()
    if name == "language":
        model = Language()
        params = jax.jit(model.init)(key, tokens[0])
        return functools.partial(language_loss, model), params, (tokens,)
    if name == "picture":
        model = Picture()
        images = jax.random.normal(key, (BATCH, 6, 6, 2))
        params = jax.jit(model.init)(key, images[0])
        labels = jnp.arange(BATCH) % 3
        return functools.partial(picture_loss, model), params, (images, labels)
    if name == "sequences":
        graph, params = nnx.split(Sequences(nnx.Rngs(5)), nnx.Param)

        def loss(params, tokens):
            logits = nnx.merge(graph, params)(tokens)[:-1]
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:, None], axis=-1)
            return -jnp.mean(chosen)

        return loss, params, (tokens,)
    raise ValueError(name)


def wide(tree):
    """A pytree with its floats in float64; only inside jax.enable_x64."""
    return jax.tree.map(
        lambda x: np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def gradients_one_by_one(loss, params, args):
    """The gradients of every row by itself, in float64 where the model computes in it."""
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(loss))
        params, args = wide(params), wide(tuple(np.asarray(arg) for arg in args))
        rows = [
            jax.tree.map(np.asarray, gradient(params, *(arg[i] for arg in args)))
            for i in range(len(args[0]))
        ]
    return [[np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(row)] for row in rows]


@functools.cache
def exact_rows(name):
    """`gradients_one_by_one` of a named model."""
    return gradients_one_by_one(*problem(name))


def clip_in_order(rows, clip_norm, groups=None):
    """The definition: clip one row after the other and add. `groups`: lists of leaf numbers."""
    groups = [list(range(len(rows[0])))] if groups is None else groups
    norms = np.broadcast_to(clip_norm, len(groups))
    total = [np.zeros_like(leaf) for leaf in rows[0]]
    for row in rows:
        for group, bound in zip(groups, norms, strict=True):
            norm = math.sqrt(sum(np.sum(row[i] ** 2) for i in group))
            for i in group:
                total[i] = total[i] + row[i] * min(1.0, bound / norm if norm else 1.0)
    return total


def distance(tree, leaves):
    """L2 distance of a pytree from a list of arrays, in float64."""
    found = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return math.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(found, leaves, strict=True)))


def length(leaves):
    """L2 norm of everything, in float64."""
    return math.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in leaves))
