"""Row kernels: they normalise, rotate or gate what a large product left behind.

N heads, H head dim, D width, F width of the MLP, M rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openpi_port.pi_torch.fast.kernels.shared import EPSILON, gelu, shape_of, summed
from openpi_port.pi_torch.fast.ops import Residual, Sum


def layer_norm(total: Sum, offset: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """One program per row, which adds up what is to be added to x."""
    y = torch.empty_like(total.x)
    _layer_norm[(len(y),)](*total, offset, scale, bias, y, len(y), **shape_of(total))
    return y


@triton.jit
def _layer_norm(x, parts, offset, scale, bias, y, M, PARTS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = col < D
    gain, shift = tl.load(scale + col, inside, 0.0), tl.load(bias + col, inside, 0.0)
    v = tl.load(offset + col, inside, 0.0) + summed(x, parts, row, col, M, PARTS, D)
    centred = tl.where(inside, v - tl.sum(v) / D, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / D + EPSILON)
    tl.store(y + row * D + col, (normed * gain + shift).to(y.dtype.element_ty), inside)


def rms_norm(total: Sum, scale: Tensor) -> Tensor:
    """One program per row, which adds up what is to be added to x."""
    y = torch.empty_like(total.x)
    _rms_norm[(len(y),)](*total, scale, y, len(y), **shape_of(total))
    return y


@triton.jit
def _rms_norm(x, parts, scale, y, M, PARTS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = col < D
    gain, v = tl.load(scale + col, inside, 0.0), summed(x, parts, row, col, M, PARTS, D)
    normed = v * tl.rsqrt(tl.sum(v * v) / D + EPSILON)
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
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # what was written last is still in the cache
    row, col = tl.program_id(0).to(tl.int64), block * BLOCK + tl.arange(0, BLOCK)
    inside = col < F
    gate = tl.load(gate_up + row * 2 * F + col, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + col, inside, 0.0).to(tl.float32)
    tl.store(y + row * F + col, (gelu(gate) * up).to(y.dtype.element_ty), inside)


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
