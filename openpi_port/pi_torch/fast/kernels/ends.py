"""In and out of the action expert.

B batch, T tokens of a sample, A actions, J action dim, D width, M = B * T rows, P parts of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openpi_port.pi_torch.fast import tiles
from openpi_port.pi_torch.fast.kernels.shared import early, inverse_rms, release, wait
from openpi_port.pi_torch.fast.ops import Residual


def lift(x_t: Tensor, first: Tensor, bias: Tensor, tokens: int, *, swish: bool, dtype: torch.dtype) -> Residual:
    """A program makes some columns; also clears the counters that `add_projected` needs."""
    (size, actions, dim), width, device = x_t.shape, first.shape[0], x_t.device
    rows, columns = size * tokens, tiles.divisor(32, width)
    x = torch.empty((rows, width), dtype=dtype, device=device)
    arrived = torch.empty((triton.cdiv(rows, 64), width // 16), dtype=torch.int32, device=device)
    _lift[(width // columns, triton.cdiv(rows, 64))](
        x_t, first, bias, x, arrived, rows, tokens, actions, arrived.numel(),
        J=dim, PADDED=max(16, triton.next_power_of_2(dim)), D=width, SWISH=swish, BM=64, BN=columns,
        **early(x_t),
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
    EARLY: tl.constexpr,
):  # fmt: skip
    wait(EARLY)
    row, col = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.arange(0, PADDED)
    action = row % T - (T - A)
    acting, inside = ((row < M) & (action >= 0))[:, None], (j < J)[None]
    noisy = tl.load(x_t + (row // T * A + action)[:, None] * J + j[None], acting & inside, 0.0)
    weights = tl.load(first + col[None] * J + j[:, None], (j < J)[:, None], 0.0)
    release(EARLY)
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
        BM=16, BK=tiles.divisor(128, width), num_stages=4, **early(w),
    )  # fmt: skip
    return out


@triton.jit
def _leave(
    x, squares, w, bias, x_t, out, M, T, A, dt,
    J: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait(EARLY)
    row, j = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, WIDE)
    norm = inverse_rms(squares, row, M, D, PARTS, PADDED)[:, None]
    acc = tl.zeros((BM, WIDE), tl.float32)
    for begin in range(0, D, BK):
        deep = begin + tl.arange(0, BK)
        left = tl.load(x + row[:, None] * D + deep[None], (row < M)[:, None], 0.0)
        acc = tl.dot(left, tl.load(w + j[None] * D + deep[:, None], (j < J)[None], 0.0), acc)
    release(EARLY)
    v_t = acc * norm + tl.load(bias + j, j < J, 0.0)[None]
    sample, action = row // T, row % T - (T - A)
    acting = ((row < M) & (action >= 0))[:, None] & (j < J)[None]
    place = (sample * A + action)[:, None] * J + j[None]
    tl.store(out + place, tl.load(x_t + place, acting, 0.0) + dt * v_t, acting)
