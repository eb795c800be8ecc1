"""The Hopper gradient kernel: two warpgroups compute, one copies; a block of the grid has 128 keys.

It goes through the queries that see its keys, tile by tile, five matrix products a tile, and keeps
the sums of its keys' gradients in registers. The scores of the next tile are on their way while
the queries' gradients of this one are added to global memory.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax._typing import Spec
from dpfa_jax.pallas import mosaic_gpu_gradient_blocks as steps
from dpfa_jax.pallas import mosaic_gpu_rows as tile_rows
from dpfa_jax.pallas.mosaic_gpu_plan import LOG2_E
from dpfa_jax.pallas.mosaic_gpu_registers import COLUMN, ROW, ROWS, TILE, Matrix

BLOCK_K = 2 * ROWS
"""Keys of one block of the grid."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one gradient kernel.

    Attributes:
      spec: what is differentiated.
      batch: B.
      queries: T.
      keys: S.
      heads: query heads.
      group: query heads of one kv head.
      width: of queries, keys and values in the kernel, 64 or 128.
      dtype: of the matrix products.
      offsets: 1 or B: batch size of the offsets.
      rows: names of the float32 numbers that each query has.
      repairs: whether keys and values that are not finite count as 0, and queries as rows of zeros.
      block_q: queries of one tile, 64 or 128.
      stages: tiles of queries in shared memory.
      registers: of the computing and the copying threads, a multiple of 8 each.
      nearby: bytes of queries and sums that blocks in flight may touch.
    """

    spec: Spec
    batch: int
    queries: int
    keys: int
    heads: int
    group: int
    width: int
    dtype: Any
    offsets: int
    rows: tuple[str, ...]
    repairs: bool = False
    block_q: int = 64
    stages: int = 2
    registers: tuple[int, int] = (240, 24)
    nearby: int = 24 << 20

    @property
    def query_blocks(self) -> int:
        """Tiles along the queries."""
        return -(-self.queries // self.block_q)

    @property
    def key_blocks(self) -> int:
        """Blocks of the grid along the keys."""
        return -(-self.keys // BLOCK_K)

    @property
    def programs(self) -> int:
        """Blocks of the grid."""
        return self.batch * (self.heads // self.group) * self.key_blocks

    @property
    def cap(self) -> float | None:
        """The public reference in the unit of the products of rows."""
        if self.spec.score_cap is None:
            return None
        return min(self.spec.score_cap / self.spec.scale, 3e38)

    @property
    def factor(self) -> float:
        """Of the scores, into units of ln 2."""
        return self.spec.scale * LOG2_E

    @property
    def matrix(self) -> Matrix:
        """Of queries, keys, values and cotangents."""
        return Matrix(self.width, self.dtype)

    @property
    def score_matrix(self) -> Matrix:
        """Of score gradients: keys by queries."""
        return Matrix(self.block_q, self.dtype)

    @property
    def sums(self) -> tuple[int, ...]:
        """Shape of the sums of the queries' gradients."""
        own = (self.block_q * self.width // 2 // 512, 128, 4)
        return (self.batch, self.heads, self.query_blocks, 2, *own)

    def place(self, program):
        """Block of the grid → (key block, kv head, batch).

        Heads whose queries and sums fit the cache together are neighbours; among them the keys
        that most queries see come first.
        """
        kv_heads = self.heads // self.group
        total = self.batch * kv_heads
        one = 8 * self.queries * self.width * self.group
        near = min(total, max(1, self.nearby // one))
        size = near * self.key_blocks
        region, rest = lax.div(program, jnp.int32(size)), lax.rem(program, jnp.int32(size))
        width = jnp.minimum(total - region * near, near)
        block, head = lax.div(rest, width), lax.rem(rest, width) + region * near
        return block, lax.rem(head, jnp.int32(kv_heads)), lax.div(head, jnp.int32(kv_heads))

    def query_range(self, block):
        """First query tile that sees a key block, and how many: at least one."""
        low = jnp.int32(0)
        if self.spec.is_causal:
            low = jnp.minimum(lax.div(block * BLOCK_K, self.block_q), self.query_blocks - 1)
        return low, self.query_blocks - low


def scratch(plan: Plan) -> dict:
    """Shared memory and barriers of one block of the grid."""
    rows, scores = plan.matrix.transforms, plan.score_matrix.transforms
    own, width = (2, ROWS, plan.width), plan.width

    def shared(shape, transforms=(), dtype=plan.dtype):
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    return {
        "k": shared(own, rows),
        "v": shared(own, rows),
        "q": shared((plan.stages, plan.block_q, width), rows),
        "do": shared((plan.stages, plan.block_q, width), rows),
        "ds": shared((2, BLOCK_K, plan.block_q), scores),
        "stage": shared(plan.sums[3:], dtype=jnp.float32),
        "row": shared((plan.stages, len(plan.rows), plan.block_q), dtype=jnp.float32),
        "k_full": plgpu.Barrier(num_arrivals=4),
        "q_full": plgpu.Barrier(num_barriers=plan.stages),
        "do_full": plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
    }


def _shared_index(size: int, index):
    return jnp.int32(0) if size == 1 else index


def _slot(step, stages: int):
    return lax.rem(step, jnp.int32(stages))


def _query_tile(low, count, step):
    """Step of a block → (query tile, member of its group of heads)."""
    return low + lax.rem(step, count), lax.div(step, count)


def _copy_loop(plan: Plan, refs, place):
    """The memory warpgroup; it copies one tile more than is used."""
    block, kv_head, batch = place
    low, count = plan.query_range(block)
    for wg in range(2):
        keys = pl.ds(block * BLOCK_K + wg * ROWS, ROWS)
        for name, source in (("k", "key"), ("v", "value")):
            rows = refs[source].at[batch, keys, kv_head]
            plgpu.copy_gmem_to_smem(rows, refs[name].at[wg], refs["k_full"])
    total = count * plan.group

    def tile(step, carry):
        slot = _slot(step, plan.stages)
        block_q, member = _query_tile(low, count, jnp.minimum(step, total - 1))
        head = kv_head * plan.group + member
        queries = pl.ds(block_q * plan.block_q, plan.block_q)
        pl.when(step >= plan.stages)(lambda: plgpu.barrier_wait(refs["empty"].at[slot]))
        for name, source in (("q", "query"), ("do", "cotangent")):
            full = refs[f"{name}_full"].at[slot]
            rows = refs[source].at[batch, queries, head]
            plgpu.copy_gmem_to_smem(rows, refs[name].at[slot], full)
        row = refs["rows"].at[batch, head, pl.ds(0, len(plan.rows)), queries]
        plgpu.copy_gmem_to_smem(row, refs["row"].at[slot], refs["do_full"].at[slot])
        return carry

    lax.fori_loop(jnp.int32(0), total + 1, tile, jnp.int32(0))


def _compute_loop(plan: Plan, refs, place, wg):
    """One of the computing warpgroups: 64 keys."""
    block, kv_head, batch = place
    low, count = plan.query_range(block)
    total = count * plan.group
    start = block * BLOCK_K + wg * ROWS
    keys = pl.ds(start, ROWS)
    matrix, score_matrix = plan.matrix, plan.score_matrix
    source = refs["offsets"].at[_shared_index(plan.offsets, batch), kv_head, keys]
    offset = plgpu.load(source, layout=ROW, optimized=False)
    limit = None
    if plan.cap is not None:
        limit = steps.largest_weights(offset, cap=plan.cap, factor=plan.factor)
    key, value = refs["k"].at[wg], refs["v"].at[wg]

    def row(name, slot, number):
        if name not in plan.rows:
            return None
        place = refs["row"].at[slot, plan.rows.index(name), pl.ds(number * ROWS, ROWS)]
        return plgpu.load(place, layout=COLUMN, optimized=False)

    parts = plan.block_q // ROWS

    def part(name, slot, number):
        return refs[name].at[slot, pl.ds(number * ROWS, ROWS)]

    def begin(slot):
        """Scores of a tile's first part, on their way."""
        plgpu.barrier_wait(refs["q_full"].at[slot])
        if plan.repairs:
            tiles = [part("q", slot, number) for number in range(parts)]
            lost = [tile_rows.unfinite(tile, matrix) for tile in tiles]
            # Neither warpgroup clears a row that the other has not seen.
            steps.meet()
            for tile, row in zip(tiles, lost, strict=True):
                tile_rows.clear_rows(tile, row, matrix)
        return steps.start(key, part("q", slot, 0), matrix)

    plgpu.barrier_wait(refs["k_full"])
    if plan.repairs:
        for rows in (key, value):
            tile_rows.clear_unfinite(rows, matrix)
    (scores,) = steps.wait(0, [begin(jnp.int32(0))])

    def one(step, carry):
        scores, d_key, d_value, d_bias = carry
        slot, after = _slot(step, plan.stages), _slot(step + 1, plan.stages)
        tile, member = _query_tile(low, count, step)
        kept = refs["ds"].at[lax.rem(step, jnp.int32(2))]
        plgpu.barrier_wait(refs["do_full"].at[slot])
        for number in range(parts):
            query, cotangent = part("q", slot, number), part("do", slot, number)
            products = steps.start(value, cotangent, matrix)
            more = number + 1 < parts
            if more:
                later = steps.start(key, part("q", slot, number + 1), matrix)
            first = None
            if plan.spec.is_causal:
                first = start - tile * plan.block_q - number * ROWS
            weights, words = steps.weights(
                scores,
                offset,
                first,
                row("best", slot, number),
                row("inverse", slot, number),
                cap=plan.cap,
                factor=plan.factor,
                dtype=plan.dtype,
            )
            d_value = steps.add(d_value, words, cotangent, matrix)
            (products,) = steps.wait(1 + more, [products])
            found, d_bias = steps.differences(
                products,
                weights,
                row("delta", slot, number),
                row("inverse", slot, number),
                limit,
                d_bias,
                dtype=plan.dtype,
            )
            d_key = steps.add(d_key, found, query, matrix)
            steps.keep(found, kept, wg, number, score_matrix)
            if more:
                (scores,) = steps.wait(2, [later])
        steps.meet()
        (d_value,) = steps.wait(1, [d_value], [words])
        d_query = steps.start_transposed(kept, refs["k"], wg, score_matrix, matrix)
        scores = begin(after)
        d_query, d_key = steps.wait(1, [d_query, d_key], [found])
        plgpu.barrier_arrive(refs["empty"].at[slot])
        head = kv_head * plan.group + member
        target = refs["sums"].at[batch, head, tile, wg]
        steps.add_to_global(d_query, refs["stage"].at[wg], target, wg)
        (scores,) = steps.wait(0, [scores])
        return scores, d_key, d_value, d_bias

    def zeros(*shape):
        return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), TILE if len(shape) == 2 else ROW)

    carry = (scores, zeros(ROWS, plan.width), zeros(ROWS, plan.width), zeros(ROWS))
    scores, d_key, d_value, d_bias = lax.fori_loop(jnp.int32(0), total, one, carry)
    # The cotangents of the last copy are not used; a block ends with none on the way.
    plgpu.barrier_wait(refs["do_full"].at[_slot(total, plan.stages)])
    refs["d_bias"][batch, kv_head, keys] = steps.row_totals(d_bias)
    steps.finish_adding()
    # No one but this warpgroup reads its values.
    for name, tile in (("d_value", d_value), ("d_key", d_key * plan.spec.scale)):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        value[...] = tile.astype(plan.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(value, refs[name].at[batch, keys, kv_head])
    plgpu.wait_smem_to_gmem(0)


def gradient_kernel(plan: Plan, names: tuple[str, ...], *args, **shared):
    """The whole kernel.

    Args:
      plan: what is static.
      names: of the refs in global memory, inputs then outputs.
      args: those refs.
      shared: what `scratch` describes.
    """
    refs = dict(zip(names, args, strict=True)) | shared
    thread = lax.axis_index("warpgroup")
    place = plan.place(lax.axis_index("program"))

    @pl.when(thread < 2)
    def _():
        plgpu.set_max_registers(plan.registers[0], action="increase")
        _compute_loop(plan, refs, place, thread)

    @pl.when(thread == 2)
    def _():
        plgpu.set_max_registers(plan.registers[1], action="decrease")
        _copy_loop(plan, refs, place)
