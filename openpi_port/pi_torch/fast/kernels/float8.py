"""Row kernels around products in float8; `float8.py` in the folder above says what each computes, under the same name.

D width, F width of the MLP. One program per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openpi_port.pi_torch.fast.kernels.shared import EPSILON, gelu, shape_of, summed
from openpi_port.pi_torch.fast.ops import Sum

LARGEST: tl.constexpr = tl.constexpr(448.0)


def rms_norm(total: Sum, room: float) -> Tensor:
    """A row in registers."""
    y = torch.empty(total.x.shape, dtype=torch.float8_e4m3fn, device=total.x.device)
    _rms_norm[(len(y),)](*total, y, len(y), ROOM=room, **shape_of(total))
    return y


@triton.jit
def _rms_norm(x, parts, y, M, ROOM: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    v = summed(x, parts, row, col, M, PARTS, D)
    normed = v * (tl.rsqrt(tl.sum(v * v) / D + EPSILON) * ROOM)
    tl.store(y + row * D + col, normed.to(y.dtype.element_ty), col < D)


def geglu(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """A row in registers, so that it is read once for its largest value and for all of them."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=gate_up.device)
    factors = torch.empty(rows, dtype=torch.float32, device=gate_up.device)
    block = triton.next_power_of_2(width)
    _geglu[(rows,)](gate_up, y, factors, F=width, BLOCK=block, num_warps=max(4, min(32, block // 512)))
    return y, factors


@triton.jit
def _geglu(gate_up, y, factors, F: tl.constexpr, BLOCK: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = col < F
    gate = tl.load(gate_up + row * 2 * F + col, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + col, inside, 0.0).to(tl.float32)
    v = gelu(gate) * up
    factor = tl.maximum(tl.max(tl.abs(v)), 1e-20) / LARGEST
    tl.store(y + row * F + col, (v / factor).to(y.dtype.element_ty), inside)
    tl.store(factors + row, factor)


def add_(x: Tensor, y: Tensor, factors: Tensor) -> None:
    """In place."""
    _add[(x.shape[0],)](x, y, factors, D=x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))


@triton.jit
def _add(x, y, factors, D: tl.constexpr, BLOCK: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    place, inside = row * D + col, col < D
    more = tl.load(y + place, inside, 0.0).to(tl.float32) * tl.load(factors + row)
    total = tl.load(x + place, inside, 0.0).to(tl.float32) + more
    tl.store(x + place, total.to(x.dtype.element_ty), inside)
