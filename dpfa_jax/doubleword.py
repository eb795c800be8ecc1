"""Sums kept as an unevaluated pair of words, so that rounding costs no privacy.

A record's effect on a plain float32 chain over 10⁶ keys may be amplified a hundred times by
rounding; over a double word it is not (F1 in sensitivity.md).
"""

import jax


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rounded sum and its exact error.

    Source: Knuth 1969; Møller 1965.
    """
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


def add_word(high: jax.Array, low: jax.Array, word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The double word (high, low) plus one word, as a double word.

    Source: Joldes, Muller, Popescu 2017, doi:10.1145/3121432, Algorithm 4.
    """
    total, error = two_sum(high, word)
    error = error + low
    high = total + error
    return high, error - (high - total)


def round_after(high: jax.Array, low: jax.Array, noise: jax.Array) -> jax.Array:
    """high + low + noise as one word, the only rounding to one word coming after the noise."""
    total, error = two_sum(high, noise)
    return total + (error + low)
