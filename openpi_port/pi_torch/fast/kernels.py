"""Triton kernels for bfloat16 on a GPU; `ops.py` says what each computes, under the same name.

B batch, T queries, S keys, N heads, H head dim, D width, F width of the MLP, M = B * T rows, P parts of a row.

Two kinds. Row kernels normalise, rotate or gate what a large product left behind. Streaming kernels are for the action
expert, whose 51 rows fit into one tile: a product is then as fast as its weights arrive, so every weight is read once,
by as many programs as the chip has processors, and what comes before and after the product is done in the same launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openpi_port.pi_torch.fast import tiles
from openpi_port.pi_torch.fast.ops import EPS, MASKED, Residual, Seen

LOG2E = 1.4426950408889634
_EPS: tl.constexpr = tl.constexpr(EPS)
_LOG2E: tl.constexpr = tl.constexpr(LOG2E)
_MASKED: tl.constexpr = tl.constexpr(MASKED)


# ---- row kernels


def layer_norm(x: Tensor, offset: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """One program per row."""
    y = torch.empty_like(x)
    _layer_norm[(x.shape[0],)](x, offset, scale, bias, y, D=x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return y


@triton.jit
def _layer_norm(x, offset, scale, bias, y, D: tl.constexpr, BLOCK: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = col < D
    gain, shift = tl.load(scale + col, inside, 0.0), tl.load(bias + col, inside, 0.0)
    v = tl.load(x + row * D + col, inside, 0.0).to(tl.float32) + tl.load(offset + col, inside, 0.0)
    centred = tl.where(inside, v - tl.sum(v) / D, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / D + _EPS)
    tl.store(y + row * D + col, (normed * gain + shift).to(y.dtype.element_ty), inside)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """One program per row."""
    y = torch.empty_like(x)
    _rms_norm[(x.shape[0],)](x, scale, y, D=x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return y


@triton.jit
def _rms_norm(x, scale, y, D: tl.constexpr, BLOCK: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = col < D
    gain, v = tl.load(scale + col, inside, 0.0), tl.load(x + row * D + col, inside, 0.0).to(tl.float32)
    normed = v * tl.rsqrt(tl.sum(v * v) / D + _EPS)
    tl.store(y + row * D + col, (normed * gain).to(y.dtype.element_ty), inside)


def start(x: Tensor, scale: Tensor) -> Residual:
    """One program per row; also clears the counters that `add_projected` needs, one per tile of 16 columns or more."""
    (rows, width), device = x.shape, x.device
    scaled = torch.empty_like(x)
    squares = torch.empty((rows, 1), dtype=torch.float32, device=device)
    arrived = torch.empty((rows, width // 16), dtype=torch.int32, device=device)
    _start[(rows,)](x, scale, scaled, squares, arrived, D=width, BLOCK=triton.next_power_of_2(width))
    return Residual(x, scaled, squares, arrived)


@triton.jit
def _start(x, scale, scaled, squares, arrived, D: tl.constexpr, BLOCK: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = col < D
    v = tl.load(x + row * D + col, inside, 0.0).to(tl.float32)
    out = v * tl.load(scale + col, inside, 0.0)
    tl.store(scaled + row * D + col, out.to(scaled.dtype.element_ty), inside)
    tl.store(squares + row, tl.sum(v * v))
    tl.store(arrived + row * (D // 16) + col, tl.zeros((BLOCK,), tl.int32), col < D // 16)


def geglu(gate_up: Tensor) -> Tensor:
    """Programs of 1024 values of a row."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    _geglu[(rows, triton.cdiv(width, 1024))](gate_up, y, F=width, BLOCK=1024)
    return y


@triton.jit
def _geglu(gate_up, y, F: tl.constexpr, BLOCK: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < F
    gate = tl.load(gate_up + row * 2 * F + col, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + col, inside, 0.0).to(tl.float32)
    tl.store(y + row * F + col, (_gelu(gate) * up).to(y.dtype.element_ty), inside)


@triton.jit
def _gelu(x):
    """The tanh form: x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x ** 3))."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


def split_qkv(qkv: Tensor, turns: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One program per row, all its heads."""
    rows, (size, _, dim) = qkv.shape[0], k.shape
    heads = qkv.shape[1] // dim - 2
    q = torch.empty((rows, heads * dim), dtype=qkv.dtype, device=qkv.device)
    blocks = {"PADDED": triton.next_power_of_2(heads + 2), "WIDE": triton.next_power_of_2(dim)}
    _split_qkv[(rows,)](qkv, turns, q, k, v, rows // size, k.stride(0), HEADS=heads, H=dim, **blocks)
    return q


@triton.jit
def _split_qkv(
    qkv, turns, q, k, v, T, stride, HEADS: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    head, channel = tl.arange(0, PADDED)[:, None], tl.arange(0, WIDE)[None]
    inside = (head < HEADS + 2) & (channel < H)
    value = tl.load(qkv + row * (HEADS + 2) * H + head * H + channel, inside, 0.0)
    even, odd = tl.split(tl.reshape(value.to(tl.float32), (PADDED, WIDE // 2, 2)))
    turn = tl.load(turns + row * H + tl.arange(0, WIDE), tl.arange(0, WIDE) < H, 0.0)
    cos, sin = tl.split(tl.reshape(turn, (1, WIDE // 2, 2)))
    turned = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (PADDED, WIDE))
    turned = turned.to(value.dtype)
    tl.store(q + row * HEADS * H + head * H + channel, turned, inside & (head < HEADS))
    offset = row // T * stride + row % T * H + channel + head * 0
    tl.store(k + offset, turned, inside & (head == HEADS))
    tl.store(v + offset, value, inside & (head == HEADS + 1))


# ---- attention


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    """Rows of queries against a span of keys per program; several spans are joined by a second kernel.

    All heads share their keys, so token and head together number the rows. The softmax is kept in base 2.
    """
    size, keys, dim = k.shape
    rows = q.numel() // (size * dim)
    tile = tiles.attend(size * rows, keys)
    out = torch.empty_like(q)
    part, weight = out, out
    if tile.splits > 1:
        part = torch.empty((tile.splits, size * rows, dim), dtype=torch.float32, device=q.device)
        weight = torch.empty((tile.splits, size * rows), dtype=torch.float32, device=q.device)
    _attend[(triton.cdiv(rows, tile.rows), tile.splits, size)](
        q, k, v, seen.past, seen.extra, part, weight, rows, seen.most, k.stride(0),
        HEADS=q.shape[1] // dim, H=dim, PADDED=triton.next_power_of_2(dim), BM=tile.rows, BN=tile.keys,
        SPLIT=tile.splits > 1, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if tile.splits > 1:
        padded = {"PADDED": triton.next_power_of_2(dim), "PARTS": triton.next_power_of_2(tile.splits)}
        _join[(size * rows,)](part, weight, out, size * rows, SPLITS=tile.splits, H=dim, **padded, num_warps=2)
    return out


@triton.jit
def _attend(
    q, k, v, past, extra, out, weight, R, most, stride,
    HEADS: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    sample, split, splits = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row, dim = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, PADDED)
    place = (sample * R + row)[:, None] * H + dim[None]
    queries = tl.load(q + place, (row < R)[:, None] & (dim < H)[None], 0.0)
    visible = tl.load(past + sample)
    span = tl.cdiv(tl.cdiv(visible + most, splits), BN) * BN
    stop = tl.minimum(split * span + span, visible + most)
    if extra is not None:
        visible = visible + tl.load(extra + row // HEADS, row < R, 0)[:, None]
    top = tl.full((BM,), _MASKED, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, PADDED), tl.float32)
    for begin in range(split * span, stop, BN):
        key = begin + tl.arange(0, BN)
        there = (key < stop)[:, None] & (dim < H)[None]
        source = sample * stride + key[:, None] * H + dim[None]
        scores = tl.dot(queries, tl.trans(tl.load(k + source, there, 0.0))) * _LOG2E
        scores = tl.where((key < stop)[None] & (key[None] < visible), scores, _MASKED)
        highest = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - highest)
        probs = tl.exp2(scores - highest[:, None])
        total = total * shrink + tl.sum(probs, 1)
        values = tl.load(v + source, there, 0.0)
        acc = tl.dot(probs.to(values.dtype), values, acc * shrink[:, None])
        top = highest
    acc = acc / tl.maximum(total, 1e-30)[:, None]  # a span behind the last key is empty
    keep = (row < R)[:, None] & (dim < H)[None]
    if SPLIT:
        first = split * tl.num_programs(2) * R
        tl.store(out + first * H + place, acc, keep)
        tl.store(weight + first + sample * R + row, tl.where(total > 0, top + tl.log2(total), _MASKED), row < R)
    else:
        tl.store(out + place, acc.to(out.dtype.element_ty), keep)


@triton.jit
def _join(
    part, weight, out, rows, SPLITS: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row, split, dim = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, PADDED)
    w = tl.load(weight + split * rows + row, split < SPLITS, _MASKED)
    w = tl.exp2(w - tl.max(w))
    inside = (split < SPLITS)[:, None] & (dim < H)[None]
    values = tl.load(part + (split * rows + row)[:, None] * H + dim[None], inside, 0.0)
    joined = tl.sum(values * (w / tl.sum(w))[:, None], 0)
    tl.store(out + row * H + dim, joined.to(out.dtype.element_ty), dim < H)


# ---- streaming kernels


@triton.jit
def _norm(squares, row, M, D: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr):
    """1 / rms of some rows, from the sums of squares over parts of them."""
    part = tl.arange(0, PADDED)
    inside = (row < M)[:, None] & (part < PARTS)[None]
    return tl.rsqrt(tl.sum(tl.load(squares + row[:, None] * PARTS + part[None], inside, 0.0), 1) / D + _EPS)


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
        BM=tile.rows, BN=tile.columns, BK=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return q


@triton.jit
def _normed_qkv(
    x, squares, w, bias, turns, at, q, k, v, M, T, stride,
    HEADS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row, col = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    inside = (row < M)[:, None]
    # What is needed at the end is loaded at the beginning, so that nothing waits for it.
    norm = _norm(squares, row, M, D, PARTS, PADDED)[:, None]
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


def normed_geglu(stream: Residual, w: Tensor, bias: Tensor | None) -> Tensor:
    """A program makes some channels of the gate and the same of the other half."""
    rows, width = stream.x.shape
    out, parts = w.shape[0] // 2, stream.squares.shape[1]
    tile = tiles.streaming("gate_up", rows, out, width)
    y = torch.empty((rows, out), dtype=w.dtype, device=w.device)
    _normed_geglu[(out // tile.columns, triton.cdiv(rows, tile.rows))](
        stream.scaled, stream.squares, w, bias, y, rows,
        F=out, D=width, PARTS=parts, PADDED=triton.next_power_of_2(parts),
        BM=tile.rows, BN=tile.columns, BK=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


@triton.jit
def _normed_geglu(
    x, squares, w, bias, y, M,
    F: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row, col = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    inside = (row < M)[:, None]
    norm = _norm(squares, row, M, D, PARTS, PADDED)[:, None]
    gate, up = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for begin in range(0, D, BK):
        deep = begin + tl.arange(0, BK)
        left = tl.load(x + row[:, None] * D + deep[None], inside, 0.0)
        source = w + col[None] * D + deep[:, None]
        gate = tl.dot(left, tl.load(source), gate)
        up = tl.dot(left, tl.load(source + F * D), up)
    gate, up = gate * norm, up * norm
    if bias is not None:
        gate, up = gate + tl.load(bias + col)[None], up + tl.load(bias + F + col)[None]
    tl.store(y + row[:, None] * F + col[None], (_gelu(gate) * up).to(y.dtype.element_ty), inside)


def add_projected(stream: Residual, a: Tensor, w: Tensor, gate: Tensor | None, scale: Tensor) -> Residual:
    """A program sums over some of the F inputs of some columns; the last to arrive at a column adds up and finishes."""
    (rows, width), deep = stream.x.shape, w.shape[1]
    tile = tiles.streaming("down" if deep > 2 * width else "o", rows, width, deep)
    columns = width // tile.columns
    x, scaled = torch.empty_like(stream.x), torch.empty_like(stream.x)
    squares = torch.empty((rows, columns), dtype=torch.float32, device=w.device)
    part = torch.empty((tile.splits, rows, width), dtype=torch.float32, device=w.device)
    _add_projected[(columns, tile.splits, triton.cdiv(rows, tile.rows))](
        a, w, stream.x, gate, scale, part, stream.arrived, x, scaled, squares, rows,
        D=width, F=deep, SPLITS=tile.splits,
        BM=tile.rows, BN=tile.columns, BK=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return Residual(x, scaled, squares, stream.arrived)


@triton.jit
def _add_projected(
    a, w, before, gate, scale, part, arrived, x, scaled, squares, M,
    D: tl.constexpr, F: tl.constexpr, SPLITS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    split, columns = tl.program_id(1), tl.num_programs(0)
    row, col = tl.program_id(2) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    inside = (row < M)[:, None]
    place = row[:, None] * D + col[None]
    old, gain = tl.load(before + place, inside, 0.0).to(tl.float32), tl.load(scale + col)[None]
    acc = tl.zeros((BM, BN), tl.float32)
    for begin in range(0, F // SPLITS, BK):
        deep = split * (F // SPLITS) + begin + tl.arange(0, BK)
        left = tl.load(a + row[:, None] * F + deep[None], inside, 0.0)
        acc = tl.dot(left, tl.load(w + col[None] * F + deep[:, None]), acc)
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


# ---- in and out of the expert


def lift(x_t: Tensor, first: Tensor, bias: Tensor, tokens: int, *, swish: bool, dtype: torch.dtype) -> Residual:
    """A program makes some columns; also clears the counters that `add_projected` needs."""
    (size, actions, dim), width, device = x_t.shape, first.shape[0], x_t.device
    rows, columns = size * tokens, tiles.divisor(32, width)
    x = torch.empty((rows, width), dtype=dtype, device=device)
    arrived = torch.empty((triton.cdiv(rows, 64), width // 16), dtype=torch.int32, device=device)
    _lift[(width // columns, triton.cdiv(rows, 64))](
        x_t, first, bias, x, arrived, rows, tokens, actions, arrived.numel(),
        J=dim, PADDED=max(16, triton.next_power_of_2(dim)), D=width, SWISH=swish, BM=64, BN=columns,
    )  # fmt: skip
    return Residual(x, x, x, arrived)


@triton.jit
def _exact_dot(a, b, acc):
    """A float32 product, nearly exact, from bfloat16 products of leading and following digits."""
    a1, b1 = a.to(tl.bfloat16), b.to(tl.bfloat16)
    a2, b2 = (a - a1.to(tl.float32)).to(tl.bfloat16), (b - b1.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(a1, b1, tl.dot(a1, b2, tl.dot(a2, b1, acc)))


@triton.jit
def _lift(
    x_t, first, bias, x, arrived, M, T, A, counters,
    J: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, SWISH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row, col = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.arange(0, PADDED)
    action = row % T - (T - A)
    acting, inside = ((row < M) & (action >= 0))[:, None], (j < J)[None]
    noisy = tl.load(x_t + (row // T * A + action)[:, None] * J + j[None], acting & inside, 0.0)
    weights = tl.load(first + col[None] * J + j[:, None], (j < J)[:, None], 0.0)
    y = _exact_dot(noisy, weights, tl.zeros((BM, BN), tl.float32)) + tl.load(bias + col)[None]
    if SWISH:
        y = y * tl.sigmoid(y)
    y = tl.where(acting, y, 0.0)
    tl.store(x + row[:, None] * D + col[None], y.to(x.dtype.element_ty), (row < M)[:, None])
    counter = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 2 + tl.arange(0, 2)
    tl.store(arrived + counter, tl.zeros((2,), tl.int32), counter < counters)


def leave(stream: Residual, w: Tensor, bias: Tensor, x_t: Tensor, dt: float) -> Tensor:
    """A program finishes 16 rows."""
    (rows, width), (size, actions, dim), parts = stream.x.shape, x_t.shape, stream.squares.shape[1]
    out = torch.empty_like(x_t)
    _leave[(triton.cdiv(rows, 16),)](
        stream.scaled, stream.squares, w, bias, x_t, out, rows, rows // size, actions, dt,
        J=dim, WIDE=max(16, triton.next_power_of_2(dim)), D=width, PARTS=parts, PADDED=triton.next_power_of_2(parts),
        BM=16, BK=tiles.divisor(128, width), num_stages=4,
    )  # fmt: skip
    return out


@triton.jit
def _leave(
    x, squares, w, bias, x_t, out, M, T, A, dt,
    J: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row, j = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, WIDE)
    norm = _norm(squares, row, M, D, PARTS, PADDED)[:, None]
    acc = tl.zeros((BM, WIDE), tl.float32)
    for begin in range(0, D, BK):
        deep = begin + tl.arange(0, BK)
        left = tl.load(x + row[:, None] * D + deep[None], (row < M)[:, None], 0.0)
        acc = tl.dot(left, tl.load(w + j[None] * D + deep[:, None], (j < J)[None], 0.0), acc)
    v_t = acc * norm + tl.load(bias + j, j < J, 0.0)[None]
    sample, action = row // T, row % T - (T - A)
    acting = ((row < M) & (action >= 0))[:, None] & (j < J)[None]
    place = (sample * A + action)[:, None] * J + j[None]
    tl.store(out + place, tl.load(x_t + place, acting, 0.0) + dt * v_t, acting)
