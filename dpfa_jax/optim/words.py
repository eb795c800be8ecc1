"""Which normals belong to which parameter, on whatever shard its part lies.

Which statement this makes true: the normal of a parameter is a function of the step's key and of
where the parameter stands in the whole tree, never of the mesh; so any number of devices add the
same words, and no two parameters share one.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpfa_jax import random
from dpfa_jax.clipping import partition

_SMALL = 1 << 20  # scalars
_BLOCK = 10  # wide normals in a block

type _Runs = tuple[jax.Array, int]


def _runs(shape: tuple[int, ...], axes: partition.Axes, offset: int) -> _Runs:
    """Flat positions where stretches of a part begin in the whole leaf, and their length."""
    whole, first = partition.whole_shape(shape, axes), partition.first_index(shape, axes)
    cut = [dimension for dimension, names in enumerate(axes) if names]
    last = cut[-1] if cut else 0
    strides = [math.prod(whole[dimension + 1 :]) for dimension in range(len(shape))]
    starts = jnp.full((), offset, jnp.uint32)
    for dimension in range(last):
        index = jnp.arange(shape[dimension], dtype=jnp.uint32) + first[dimension]
        starts = starts[..., None] + index * jnp.uint32(strides[dimension])
    if cut:
        starts = starts + first[last] * jnp.uint32(strides[last])
    return starts.reshape(-1), math.prod(shape[last:])


def _draw(data: jax.Array, runs: Sequence[_Runs]) -> list[jax.Array]:
    """The normals of stretches of one key's wide noise, (stretches, length) each: one draw."""
    blocks = [
        starts[:, None] // _BLOCK
        + jnp.arange((length + 2 * _BLOCK - 2) // _BLOCK, dtype=jnp.uint32)
        for starts, length in runs
    ]
    drawn = random.wide_normals(data, jnp.concatenate([each.reshape(-1) for each in blocks]))
    normals, place = [], 0
    for (starts, length), block in zip(runs, blocks, strict=True):
        held = drawn[place : place + block.size].reshape(starts.size, -1)
        place += block.size
        pairs = zip(held, starts % _BLOCK, strict=True) if len(held) == 1 else ()
        take = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=length)
        alone = [take(row, first) for row, first in pairs]  # no gather for a single stretch
        normals.append(jnp.stack(alone) if alone else jax.vmap(take)(held, starts % _BLOCK))
    return normals


def normals(
    data: jax.Array, shapes: Sequence[tuple[int, ...]], split: Sequence[partition.Axes]
) -> list[jax.Array]:
    """Normals for every leaf: large ones from a key of their own, small ones from one for them all.

    Models have many small leaves, and every draw of its own costs a second of compiling.

    Args:
      data: uint32[8] key data of this step.
      shapes: of each leaf, or of this shard's part of it.
      split: of `partition.split_axes`.

    Returns:
      float32 arrays of the shapes: wide normals at the same addresses on every mesh.

    Raises:
      ValueError: for 2³² scalars or more under one key.

    Guarantee: O6 (words.md).
    """
    sizes = [
        math.prod(partition.whole_shape(shape, axes))
        for shape, axes in zip(shapes, split, strict=True)
    ]
    shared = sum(size for size in sizes if size < _SMALL)
    largest = max(shared, *sizes, 0)
    if largest >= 1 << 32:
        raise ValueError(f"Expected fewer than 2**32 scalars in one array, got {largest}. Cut it.")
    # Drawn together: small leaves that differ along the same mesh axes, so that what is equal on
    # all shards is known to be.
    draws: dict[Any, list[tuple[int, _Runs]]] = {}
    start = 0
    for index, (shape, axes, size) in enumerate(zip(shapes, split, sizes, strict=True)):
        if size < _SMALL:
            key = (len(shapes), partition.names_of(axes))
            draws.setdefault(key, []).append((index, _runs(shape, axes, start)))
            start += size
        else:
            draws[index, None] = [(index, _runs(shape, axes, 0))]
    found: dict[int, jax.Array] = {}
    for (message, _), members in draws.items():
        own = random.fold_in_data(data, jnp.uint32(message))
        drawn = _draw(own, [runs for _, runs in members])
        for (index, _), each in zip(members, drawn, strict=True):
            found[index] = each.reshape(shapes[index])
    return [found[index] for index in range(len(shapes))]
