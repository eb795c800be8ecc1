"""What the rounding of the Hopper kernel's sums costs: few hundred keys in one accumulator."""

import itertools
import math
from collections.abc import Sequence

from dpfa_jax import _check
from dpfa_jax.pallas.tiling import WEIGHT_ERROR, WEIGHT_ROUNDOFF

GROUP_KEYS = 512
"""Keys summed in one accumulator of the matrix unit before they join the outer sum, at most."""

SHORTEST_GROUP = 480
"""As many at least, where a group is full: five tiles of 96 keys, others fill 512."""

RUN_GROUPS = 16
"""Groups of one outer sum, which then joins a third one."""

PAIRED_FROM = 32769
"""Rows of a memory from which on the third sum is a double word."""

LONGEST = 131072
"""Longest memory that the kernel sums: the last rounding, to one float32 word, grows with it."""

_STEP_KEYS = 16
_STEP_ERROR = 5.5 * 2.0**-23
_UNIT = 2.0**-24


def sums_rounding(keys: int) -> float:
    """Relative growth of a sensitivity by the kernel's sums, for a memory of `keys` rows.

    Args:
      keys: 1 ≤ n ≤ `LONGEST`.

    Returns:
      R such that the sums move by at most (1+R) times the exact-sum sensitivity. Upper bound.

    Guarantee: F4 (accumulators.md).

    Example:
      >>> sums_rounding(4096) < 0.015
      True
    """
    keys = _check.integer("keys", keys, low=1, high=LONGEST)
    steps = -(-min(GROUP_KEYS, keys) // _STEP_KEYS)
    within = 2 * _STEP_ERROR * _STEP_KEYS * steps * (steps + 1) / 2
    return 1.01 * (within + 2 * _UNIT * _joined_keys(keys, keys >= PAIRED_FROM))


def _joined_keys(keys: int, paired: bool) -> float:
    """Keys in the partial sums that joins round, those of the groups and runs of one record."""
    groups = min(-(-keys // SHORTEST_GROUP), RUN_GROUPS + 1) + 1
    partial = sum(min(k * GROUP_KEYS, keys) for k in range(2, groups + 1))
    runs = -(-keys // (RUN_GROUPS * SHORTEST_GROUP)) + 1
    if paired:
        return partial + keys + _UNIT * keys * runs * (runs + 1) / 2
    if keys > RUN_GROUPS * SHORTEST_GROUP:
        partial += sum(min(k * RUN_GROUPS * GROUP_KEYS, keys) for k in range(2, runs + 1))
    return partial


def split_is_charged(parts: Sequence[int]) -> bool:
    """Whether sums of parts of a memory, added up one after another, round by what is charged.

    Args:
      parts: rows of each part, 1 or more, in the order in which they are added up; not empty.

    Returns:
      True if the sums of all differ by at most `sums_rounding` of the memory's rows; False from
      `PAIRED_FROM` rows on, where a double word is charged less than the joins would round.

    Guarantee: F4 (accumulators.md).
    """
    keys = sum(parts)
    joins = sum(itertools.accumulate(parts)) - parts[0]
    fits = _joined_keys(max(parts), False) + joins <= _joined_keys(keys, False)
    return keys < PAIRED_FROM and fits


def rounding(keys: int) -> float:
    """Relative growth of a sensitivity by the kernel's arithmetic, weights and sums together.

    Args:
      keys: rows of one memory.

    Returns:
      R such that noise for (1+R)Δ covers the computed sums; ∞ beyond `LONGEST` rows, where nothing
      is known. Upper bound.

    Guarantee: F4 (accumulators.md).
    """
    if keys > LONGEST:
        return math.inf
    weights = (1 + WEIGHT_ROUNDOFF) * (1 + WEIGHT_ERROR)
    return weights * (1 + sums_rounding(max(keys, 1))) - 1
