"""The Triton kernels of `attend`.

R rows of queries, all heads of a token one after another; S keys, H head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of a tile: rows, keys, warps, stages; the fastest of those tried on an H200.
FORWARD = (128, 64, 8, 2)
# Rows, keys, how much of H is read at a time, warps, stages; and the same for few rows.
MANY, FEW = (128, 128, 64, 8, 3), (64, 64, 64, 4, 3)


def forward(q: Tensor, k: Tensor, v: Tensor, queries: Tensor | None, keys: Tensor) -> tuple[Tensor, Tensor]:
    """See `attend._attention`."""
    size, length, heads, dim = q.shape
    rows = length * heads
    out, sums = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    tile, part, warps, stages = FORWARD
    _forward[(triton.cdiv(rows, tile), size)](
        q, k, v, keys if queries is None else queries, keys, out, sums, rows, k.shape[1], length,
        BLOCKS=queries is not None, N=heads, H=dim, ROWS=tile, KEYS=part, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, sums


def weights(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, queries: Tensor | None, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """See `attend._weights`."""
    size, length, heads, dim = q.shape
    rows, count = length * heads, k.shape[1]
    around = torch.empty(size * rows, dtype=torch.float32, device=q.device)
    _products[(triton.cdiv(size * rows, 16),)](gradient, out, around, size * rows, H=dim, BLOCK=16, num_warps=4)
    stride = triton.cdiv(count, 8) * 8
    p, dp = (q.new_empty(size, rows, stride) for _ in range(2))
    tile, part, depth, warps, stages = MANY if rows > 1024 else FEW
    _weights[(triton.cdiv(rows, tile), triton.cdiv(count, part), size)](
        gradient, q, k, v, sums, around, keys if queries is None else queries, keys, p, dp, rows, count, length, stride,
        BLOCKS=queries is not None, N=heads, H=dim, ROWS=tile, KEYS=part, PART=min(depth, dim),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return p, dp


@triton.jit
def _seen(of_queries, of_keys, sample, row, key, rows, count, length, BLOCKS: tl.constexpr, N: tl.constexpr):
    """Which rows see which keys, [rows, keys]; see `masks.Blocks`."""
    block = tl.load(of_keys + sample * count + key, key < count, 1 << 30)
    if BLOCKS:
        limit = tl.load(of_queries + sample * length + row // N, row < rows, -1)
        return block[None] <= limit[:, None]
    return (block < (1 << 30))[None] & (row >= 0)[:, None]


@triton.jit
def _forward(
    q, k, v, of_queries, of_keys, out, sums, rows, count, length,
    BLOCKS: tl.constexpr, N: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Softmax over the keys tile by tile, in powers of two; what was found before shrinks as the largest grows."""
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h = tl.arange(0, H)
    at = (sample * rows + row)[:, None] * H + h[None]
    inside = (row < rows)[:, None]
    a = tl.load(q + at, inside, 0.0)
    largest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, H], tl.float32)
    for first in range(0, count, KEYS):
        key = first + tl.arange(0, KEYS)
        b = tl.load(k + (sample * count + key)[None] * H + h[:, None], (key < count)[None], 0.0)
        seen = _seen(of_queries, of_keys, sample, row, key, rows, count, length, BLOCKS, N)
        logits = tl.where(seen, tl.dot(a, b) * 1.4426950408889634, -float("inf"))
        new = tl.maximum(largest, tl.max(logits, 1))
        p = tl.exp2(logits - new[:, None])
        shrunk = tl.exp2(largest - new)
        total = total * shrunk + tl.sum(p, 1)
        c = tl.load(v + (sample * count + key)[:, None] * H + h[None], (key < count)[:, None], 0.0)
        found = tl.dot(p.to(c.dtype), c, found * shrunk[:, None])
        largest = new
    total = tl.where(total == 0, 1.0, total)
    tl.store(out + at, (found / total[:, None]).to(out.dtype.element_ty), inside)
    tl.store(sums + sample * rows + row, (largest + tl.log2(total)) * 0.6931471805599453, row < rows)


@triton.jit
def _products(a, b, out, rows, H: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of a * b over H."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None] * H + tl.arange(0, H)[None]
    inside = row[:, None] < rows
    products = tl.load(a + at, inside, 0.0).to(tl.float32) * tl.load(b + at, inside, 0.0).to(tl.float32)
    tl.store(out + row, tl.sum(products, 1), row < rows)


@triton.jit
def _weights(
    gradient, q, k, v, sums, around, of_queries, of_keys, p_out, dp_out, rows, count, length, stride,
    BLOCKS: tl.constexpr, N: tl.constexpr, H: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    key = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    in_rows, in_keys = row < rows, key < count
    part = tl.arange(0, PART)
    of_row = (sample * rows + row)[:, None] * H + part[None]
    of_key = (sample * count + key)[None] * H + part[:, None]
    logits = tl.zeros([ROWS, KEYS], tl.float32)
    dp = tl.zeros([ROWS, KEYS], tl.float32)
    for first in range(0, H, PART):
        a = tl.load(q + of_row + first, in_rows[:, None], 0.0)
        b = tl.load(k + of_key + first, in_keys[None], 0.0)
        logits = tl.dot(a, b, logits)
        c = tl.load(gradient + of_row + first, in_rows[:, None], 0.0)
        d = tl.load(v + of_key + first, in_keys[None], 0.0)
        dp = tl.dot(c, d, dp)
    every = sample * rows + row
    total = tl.load(sums + every, in_rows, 0.0)
    seen = _seen(of_queries, of_keys, sample, row, key, rows, count, length, BLOCKS, N)
    p = tl.where(seen, tl.exp(logits - total[:, None]), 0.0)
    dp = p * (dp - tl.load(around + every, in_rows, 0.0)[:, None])
    at = every[:, None] * stride + key[None]
    inside = in_rows[:, None] & (key < stride)[None]
    tl.store(p_out + at, p.to(p_out.dtype.element_ty), inside)
    tl.store(dp_out + at, dp.to(dp_out.dtype.element_ty), inside)
