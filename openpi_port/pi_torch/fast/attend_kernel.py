"""The Triton kernels of `attend`.

R rows of queries, all heads of a token one after another; S keys, H head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, KEYS, PART = 128, 128, 64  # a tile of the result, and how much of H is read at a time
WARPS, STAGES = 8, 3  # the fastest of those tried on an H100: 0.55 ms of 0.58 with its products


def weights(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """See `attend._weights`."""
    size, length, heads, dim = q.shape
    rows, keys = length * heads, k.shape[1]
    around = torch.empty(size * rows, dtype=torch.float32, device=q.device)
    _products[(triton.cdiv(size * rows, 16),)](gradient, out, around, size * rows, H=dim, BLOCK=16, num_warps=4)
    stride = triton.cdiv(keys, 8) * 8  # so that every row begins where cuBLAS reads fast
    p, dp = (q.new_empty(size, rows, stride) for _ in range(2))
    grid = triton.cdiv(rows, ROWS), triton.cdiv(keys, KEYS), size
    _weights[grid](
        gradient, q, k, v, sums, around, valid, p, dp, rows, keys, stride, size * length,
        N=heads, H=dim, ROWS=ROWS, KEYS=KEYS, PART=min(PART, dim), num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return p[..., :keys], dp[..., :keys]


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
    gradient, q, k, v, sums, around, valid, p_out, dp_out, rows, keys, stride, tokens,
    N: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    key = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    in_rows, in_keys = row < rows, key < keys
    part = tl.arange(0, PART)
    of_row = (sample * rows + row)[:, None] * H + part[None]
    of_key = (sample * keys + key)[None] * H + part[:, None]
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
    total = tl.load(sums + (every % N) * tokens + every // N, in_rows, 0.0)
    seen = tl.load(valid + sample * keys + key, in_keys, 0) != 0
    p = tl.where(seen[None], tl.exp(logits - total[:, None]), 0.0)
    dp = p * (dp - tl.load(around + every, in_rows, 0.0)[:, None])
    at = every[:, None] * stride + key[None]
    inside = in_rows[:, None] & in_keys[None]
    tl.store(p_out + at, p.to(p_out.dtype.element_ty), inside)
    tl.store(dp_out + at, dp.to(dp_out.dtype.element_ty), inside)
