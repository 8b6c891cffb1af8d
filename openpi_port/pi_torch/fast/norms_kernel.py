"""The Triton kernels of `norms`: a program takes rows as a whole, every number is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 528  # of the backward pass, each with a sum of its own for scale and bias: four times an H100's processors


def norm(x: Tensor, more: Tensor | None, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `norms.fork`."""
    whole, out, width = x if more is None else torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    _norm[(x.numel() // width,)](
        x, x if more is None else more, scale, scale if bias is None else bias, whole, out,
        WIDTH=width, ADD=more is not None, CENTERED=bias is not None, BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return whole, out


def gradients(gradient: Tensor, x: Tensor, scale: Tensor, around: Tensor, centered: bool) -> tuple[Tensor, Tensor]:
    """Of x, with `around` added, and of scale and bias; see `norms`."""
    width = x.shape[-1]
    rows = x.numel() // width
    each = triton.cdiv(rows, PROGRAMS)
    programs = triton.cdiv(rows, each)
    dx, sums = torch.empty_like(x), x.new_empty(2 if centered else 1, programs, width, dtype=torch.float32)
    _gradients[(programs,)](
        gradient, x, scale, around, dx, sums[0], sums[-1], rows, each,
        WIDTH=width, CENTERED=centered, BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    total = sums.new_empty(len(sums), width)
    _sums[triton.cdiv(width, 32), len(sums)](sums, total, programs, WIDTH=width, ROWS=128, BLOCK=32, num_warps=4)
    return dx, total


@triton.jit
def _norm(
    x, more, scale, bias, whole, out,
    WIDTH: tl.constexpr, ADD: tl.constexpr, CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * WIDTH
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    v = tl.load(x + first + at, inside, 0.0).to(tl.float32)
    if ADD:
        v += tl.load(more + first + at, inside, 0.0).to(tl.float32)
        v = v.to(whole.dtype.element_ty)
        tl.store(whole + first + at, v, inside)
        v = v.to(tl.float32)
    if CENTERED:
        v = tl.where(inside, v - tl.sum(v) / WIDTH, 0.0)
    v = v * tl.rsqrt(tl.sum(v * v) / WIDTH + 1e-6)
    s = tl.load(scale + at, inside, 0.0)
    v = v * s + tl.load(bias + at, inside, 0.0) if CENTERED else v * (1 + s)
    tl.store(out + first + at, v.to(out.dtype.element_ty), inside)


@triton.jit
def _gradients(
    gradient, x, scale, around, dx, of_scale, of_bias, rows, each,
    WIDTH: tl.constexpr, CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    s = tl.load(scale + at, inside, 0.0)
    if not CENTERED:
        s += 1
    sum_s = tl.zeros([BLOCK], tl.float32)
    sum_b = tl.zeros([BLOCK], tl.float32)
    begin = program.to(tl.int64) * each
    for row in tl.range(begin, tl.minimum(begin + each, rows), num_stages=3):  # the next rows are read meanwhile
        here = row * WIDTH + at
        v = tl.load(x + here, inside, 0.0).to(tl.float32)
        g = tl.load(gradient + here, inside, 0.0).to(tl.float32)
        more = tl.load(around + here, inside, 0.0).to(tl.float32)
        if CENTERED:
            v = tl.where(inside, v - tl.sum(v) / WIDTH, 0.0)
            sum_b += g
        r = tl.rsqrt(tl.sum(v * v) / WIDTH + 1e-6)
        v = v * r
        sum_s += g * v
        g = g * s
        d = g - v * (tl.sum(g * v) / WIDTH)
        if CENTERED:
            d -= tl.sum(g) / WIDTH
        tl.store(dx + here, (d * r + more).to(dx.dtype.element_ty), inside)
    tl.store(of_scale + program * WIDTH + at, sum_s, inside)
    if CENTERED:
        tl.store(of_bias + program * WIDTH + at, sum_b, inside)


@triton.jit
def _sums(parts, total, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of [count, WIDTH], over the first axis."""
    which = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (at < WIDTH)[None]
        found += tl.load(parts + (which * count + row)[:, None] * WIDTH + at[None], inside, 0.0)
    tl.store(total + which * WIDTH + at, tl.sum(found, 0), at < WIDTH)
