"""Sizes of the kernels' tiles, which tiles a block can see, and what their sums' rounding costs.

What a kernel computes does not depend on these sizes, how fast it is and how
it rounds does.
"""

import dataclasses
import importlib.resources
import json
import math
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dpfa_jax import _check

GROUP_KEYS = 256
"""Keys summed in one accumulator of the matrix unit before they join the outer sum."""

PLAIN_KEYS = 4096
"""Keys whose groups are joined in one float32 word, a run; longer memories join runs in a double
word."""

WEIGHT_ROUNDOFF = 2.0**-8
"""Relative rounding of one weight: bfloat16's; float16's and float32's are smaller."""

WEIGHT_ERROR = 2.0**-12
"""Relative excess of a weight over its bound before it is rounded: `reference.WEIGHT_ERROR`, and
exponents of magnitude up to 3500 at 2⁻²⁴."""

_SHORT_KEYS = 1024
_NARROWEST = 64
_STEP_KEYS = 8
_STEP_ERROR = 5.5 * 2.0**-23
_UNIT = 2.0**-24


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one kernel is cut into blocks.

    Attributes:
      block_q: query rows of one block, a power of two ≥ 16.
      block_k: keys of one tile, a power of two ≥ 16.
      warps: of 32 threads, a power of two ≤ 16.
      stages: loads in flight, ≥ 1.
    """

    block_q: int
    block_k: int
    warps: int
    stages: int

    def __post_init__(self):
        for name in ("block_q", "block_k", "warps"):
            value = _check.integer(name, getattr(self, name), low=1)
            if value & (value - 1):
                raise ValueError(f"Expected {name} to be a power of two, got {value}.")
        _check.integer("block_q", self.block_q, low=16)
        _check.integer("block_k", self.block_k, low=16, high=GROUP_KEYS)
        _check.integer("warps", self.warps, high=16)
        _check.integer("stages", self.stages, low=1)


def padded(width: int) -> int:
    """The width that a tile gives a row of `width` columns: a power of two ≥ 16."""
    return max(16, 1 << (width - 1).bit_length())


def length_class(keys: int) -> str:
    """The row of the table for a memory of so many keys: "short" or "long"."""
    return "short" if keys <= _SHORT_KEYS else "long"


def _table() -> Mapping[tuple, Tile]:
    """What the tuner found fastest, by (pass, capability, padded width, causal, length class)."""
    text = importlib.resources.files(__package__).joinpath("tiles.json").read_text()
    sizes = [field.name for field in dataclasses.fields(Tile)]
    found = {}
    for row in json.loads(text):
        place = (row["pass"], row["capability"], row["width"], row["causal"], row["length"])
        found[place] = Tile(*(row[size] for size in sizes))
    return types.MappingProxyType(found)


TABLE = _table()
"""Tiles of 16-bit rows on devices that were measured, from `experiments/tune_tiles.py`."""


def forward_tile(*, capability: int, width: int, item_bytes: int, causal: bool, keys: int) -> Tile:
    """The tile of the forward kernel.

    Args:
      capability: compute capability, 90 for Hopper; those not in `TABLE` get what fits any.
      width: the wider of the padded query and value rows.
      item_bytes: bytes of one number.
      causal: whether queries see earlier keys only.
      keys: rows of one memory.
    """
    if item_bytes > 2:
        return Tile(32, 32, 4, 1) if width > 128 else Tile(32, 32, 4, 2)
    safe = Tile(64, 64, 4, 2) if width <= 128 else Tile(64, 32, 4, 2)
    place = max(width, _NARROWEST), causal, length_class(keys)
    return TABLE.get(("forward", capability, *place), safe)


def backward_tile(*, capability: int, width: int, item_bytes: int, causal: bool, keys: int) -> Tile:
    """The tile of the backward kernels; see `forward_tile`."""
    if item_bytes > 2:
        return Tile(16, 16, 4, 1) if width > 128 else Tile(32, 32, 4, 1)
    safe = Tile(32, 32, 4, 1)
    if width <= 128:
        safe = Tile(64, 64, 4, 2 if width <= 64 else 1)
    place = max(width, _NARROWEST), causal, length_class(keys)
    return TABLE.get(("backward", capability, *place), safe)


def _minimum(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return jnp.minimum(a, b)


def _maximum(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    return jnp.maximum(a, b)


def tiles(count: Any, size: int) -> Any:
    """`count` // `size` for count ≥ 0, a Python number or a traced one."""
    if isinstance(count, int):
        return count // size
    return jax.lax.div(count, size)


def sections(
    start: Any, size: int, step: int, length: int, left: int | None, right: int | None
) -> tuple[tuple[Any, Any, bool], ...]:
    """Which tiles the block start..start+size meets: (first, end, masked), in order.

    Position i of the block meets positions j with i − left ≤ j ≤ i + right and 0 ≤ j < length.

    Args:
      start: first position of the block, a Python or a traced int.
      size: positions in the block.
      step: positions in one tile.
      length: number of positions that tiles run over.
      left: or None for no limit on that side.
      right: or None.

    Returns:
      Up to three runs of tiles. In one that is not masked every pair meets; runs that no block can
      have are left out. Runs may be empty.
    """
    whole, last = length // step, -(-length // step)
    low, high, inner_low, inner_high = 0, last, 0, whole
    if left is not None:
        low = tiles(_maximum(start - left, 0), step)
        inner_low = tiles(_maximum(start + size - 1 - left, 0) + (step - 1), step)
    if right is not None:
        high = tiles(_minimum(start + size + right, length) + (step - 1), step)
        inner_high = _minimum(tiles(_maximum(start + right + 1, 0), step), whole)
    high = _maximum(high, low)
    inner_low = _minimum(_maximum(inner_low, low), high)
    inner_high = _maximum(_minimum(inner_high, high), inner_low)
    runs = []
    if left is not None:
        runs.append((low, inner_low, True))
    if whole:
        runs.append((inner_low, inner_high, False))
    else:
        inner_high = inner_low
    if right is not None or whole < last:
        runs.append((inner_high, high, True))
    return tuple(runs)


def sums_rounding(keys: int) -> float:
    """Relative growth of a sensitivity by the kernels' sums, for a memory of `keys` rows.

    Groups of up to 256 keys at fixed positions, each summed by the matrix unit in steps of 8 keys
    or more, one step erring by at most 5.5·2⁻²³ of the magnitudes added so far; the groups of a run
    of up to 4096 keys joined in one float32 word, the runs in a double word.

    Args:
      keys: n ≥ 1.

    Returns:
      R such that the sums move by at most (1+R) times the exact-sum sensitivity. Upper bound.

    Guarantee: F3 (tiling.md).
    """
    keys = _check.integer("keys", keys, low=1)
    group, run = min(GROUP_KEYS, keys), min(PLAIN_KEYS, keys)
    steps = -(-group // _STEP_KEYS)
    within = 2 * _STEP_ERROR * _STEP_KEYS * steps * (steps + 1) / 2
    # A block's first and last group may not be full, nor may its first and last run.
    groups = -(-run // GROUP_KEYS) + 2
    joined = 2 * _UNIT * sum(min(k * GROUP_KEYS, run) for k in range(2, groups + 1))
    if keys > PLAIN_KEYS:
        runs = -(-keys // PLAIN_KEYS) + 4
        joined += 2 * keys * math.expm1((runs + 1) * math.log1p(2 * _UNIT**2))
    return 1.01 * (within + joined)


def rounding(keys: int) -> float:
    """Relative growth of a sensitivity by the kernels' arithmetic, weights and sums together.

    Args:
      keys: rows of one memory.

    Returns:
      R such that noise for (1+R)Δ covers the computed sums. Upper bound.

    Guarantee: F3 (tiling.md).
    """
    weights = (1 + WEIGHT_ROUNDOFF) * (1 + WEIGHT_ERROR)
    return weights * (1 + sums_rounding(max(keys, 1))) - 1
