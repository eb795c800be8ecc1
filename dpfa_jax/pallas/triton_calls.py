"""Launching a kernel: its arrays as blocks, its grid, and the second launch that repairs."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dpfa_jax import _primitives
from dpfa_jax.pallas import tiling, triton_kernels
from dpfa_jax.pallas.triton_kernels import Plan


def shape_like(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """A result that varies over the mesh axes over which `like` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def pad(array: jax.Array, axis: int, multiple: int, fill: Any) -> jax.Array:
    """The array with one axis filled up to a multiple."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % multiple)
    return jnp.pad(array, widths, constant_values=fill)


@dataclasses.dataclass(frozen=True)
class Argument:
    """One array of a kernel call: block shape, and its place for (block, head, batch).

    `cut` is the axis that the blocks of queries or keys cut, None where a program sees all of it.
    """

    name: str
    array: Any
    block: tuple[int | None, ...]
    place: Callable
    cut: int | None = None

    def spec(self, count: int | None, place: Callable) -> pl.BlockSpec:
        """For a kernel of one block; with a count of blocks, for one of all of them."""
        block = list(self.block)
        if count is not None and self.cut is not None:
            block[self.cut] = count * (self.block[self.cut] or 1)
        return pl.BlockSpec(tuple(block), lambda program: self.place(*place(program)))


def round_up(size: int, multiple: int) -> int:
    """The next multiple that is not below `size`."""
    return -(-size // multiple) * multiple


def shared(size: int, index):
    """The index along an axis that may have size 1 for all."""
    return 0 if size == 1 else index


def _flags(flags: jax.Array) -> Argument:
    """Flags of a memory or of its queries, all of them at once for every program."""
    flags = pad(flags, 1, tiling.padded(flags.shape[1]), 0)
    return Argument(
        "flags", flags, (None, flags.shape[1]), lambda i, h, b: (shared(flags.shape[0], b), 0)
    )


def call(
    body: Callable,
    plan: Plan,
    grid: tuple[int, int, int],
    inputs: list[Argument],
    outputs: list[Argument],
    flags: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Runs a kernel over (blocks, heads, batch), blocks first so that they share keys in cache.

    With flags the kernel takes its arrays as they are, and where flags are up a second one writes
    the answers anew without the rows that are not finite. No branch then costs the first anything;
    the second reads flags and ends.
    """
    results = _launch(body, plan, grid, inputs, outputs)
    if flags is not None:
        repairing = dataclasses.replace(plan, repairs=True)
        earlier = [
            dataclasses.replace(o, name=f"earlier {o.name}", array=result)
            for o, result in zip(outputs, results, strict=True)
        ]
        inputs = [*earlier, _flags(flags), *inputs]
        results = _launch(body, repairing, grid, inputs, outputs)
    return {o.name: result for o, result in zip(outputs, results, strict=True)}


def _launch(body, plan, grid, inputs, outputs) -> tuple:
    count, heads, _ = grid
    heavy_last = plan.spec.is_causal and body is triton_kernels.forward_kernel

    def place(program):
        """Block, head and batch of one program, which when repairing has all the blocks."""
        index, rest = jnp.int32(0), program
        if not plan.repairs:
            index = lax.rem(program, jnp.int32(count))
            rest = lax.div(program, jnp.int32(count))
            # The longest causal rows start first.
            index = count - 1 - index if heavy_last else index
        return index, lax.rem(rest, jnp.int32(heads)), lax.div(rest, jnp.int32(heads))

    names = tuple(argument.name for argument in (*inputs, *outputs))
    arrays = _primitives.vary_alike(*(argument.array for argument in inputs))

    def run(fast, *arrays):
        chosen = dataclasses.replace(plan, fast=fast)

        def kernel(*all_refs):
            refs = dict(zip(names, all_refs, strict=True))
            index, *rest = place(pl.program_id(0))
            if not plan.repairs:
                body(chosen, (index, *rest), refs)
                return

            def one(index, carry):
                body(chosen, (index, *rest), refs)
                return carry

            found = jnp.max(refs["flags"][...]) != 0
            todo = jnp.where(found, jnp.int32(count), jnp.int32(0))
            lax.fori_loop(jnp.int32(0), todo, one, jnp.int32(0))

        kernel.__name__ = f"dpfa_{body.__name__}" + "_repair" * plan.repairs
        cut = count if plan.repairs else None
        return pl.pallas_call(
            kernel,
            grid=(math.prod(grid) // (count if plan.repairs else 1),),
            in_specs=[argument.spec(cut, place) for argument in inputs],
            out_specs=[argument.spec(cut, place) for argument in outputs],
            out_shape=[shape_like(*argument.array, like=arrays[0]) for argument in outputs],
            input_output_aliases={i: i for i in range(len(outputs))} if plan.repairs else {},
            compiler_params=plgpu.CompilerParams(
                num_warps=plan.tile.warps, num_stages=1 if plan.repairs else plan.tile.stages
            ),
            interpret=not fast,
            name=kernel.__name__,
        )(*arrays)

    def interpreted(*arrays):
        return _primitives.closed(partial(run, False), *arrays)

    return tuple(lax.platform_dependent(*arrays, cuda=partial(run, True), default=interpreted))
