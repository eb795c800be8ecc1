"""Tiles of queries whose keys several blocks of the Hopper kernel's grid share.

Blocks live as long as the call and take whole tiles while there are enough for all. The keys of the
tiles that are left are dealt out, so that all blocks end at about the same time: each makes sums of
a share of the keys, and the block that has a tile's last share adds up the others' and answers. The
public reference is the same for all keys: sums of shares need no common maximum.

A block waits for those with lower numbers alone, which wait for nobody before their sums are
written. Devices start blocks in the order of their numbers, which this relies on, as prefix sums in
one pass do, and which no document promises: then none waits for ever, however few run at a time.

Source: Stream-K (Osama et al. 2023, doi:10.1145/3572848.3577479), whose fix-up this is;
Flash-Decoding splits keys likewise (Dao et al. 2023).
"""

import collections
import functools
import math
from typing import NamedTuple

import numpy as np

from dpfa_jax.pallas.accumulators import split_is_charged

_LEAST = 2
"""Key tiles whose time shares must save: what it costs to clear the counters they wait for."""


OWN_TIME = 3
"""What a query tile costs beside its key tiles, in key tiles."""


class Costs(NamedTuple):
    """What takes time beside key tiles, in key tiles.

    Attributes:
      tile: begin and end a tile of queries, or a share of one.
      join: add the sums of another block's share to one's own.
    """

    tile: int = OWN_TIME
    join: float = 0.5


WIDE = Costs(8, 5.0)
"""Rows wider than 128, whose sums leave no registers for anything else: measured on an H100."""

ROWS = KEPT, LAST = range(2)
"""Rows of a block's table: a share whose sums are left to a later block, and a tile's last one."""

COLUMNS = TILE, FIRST, COUNT, OTHERS, PLACE = range(5)
"""Number of the query tile, first key tile, how many; how many blocks before this one made sums of
the same tile that this one adds to its own, -1 where it leaves them to a later one; and the place
where these sums wait, or the last of those that it adds, which come one after another."""


def _dealt(tiles: int, programs: int, size: int, most: int, own: int, alone: int | None):
    """Shares of at most `most` key tiles' time a block: (tile, first, count, last) of each block.

    None if the blocks are too few.
    """
    found: list[list[tuple[int, int, int, bool]]] = []
    tile = first = 0
    while tile < tiles:
        if len(found) == programs:
            return None
        shares, room = [], most
        count = min(size - first, room - own)
        last = first + count == size
        shares.append((tile, first, count, last))
        room -= count + own
        first += count
        if last:
            tile, first = tile + 1, 0
            if tile < tiles and room > own and (alone is None or count <= alone):
                # Never a whole tile, for which there was no time before either.
                first = room - own
                shares.append((tile, 0, first, False))
        found.append(shares)
    return found


@functools.lru_cache(maxsize=256)
def dealt(
    first: int,
    end: int,
    programs: int,
    size: int,
    keys: int,
    block_k: int,
    alone: int | None,
    costs: Costs,
) -> np.ndarray | None:
    """What each block does beside whole tiles: what others add up, then what it answers.

    Args:
      first: of the tiles that are left.
      end: after the last, less than `programs` more.
      programs: blocks of the grid.
      size: key tiles of each.
      keys: rows of a memory.
      block_k: of a key tile.
      alone: the longest last share, in key tiles, beside which a block may have another one; None
        for any.
      costs: of the kernel.

    Returns:
      (programs, 2, 5) int32: for each block the rows `KEPT` and `LAST` of `COLUMNS`, zeros where it
      has no such share. None where whole tiles are as fast, or where the rounding of shares would
      be more than is charged (F4).
    """
    tiles = end - first
    if not tiles:
        return None
    best, least = None, size + costs.tile - _LEAST + 1
    for most in range(costs.tile + 1, size + costs.tile):
        if most >= least:
            break
        found = _dealt(tiles, programs, size, most, costs.tile, alone)
        if found is None:
            continue
        parts = [[s for shares in found for s in shares if s[0] == tile] for tile in range(tiles)]
        time = most + math.ceil(costs.join * max(map(len, parts)))
        # A tile's last share first, then the others backwards; its last key tile may not be full.
        counts = [[count * block_k for _, _, count, _ in reversed(shares)] for shares in parts]
        for part in counts:
            part[0] -= size * block_k - keys
        if time >= least or not all(map(split_is_charged, counts)):
            continue
        best, least = _table(found, programs), time
        best[:, :, TILE] += first
        if alone is not None:
            # Where a block's runs waited.
            best[:, KEPT, PLACE] = np.arange(programs)
            best[:, LAST, PLACE] = np.arange(programs) - 1
        best.flags.writeable = False
    return best


def _table(found: list, programs: int) -> np.ndarray:
    table, waiting = np.zeros((programs, 2, len(COLUMNS)), np.int32), 0
    kept = collections.Counter(tile for shares in found for tile, *_, last in shares if not last)
    for row, shares in zip(table, found, strict=False):
        for tile, low, count, last in shares:
            others = kept[tile] if last else -1
            row[LAST if last else KEPT] = tile, low, count, others, waiting - last
            waiting += not last
    return table


def places(table: np.ndarray) -> int:
    """So many sums wait at most.

    Args:
      table: as of `dealt`.
    """
    return int(table[table[:, KEPT, COUNT] > 0, KEPT, PLACE].max(initial=-1)) + 1
