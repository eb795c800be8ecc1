"""The Hopper kernel that sums a key's squared weights over the queries that read it."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax.pallas import mosaic_gpu_blocks as blocks
from dpfa_jax.pallas import mosaic_gpu_copies as copies
from dpfa_jax.pallas import mosaic_gpu_kernels as kernels
from dpfa_jax.pallas import mosaic_gpu_products as products
from dpfa_jax.pallas.mosaic_gpu_plan import Plan
from dpfa_jax.pallas.mosaic_gpu_registers import COLUMN, ROW, ROWS, TILE

_PAIR = 2


def column_scratch(plan: Plan) -> dict:
    """Shared memory and barriers of `column_kernel`."""
    rows = plan.matrices[0]
    size, transforms = plan.shape.block_k, rows.transforms
    return {
        "q": plgpu.SMEM((_PAIR, 2, ROWS, plan.key_width), rows.dtype, transforms=transforms),
        "k": plgpu.SMEM((size, plan.key_width), rows.dtype, transforms=transforms),
        "offset": plgpu.SMEM((size,), jnp.float32),
        "q_full": plgpu.Barrier(num_barriers=2 * _PAIR),
        "k_full": plgpu.Barrier(num_arrivals=2),
    }


def column_kernel(plan: Plan, names: tuple[str, ...], *args, **shared):
    """One tile of keys: Σ w² over the queries and heads that read it, as 4 sums a warpgroup.

    The scores are those of `forward_kernel` bit for bit: the same products, the same way round.
    """
    refs = dict(zip(names, args, strict=True)) | shared
    wg, size = lax.axis_index("warpgroup"), plan.shape.block_k
    program = lax.axis_index("program")
    key_block, rest = lax.rem(program, plan.key_blocks), lax.div(program, plan.key_blocks)
    kv_heads = plan.heads // plan.group
    kv_head, batch = lax.rem(rest, kv_heads), lax.div(rest, kv_heads)
    memory, key_start = copies.shared_index(plan.memories, batch), key_block * size
    keys = pl.ds(key_start, size)

    @pl.when(wg == 0)
    def _():
        plgpu.copy_gmem_to_smem(refs["key"].at[memory, keys, kv_head], refs["k"], refs["k_full"])
        row = refs["offsets"].at[copies.shared_index(plan.offsets, batch), kv_head, keys]
        plgpu.copy_gmem_to_smem(row, refs["offset"], refs["k_full"])

    tiles = -(-plan.queries // ROWS)
    low = jnp.int32(0)
    if plan.spec.is_causal:
        low = jnp.minimum(lax.div(key_start, ROWS), tiles)
    count = (tiles - low) * plan.group
    mine = lax.div(count - wg + (_PAIR - 1), _PAIR)

    def place(i):
        number = i * _PAIR + wg
        width = jnp.maximum(tiles - low, 1)
        return (low + lax.rem(number, width)) * ROWS, kv_head * plan.group + lax.div(number, width)

    def copy(i):
        start, head = place(i)
        slot = lax.rem(i, jnp.int32(2))
        source = refs["query"].at[batch, pl.ds(start, ROWS), head]
        full = refs["q_full"].at[2 * wg + slot]
        plgpu.copy_gmem_to_smem(source, refs["q"].at[wg, slot], full)

    pl.when(mine > 0)(lambda: copy(jnp.int32(0)))
    plgpu.barrier_wait(refs["k_full"])
    offset = plgpu.load(refs["offset"], layout=COLUMN, optimized=False)

    def one(i, total):
        # All four warps are done with the queries that the next ones take the place of.
        plgpu.commit_smem()
        pl.when(i + 1 < mine)(lambda: copy(i + 1))
        slot = lax.rem(i, jnp.int32(2))
        plgpu.barrier_wait(refs["q_full"].at[2 * wg + slot])
        scores = products.scores(refs["q"].at[wg, slot], refs["k"], plan.matrices[0])
        start, _ = place(i)
        query_ids = None
        if plan.segments:
            source = refs["query_segments"].at[batch, pl.ds(start, ROWS)]
            query_ids = plgpu.load(source, layout=ROW, optimized=False)
        allowed = kernels.visible(plan, start, key_start, refs, batch, query_ids)
        if plan.queries % ROWS:
            rows = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=TILE)
            inside = rows < plan.queries - start
            allowed = inside if allowed is None else allowed & inside
        if allowed is not None:
            scores = jnp.where(allowed, scores, -jnp.inf)
        return blocks.squares(scores, offset, total, **plan.weighing)

    total = lax.fori_loop(jnp.int32(0), mine, one, kernels.zeros(ROWS, size))
    blocks.write_column_sums(total, refs["squares"].at[batch, kv_head, pl.ds(4 * wg, 4), keys])
