"""One copy from the host to the device for all inputs together: each copy has a price of its own."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

Layout = tuple[Any, tuple[tuple[tuple[int, ...], str], ...]]  # structure; shape and dtype of each leaf


def pack(tree: Any) -> tuple[np.ndarray, Layout]:
    """Nested numpy arrays as uint8 in one piece, and how to find them in it (hashable).

    Wider numbers come first, so that each lies where its kind may lie.
    """
    leaves, structure = jax.tree.flatten(tree)
    order = sorted(range(len(leaves)), key=lambda i: -leaves[i].itemsize)
    flat = np.concatenate([np.ascontiguousarray(leaves[i]).reshape(-1).view(np.uint8) for i in order])
    return flat, (structure, tuple((leaf.shape, leaf.dtype.name) for leaf in leaves))


def unpack(flat: jax.Array, layout: Layout) -> Any:
    """What was packed, on the device."""
    structure, leaves = layout
    found, start = {}, 0
    for i in sorted(range(len(leaves)), key=lambda i: -np.dtype(leaves[i][1]).itemsize):
        shape, dtype = leaves[i][0], np.dtype(leaves[i][1])
        size = math.prod(shape) * dtype.itemsize
        part = flat[start : start + size]
        if dtype.itemsize > 1:
            part = part.reshape(-1, dtype.itemsize)
        found[i] = jax.lax.bitcast_convert_type(part, dtype).reshape(shape)
        start += size
    return jax.tree.unflatten(structure, [found[i] for i in range(len(leaves))])
