"""The Triton kernels of `attend_own`.

A program takes one head of one sample, and some of its queries with all keys, or some of its keys with all queries. A
head's H numbers are taken in two pieces, whose sizes are powers of two. Softmax is in powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Queries (or keys) of a program, warps, stages; the fastest of those tried on an H200.
FORWARD, QUERIES, KEYS = (128, 8, 1), (64, 4, 2), (64, 4, 2)
PART = 64  # of what a loop reads at a time
LOG2E = tl.constexpr(1.4426950408889634)


def forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """See `attend_own._attention`."""
    size, length, _, heads, dim = qkv.shape
    out, sums = qkv.new_empty(size, length, heads, dim), qkv.new_empty(size, heads, length, dtype=torch.float32)
    _forward[_grid(qkv, FORWARD)](qkv, out, sums, **_options(qkv, FORWARD))
    return out, sums


def gradients(gradient: Tensor, qkv: Tensor, out: Tensor, sums: Tensor) -> Tensor:
    """See `attend_own._attention_gradients`."""
    found, around, part = torch.empty_like(qkv), torch.empty_like(sums), min(PART, qkv.shape[1])
    _of_queries[_grid(qkv, QUERIES)](gradient, qkv, out, sums, around, found, PART=part, **_options(qkv, QUERIES))
    _of_keys[_grid(qkv, KEYS)](gradient, qkv, sums, around, found, PART=part, **_options(qkv, KEYS))
    return found


def _grid(qkv: Tensor, how: tuple[int, int, int]) -> tuple[int, int, int]:
    return triton.cdiv(qkv.shape[1], how[0]), qkv.shape[3], qkv.shape[0]


def _options(qkv: Tensor, how: tuple[int, int, int]) -> dict[str, int | float]:
    _, length, _, heads, dim = qkv.shape
    large = 1 << (dim.bit_length() - 1)
    small = max(16, triton.next_power_of_2(dim - large)) if dim > large else 0
    sizes = {"T": length, "N": heads, "H": dim, "LARGE": large, "SMALL": small, "SCALE": dim**-0.5}
    return {**sizes, "ROWS": min(how[0], length), "num_warps": how[1], "num_stages": how[2]}


@triton.jit
def _rows(first, COUNT: tl.constexpr, T: tl.constexpr, N: tl.constexpr, H: tl.constexpr):
    """From row `first` of this program's head on: where they begin in queries, in what is attended, and in sums."""
    head = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    t = first + tl.arange(0, COUNT)
    row = sample * T + t
    return row * (3 * N * H) + head * H, row * (N * H) + head * H, (sample * N + head) * T + t


@triton.jit
def _rest(LARGE: tl.constexpr, SMALL: tl.constexpr, H: tl.constexpr):
    """The second piece of a head's numbers, and which of them there are."""
    h = LARGE + tl.arange(0, SMALL)
    return h, h < H


@triton.jit
def _forward(
    qkv, out, sums,
    T: tl.constexpr, N: tl.constexpr, H: tl.constexpr, LARGE: tl.constexpr, SMALL: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    mine, here, places = _rows(tl.program_id(0) * ROWS, ROWS, T, N, H)
    every, _, _ = _rows(0, T, T, N, H)
    q, k, v = qkv, qkv + N * H, qkv + 2 * N * H
    h = tl.arange(0, LARGE)
    logits = tl.dot(tl.load(q + mine[:, None] + h[None]), tl.load(k + every[None] + h[:, None]))
    if SMALL:
        i, there = _rest(LARGE, SMALL, H)
        a = tl.load(q + mine[:, None] + i[None], there[None], 0.0)
        logits = tl.dot(a, tl.load(k + every[None] + i[:, None], there[:, None], 0.0), logits)
    logits *= SCALE * LOG2E
    largest = tl.max(logits, 1)
    p = tl.exp2(logits - largest[:, None])
    total = tl.sum(p, 1)
    tl.store(sums + places, largest + tl.log2(total))
    p = p.to(out.dtype.element_ty)
    found = tl.dot(p, tl.load(v + every[:, None] + h[None])) / total[:, None]
    tl.store(out + here[:, None] + h[None], found.to(out.dtype.element_ty))
    if SMALL:
        found = tl.dot(p, tl.load(v + every[:, None] + i[None], there[None], 0.0)) / total[:, None]
        tl.store(out + here[:, None] + i[None], found.to(out.dtype.element_ty), there[None])


@triton.jit
def _of_queries(
    gradient, qkv, out, sums, around, found,
    T: tl.constexpr, N: tl.constexpr, H: tl.constexpr, LARGE: tl.constexpr, SMALL: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The gradient of some queries, from all keys, a part of them at a time; and what `_of_keys` subtracts."""
    mine, here, places = _rows(tl.program_id(0) * ROWS, ROWS, T, N, H)
    q, k, v = qkv, qkv + N * H, qkv + 2 * N * H
    h = tl.arange(0, LARGE)
    a = tl.load(q + mine[:, None] + h[None])
    b = tl.load(gradient + here[:, None] + h[None])
    mean = tl.sum(b.to(tl.float32) * tl.load(out + here[:, None] + h[None]).to(tl.float32), 1)
    of_q = tl.zeros([ROWS, LARGE], tl.float32)
    if SMALL:
        i, there = _rest(LARGE, SMALL, H)
        c = tl.load(q + mine[:, None] + i[None], there[None], 0.0)
        d = tl.load(gradient + here[:, None] + i[None], there[None], 0.0)
        mean += tl.sum(d.to(tl.float32) * tl.load(out + here[:, None] + i[None], there[None], 0.0).to(tl.float32), 1)
        more = tl.zeros([ROWS, SMALL], tl.float32)
    tl.store(around + places, mean)
    total = tl.load(sums + places)
    for first in range(0, T, PART):
        theirs, _, _ = _rows(first, PART, T, N, H)
        x = tl.load(k + theirs[None] + h[:, None])
        logits = tl.dot(a, x)
        dp = tl.dot(b, tl.load(v + theirs[None] + h[:, None]))
        if SMALL:
            y = tl.load(k + theirs[None] + i[:, None], there[:, None], 0.0)
            logits = tl.dot(c, y, logits)
            dp = tl.dot(d, tl.load(v + theirs[None] + i[:, None], there[:, None], 0.0), dp)
        p = tl.exp2(logits * (SCALE * LOG2E) - total[:, None])
        ds = (p * (dp - mean[:, None])).to(found.dtype.element_ty)
        of_q = tl.dot(ds, tl.trans(x), of_q)
        if SMALL:
            more = tl.dot(ds, tl.trans(y), more)
    tl.store(found + mine[:, None] + h[None], (of_q * SCALE).to(found.dtype.element_ty))
    if SMALL:
        tl.store(found + mine[:, None] + i[None], (more * SCALE).to(found.dtype.element_ty), there[None])


@triton.jit
def _of_keys(
    gradient, qkv, sums, around, found,
    T: tl.constexpr, N: tl.constexpr, H: tl.constexpr, LARGE: tl.constexpr, SMALL: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The gradients of some keys and their values, from all queries, a part of them at a time."""
    mine, _, _ = _rows(tl.program_id(0) * ROWS, ROWS, T, N, H)
    q, k, v, dk, dv = qkv, qkv + N * H, qkv + 2 * N * H, found + N * H, found + 2 * N * H
    h = tl.arange(0, LARGE)
    a = tl.load(k + mine[:, None] + h[None])
    b = tl.load(v + mine[:, None] + h[None])
    of_k = tl.zeros([ROWS, LARGE], tl.float32)
    of_v = tl.zeros([ROWS, LARGE], tl.float32)
    if SMALL:
        i, there = _rest(LARGE, SMALL, H)
        c = tl.load(k + mine[:, None] + i[None], there[None], 0.0)
        d = tl.load(v + mine[:, None] + i[None], there[None], 0.0)
        more_k = tl.zeros([ROWS, SMALL], tl.float32)
        more_v = tl.zeros([ROWS, SMALL], tl.float32)
    for first in range(0, T, PART):
        theirs, others, places = _rows(first, PART, T, N, H)
        x = tl.load(q + theirs[None] + h[:, None])
        g = tl.load(gradient + others[None] + h[:, None])
        logits = tl.dot(a, x)
        dp = tl.dot(b, g)
        if SMALL:
            y = tl.load(q + theirs[None] + i[:, None], there[:, None], 0.0)
            f = tl.load(gradient + others[None] + i[:, None], there[:, None], 0.0)
            logits = tl.dot(c, y, logits)
            dp = tl.dot(d, f, dp)
        p = tl.exp2(logits * (SCALE * LOG2E) - tl.load(sums + places)[None])
        ds = (p * (dp - tl.load(around + places)[None])).to(found.dtype.element_ty)
        p = p.to(found.dtype.element_ty)
        of_v = tl.dot(p, tl.trans(g), of_v)
        of_k = tl.dot(ds, tl.trans(x), of_k)
        if SMALL:
            more_v = tl.dot(p, tl.trans(f), more_v)
            more_k = tl.dot(ds, tl.trans(y), more_k)
    tl.store(dk + mine[:, None] + h[None], (of_k * SCALE).to(found.dtype.element_ty))
    tl.store(dv + mine[:, None] + h[None], of_v.to(found.dtype.element_ty))
    if SMALL:
        tl.store(dk + mine[:, None] + i[None], (more_k * SCALE).to(found.dtype.element_ty), there[None])
        tl.store(dv + mine[:, None] + i[None], more_v.to(found.dtype.element_ty), there[None])
