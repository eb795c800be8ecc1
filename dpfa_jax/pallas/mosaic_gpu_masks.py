"""Masks of the Hopper kernel: which pairs of a tile may meet, by a number of row and of column."""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from dpfa_jax.pallas import mosaic_gpu_registers as rg
from dpfa_jax.pallas.mosaic_gpu_registers import ROWS


def same(row_ids, column_ids):
    """Whether row and column have one id: (64, keys) boolean."""
    shape = (ROWS, column_ids.shape[0])

    @rg.inline(
        arg_types=(rg.ROW, rg.COLUMN), return_type=plgpu.ShapeDtypeStruct(shape, jnp.bool_, rg.TILE)
    )
    def run(_, row_ids, column_ids):
        rows, columns = rg.numbers(row_ids), rg.numbers(column_ids)
        found = [
            arith.cmpi(arith.CmpIPredicate.eq, rows[i // 2 % 2], columns[2 * (i // 4) + i % 2])
            for i in range(2 * len(columns))
        ]
        return rg.from_numbers(found, shape, rg.TILE, signed=False)

    return run(row_ids, column_ids)


def seen(rows, keys, left: int | None, right: int | None):
    """Whether keys are at most `left` before and `right` after the row: (64, keys) boolean.

    Args:
      rows: (64,) int32, the rows' positions.
      keys: (keys,) int32, the keys' positions.
      left: or None without such a side.
      right: likewise; not both are None.
    """
    shape = (ROWS, keys.shape[0])

    @rg.inline(
        arg_types=(rg.ROW, rg.COLUMN), return_type=plgpu.ShapeDtypeStruct(shape, jnp.bool_, rg.TILE)
    )
    def run(_, rows, keys):
        rows, keys = rg.numbers(rows), rg.numbers(keys)
        sides = []
        if right is not None:
            last = [arith.addi(row, rg.integer(right)) for row in rows]
            sides.append((arith.CmpIPredicate.sle, last))
        if left is not None:
            first = [arith.subi(row, rg.integer(left)) for row in rows]
            sides.append((arith.CmpIPredicate.sge, first))
        found = []
        for i in range(2 * len(keys)):
            key = keys[2 * (i // 4) + i % 2]
            inside = [arith.cmpi(kind, key, limit[i // 2 % 2]) for kind, limit in sides]
            found.append(inside[0] if len(inside) == 1 else arith.andi(*inside))
        return rg.from_numbers(found, shape, rg.TILE, signed=False)

    return run(rows, keys)
