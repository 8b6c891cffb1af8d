"""Tile sizes of the kernels: found once by measuring inside a graph, with weights that are not in the cache.

A size that was not measured takes the nearest that divides its shape.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Of a streaming kernel: columns of the output and depth of the sum at a time, programs that share a sum."""

    columns: int
    depth: int
    splits: int
    warps: int
    stages: int


class Attend(NamedTuple):
    """Of attention: rows of queries and keys at a time, programs that share the keys."""

    rows: int
    keys: int
    splits: int
    warps: int
    stages: int


# Measured on an H100 at the sizes of `base`.
STREAMING = {
    "qkv": Tile(columns=32, depth=128, splits=1, warps=4, stages=4),
    "gate_up": Tile(columns=32, depth=128, splits=1, warps=4, stages=4),
    "o": Tile(columns=32, depth=128, splits=4, warps=4, stages=4),
    "down": Tile(columns=32, depth=128, splits=4, warps=4, stages=4),
}
FEW_ROWS = Attend(rows=64, keys=64, splits=8, warps=4, stages=2)
MANY_ROWS = Attend(rows=128, keys=64, splits=1, warps=8, stages=2)


def streaming(kind: str, columns: int, depth: int) -> Tile:
    """The tile of a product.

    Args:
      kind: a key of `STREAMING`.
      columns: what a tile's columns must divide.
      depth: length of the sum, which depth and splits must divide.
    """
    tile = STREAMING[kind]
    splits = _divisor(tile.splits, depth // 16)
    return tile._replace(
        columns=_divisor(tile.columns, columns), splits=splits, depth=_divisor(tile.depth, depth // splits)
    )


def attend(rows: int, keys: int) -> Attend:
    """The tile of attention of so many rows (tokens x heads) to so many keys."""
    if rows > 2048:
        return MANY_ROWS
    return FEW_ROWS._replace(splits=min(FEW_ROWS.splits, -(-keys // FEW_ROWS.keys)))


def _divisor(wanted: int, size: int) -> int:
    """The largest power of two, at most `wanted`, that divides `size`."""
    return min(wanted, size & -size)
