"""Samplers of the noise that is charged: Gaussian, Laplace, discrete Gaussian, sampled softmax.

Which statement this makes true: each function releases its value under the distribution its
docstring names, up to the distance stated in mechanisms.md. They add noise and nothing else: bounds
on what the value may move are the caller's (sensitivity.md). Every sampler takes the same time and
touches the same memory whatever it draws, and under `vmap` every example gets its own noise even
with one unbatched key.
"""

import decimal
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dpfa_jax import _check, _primitives, random

_DIGITS = 60
_GRID_BITS = 16
_MAGNITUDE_BITS = 23
_LARGEST_TABLE = 1024.0
_WEIGHT_BITS = 30
_EXP_ERROR = 2.0**-20
_LARGEST_BLOCK = 1 << 16

type Wide = tuple[jax.Array, jax.Array]  # a 64-bit integer as (high, low) uint32 words


def _own_key(rng: jax.Array, *operands: jax.Array) -> jax.Array:
    data = random.key_data(rng)
    _primitives.refuse_constant(rng, "Pass the key as an argument of that function.")
    return random.wrap_key_data(_primitives.stream_key(data, *operands))


def _words(rng: jax.Array, shape: tuple[int, ...], count: int) -> list[jax.Array]:
    drawn = random.bits(rng, (count, *shape))
    return [drawn[i] for i in range(count)]


def _floats(name: str, value: Any) -> jax.Array:
    array = jnp.asarray(value)
    if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(
            f"Expected {name} in float32, bfloat16 or float16, got {array.dtype} of shape "
            f"{array.shape}. Cast it with .astype(jnp.float32)."
        )
    return array.astype(jnp.float32)


def gaussian(
    rng: jax.Array,
    value: jax.Array,
    *,
    noise_std: float,
    radius_bits: int = random.RADIUS_BITS,
) -> jax.Array:
    """The value plus independent normal noise, added in float32.

    Args:
      rng: one typed key, used for nothing else.
      value: float32, bfloat16 or float16; how far it may move is the caller's to bound.
      noise_std: standard deviation of the noise, in the unit of the value, 2⁻¹⁰⁰ to 2¹⁰⁰.
      radius_bits: 40 or 64, where the noise ends, as in `random.normal`.

    Returns:
      float32 array of the value's shape. Cast it after this call, never the value before it.

    Raises:
      TypeError: for another dtype, or a noise_std that is not a static number.
      ValueError: for a noise_std that float32 does not hold.

    Guarantee: N1 (mechanisms.md): Gaussian over the reals up to its cut-off, 7.45 noise_std; the
      float32 bits of one release are NOT covered against somebody who compares two known values.

    Example:
      >>> key = jax.random.key(0)
      >>> gaussian(key, jnp.zeros(3), noise_std=2.0).shape
      (3,)
    """
    noise_std = _check.noise_std("noise_std", noise_std)
    value = _floats("value", value)
    key = _own_key(rng, value)
    return value + jnp.float32(noise_std) * random.normal(key, value.shape, radius_bits=radius_bits)


# 64-bit integers as two words -------------------------------------------------------------------


def _less(a: Wide, b: Wide) -> jax.Array:
    return (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))


def _add(a: Wide, b: Wide) -> Wide:
    low = a[1] + b[1]
    return a[0] + b[0] + (low < b[1]).astype(jnp.uint32), low


def _widen(word: jax.Array) -> Wide:
    return jnp.zeros_like(word), word


def _multiply(a: jax.Array, b: jax.Array) -> Wide:
    """The 64-bit product of two words."""
    a_high, a_low, b_high, b_low = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a_high * b_low + ((a_low * b_low) >> 16)
    other = a_low * b_high + (middle & 0xFFFF)
    return a_high * b_high + (middle >> 16) + (other >> 16), a * b


def _fraction(words: list[jax.Array], total: Wide) -> Wide:
    """⌊u·total/2⁹⁶⌋ for u = words[0]·2⁶⁴ + words[1]·2³² + words[2]."""
    part = _widen(jnp.zeros_like(total[1]))
    for word in reversed(words):  # part ← ⌊(part + word·total)/2³²⌋
        below, above = _multiply(word, total[1]), _multiply(word, total[0])
        lowest = below[1] + part[1]
        carry = (lowest < part[1]).astype(jnp.uint32)
        for term in (below[0], part[0], carry):
            above = _add(above, _widen(term))
        part = above
    return part


def _two_words(numbers: list[int]) -> np.ndarray:
    return np.array([[n >> 32, n & 0xFFFFFFFF] for n in numbers], np.uint32).reshape(-1, 2)


def _threshold(probability: decimal.Decimal) -> int:
    """The integer T for which a uniform 64-bit integer is below T with this probability."""
    return int((probability * 2**64).to_integral_value(decimal.ROUND_HALF_EVEN))


# Discrete mechanisms ----------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _gaussian_table(noise_std: float) -> tuple[int, ...]:
    """round(2⁶⁴·P(|X| ≤ k)), k = 0, 1, ..., for X on the integers with P(X = k) ∝ e^(−k²/2σ²)."""
    with decimal.localcontext(prec=_DIGITS, Emin=-(10**6)):
        variance = decimal.Decimal(noise_std) ** 2
        ratio, step = (-1 / (2 * variance)).exp(), (-1 / variance).exp()
        masses, mass = [decimal.Decimal(1)], decimal.Decimal(1)
        while mass > decimal.Decimal(10) ** -30:  # far below 2⁻⁶⁴ of the total
            mass *= ratio
            ratio *= step
            masses.append(2 * mass)
        total = sum(masses, decimal.Decimal(0))
        table, below = [], decimal.Decimal(0)
        for mass in masses:
            below += mass
            threshold = _threshold(below / total)
            if threshold == 1 << 64:
                break
            table.append(threshold)
    return tuple(table)


def discrete_gaussian(rng: jax.Array, value: jax.Array, *, noise_std: float) -> jax.Array:
    """The integers plus independent discrete Gaussian noise, P(X = k) ∝ e^(−k²/(2·noise_std²)).

    A magnitude is the number of 64-bit table entries that a 64-bit uniform integer reaches, with
    every entry compared every time; a sign bit follows. Work: 9.3·noise_std comparisons a value.

    Args:
      rng: one typed key, used for nothing else.
      value: int32; how far it may move is the caller's to bound.
      noise_std: σ of the weights e^(−k²/2σ²), in units of the integers, in (0, 1024].

    Returns:
      int32 array of the value's shape, modulo 2³² (wrapping is post-processing).

    Raises:
      TypeError: if value is not int32.
      ValueError: for a noise_std outside (0, 1024].

    Guarantee: N2 (mechanisms.md): total variation to the ideal at most
      (9.3·noise_std + 4)·2⁻⁶⁵ a value.
    Source: Canonne, Kamath, Steinke 2020, arXiv:2004.00010 (the distribution and its zCDP).

    Example:
      >>> discrete_gaussian(jax.random.key(0), jnp.zeros(4, jnp.int32), noise_std=3.0).dtype
      dtype('int32')
    """
    noise_std = _check.real("noise_std", noise_std, low=0, high=_LARGEST_TABLE, open_low=True)
    value = jnp.asarray(value)
    if value.dtype != jnp.int32:
        raise TypeError(f"Expected value in int32, got {value.dtype} of shape {value.shape}.")
    high, low, sign = _words(_own_key(rng, value), value.shape, 3)
    table = jnp.asarray(_two_words(list(_gaussian_table(noise_std))))

    def step(magnitude, entry):
        return magnitude + 1 - _less((high, low), (entry[0], entry[1])).astype(jnp.int32), None

    start = (sign ^ sign).astype(jnp.int32)  # zeros that vary over the same mesh axes
    magnitude, _ = lax.scan(step, start, table, unroll=min(8, max(1, table.shape[0])))
    return value + jnp.where(sign & 1 == 1, -magnitude, magnitude)


def laplace_grid(*, noise_scale: float) -> float:
    """The public grid on which `laplace` releases: 2⁻¹⁶ to 2⁻¹⁷ of the noise scale.

    Args:
      noise_scale: b of the density e^(−|x|/b), in [1e-20, 1e20].

    Returns:
      The largest power of two g ≤ 2⁻¹⁶·noise_scale. Equality. Rounding to it moves each
      coordinate of a neighbour by up to g more: with M coordinates that may move, charge the
      l1_sensitivity Δ₁ + M·g.

    Guarantee: N3 (mechanisms.md).

    Example:
      >>> laplace_grid(noise_scale=1.0) == 2**-16
      True
    """
    noise_scale = _check.real("noise_scale", noise_scale, low=1e-20, high=1e20)
    return math.ldexp(1.0, math.frexp(noise_scale)[1] - 1 - _GRID_BITS)


@functools.lru_cache(maxsize=64)
def _laplace_thresholds(noise_scale: float) -> tuple[int, ...]:
    """2⁶⁴ times P(X = 0), then P(bit i of |X| − 1 is set), for noise in units of the grid."""
    with decimal.localcontext(prec=_DIGITS):
        scale = decimal.Decimal(noise_scale) / decimal.Decimal(
            laplace_grid(noise_scale=noise_scale)
        )
        q = (-1 / scale).exp()
        bits = [1 / (1 + (2**i / scale).exp()) for i in range(_MAGNITUDE_BITS)]
        return tuple(_threshold(p) for p in [(1 - q) / (1 + q), *bits])


def laplace(rng: jax.Array, value: jax.Array, *, noise_scale: float) -> jax.Array:
    """The value on a public grid plus discrete Laplace noise on that grid.

    |X| − 1 is geometric, so its bits are independent: each is one comparison of 64 bits, 24
    comparisons and 49 words a value whatever is drawn.

    Args:
      rng: one typed key, used for nothing else.
      value: float32, bfloat16 or float16; its L1 movement is the caller's to bound.
      noise_scale: b of the distribution ∝ e^(−|x|/b), in the unit of the value, [1e-20, 1e20].

    Returns:
      float32 array of the value's shape: grid multiples, their sum rounded once, to float32.

    Raises:
      TypeError: for another dtype.
      ValueError: for a noise_scale outside its range.

    Guarantee: N3 (mechanisms.md): ε = (Δ₁ + M·g)/noise_scale with g = `laplace_grid`, and total
      variation to that ideal at most 25·2⁻⁶⁴ a value.
    Source: Ghosh, Roughgarden, Sundararajan 2012 (the geometric mechanism); Mironov 2012,
      doi:10.1145/2382196.2382264 (why not in floating point).

    Example:
      >>> noisy = laplace(jax.random.key(0), jnp.zeros(3), noise_scale=1.0)
      >>> bool(jnp.all(noisy * 2**16 == jnp.round(noisy * 2**16)))
      True
    """
    grid = laplace_grid(noise_scale=noise_scale)
    value = _floats("value", value)
    thresholds = jnp.asarray(_two_words(list(_laplace_thresholds(float(noise_scale)))))
    words = _words(_own_key(rng, value), value.shape, 2 * thresholds.shape[0] + 1)

    def happens(index):
        uniform = words[2 * index], words[2 * index + 1]
        return _less(uniform, (thresholds[index, 0], thresholds[index, 1]))

    geometric = sum(happens(1 + i).astype(jnp.int32) << i for i in range(_MAGNITUDE_BITS))
    magnitude = jnp.where(happens(0), 0, 1 + geometric)
    noise = jnp.where(words[-1] & 1 == 1, -magnitude, magnitude).astype(jnp.float32)
    # From 2²³ grid steps on, a float32 is a multiple of the grid already.
    snapped = jnp.where(jnp.abs(value) < grid * 2.0**23, jnp.round(value / grid) * grid, value)
    return snapped + noise * jnp.float32(grid)


# Sampled softmax --------------------------------------------------------------------------------


def exponential_score_bound(*, score_bound: float) -> float:
    """The score bound that `exponential` has really, its integer weights and draws included.

    Args:
      score_bound: B, to which scores are clipped, in [0, 100].

    Returns:
      B' with e^(2B') ≥ the largest ratio of two probabilities' weights: charge S8 with it in the
      place of B. Upper bound; it exceeds B by about e^(2B)·2⁻³², and ends at 10.4 for any B, since
      no weight is below 2⁻³⁰ of the largest.

    Guarantee: N4 (mechanisms.md).

    Example:
      >>> 3.0 < exponential_score_bound(score_bound=3.0) < 3.00001
      True
    """
    score_bound = float(np.float32(_check.real("score_bound", score_bound, low=0, high=100)))
    largest = 2.0**_WEIGHT_BITS
    smallest = max(1.0, largest * math.exp(-2 * score_bound) * (1 - _EXP_ERROR) - 0.5)
    return math.log(largest / smallest) / 2 * (1 + 2.0**-44) + 2.0**-33


def _integer_weights(scores: jax.Array, visible: jax.Array, score_bound: float) -> jax.Array:
    bound = jnp.float32(score_bound)
    scores = jnp.where(jnp.isnan(scores), -bound, jnp.clip(scores, -bound, bound))
    weights = jnp.round(jnp.exp(scores - bound) * 2.0**_WEIGHT_BITS)
    weights = jnp.clip(weights, 1.0, 2.0**_WEIGHT_BITS).astype(jnp.uint32)
    return jnp.where(visible, weights, 0)


def _join(low: jax.Array, high: jax.Array) -> Wide:
    """low + high·2¹⁵."""
    return _add((high >> 17, high << 15), _widen(low))


def _sum(weights: jax.Array) -> Wide:
    """The sum over the last axis, exact for up to 2¹⁶ weights of at most 2³⁰."""
    parts = weights & 0x7FFF, weights >> 15
    return _join(*(jnp.sum(part, axis=-1, dtype=jnp.uint32) for part in parts))


def _running_sums(weights: jax.Array) -> Wide:
    """The cumulative sums over the last axis, exact as `_sum`."""
    parts = weights & 0x7FFF, weights >> 15
    return _join(*(jnp.cumsum(part, axis=-1, dtype=jnp.uint32) for part in parts))


def _column(number: Wide) -> Wide:
    return number[0][..., None], number[1][..., None]


def exponential(
    rng: jax.Array,
    score_block: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]],
    operands: Any,
    *,
    blocks: int,
    score_bound: float,
) -> jax.Array:
    """One candidate drawn with probability proportional to e^score, scores read block by block.

    Weights are the integers round(2³⁰·e^(score−B)), at least 1; a 96-bit uniform integer picks a
    point of their total and the index is the number of running totals that do not exceed it. Scores
    are computed twice and never stored; every block is read in full whatever is drawn.

    Args:
      rng: one typed key, used for nothing else.
      score_block: (operands, index of the block) -> (scores float32 (..., size), which of them are
        candidates: public booleans that broadcast against them). Score j may depend on record j and
        on public things only. A NaN score counts as −B.
      operands: pytree of all arrays that `score_block` reads.
      blocks: number of blocks, ≥ 1, of at most 2¹⁶ candidates each.
      score_bound: B in [0, 100]: scores are clipped to [−B, B].

    Returns:
      int32 array of the leading shape: the index block·size + position of the draw, or −1 where
      there is no candidate.

    Raises:
      ValueError: for a block of more than 2¹⁶ candidates, or 2³¹ candidates in all.

    Guarantee: N4 (mechanisms.md): S8 with B' = `exponential_score_bound`, exactly.

    Example:
      >>> scores = jnp.array([0.0, 5.0, -5.0, 1.0])
      >>> def block(scores, index):
      ...     return lax.dynamic_slice(scores, (2 * index,), (2,)), jnp.ones(2, bool)
      >>> int(exponential(jax.random.key(0), block, scores, blocks=2, score_bound=5.0)) in range(4)
      True
    """
    blocks = _check.integer("blocks", blocks, low=1)
    score_bound = _check.real("score_bound", score_bound, low=0, high=100)
    scores, visible = jax.eval_shape(score_block, operands, jnp.int32(0))
    shape = np.broadcast_shapes(scores.shape, visible.shape)
    size = shape[-1]
    if size > _LARGEST_BLOCK or blocks * size >= 1 << 31:
        raise ValueError(
            f"Expected blocks of at most {_LARGEST_BLOCK} candidates and fewer than 2**31 in all, "
            f"got {blocks} blocks of {size}."
        )
    arrays = [jnp.asarray(leaf) for leaf in jax.tree.leaves(operands)]
    words = _words(_own_key(rng, *arrays), shape[:-1], 3)

    def weights_of(index):
        weights = _integer_weights(*score_block(operands, index), score_bound)
        return jnp.broadcast_to(weights, shape)

    def add(total, index):
        return _add(total, _sum(weights_of(index))), None

    zero = words[0] ^ words[0]  # varies over the same mesh axes as the words
    total, _ = lax.scan(add, (zero, zero), jnp.arange(blocks))
    point = _column(_fraction(words, total))

    def passed(carry, index):
        before, count = carry
        weights = weights_of(index)
        reached = _add(_column(before), _running_sums(weights))
        count += jnp.sum(~_less(point, reached), axis=-1, dtype=jnp.int32)
        return (_add(before, _sum(weights)), count), None

    (_, drawn), _ = lax.scan(passed, ((zero, zero), zero.astype(jnp.int32)), jnp.arange(blocks))
    return jnp.where((total[0] | total[1]) == 0, -1, drawn)
