"""Attention: of many heads to one head of keys and values, and of the heads of an image each to its own.

B batch, T queries, S keys, N heads, H head dim, M = B * T rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from openpi_port.pi_torch.fast import tiles
from openpi_port.pi_torch.fast.kernels.shared import FORBIDDEN, LOG2E, describable, early, memory, release, wait
from openpi_port.pi_torch.fast.ops import Seen


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    """Rows of queries against a span of keys per program; several spans are joined by a second kernel.

    All heads share their keys, so token and head together number the rows. The softmax is kept in base 2.
    """
    size, keys, dim = k.shape
    rows = q.numel() // (size * dim)
    tile, padded = tiles.attend(size * rows, keys, memory(q.device)), triton.next_power_of_2(dim)
    out = torch.empty_like(q)
    part, weight = out, out
    if tile.splits > 1:
        part = torch.empty((tile.splits, size * rows, dim), dtype=torch.float32, device=q.device)
        weight = torch.empty((tile.splits, size * rows), dtype=torch.float32, device=q.device)
    described = tile.described and describable(q, dim)
    sources, stride = (q, k, v), k.stride(0)
    if described:
        q3 = q.view(size, rows, dim)
        sources = [
            TensorDescriptor(t, t.shape, t.stride(), (1, block, padded))
            for t, block in ((q3, tile.rows), (k, tile.keys), (v, tile.keys))
        ]
    _attend[(triton.cdiv(rows, tile.rows), tile.splits, size)](
        *sources, seen.past, seen.extra, part, weight, rows, seen.most, stride,
        HEADS=q.shape[1] // dim, H=dim, PADDED=padded, BM=tile.rows, BN=tile.keys,
        SPLIT=tile.splits > 1, DESCRIBED=described, num_warps=tile.warps, num_stages=tile.stages, **early(q),
    )  # fmt: skip
    if tile.splits > 1:
        _join[(size * rows,)](
            part, weight, out, size * rows, SPLITS=tile.splits, H=dim, PADDED=padded,
            PARTS=triton.next_power_of_2(tile.splits), num_warps=2, **early(q),
        )  # fmt: skip
    return out


@triton.jit
def _attend(
    q, k, v, past, extra, out, weight, R, most, stride,
    HEADS: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SPLIT: tl.constexpr, DESCRIBED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait(EARLY)
    sample, split, splits = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row, dim = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, PADDED)
    place = (sample * R + row)[:, None] * H + dim[None]
    keep = (row < R)[:, None] & (dim < H)[None]
    if DESCRIBED:
        queries = q.load([tl.program_id(2), tl.program_id(0) * BM, 0]).reshape(BM, PADDED)
    else:
        queries = tl.load(q + place, keep, 0.0)
    visible = tl.load(past + sample)
    span = tl.cdiv(tl.cdiv(visible + most, splits), BN) * BN
    stop = tl.minimum(split * span + span, visible + most)
    if extra is not None:
        visible = visible + tl.load(extra + row // HEADS, row < R, 0)[:, None]
    top = tl.full((BM,), FORBIDDEN, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, PADDED), tl.float32)
    for begin in range(split * span, stop, BN):
        key = begin + tl.arange(0, BN)
        if DESCRIBED:  # rows behind the last are zeros, those behind `stop` other keys
            keys = k.load([tl.program_id(2), begin, 0]).reshape(BN, PADDED)
            values = v.load([tl.program_id(2), begin, 0]).reshape(BN, PADDED)
        else:
            there = (key < stop)[:, None] & (dim < H)[None]
            source = sample * stride + key[:, None] * H + dim[None]
            keys, values = tl.load(k + source, there, 0.0), tl.load(v + source, there, 0.0)
        scores = tl.dot(queries, tl.trans(keys)) * LOG2E
        scores = tl.where((key < stop)[None] & (key[None] < visible), scores, FORBIDDEN)
        acc, top, total = _soften(scores, values, acc, top, total)
    release(EARLY)
    acc = acc / tl.maximum(total, 1e-30)[:, None]  # a span behind the last key is empty
    if SPLIT:
        first = split * tl.num_programs(2) * R
        tl.store(out + first * H + place, acc, keep)
        tl.store(weight + first + sample * R + row, tl.where(total > 0, top + tl.log2(total), FORBIDDEN), row < R)
    else:
        tl.store(out + place, acc.to(out.dtype.element_ty), keep)


@triton.jit
def _soften(scores, values, acc, top, total):
    """Some more keys: the sum of values, the highest score and the sum of weights, all relative to the highest."""
    highest = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp2(top - highest)
    probs = tl.exp2(scores - highest[:, None])
    acc = tl.dot(probs.to(values.dtype), values, acc * shrink[:, None])
    return acc, highest, total * shrink + tl.sum(probs, 1)


@triton.jit
def _join(
    part, weight, out, rows, SPLITS: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    wait(EARLY)
    release(EARLY)
    row, split, dim = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, PADDED)
    w = tl.load(weight + split * rows + row, split < SPLITS, FORBIDDEN)
    w = tl.exp2(w - tl.max(w))
    inside = (split < SPLITS)[:, None] & (dim < H)[None]
    values = tl.load(part + (split * rows + row)[:, None] * H + dim[None], inside, 0.0)
    joined = tl.sum(values * (w / tl.sum(w))[:, None], 0)
    tl.store(out + row * H + dim, joined.to(out.dtype.element_ty), dim < H)


def attend_all(qkv: Tensor, size: int, heads: int) -> Tensor:
    """A program: some rows of one head of one sample, and all its keys."""
    rows, width = qkv.shape[0] // size, qkv.shape[1] // 3
    dim, tile = width // heads, tiles.attend_all(size, heads, rows, memory(qkv.device))
    padded = triton.next_power_of_2(dim)
    out = torch.empty((qkv.shape[0], width), dtype=qkv.dtype, device=qkv.device)
    source = None
    if tile.described and describable(qkv, width):
        source = TensorDescriptor(qkv, qkv.shape, qkv.stride(), (tile.keys, padded))
    _attend_all[(triton.cdiv(rows, tile.rows), heads, size)](
        qkv, source, out, rows, D=width, H=dim, PADDED=padded, BM=tile.rows, BN=tile.keys,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


@triton.jit
def _attend_all(
    qkv, source, out, T, D: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row, dim = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, PADDED)
    inside, first = (dim < H)[None], tl.program_id(2).to(tl.int64) * T
    head = tl.program_id(1) * H
    start = qkv + first * 3 * D + head
    queries = tl.load(start + row[:, None] * 3 * D + dim[None], (row < T)[:, None] & inside, 0.0)
    top = tl.full((BM,), FORBIDDEN, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, PADDED), tl.float32)
    for begin in range(0, T, BN):
        key = begin + tl.arange(0, BN)
        if source is not None:  # behind the channels of a head are others', which queries have zeros for
            at = tl.program_id(2) * T + begin
            keys, values = source.load([at, D + head]), source.load([at, 2 * D + head])
        else:
            there = (key < T)[:, None] & inside
            place = start + D + key[:, None] * 3 * D + dim[None]
            keys, values = tl.load(place, there, 0.0), tl.load(place + D, there, 0.0)
        scores = tl.dot(queries, tl.trans(keys)) * LOG2E
        scores = tl.where((key < T)[None], scores, FORBIDDEN)
        acc, top, total = _soften(scores, values, acc, top, total)
    place = (first + row)[:, None] * D + head + dim[None]
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), (row < T)[:, None] & inside)
