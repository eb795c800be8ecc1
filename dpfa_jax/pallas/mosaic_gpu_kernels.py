"""The Hopper kernel's body: two warpgroups compute, one copies, one draws noise and runs ahead.

A block of the grid lives as long as the call and takes one tile of 128 queries of one head after
another. While the matrix unit multiplies weights and values of one key tile, the special-function
unit makes the weights of the next. Keys are read from the last tile that a query tile sees to the
first, so that the tile on the diagonal comes before the loop.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax._typing import Spec
from dpfa_jax.pallas import mosaic_gpu_blocks as blocks

ROWS = blocks.ROWS
LOG2_E = math.log2(math.e)
_COMPUTE = 2
_PACKED, _TILE = plgpu.Layout.WGMMA, plgpu.Layout._WGMMA_ACC_32BIT
_COLUMN, _ROW = _PACKED.reduce(0), _PACKED.reduce(1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one kernel.

    Attributes:
      spec: what is computed.
      batch: B.
      memories: B or 1.
      queries: T.
      keys: S.
      heads: query heads.
      group: query heads of one kv head.
      key_width: H, a multiple of 16.
      value_width: h, a multiple of 16.
      dtype: of the matrix products.
      block_k: keys of one tile, a multiple of 64.
      stages: tiles of keys and of values in shared memory.
      programs: blocks of the grid.
      flush: key tiles of one accumulator.
      shift: powers of two by which weights are raised.
      segments: whether there are segment ids.
      biases: 1 or B: batch size of the offsets.
    """

    spec: Spec
    batch: int
    memories: int
    queries: int
    keys: int
    heads: int
    group: int
    key_width: int
    value_width: int
    dtype: Any
    block_k: int
    stages: int
    programs: int
    flush: int
    shift: int = 0
    segments: bool = False
    biases: int = 1

    @property
    def block_q(self) -> int:
        """Queries of one tile of the grid."""
        return ROWS * _COMPUTE

    @property
    def query_blocks(self) -> int:
        """Tiles along the queries."""
        return -(-self.queries // self.block_q)

    @property
    def key_blocks(self) -> int:
        """Tiles along the keys."""
        return -(-self.keys // self.block_k)

    @property
    def tiles(self) -> int:
        """Tiles of the call."""
        return self.batch * self.heads * self.query_blocks

    @property
    def noisy(self) -> bool:
        """Whether a warpgroup draws noise."""
        return self.spec.noise != "none"

    @property
    def released(self) -> bool:
        """Whether the denominator is used."""
        return self.spec.denominator_std != math.inf

    @property
    def keeps(self) -> bool:
        """Whether some sum needs more than one accumulator."""
        return self.key_blocks > self.flush

    @property
    def sides(self) -> tuple[int | None, int | None]:
        """How far before and after itself a query sees."""
        left, right = self.spec.window or (None, None)
        if self.spec.is_causal:
            right = 0 if right is None else min(right, 0)
        return left, right

    @property
    def masked(self) -> bool:
        """Whether every key tile is masked, not only the one on the diagonal."""
        return self.segments or self.spec.window is not None

    @property
    def weights(self) -> blocks.Weights:
        """The map from scores to weights."""
        cap = self.spec.score_cap
        assert cap is not None
        return blocks.Weights(
            cap=min(cap / self.spec.scale, 3e38), factor=self.spec.scale * LOG2_E, dtype=self.dtype
        )

    @property
    def matrices(self) -> tuple[blocks.Matrix, blocks.Matrix]:
        """Of queries and keys, and of values."""
        return (
            blocks.Matrix(self.key_width, self.dtype),
            blocks.Matrix(self.value_width, self.dtype),
        )

    def place(self, tile):
        """Tile number → (query block, head, batch); the longest causal rows of a head first."""
        count = jnp.int32(self.query_blocks)
        block, rest = lax.rem(tile, count), lax.div(tile, count)
        if self.spec.is_causal:
            block = count - 1 - block
        return block, lax.rem(rest, jnp.int32(self.heads)), lax.div(rest, jnp.int32(self.heads))

    def key_range(self, block):
        """First key tile that a query block sees, and how many: at least one."""
        left, right = self.sides
        low, high = jnp.int32(0), jnp.int32(self.key_blocks)
        start, size = block * self.block_q, jnp.int32(self.block_k)
        if right is not None:
            high = lax.div(start + (self.block_q + right + self.block_k - 1), size)
            high = jnp.clip(high, 1, self.key_blocks)
        if left is not None:
            low = lax.div(jnp.maximum(start - left, 0), size)
            low = jnp.minimum(low, high - 1)
        return low, high - low


def _slot(step, stages: int):
    return lax.rem(step, jnp.int32(stages))


def _wide(width: int) -> tuple:
    """Transforms of float32 rows that only threads read."""
    swizzle = next(size for size in (128, 64, 32) if 4 * width % size == 0)
    return (plgpu.TilingTransform((8, swizzle // 4)), plgpu.SwizzleTransform(swizzle))


def scratch(plan: Plan) -> dict:
    """Shared memory and barriers of one block of the grid."""
    key, value = (matrix.transforms for matrix in plan.matrices)

    def shared(shape, dtype, transforms=()):
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    out = shared((_COMPUTE, ROWS, plan.value_width), plan.dtype, value)
    if plan.noisy:
        wide = _wide(plan.value_width)
        out = plgpu.RefUnion(shared((_COMPUTE, ROWS, plan.value_width), jnp.float32, wide), out)
    found = {
        "q": shared((_COMPUTE, ROWS, plan.key_width), plan.dtype, key),
        "k": shared((plan.stages, plan.block_k, plan.key_width), plan.dtype, key),
        "v": shared((plan.stages, plan.block_k, plan.value_width), plan.dtype, value),
        "offset": shared((plan.stages, plan.block_k), jnp.float32),
        "stage": out,
        "q_full": plgpu.Barrier(num_barriers=_COMPUTE),
        "q_empty": plgpu.Barrier(num_barriers=_COMPUTE),
        "k_full": plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
        "k_empty": plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=plan.stages),
        "v_full": plgpu.Barrier(num_barriers=plan.stages),
        "v_empty": plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=plan.stages),
    }
    if plan.noisy:
        found["noise_full"] = plgpu.Barrier(num_barriers=_COMPUTE)
        found["noise_empty"] = plgpu.Barrier(num_barriers=_COMPUTE)
        if plan.spec.noise == "sums" and plan.released:
            found["row_noise"] = shared((_COMPUTE * ROWS,), jnp.float32)
    return found


def _shared_index(size: int, index):
    return jnp.int32(0) if size == 1 else index


def _each_tile(plan: Plan, body, carry):
    """`body(local number, tile, carry)` over the tiles of this block of the grid."""
    program = lax.axis_index("program")
    mine = lax.div(jnp.int32(plan.tiles - 1) - program, jnp.int32(plan.programs)) + 1

    def step(index, carry):
        return body(index, program + index * plan.programs, carry)

    return lax.fori_loop(jnp.int32(0), mine, step, carry)


def _copy_loop(plan: Plan, refs):
    """The memory warpgroup."""

    def tile(index, number, step):
        block, head, batch = plan.place(number)
        low, count = plan.key_range(block)
        memory = _shared_index(plan.memories, batch)
        kv_head = lax.div(head, jnp.int32(plan.group))
        for wg in range(_COMPUTE):
            pl.when(index > 0)(lambda wg=wg: plgpu.barrier_wait(refs["q_empty"].at[wg]))
            rows = pl.ds(block * plan.block_q + wg * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(
                refs["query"].at[batch, rows, head], refs["q"].at[wg], refs["q_full"].at[wg]
            )

        def key_tile(i, step):
            slot = _slot(step, plan.stages)
            keys = pl.ds((low + count - 1 - i) * plan.block_k, plan.block_k)
            again = step >= plan.stages
            pl.when(again)(lambda: plgpu.barrier_wait(refs["k_empty"].at[slot]))
            full = refs["k_full"].at[slot]
            plgpu.copy_gmem_to_smem(
                refs["key"].at[memory, keys, kv_head], refs["k"].at[slot], full
            )
            source = refs["bias"].at[_shared_index(plan.biases, batch), kv_head, keys]
            plgpu.copy_gmem_to_smem(source, refs["offset"].at[slot], full)
            pl.when(again)(lambda: plgpu.barrier_wait(refs["v_empty"].at[slot]))
            plgpu.copy_gmem_to_smem(
                refs["value"].at[memory, keys, kv_head], refs["v"].at[slot], refs["v_full"].at[slot]
            )
            return step + 1

        return lax.fori_loop(jnp.int32(0), count, key_tile, step)

    _each_tile(plan, tile, jnp.int32(0))


def _noise_loop(plan: Plan, refs):
    """The noise warpgroup: draws for the next tile while this one's sums are made."""
    spec, key = plan.spec, refs["noise_key"]
    noise, _ = refs["stage"]

    def tile(index, number, carry):
        block, head, batch = plan.place(number)
        start = block * plan.block_q
        for wg in range(_COMPUTE):
            pl.when(index > 0)(lambda wg=wg: plgpu.barrier_wait(refs["noise_empty"].at[wg]))
        if "row_noise" in refs:
            std = spec.denominator_std
            blocks.row_noise(key, batch, head, start, std, refs["row_noise"])
        for wg in range(_COMPUTE):
            for first in range(0, plan.value_width, 64):
                width = min(64, plan.value_width - first)
                place = (batch, head, start + wg * ROWS, jnp.int32(first // 64))
                drawn = blocks.matrix_noise(key, *place, width, spec.noise_std)
                noise[wg, :, pl.ds(first, width)] = drawn
            plgpu.barrier_arrive(refs["noise_full"].at[wg])
        return carry

    _each_tile(plan, tile, jnp.int32(0))


def _visible(plan: Plan, start, key_start, refs, batch, query_ids):
    """Boolean (64, block_k): pairs that may meet."""
    shape = (ROWS, plan.block_k)

    def iota(axis):
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_TILE)

    rows, keys = iota(0) + start, iota(1) + key_start
    left, right = plan.sides
    allowed = None
    if right is not None:
        allowed = keys - rows <= right
    if left is not None:
        near = rows - keys <= left
        allowed = near if allowed is None else allowed & near
    if plan.segments:
        memory = _shared_index(plan.memories, batch)
        source = refs["key_segments"].at[memory, pl.ds(key_start, plan.block_k)]
        ids = plgpu.load(source, layout=_COLUMN, optimized=False)
        same = lax.broadcast_in_dim(ids, shape, [1]) == lax.broadcast_in_dim(query_ids, shape, [0])
        allowed = same if allowed is None else allowed & same
    return allowed


def _sums(plan: Plan, refs, wg, place, step):
    """One warpgroup's sums over all keys that its tile sees: (64, h), (64,) shares, next step."""
    block, _, batch = place
    low, count = plan.key_range(block)
    start = block * plan.block_q + wg * ROWS
    weights = plan.weights
    query_ids = None
    if plan.segments:
        source = refs["query_segments"].at[batch, pl.ds(start, ROWS)]
        query_ids = plgpu.load(source, layout=_ROW, optimized=False)

    def wait(name, slot):
        plgpu.barrier_wait(refs[name].at[slot])

    def arrive(name, slot):
        plgpu.barrier_arrive(refs[name].at[slot])

    def weigh(i, slot, scores, mass, masked):
        if masked:
            key_start = (low + count - 1 - i) * plan.block_k
            allowed = _visible(plan, start, key_start, refs, batch, query_ids)
            scores = jnp.where(allowed, scores, -jnp.inf)
        offset = plgpu.load(refs["offset"].at[slot], layout=_COLUMN, optimized=False)
        rounded, mass = weights(scores, offset, mass)
        arrive("k_empty", slot)
        return rounded, mass

    matrices = plan.matrices
    zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), _ROW)
    query = refs["q"].at[wg]
    slot = _slot(step, plan.stages)
    plgpu.barrier_wait(refs["q_full"].at[wg])
    wait("k_full", slot)
    scores = blocks.scores(query, refs["k"].at[slot], matrices[0])
    on_diagonal = plan.masked or plan.sides[1] is not None
    rounded, mass = weigh(jnp.int32(0), slot, scores, zero, on_diagonal)

    flush = jnp.int32(plan.flush)
    buffer = refs["sums"].at[lax.axis_index("program"), wg] if plan.keeps else None

    def adds(i):
        """Whether key tile i joins the ones before it in one accumulator."""
        return (i > 0 if buffer is None else lax.rem(i, flush) > 0).astype(jnp.int32)

    def one(i, carry):
        """Sums of key tile i-1, weights of key tile i."""
        rounded, total, mass, joined = carry
        slot, before = _slot(step + i, plan.stages), _slot(step + i - 1, plan.stages)
        wait("k_full", slot)
        scores, total = blocks.overlapped(
            query,
            refs["k"].at[slot],
            refs["v"].at[before],
            rounded,
            total,
            adds(i - 1),
            *matrices,
            lambda: wait("v_full", before),
        )
        if buffer is not None:
            # Keys of a new accumulator are a new group of the denominator's too.
            fresh = lax.rem(i, flush) == 0
            joined = jnp.where(fresh, joined + mass, joined)
            mass = jnp.where(fresh, 0.0, mass)
        new, mass = weigh(i, slot, scores, mass, plan.masked)
        total = blocks.finish(total, rounded)
        arrive("v_empty", before)
        if buffer is not None:
            pl.when(i == flush)(lambda: blocks.keep(total, buffer, add=False))
            pl.when(fresh & (i > flush))(lambda: blocks.keep(total, buffer, add=True))
        return new, total, mass, joined

    carry = (rounded, blocks.unset(plan.value_width), mass, zero)
    rounded, total, mass, joined = lax.fori_loop(jnp.int32(1), count, one, carry)
    slot = _slot(step + count - 1, plan.stages)
    arrive("q_empty", wg)
    wait("v_full", slot)
    total = blocks.sums(refs["v"].at[slot], rounded, total, adds(count - 1), matrices[1])
    arrive("v_empty", slot)
    if buffer is not None:
        before = blocks.kept(buffer, plan.value_width)
        total = total + jnp.where(count > flush, before, 0.0)
    return total, joined + mass, step + count


def _bounded(ratio, bound):
    """Rows scaled to norm ≤ bound, and their factors; rows that are not finite become 0."""
    shape = ratio.shape
    largest = jnp.max(jnp.abs(ratio), axis=1)
    unit = jnp.where(largest > 2.0**60, 2.0**-100, jnp.where(largest < 2.0**-60, 2.0**100, 1.0))
    scaled = ratio * lax.broadcast_in_dim(unit, shape, [0])
    square = jnp.maximum(jnp.sum(scaled * scaled, axis=1), 2.0**-120)
    factor = jnp.minimum(1.0, (bound * unit) * lax.rsqrt(square))
    finite = largest < jnp.inf
    factor = jnp.where(finite, factor, 0.0)
    finite = lax.broadcast_in_dim(finite, shape, [0])
    return jnp.where(finite, ratio * lax.broadcast_in_dim(factor, shape, [0]), 0.0), factor


def _answer(plan: Plan, refs, wg, total, mass):
    """What is made of the sums: noise, ratio, projection. The noise buffer is read here only."""
    spec = plan.spec
    shape = total.shape
    total = plgpu.layout_cast(total, _PACKED)
    unshift = 2.0**-plan.shift
    mass = blocks.row_sum(mass)
    if plan.shift:
        total, mass = total * unshift, mass * unshift
    if plan.noisy:
        plgpu.barrier_wait(refs["noise_full"].at[wg])
        noise = refs["stage"][0][wg]
    if spec.noise == "sums":
        total = blocks.on_grid(total + noise, spec)
        if plan.released:
            row = plgpu.load(
                refs["row_noise"].at[pl.ds(wg * ROWS, ROWS)], layout=_ROW, optimized=False
            )
            mass = blocks.on_grid(mass + row, spec, denominator=True)
    if plan.released:
        inverse = 1.0 / jnp.maximum(mass, spec.floor)
        ratio = total * lax.broadcast_in_dim(inverse, shape, [0])
    else:
        ratio = total * (1.0 / spec.floor)
        mass = mass * 0.0
    bound = spec.ball if spec.ball is not None else spec.row_clip
    factor = None
    if bound is not None:
        ratio, factor = _bounded(ratio, bound)
    clean = ratio
    if spec.noise == "rows":
        ratio = blocks.on_grid(ratio + noise, spec)
    return ratio, clean, mass, factor


def _compute_loop(plan: Plan, refs, wg):
    """One of the computing warpgroups."""
    staging = refs["stage"][1] if plan.noisy else refs["stage"]

    def tile(index, number, step):
        block, head, batch = place = plan.place(number)
        total, mass, step = _sums(plan, refs, wg, place, step)
        answer, clean, mass, factor = _answer(plan, refs, wg, total, mass)
        rows = pl.ds(block * plan.block_q + wg * ROWS, ROWS)

        def write(name, array):
            staging[wg] = array.astype(plan.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staging.at[wg], refs[name].at[batch, rows, head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        # All threads of the warpgroup have read the noise before any of them writes over it.
        plgpu.commit_smem()
        write("out", answer)
        if "clean" in refs:
            plgpu.commit_smem()
            write("clean", clean)
        if plan.noisy:
            plgpu.barrier_arrive(refs["noise_empty"].at[wg])
        refs["mass"][batch, head, rows] = mass
        if factor is not None:
            refs["factor"][batch, head, rows] = factor
        return step

    _each_tile(plan, tile, jnp.int32(0))


def forward_kernel(plan: Plan, names: tuple[str, ...], *args, **shared):
    """The whole kernel.

    Args:
      plan: what is static.
      names: of the refs in global memory, inputs then outputs.
      args: those refs.
      shared: what `scratch` describes.
    """
    refs = dict(zip(names, args, strict=True)) | shared
    thread = lax.axis_index("warpgroup")
    threads = _COMPUTE + 1 + plan.noisy
    budget = 200 if plan.noisy else 240

    @pl.when(thread < _COMPUTE)
    def _():
        plgpu.set_max_registers(budget, action="increase")
        _compute_loop(plan, refs, thread)

    @pl.when(thread == _COMPUTE)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _copy_loop(plan, refs)

    if threads > _COMPUTE + 1:

        @pl.when(thread == _COMPUTE + 1)
        def _():
            plgpu.set_max_registers(88, action="decrease")
            _noise_loop(plan, refs)
