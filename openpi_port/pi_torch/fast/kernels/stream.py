"""Streaming kernels, for the action expert, whose 51 rows fit into one tile.

A product is then as fast as its weights arrive, so every weight is read once, by as many programs as the chip has
processors, and what comes before and after the product is done in the same launch.

B batch, T tokens of a sample, S keys, N heads, H head dim, D width, F width of the MLP, M = B * T rows, P parts of a
row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openpi_port.pi_torch.fast import tiles
from openpi_port.pi_torch.fast.kernels.shared import early, gelu, inverse_rms, release, wait
from openpi_port.pi_torch.fast.ops import Residual


def normed_qkv(
    stream: Residual, w: Tensor, bias: Tensor | None, turns: Tensor, k: Tensor, v: Tensor, at: Tensor
) -> Tensor:
    """A program makes some channels of one head, rotates them and puts them where they belong."""
    (rows, width), (size, _, dim) = stream.x.shape, k.shape
    heads, parts = w.shape[0] // dim - 2, stream.squares.shape[1]
    tile = tiles.streaming("qkv", rows, dim, width)
    q = torch.empty((rows, heads * dim), dtype=w.dtype, device=w.device)
    _normed_qkv[(w.shape[0] // tile.columns, triton.cdiv(rows, tile.rows))](
        stream.scaled, stream.squares, w, bias, turns, at, q, k, v, rows, rows // size, k.stride(0),
        HEADS=heads, H=dim, D=width, PARTS=parts, PADDED=triton.next_power_of_2(parts),
        BM=tile.rows, BN=tile.columns, BK=tile.depth, num_warps=tile.warps, num_stages=tile.stages, **early(w),
    )  # fmt: skip
    return q


@triton.jit
def _normed_qkv(
    x, squares, w, bias, turns, at, q, k, v, M, T, stride,
    HEADS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait(EARLY)
    row, col = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    inside = (row < M)[:, None]
    # What is needed at the end is loaded at the beginning, so that nothing waits for it.
    norm = inverse_rms(squares, row, M, D, PARTS, PADDED)[:, None]
    place = tl.load(at + row // T, row < M, 0)
    head = tl.program_id(0) * BN // H
    pair = tl.program_id(0) * BN % H // 2 + tl.arange(0, BN // 2)
    cos = tl.load(turns + row[:, None] * H + 2 * pair[None], inside, 1.0)
    sin = tl.load(turns + row[:, None] * H + 2 * pair[None] + 1, inside, 0.0)
    acc = tl.zeros((BM, BN), tl.float32)
    for begin in range(0, D, BK):
        deep = begin + tl.arange(0, BK)
        left = tl.load(x + row[:, None] * D + deep[None], inside, 0.0)
        acc = tl.dot(left, tl.load(w + col[None] * D + deep[:, None]), acc)
    release(EARLY)
    acc = acc * norm
    if bias is not None:
        acc += tl.load(bias + col)[None]
    channel = col % H
    if head <= HEADS:  # a query or the key: neighbours turn together
        even, odd = tl.split(tl.reshape(acc, (BM, BN // 2, 2)))
        acc = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (BM, BN))
    value = acc.to(q.dtype.element_ty)
    offset = row // T * stride + (place + row % T) * H
    if head < HEADS:
        tl.store(q + row[:, None] * (HEADS * H) + col[None], value, inside)
    elif head == HEADS:
        tl.store(k + offset[:, None] + channel[None], value, inside)
    else:
        tl.store(v + offset[:, None] + channel[None], value, inside)


def normed_geglu(stream: Residual, w: Tensor, bias: Tensor | None, factor: Tensor | None = None) -> Tensor:
    """A program makes some channels of the gate and the same of the other half."""
    rows, width = stream.x.shape
    out, parts = w.shape[0] // 2, stream.squares.shape[1]
    tile = tiles.streaming("gate_up", rows, out, width)
    y = torch.empty((rows, out), dtype=stream.x.dtype, device=w.device)
    _normed_geglu[(out // tile.columns, triton.cdiv(rows, tile.rows))](
        stream.scaled, stream.squares, w, bias, factor, y, rows,
        F=out, D=width, PARTS=parts, PADDED=triton.next_power_of_2(parts),
        BM=tile.rows, BN=tile.columns, BK=tile.depth, num_warps=tile.warps, num_stages=tile.stages, **early(w),
    )  # fmt: skip
    return y


@triton.jit
def _normed_geglu(
    x, squares, w, bias, factor, y, M,
    F: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait(EARLY)
    row, col = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    inside = (row < M)[:, None]
    norm = inverse_rms(squares, row, M, D, PARTS, PADDED)[:, None]
    gate, up = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for begin in range(0, D, BK):
        deep = begin + tl.arange(0, BK)
        left = tl.load(x + row[:, None] * D + deep[None], inside, 0.0)
        source = w + col[None] * D + deep[:, None]
        gate = tl.dot(left, tl.load(source).to(left.dtype), gate)
        up = tl.dot(left, tl.load(source + F * D).to(left.dtype), up)
    release(EARLY)
    if factor is not None:
        norm = norm * tl.load(factor)
    gate, up = gate * norm, up * norm
    if bias is not None:
        gate, up = gate + tl.load(bias + col)[None], up + tl.load(bias + F + col)[None]
    tl.store(y + row[:, None] * F + col[None], (gelu(gate) * up).to(y.dtype.element_ty), inside)


def add_projected(
    stream: Residual, a: Tensor, w: Tensor, gate: Tensor | None, scale: Tensor, factor: Tensor | None = None
) -> Residual:
    """A program sums over some of the F inputs of some columns; the last to arrive at a column adds up and finishes."""
    (rows, width), deep = stream.x.shape, w.shape[1]
    tile = tiles.streaming("down" if deep > 2 * width else "o", rows, width, deep)
    columns = width // tile.columns
    x, scaled = torch.empty_like(stream.x), torch.empty_like(stream.x)
    squares = torch.empty((rows, columns), dtype=torch.float32, device=w.device)
    part = torch.empty((tile.splits, rows, width), dtype=torch.float32, device=w.device)
    _add_projected[(columns, tile.splits, triton.cdiv(rows, tile.rows))](
        a, w, factor, stream.x, gate, scale, part, stream.arrived, x, scaled, squares, rows,
        D=width, F=deep, SPLITS=tile.splits,
        BM=tile.rows, BN=tile.columns, BK=tile.depth, num_warps=tile.warps, num_stages=tile.stages, **early(w),
    )  # fmt: skip
    return Residual(x, scaled, squares, stream.arrived)


@triton.jit
def _add_projected(
    a, w, factor, before, gate, scale, part, arrived, x, scaled, squares, M,
    D: tl.constexpr, F: tl.constexpr, SPLITS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait(EARLY)
    split, columns = tl.program_id(1), tl.num_programs(0)
    row, col = tl.program_id(2) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    inside = (row < M)[:, None]
    place = row[:, None] * D + col[None]
    old, gain = tl.load(before + place, inside, 0.0).to(tl.float32), tl.load(scale + col)[None]
    acc = tl.zeros((BM, BN), tl.float32)
    for begin in range(0, F // SPLITS, BK):
        deep = split * (F // SPLITS) + begin + tl.arange(0, BK)
        left = tl.load(a + row[:, None] * F + deep[None], inside, 0.0)
        acc = tl.dot(left, tl.load(w + col[None] * F + deep[:, None]).to(left.dtype), acc)
    release(EARLY)
    if factor is not None:
        acc = acc * tl.load(factor)
    last = True
    if SPLITS > 1:
        tl.store(part + split * M * D + place, acc, inside)
        counter = arrived + tl.program_id(2) * columns + tl.program_id(0)
        tl.debug_barrier()  # all of the tile is written before it counts
        last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1
    if last:
        if SPLITS > 1:
            acc = tl.zeros((BM, BN), tl.float32)
            for i in tl.static_range(SPLITS):  # in this order whoever came last: the sum is the same every time
                acc += tl.load(part + i * M * D + place, inside, 0.0, cache_modifier=".cg")
            tl.store(counter, 0)
        if gate is not None:
            acc = acc * tl.load(gate + col)[None]
        after = (old + acc).to(x.dtype.element_ty)
        tl.store(x + place, after, inside)
        after = after.to(tl.float32)
        tl.store(scaled + place, (after * gain).to(x.dtype.element_ty), inside)
        tl.store(squares + row * columns + tl.program_id(0), tl.sum(after * after, 1), row < M)
