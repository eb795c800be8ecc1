"""What memory a block of the Hopper kernel's grid has: shared, barriers, and global.

Of the global one a block uses its own part, but for sums of shares.
"""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax.pallas.mosaic_gpu_kept import SHARE_WORDS
from dpfa_jax.pallas.mosaic_gpu_plan import Plan
from dpfa_jax.pallas.mosaic_gpu_registers import ROWS


def scratch(plan: Plan) -> dict:
    """Shared memory and barriers of one block of the grid."""
    shape = plan.shape
    rows, values = plan.matrices
    key, value = rows.transforms, values.transforms
    numbers = ROWS * plan.value_width

    def shared(shape, dtype, transforms=()):
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    staged = plan.staged
    stage = shared((shape.compute, ROWS, staged.width), staged.dtype, staged.transforms)
    found = {
        "q": shared((shape.compute, ROWS, plan.key_width), rows.dtype, key),
        "k": shared((shape.stages, shape.block_k, plan.key_width), rows.dtype, key),
        "v": shared((shape.stages, shape.block_k, plan.value_width), plan.dtype, value),
        "offset": shared((plan.offset_slots, shape.block_k), jnp.float32),
        "stage": stage,
        "q_full": plgpu.Barrier(num_barriers=shape.compute),
        "q_empty": plgpu.Barrier(num_barriers=shape.compute),
        "k_full": plgpu.Barrier(num_arrivals=2, num_barriers=shape.stages),
        "k_empty": plgpu.Barrier(num_arrivals=shape.compute, num_barriers=shape.stages),
        "v_full": plgpu.Barrier(num_barriers=shape.stages),
        "v_empty": plgpu.Barrier(num_arrivals=shape.compute, num_barriers=shape.stages),
    }
    if plan.converts:
        given = plan.given
        whole = (shape.compute, ROWS, given.width)
        found["given"] = shared(whole, given.dtype, given.transforms)
    if plan.noisy:
        found["noise_full"] = plgpu.Barrier(num_barriers=shape.slots * shape.compute)
        found["noise_empty"] = plgpu.Barrier(num_arrivals=shape.compute, num_barriers=shape.slots)
        if shape.noise == "shared":
            found["noise"] = shared((shape.slots, shape.compute, numbers), jnp.float32)
    return found


def buffers(plan: Plan) -> dict:
    """Global memory that the kernel alone uses: name → shape, float32."""
    shape = plan.shape
    found = {}
    if plan.noisy and shape.noise == "global":
        found["noise"] = (plan.programs, shape.slots, shape.compute, ROWS * plan.value_width)
    if plan.outside:
        found["outer"] = (plan.programs, shape.compute, ROWS * plan.value_width)
    if plan.regroups:
        words = 1 + plan.paired
        size = words * ROWS * plan.value_width + SHARE_WORDS * (plan.part == "far")
        found["far"] = (plan.programs, shape.compute, size)
    if plan.part == "part":
        size = ROWS * plan.value_width + SHARE_WORDS
        found["part"] = (plan.places, shape.compute, size)
    if plan.row_noisy:
        rows = plan.row_ring * plan.served * ROWS
        found["row_noise"] = (plan.programs, shape.drawing, rows)
    return found
