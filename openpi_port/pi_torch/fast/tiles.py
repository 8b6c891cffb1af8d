"""Tile sizes of the kernels: found once by measuring inside a graph, with weights that are not in the cache.

A size that was not measured takes the nearest that divides its shape.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Of a streaming kernel: rows and columns of the output, depth of the sum at a time, programs that share a sum."""

    rows: int
    columns: int
    depth: int
    splits: int
    warps: int
    stages: int


class Attend(NamedTuple):
    """Of attention: rows of queries and keys at a time, programs that share the keys.

    `described`: through tensor memory access, which leaves the registers to the sums of many rows.
    """

    rows: int
    keys: int
    splits: int
    warps: int
    stages: int
    described: bool = False


# Measured on an H100 at the sizes of `base`: the action expert's 51 rows, and one row of the language model, for which
# the matrix units' older, smaller tile is enough. Few stages leave room on the chip for the kernel that comes early.
EXPERT = {
    "qkv": Tile(rows=64, columns=32, depth=128, splits=1, warps=4, stages=4),
    "gate_up": Tile(rows=64, columns=32, depth=128, splits=1, warps=4, stages=3),
    "o": Tile(rows=64, columns=16, depth=128, splits=2, warps=4, stages=4),
    "down": Tile(rows=64, columns=32, depth=128, splits=4, warps=4, stages=4),
}
TOKEN = {
    "qkv": Tile(rows=16, columns=16, depth=256, splits=1, warps=4, stages=4),
    "gate_up": Tile(rows=16, columns=32, depth=128, splits=1, warps=4, stages=5),
    "o": Tile(rows=16, columns=32, depth=256, splits=4, warps=4, stages=3),
    "down": Tile(rows=16, columns=32, depth=256, splits=8, warps=4, stages=4),
}
SUFFIX_ATTENTION = Attend(rows=16, keys=64, splits=5, warps=4, stages=2)
TOKEN_ATTENTION = Attend(rows=16, keys=64, splits=16, warps=4, stages=2)
IMAGE_ATTENTION = Attend(rows=128, keys=64, splits=1, warps=8, stages=2)
FEW_IMAGES_ATTENTION = Attend(rows=64, keys=64, splits=1, warps=4, stages=3, described=True)
PREFIX_ATTENTION = Attend(rows=64, keys=64, splits=1, warps=4, stages=3, described=True)

# All that are not described fit into the 99 KiB on the chip that smaller GPUs give a program (an RTX 4090, 8.9; a 5090,
# 12.0; seen by compiling for them), where the described have no room. The small one has not been measured.
LARGE = 225 * 1024  # bytes in which the described have room, on an H100
SMALL_PREFIX_ATTENTION = Attend(rows=64, keys=32, splits=1, warps=8, stages=2)

PROCESSORS = 132
LEAST_DEPTH = 1024  # of a part of a large product


def streaming(kind: str, rows: int, columns: int, depth: int) -> Tile:
    """The tile of a product.

    Args:
      kind: "qkv", "gate_up", "o" or "down".
      rows: of the product.
      columns: what a tile's columns must divide.
      depth: length of the sum, which depth and splits must divide.
    """
    tile = (TOKEN if rows <= 16 else EXPERT)[kind]
    splits = divisor(tile.splits, depth // 16)
    return tile._replace(
        columns=divisor(tile.columns, columns), splits=splits, depth=divisor(tile.depth, depth // splits)
    )


def parts(rows: int, columns: int, depth: int) -> int:
    """How many products, each over a part of its depth, a large product becomes: as many as fill the chip together.

    Alone it would have to be cut into small tiles, which read every number more often. But what the parts leave is
    written and read once more, so only deep ones are worth it.
    """
    if depth < 2 * columns:
        return 1
    most = min(PROCESSORS // (-(-rows // 256) * -(-columns // 128)), depth // LEAST_DEPTH)  # tiles of 256 x 128
    return divisor(1 << max(most.bit_length() - 1, 0), depth)


def attend(rows: int, keys: int, memory: int) -> Attend:
    """The tile of attention of so many rows (tokens x heads) to so many keys, in so many bytes on the chip."""
    many = PREFIX_ATTENTION if memory >= LARGE else SMALL_PREFIX_ATTENTION
    tile = many if rows > 2048 else SUFFIX_ATTENTION if rows > 64 else TOKEN_ATTENTION
    return tile._replace(splits=min(tile.splits, -(-keys // tile.keys)))


def attend_all(samples: int, heads: int, rows: int, memory: int) -> Attend:
    """The tile of the attention of images: the smaller where the chip has room for all its programs side by side."""
    fits = samples * heads * -(-rows // FEW_IMAGES_ATTENTION.rows) <= PROCESSORS and memory >= LARGE
    return FEW_IMAGES_ATTENTION if fits else IMAGE_ATTENTION


def divisor(wanted: int, size: int) -> int:
    """The largest power of two, at most `wanted`, that divides `size`."""
    return min(wanted, size & -size)
