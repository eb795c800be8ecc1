"""The one noise source: ChaCha bits and Box-Muller normals, addressed by global element index.

Every backend computes the same words: the generator needs only add, xor and rotate on uint32, and
the block that holds the noise of element (batch, head, row, column) is a fixed public function of
that index, never of a tile, a chunk or a device. One block (16 words) serves 16 normals, so a
kernel never computes one block per element.

Addresses (the four counter words of a ChaCha block; RFC 8439, section 2.3):

| word | matrix noise | one normal per row | bits, split, fold_in |
| --- | --- | --- | --- |
| 12 | row | row >> 4 | counter |
| 13 | (column >> 6) << 2 or-ed with (column >> 1) & 3 | 0 | bit width, or 0 |
| 14 | batch | batch | 0 |
| 15 | domain << 24 or-ed with head | the same | domain << 24 |

Domains: 1 matrix noise, 2 row noise, 3 bits, 4 split, 5 fold_in, 6 seed, 7 expanded keys, 8 the
history of a memory (memory/history.py), 9 wide noise (word 12 is the block of ten normals).

A matrix block therefore owns the columns 64c + 8j + 2t + {0, 1}, j = 0..7: word pair j gives the
two normals of that column pair, which is what one thread of a tensor-core accumulator holds. A row
block owns rows 16r + {0..15}: word pair j gives rows j and j + 8.

What is promised: uniform words that nobody without the 256-bit key can tell from random, as far as
is known for ChaCha with `ROUNDS` rounds; no library guarantee speaks about anything but ideal
random bits. What is not: `jax.random.normal`, even on these keys, builds its normals from 23 bits;
use `normal` from here.
"""

import functools
import math
import os
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.core as jax_core
import jax.extend.random
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from dpfa_jax import _check
from dpfa_jax.box_muller import normal_pair as normal_pair
from dpfa_jax.box_muller import wide_pair as wide_pair

ROUNDS = 8
"""Rounds of the generator, used everywhere. The best published attacks reach 7 of them."""

RADIUS_BITS = 40
"""Bits of the Box-Muller radius: the noise ends at √(2·40·ln 2) = 7.45 standard deviations."""

WIDE_RADIUS_BITS = 64
"""Bits of the radius of wide noise, which ends at √(2·64·ln 2) = 9.42 standard deviations."""

Words = tuple[jax.Array, ...]

_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
_MATRIX, _ROW, _BITS, _SPLIT, _FOLD, _SEED, _EXPAND = range(1, 8)
_WIDE = 9
_MAX_HEADS = 1 << 24


def _rotate(word: jax.Array, bits: int) -> jax.Array:
    return (word << bits) | (word >> (32 - bits))


def _quarter_round(a, b, c, d):
    a = a + b
    d = _rotate(d ^ a, 16)
    c = c + d
    b = _rotate(b ^ c, 12)
    a = a + b
    d = _rotate(d ^ a, 8)
    c = c + d
    b = _rotate(b ^ c, 7)
    return a, b, c, d


def _double_round(state: Words) -> Words:
    x = list(state)
    for column in range(4):
        i, j, k, m = (column + 4 * row for row in range(4))
        x[i], x[j], x[k], x[m] = _quarter_round(x[i], x[j], x[k], x[m])
    for column in range(4):
        i, j, k, m = (4 * row + (column + row) % 4 for row in range(4))
        x[i], x[j], x[k], x[m] = _quarter_round(x[i], x[j], x[k], x[m])
    return tuple(x)


def chacha_block(
    key: Words, address: Words, *, rounds: int = ROUNDS, unroll: bool = False
) -> Words:
    """One ChaCha block per address, as 16 arrays of uint32 words.

    Args:
      key: eight uint32 arrays (or scalars), the 256-bit key.
      address: four uint32 arrays, words 12 to 15 of the state; all eight and four broadcast.
      rounds: 8, 12 or 20.
      unroll: whether the rounds are unrolled, as a kernel wants; unrolled outside a kernel they
        cost minutes of compile time.

    Returns:
      Sixteen uint32 arrays of the common shape.

    Source: RFC 8439, section 2.3 (20 rounds); Bernstein 2008 for 8 and 12.
    """
    _check.choice("rounds", rounds, (8, 12, 20))
    shape = jnp.broadcast_shapes(*(jnp.shape(word) for word in (*key, *address)))
    initial = tuple(
        jnp.broadcast_to(jnp.asarray(word, jnp.uint32), shape)
        for word in (*(jnp.uint32(c) for c in _CONSTANTS), *key, *address)
    )
    if not unroll:
        return _rolled_block(initial, rounds)
    state = initial
    for _ in range(rounds // 2):
        state = _double_round(state)
    return tuple(a + b for a, b in zip(state, initial, strict=True))


# Jitted here, so that an eager caller compiles the loop once for each shape, not at every call.
@functools.partial(jax.jit, static_argnames="rounds")
def _rolled_block(initial: Words, rounds: int) -> Words:
    # A broadcast constant does not vary over a manual mesh axis and the loop's result does.
    token = sum((word ^ word for word in initial[5:]), initial[4] ^ initial[4])
    state = tuple(word + token for word in initial)
    state = lax.fori_loop(0, rounds // 2, lambda _, words: _double_round(words), state)
    return tuple(a + b for a, b in zip(state, initial, strict=True))


def _key_words(data: jax.Array) -> Words:
    return tuple(data[..., i] for i in range(8))


def _u32(x) -> jax.Array:
    return jnp.asarray(x, jnp.uint32)


def _address(first: Any, second: Any, third: Any, domain: int, head: Any = 0) -> Words:
    tagged = (jnp.uint32(domain) << 24) | _u32(head)
    return (_u32(first), _u32(second), _u32(third), tagged)


@functools.partial(jax.jit, static_argnames="columns")
def matrix_normals(
    data: jax.Array, batch: ArrayLike, head: ArrayLike, row: ArrayLike, columns: int
) -> jax.Array:
    """The normals of whole rows: element (batch, head, row, column) of the noise field.

    Args:
      data: uint32[8] key data (`key_data`).
      batch: global batch indices, any integer shape that broadcasts with `head` and `row`.
      head: global head indices, < 2²⁴.
      row: global row indices.
      columns: number of columns, from column 0.

    Returns:
      float32 array of the broadcast shape with one more axis of length `columns`.
    """
    chunks = -(-columns // 64)
    # A narrow matrix needs only the first blocks and word pairs of its one chunk.
    lanes = min(4, -(-columns // 2))
    pairs = 8 if chunks > 1 else -(-columns // 8)
    block = jnp.arange(4 * chunks, dtype=jnp.uint32).reshape(chunks, 4)[:, :lanes].reshape(-1)
    place = (_u32(row)[..., None], block, _u32(batch)[..., None])
    words = chacha_block(_key_words(data), _address(*place, _MATRIX, _u32(head)[..., None]))
    # Words are put in order, not normals: with a transposed stack of normals 2²⁵ of them took XLA
    # 2.4 ms on an H100, so .77.
    ordered = [word.reshape(*word.shape[:-1], chunks, lanes) for word in words[: 2 * pairs]]
    first, second = jnp.stack(ordered[0::2], -2), jnp.stack(ordered[1::2], -2)
    noise = jnp.stack(normal_pair(first, second), -1)  # (..., chunks, j, lanes, 2)
    return noise.reshape(*noise.shape[:-4], chunks * pairs * lanes * 2)[..., :columns]


@functools.partial(jax.jit, static_argnames="rows")
def row_normals(
    data: jax.Array, batch: ArrayLike, head: ArrayLike, rows: int, first: ArrayLike | None = None
) -> jax.Array:
    """One normal per row: element (batch, head, row) of a noise field apart from the matrix one.

    Args:
      data: uint32[8] key data (`key_data`).
      batch: global batch indices, any shape that broadcasts with `head`.
      head: global head indices, < 2²⁴.
      rows: number of rows.
      first: row from which they count; None is 0.

    Returns:
      float32 array of the broadcast shape with one more axis of length `rows`.
    """
    # From a row inside a block on there may be one more.
    blocks = -(-rows // 16) + (first is not None)
    block = jnp.arange(blocks, dtype=jnp.uint32)
    if first is not None:
        block += _u32(first) >> 4
    words = chacha_block(
        _key_words(data),
        _address(block, 0, _u32(batch)[..., None], _ROW, _u32(head)[..., None]),
    )
    pairs = [jnp.stack(normal_pair(words[2 * j], words[2 * j + 1]), -1) for j in range(8)]
    noise = jnp.swapaxes(jnp.stack(pairs, -2), -1, -2)  # (..., blocks, parity, j)
    noise = noise.reshape(*noise.shape[:-3], 16 * blocks)
    if first is None:
        return noise[..., :rows]
    return lax.dynamic_slice_in_dim(noise, _u32(first) & 15, rows, axis=-1)


@jax.jit
def wide_normals(data: jax.Array, block: jax.Array) -> jax.Array:
    """Blocks of the wide noise: block b holds its normals 10b to 10b + 9.

    Args:
      data: uint32[8] key data (`key_data`).
      block: uint32 numbers of blocks, any shape.

    Returns:
      float32 array with one more axis of length 10.
    """
    words = chacha_block(_key_words(data), _address(block, 0, 0, _WIDE))
    pairs = [jnp.stack(wide_pair(*words[3 * j : 3 * j + 3]), -1) for j in range(5)]
    return jnp.stack(pairs, -2).reshape(*block.shape, 10)


def _first_words(words: Words) -> jax.Array:
    return jnp.stack(words[:8], axis=-1)


def _seed(seed: jax.Array) -> jax.Array:
    wide = seed.dtype.itemsize == 8
    low = (seed & 0xFFFFFFFF if wide else seed).astype(jnp.uint32)
    high = lax.shift_right_logical(seed, jnp.asarray(32, seed.dtype)) if wide else 0
    zeros = (jnp.uint32(0),) * 6
    return _first_words(chacha_block((low, _u32(high), *zeros), _address(0, 0, 0, _SEED)))


def _split(data: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    counter = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    return _first_words(chacha_block(_key_words(data), _address(counter, 0, 0, _SPLIT)))


def fold_in_data(data: jax.Array, message: Any) -> jax.Array:
    """Key data derived from key data for one uint32 message: `fold_in` below the key type.

    Args:
      data: uint32[..., 8].
      message: uint32 scalar, or an array that broadcasts with the leading axes.

    Returns:
      uint32[..., 8].
    """
    return _first_words(chacha_block(_key_words(data), _address(message, 0, 0, _FOLD)))


def _random_bits(data: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    size = math.prod(shape)
    count = 2 * size if bit_width == 64 else size
    if count >= 1 << 36:
        raise ValueError(f"Expected fewer than 2**36 random words, got {count}. Split the key.")
    block = jnp.arange(-(-count // 16), dtype=jnp.uint32)
    words = chacha_block(_key_words(data), _address(block, bit_width, 0, _BITS))
    flat = jnp.stack(words, -1).reshape(-1)[:count]
    if bit_width == 64:
        pairs = flat.reshape(size, 2).astype(jnp.uint64)
        flat = pairs[:, 0] | (pairs[:, 1] << jnp.uint64(32))
    return flat.astype(f"uint{bit_width}").reshape(shape)


IMPL = jax.extend.random.define_prng_impl(
    key_shape=(8,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=fold_in_data,
    name=f"dpfa_chacha{ROUNDS}",
    tag=f"cc{ROUNDS}",
)
"""The JAX PRNG implementation: `jax.random.key(seed, impl=IMPL)`, and all of `jax.random` on it."""

_REFUSAL = (
    "Expected rng to be a typed JAX key, got {got}. Pass dpfa_jax.random.secure_key() (256 bits "
    "from the operating system), or jax.random.key(seed) where reproducibility matters more than "
    "secrecy; {hint}"
)


def _typed(rng: Any) -> jax.Array:
    if isinstance(rng, jax.Array) and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        if rng.ndim:
            raise ValueError(
                f"Expected rng to be one key, got an array of keys of shape {rng.shape}. Use "
                "jax.vmap to map over keys, or pass rng[0]."
            )
        return rng
    if isinstance(rng, int):
        hint = "a bare int is a 32-bit secret at best, and everybody guesses 0."
        raise TypeError(_REFUSAL.format(got=f"the int {rng}", hint=hint))
    if hasattr(rng, "dtype") and hasattr(rng, "shape"):
        hint = "a legacy uint32 key becomes one by jax.random.wrap_key_data(rng)."
        raise TypeError(_REFUSAL.format(got=f"a {rng.dtype} array of shape {rng.shape}", hint=hint))
    hint = "there is no default key."
    raise TypeError(_REFUSAL.format(got=repr(rng), hint=hint))


def key_data(rng: Any) -> jax.Array:
    """The 256-bit key behind a typed JAX key, as uint32[8].

    Keys of this library's implementation give their data. Any other typed key is expanded: the
    result is a function of its words, so it holds no more entropy than they do: 64 bits for
    threefry keys, 128 for rbg and philox4x32 ones, and 32 for any of them made from a Python int
    while 64-bit mode is off.

    Args:
      rng: one typed key; ints and legacy uint32 arrays are refused.

    Returns:
      uint32[8]. It is as secret as the noise.

    Raises:
      TypeError: for anything but a typed key.
      ValueError: for an array of keys.
    """
    rng = _typed(rng)
    data = jax.random.key_data(rng)
    impl = jax.random.key_impl(rng)
    if impl == IMPL or str(impl) == str(IMPL):
        return data
    words = data.reshape(-1).astype(jnp.uint32)
    if words.shape[0] > 8:
        raise TypeError(f"Expected a key of at most 256 bits, got {32 * words.shape[0]} ({impl}).")
    padded = jnp.concatenate([words, jnp.zeros(8 - words.shape[0], jnp.uint32)])
    name = zlib.crc32(str(impl).encode())
    address = _address(name, words.shape[0], 0, _EXPAND)
    return _first_words(chacha_block(_key_words(padded), address))


def wrap_key_data(data: jax.Array) -> jax.Array:
    """The typed key of this library's implementation with the given uint32[8] data.

    Checkpoints hold key data, since a key of a custom implementation can be saved but not
    restored; this is the way back.

    Args:
      data: uint32[..., 8].

    Returns:
      Typed keys of the leading shape.
    """
    return jax.random.wrap_key_data(data, impl=IMPL)


def secure_key() -> jax.Array:
    """A new key with 256 bits from the operating system's generator.

    Returns:
      One typed key of this library's implementation.

    Raises:
      RuntimeError: inside `jit` or another transformation, where the key would become a constant
        of the compiled function and the same noise would come out of every call.
    """
    words = [int.from_bytes(os.urandom(4), "little") for _ in range(8)]
    key = wrap_key_data(jnp.array(words, jnp.uint32))
    if isinstance(key, jax_core.Tracer):
        raise RuntimeError(
            "secure_key() was called while tracing: the compiled function would use this one key "
            "for ever. Make the key outside and pass it in as an argument."
        )
    return key


def split(rng: Any, num: int | Sequence[int] = 2) -> jax.Array:
    """New independent typed keys of this library's implementation.

    Args:
      rng: one typed key.
      num: how many, or the shape of the array of keys.

    Returns:
      Typed keys of that shape.
    """
    shape = (num,) if isinstance(num, int) else tuple(num)
    return wrap_key_data(_split(key_data(rng), shape))


def fold_in(rng: Any, data: Any) -> jax.Array:
    """The key derived from `rng` for the 32-bit integer `data`, of this library's implementation.

    Args:
      rng: one typed key.
      data: an integer scalar, taken modulo 2³²; may be traced.

    Returns:
      One typed key.
    """
    return wrap_key_data(fold_in_data(key_data(rng), _u32(data)))


def bits(rng: Any, shape: Sequence[int] = ()) -> jax.Array:
    """Uniform uint32 words of the given shape.

    Args:
      rng: one typed key; never one that also draws noise through another function's `rng`.
      shape: of the result.

    Returns:
      uint32 array of that shape.
    """
    return _random_bits(key_data(rng), 32, tuple(shape))


def normal(
    rng: Any,
    shape: Sequence[int] = (),
    dtype: Any = jnp.float32,
    *,
    radius_bits: int = RADIUS_BITS,
) -> jax.Array:
    """Standard normals from 64 or 96 bits a pair, addressed by their index.

    Computed in float32. The distribution ends at 7.45 standard deviations, with 64 radius bits at
    9.42; what that costs is charged to δ. 40 bits do for 10⁷ released scalars, not for the 10¹³ of
    a training run (E2 in accounting/charge.md). Adding float32 noise to float32 data is not the
    real-valued mechanism: see `mechanisms.md`.

    Args:
      rng: one typed key. The same key gives the same normals on every backend.
      shape: the last axis is the column, the one before it the row, all others count batches.
      dtype: float32, or float16 or bfloat16 to round the result.
      radius_bits: 40, or 64 for other normals, addressed by their flat index, at 1.6 × the cost.

    Returns:
      An array of the given shape and dtype.

    Raises:
      ValueError: for another dtype or number of radius bits.

    Example:
      >>> import jax
      >>> normal(jax.random.key(0), (2, 3)).shape
      (2, 3)
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
        raise ValueError(
            f"Expected dtype float32, float16 or bfloat16, got {dtype}. The normals carry float32 "
            "precision; cast them yourself if you need a wider type."
        )
    _check.choice("radius_bits", radius_bits, (RADIUS_BITS, WIDE_RADIUS_BITS))
    shape = tuple(shape)
    if math.prod(shape) == 0:
        return jnp.zeros(shape, dtype)
    if radius_bits == WIDE_RADIUS_BITS:
        if math.prod(shape) >= 1 << 32:
            raise ValueError(f"Expected fewer than 2**32 wide normals a key, got shape {shape}.")
        size = math.prod(shape)
        drawn = wide_normals(key_data(rng), jnp.arange(-(-size // 10), dtype=jnp.uint32))
        return drawn.reshape(-1)[:size].reshape(shape).astype(dtype)
    *lead, rows, columns = (1,) * (2 - len(shape)) + shape
    batches = math.prod(lead)
    if batches >= 1 << 32 or rows >= 1 << 32:
        raise ValueError(f"Expected fewer than 2**32 rows and batches, got shape {shape}.")
    batch = jnp.arange(batches, dtype=jnp.uint32)[:, None]
    row = jnp.arange(rows, dtype=jnp.uint32)
    return matrix_normals(key_data(rng), batch, _u32(0), row, columns).reshape(shape).astype(dtype)
