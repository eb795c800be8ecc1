"""How the Hopper kernels are cut: what is static, which tile comes when."""

import dataclasses
import heapq
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from dpfa_jax._typing import Spec
from dpfa_jax.pallas import mosaic_gpu_shares as shares
from dpfa_jax.pallas.accumulators import GROUP_KEYS, PAIRED_FROM, RUN_GROUPS, SHORTEST_GROUP
from dpfa_jax.pallas.mosaic_gpu_registers import ROWS, WARPGROUP, Matrix

LOG2_E = math.log2(math.e)

_REGISTERS = 1 << 16
"""Of a multiprocessor."""

ROW_BATCH = 4
"""Tiles whose denominators' noise is drawn at a time: by all of a warp's threads then."""

_WIDEST_SUMS = 128
"""Columns of values for which a thread's registers hold two sums."""

_PIECE_BYTES = 256
"""Of a row of what goes out, in shared memory."""

_SMALLEST_BALL = 2.0**-90
"""Bound of values below which sums that memory adds, subnormal numbers flushed to 0, could err by
more than is charged (F4)."""

_LONGEST_TABLE = 1 << 16
"""Tiles beyond which so many fall to each block of the grid that their order hardly matters."""

_NEVER = (1 << 31) - 1
"""More than any key tile's number."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """How the kernel is cut.

    Attributes:
      block_k: keys of one tile, a multiple of 32.
      stages: tiles of keys and of values in shared memory.
      compute: warpgroups that compute.
      flush: key tiles of one accumulator.
      slots: tiles whose noise may wait to be used.
      noise: where it waits, "shared" or "global" memory.
      registers: of the computing, copying and drawing threads, a multiple of 8 each.
      nearby: bytes of keys and values that tiles in flight may read.
      early: how many of a thread's weights of the next tile are made before the last sums are
        waited for, of the others the exponents: a multiple of 4 up to block_k // 2. None leaves it
        to the assembler. Without a score cap it is all of them unless it is None.
      turns: whether two computing warpgroups start products in turn, so that one multiplies while
        the other makes weights.
      drawing: warpgroups that draw noise, each that of as many computing ones: a divisor of
        `compute`.
      shares: whether blocks of the grid may share the keys of tiles that do not go round.
    """

    block_k: int = 128
    stages: int = 2
    compute: int = 2
    flush: int = 4
    slots: int = 2
    noise: str = "global"
    registers: tuple[int, int, int] = (208, 24, 72)
    nearby: int = 24 << 20
    early: int | None = None
    turns: bool = False
    drawing: int = 1
    shares: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one kernel.

    Attributes:
      spec: what is computed.
      shape: how it is cut.
      batch: B.
      memories: B or 1.
      queries: T.
      keys: S.
      heads: query heads.
      group: query heads of one kv head.
      key_width: H, a multiple of 16.
      value_width: h, a multiple of 16.
      dtype: of the matrix products.
      programs: blocks of the grid.
      shift: powers of two by which weights are raised.
      segments: whether there are segment ids.
      offsets: 1 or B: batch size of the offsets.
      key_dtype: of query and key, that of the values or float8_e4m3fn.
      converts: whether queries come in `dtype` and are rounded to `key_dtype` in the kernel.
      marks: whether queries that are not finite are answered by NaN.
      repairs: whether values that are not finite count as 0, and queries as rows of zeros.
      judges: whether the kernel reads `flags` and tells of keys that are not finite too.
      sums: whether the sums go out as they are, in float32, instead of an answer.
      splits: whether blocks of the grid share the keys of tiles that do not go round.
      moved: whether the queries' noise begins at a row that is known at run time only.
    """

    spec: Spec
    shape: Shape
    batch: int
    memories: int
    queries: int
    keys: int
    heads: int
    group: int
    key_width: int
    value_width: int
    dtype: Any
    programs: int
    shift: int = 0
    segments: bool = False
    offsets: int = 1
    key_dtype: Any = None
    converts: bool = False
    marks: bool = False
    repairs: bool = False
    judges: bool = False
    sums: bool = False
    splits: bool = False
    moved: bool = False

    def __post_init__(self):
        if self.shape.turns and self.shape.compute != 2:
            raise ValueError(
                f"Expected two computing warpgroups to take turns, got compute="
                f"{self.shape.compute}, which would wait for ever; pass turns=False."
            )
        if self.shape.drawing < 1 or self.shape.compute % self.shape.drawing:
            raise ValueError(
                f"Expected drawing to divide the {self.shape.compute} computing warpgroups, got "
                f"{self.shape.drawing}; pass 1."
            )
        if self.judges and (self.shape.stages < 2 or self.shape.block_k > WARPGROUP):
            raise ValueError(
                f"Expected two stages or more, of up to {WARPGROUP} keys, to judge keys, got "
                f"stages={self.shape.stages} and block_k={self.shape.block_k}: some keys would be "
                "copied over, or passed by, before a thread looks at them. Pass stages=2 and a "
                f"block_k of {WARPGROUP}."
            )
        kinds = (self.shape.compute, 1, self.shape.drawing * self.noisy)
        taken = sum(kind * each for kind, each in zip(kinds, self.shape.registers, strict=True))
        # Threads start with equal shares; one that waits for more than is left waits for ever.
        given = sum(kinds) * (_REGISTERS // (WARPGROUP * sum(kinds)) // 8 * 8)
        if taken > given:
            raise ValueError(
                f"Expected the registers of a thread of each of {sum(kinds)} warpgroups to add up "
                f"to at most {given}, got registers={self.shape.registers}, {taken} in all; pass "
                "fewer."
            )
        early, most = self.shape.early, self.shape.block_k // 2
        if early is not None and (not 0 <= early <= most or early % 4):
            raise ValueError(
                f"Expected early to be None or a multiple of 4 up to {most}, half of block_k, got "
                f"{early}; a thread makes {most} weights of a key tile."
            )
        if self.edge > 1 and self.key_blocks > 1 and self.key_range(np.int32(0), np)[1] < 2:
            raise ValueError(
                f"Expected a block_k up to {self.block_q}, or a multiple of it, got "
                f"{self.shape.block_k}: causal tiles would see one key tile or two. Pass 128."
            )
        group = self.shape.flush * self.shape.block_k
        charged = self.sums or self.spec.noise == "sums"
        if charged and not SHORTEST_GROUP <= group <= GROUP_KEYS:
            raise ValueError(
                f"Expected groups of {SHORTEST_GROUP} to {GROUP_KEYS} keys, for which the rounding "
                f"of sums is charged (F4), got flush={self.shape.flush} tiles of "
                f"block_k={self.shape.block_k}, {group} keys."
            )
        if self.sums and self.online:
            raise ValueError(
                "Expected a score_cap, got None: sums beside a running maximum cannot be added to "
                "those of others. Pass the mechanism's cap."
            )
        if self.outside and (self.spec.ball or 1.0) < _SMALLEST_BALL:
            raise ValueError(
                f"Expected values bounded by 2**-90 or more for rows wider than {_WIDEST_SUMS}, "
                f"got {self.spec.ball:g}: sums in memory have no smaller numbers. Scale the values "
                "and their value_bound."
            )

    @property
    def block_q(self) -> int:
        """Queries of one tile of the grid."""
        return ROWS * self.shape.compute

    @property
    def query_blocks(self) -> int:
        """Tiles along the queries."""
        return -(-self.queries // self.block_q)

    @property
    def key_blocks(self) -> int:
        """Tiles along the keys."""
        return -(-self.keys // self.shape.block_k)

    @property
    def tiles(self) -> int:
        """Tiles of the call."""
        return self.batch * self.heads * self.query_blocks

    @property
    def noisy(self) -> bool:
        """Whether a warpgroup draws noise."""
        return self.spec.noise != "none"

    @property
    def row_noisy(self) -> bool:
        """Whether denominators have noise."""
        return self.spec.noise == "sums" and self.released

    @property
    def released(self) -> bool:
        """Whether the denominator is used."""
        return self.spec.denominator_std != math.inf

    @property
    def served(self) -> int:
        """Computing warpgroups of which one warpgroup draws the noise."""
        return self.shape.compute // self.shape.drawing

    @property
    def row_ring(self) -> int:
        """Tiles whose denominators' noise is kept: those of a batch, and what is not yet used."""
        used = self.shape.slots - 1
        return ROW_BATCH * (1 + -(-used // ROW_BATCH))

    @property
    def contained(self) -> bool:
        """Whether no sum can be infinite, nor the squares of an answer before its projection.

        Records that are not finite weigh nothing and the others' norms times their weights are at
        most the ball's radius, wherever queries are marked.
        """
        spec = self.spec
        if not (self.marks and self.released and spec.noise == "sums" and spec.ball is not None):
            return False
        largest = 2.0 * self.keys * spec.ball + 16.0 * spec.noise_std
        return 1e-30 < spec.ball * spec.floor and largest < 1e15 * min(1.0, spec.ball * spec.floor)

    @property
    def sides(self) -> tuple[int | None, int | None]:
        """How far before and after itself a query sees."""
        left, right = self.spec.window or (None, None)
        if self.spec.is_causal:
            right = 0 if right is None else min(right, 0)
        return left, right

    @property
    def masked(self) -> bool:
        """Whether every key tile is masked, not only those on the diagonal."""
        return self.segments or self.spec.window is not None or self.edge > 2

    @property
    def edge(self) -> int:
        """Key tiles on the diagonal of a query tile, at most."""
        if not self.spec.is_causal or self.spec.window is not None:
            return 0
        size, blocks = self.shape.block_k, self.query_blocks
        starts = range(0, min(blocks, size) * self.block_q, self.block_q)
        return max(-(-(start + self.block_q) // size) - start // size for start in starts)

    @property
    def online(self) -> bool:
        """Whether the reference is the running maximum."""
        return self.spec.score_cap is None

    @property
    def joins(self) -> bool:
        """Whether an accumulator must be emptied: only the rounding of released sums is charged."""
        released = self.spec.noise == "sums" and self.spec.ball is not None
        return (released or self.sums) and self.key_blocks > self.shape.flush

    @property
    def regroups(self) -> bool:
        """Whether the outer accumulator must be emptied too."""
        return self.joins and self.key_blocks > RUN_GROUPS * self.shape.flush

    @property
    def paired(self) -> bool:
        """Whether what the outer accumulator is emptied into is a double word."""
        return self.regroups and self.keys >= PAIRED_FROM

    @property
    def outside(self) -> bool:
        """Whether the outer accumulator waits in global memory: registers have no room for it."""
        return self.joins and self.value_width > _WIDEST_SUMS

    @property
    def offset_slots(self) -> int:
        """Key tiles whose offsets are in shared memory: a power of 2, more than there are stages.

        A thread says that it is done with a tile's keys when its offsets may still be on their way
        to its registers: only that the weights of the tile before are made is sure then. The copy
        that follows may write over the offsets of such a tile, not over those of this one.
        """
        return 1 << self.shape.stages.bit_length()

    @property
    def piece(self) -> int:
        """Columns of what goes out that leave the registers at a time."""
        widest = _PIECE_BYTES // self.outgoing.itemsize
        fits = range(16, min(self.value_width, widest) + 1, 16)
        return max(width for width in fits if self.value_width % width == 0)

    @property
    def outgoing(self) -> Any:
        """Of what goes out."""
        return jnp.dtype(jnp.float32) if self.sums else self.dtype

    @property
    def staged(self) -> Matrix:
        """A piece of what goes out."""
        return Matrix(self.piece, self.outgoing)

    @property
    def cap(self) -> float:
        """The public reference in the unit of the products of rows."""
        return min((self.spec.score_cap or 0.0) / self.spec.scale, 3e38)

    @property
    def factor(self) -> float:
        """Of the scores, into units of ln 2."""
        return self.spec.scale * LOG2_E

    @property
    def weighing(self) -> dict[str, float]:
        """What capped weights depend on beside the scores and offsets."""
        return {"cap": self.cap, "factor": self.factor}

    @property
    def matrices(self) -> tuple[Matrix, Matrix]:
        """Of queries and keys, and of values."""
        return (
            Matrix(self.key_width, self.dtype if self.key_dtype is None else self.key_dtype),
            Matrix(self.value_width, self.dtype),
        )

    @property
    def given(self) -> Matrix:
        """Of queries as they are copied in."""
        return Matrix(self.key_width, self.dtype) if self.converts else self.matrices[0]

    def place(self, tile, arithmetic=jnp):
        """Tile number → (query block, head, batch).

        Heads whose keys and values fit the cache together are neighbours; among them the longest
        causal rows come first.

        Args:
          tile: int32 scalar of a kernel; or an array of `arithmetic`.
          arithmetic: jnp or np.
        """
        region, rest = _divided(tile, self.near * self.query_blocks, arithmetic)
        width = arithmetic.minimum(self.batch * self.heads - region * self.near, self.near)
        block, head = _divided(rest, width, arithmetic)
        batch, head = _divided(head + region * self.near, self.heads, arithmetic)
        if self.spec.is_causal:
            block = self.query_blocks - 1 - block
        return block, head, batch

    @property
    def near(self) -> int:
        """Query heads of a region: their keys and values fit the cache together."""
        one = 2 * self.keys * (self.key_width + self.value_width)
        return min(self.batch * self.heads, max(1, self.shape.nearby // one) * self.group)

    @property
    def scheduled(self) -> bool:
        """Whether a table says which tiles a block of the grid takes: some tiles see more keys."""
        left, right = self.sides
        return (left, right) != (None, None) and self.tiles <= _LONGEST_TABLE

    def schedule(self) -> np.ndarray:
        """Each block's number of tiles and the tiles themselves: (programs, 1 + most) int32.

        Rows are filled up by zeros to whole batches of `ROW_BATCH` tiles.

        The tiles in order, each to the block that is free first, as the device itself would place
        blocks that live for one tile. Taking every `programs`-th tile instead gives some blocks of
        the grid the longest causal rows of every region.
        """
        blocks, *_ = self.place(np.arange(self.tiles, dtype=np.int32), np)
        costs = self.key_range(blocks, np)[1] + shares.OWN_TIME
        free = [(0, program) for program in range(self.programs)]
        mine: list[list[int]] = [[] for _ in free]
        for tile, cost in enumerate(costs.tolist()):
            time, program = free[0]
            heapq.heapreplace(free, (time + cost, program))
            mine[program].append(tile)
        most = -(-max(map(len, mine)) // ROW_BATCH) * ROW_BATCH
        table = np.zeros((self.programs, most + 1), np.int32)
        for row, tiles in zip(table, mine, strict=True):
            row[0] = len(tiles)
            row[1 : 1 + len(tiles)] = tiles
        return table

    @property
    def whole(self) -> int:
        """Whole tiles of a block of the grid, where others are split."""
        return self.tiles // self.programs

    def dealt(self) -> np.ndarray | None:
        """What blocks of the grid do beside whole tiles (`mosaic_gpu_shares.dealt`), or None.

        Not under masks by position (unequal keys), nor beside different maxima (no sums to add).
        """
        if not self.shape.shares or self.online or self.sides != (None, None):
            return None
        alone = RUN_GROUPS * self.shape.flush if self.regroups else None
        tiles = self.whole * self.programs, self.tiles
        size = self.key_blocks, self.keys, self.shape.block_k
        costs = shares.WIDE if self.value_width > _WIDEST_SUMS else shares.Costs()
        return shares.dealt(*tiles, self.programs, *size, alone, costs)

    @property
    def part(self) -> str | None:
        """Name of the memory where sums of a share wait.

        After the whole tiles that of runs is free, but for a last share longer than a run.
        """
        if not self.splits:
            return None
        return "far" if self.regroups else "part"

    @property
    def places(self) -> int:
        """How many sums of shares may wait."""
        table = self.dealt()
        return 0 if table is None else shares.places(table)

    def key_range(self, block, arithmetic=jnp):
        """First key tile that a query block sees, and how many: at least one.

        Args:
          block: int32 scalar of a kernel; or an array of `arithmetic`.
          arithmetic: jnp or np.
        """
        left, right = self.sides
        low, high = arithmetic.int32(0), arithmetic.int32(self.key_blocks)
        size = arithmetic.int32(self.shape.block_k)
        start = block * self.block_q
        if right is not None:
            high, _ = _divided(start + (self.block_q + right + size - 1), size, arithmetic)
            high = arithmetic.clip(high, 1, self.key_blocks)
        if left is not None:
            low, _ = _divided(arithmetic.maximum(start - left, 0), size, arithmetic)
            low = arithmetic.minimum(low, high - 1)
        return low, high - low

    def judging(self, block, head, batch):
        """Which of the key tiles that it sees a query tile judges, as a number for `judged`.

        Every key tile that any query sees is judged once, by a query tile that sees it.

        Args:
          block: as of `place`, int32 scalar of a kernel like the others.
          head: of the queries.
          batch: of the queries.
        """
        ours = lax.rem(head, jnp.int32(self.group)) == 0
        if self.memories == 1:
            ours &= batch == 0
        if self.sides == (None, None):
            return jnp.where(ours, block, -1)
        low, count = self.key_range(jnp.maximum(block - 1, 0))
        return jnp.where(ours, jnp.where(block > 0, low + count, 0), _NEVER)

    def judged(self, tile, judging):
        """Whether a key tile that a query tile sees is judged by it.

        Args:
          tile: number of the key tile, int32 scalar of a kernel.
          judging: what `judging` says of the query tile.
        """
        if self.sides == (None, None):
            # As many by every query tile.
            return lax.rem(tile, jnp.int32(self.query_blocks)) == judging
        # What no earlier query tile sees.
        return tile >= judging


def _divided(number, by, arithmetic):
    """Quotient and remainder of what is not negative, for which a kernel needs no case."""
    if arithmetic is np:
        return np.divmod(number, by)
    return lax.div(number, jnp.int32(by)), lax.rem(number, jnp.int32(by))
