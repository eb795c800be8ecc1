"""Neighbouring data sets: what one person's presence may change.

A sensitivity, an event or a guarantee means nothing without one of these, so every mechanism
carries one. Positions and shapes are public in all of them.
"""

import dataclasses

from dpfa_jax import _check


@dataclasses.dataclass(frozen=True)
class Adjacency:
    """A relation between data sets, and how many rows it may change.

    Attributes:
      kind: "ZERO_OUT", "REPLACE_ONE", "GROUP" or "SEQUENCE".
      rows: for "GROUP", the number of rows that may become NULL together, ≥ 1; otherwise 1.
    """

    kind: str
    rows: int = 1

    def __post_init__(self):
        _check.choice("kind", self.kind, ("ZERO_OUT", "REPLACE_ONE", "GROUP", "SEQUENCE"))
        _check.integer("rows", self.rows, low=1)
        if self.kind != "GROUP" and self.rows != 1:
            raise ValueError(
                f"Expected rows == 1 for {self.kind}, got {self.rows}. Use GROUP(rows) where one "
                "person owns several rows."
            )

    def __str__(self):
        return f"GROUP({self.rows})" if self.kind == "GROUP" else self.kind

    __repr__ = __str__


ZERO_OUT = Adjacency("ZERO_OUT")
"""One record is present in one data set and NULL in the other, at the same position."""

REPLACE_ONE = Adjacency("REPLACE_ONE")
"""One record is replaced by any other; the number of records is public."""

SEQUENCE = Adjacency("SEQUENCE")
"""The whole input is replaced (the local model)."""


def GROUP(rows: int) -> Adjacency:
    """Up to `rows` records (a document, a patient) become NULL together.

    Args:
      rows: how many rows one person may own, ≥ 1.

    Example:
      >>> GROUP(3)
      GROUP(3)
    """
    return Adjacency("GROUP", rows)
