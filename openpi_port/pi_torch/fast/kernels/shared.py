"""What several kernels compute."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from openpi_port.pi_torch.fast import ops, tiles

EPSILON: tl.constexpr = tl.constexpr(ops.EPS)
FORBIDDEN: tl.constexpr = tl.constexpr(ops.MASKED)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


def early(x: Tensor) -> dict[str, bool]:
    """How a kernel is launched that begins with `wait`: before the end of the one in front, where the GPU can that."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


def describable(x: Tensor, width: int) -> bool:
    """Whether x may be read through tensor memory access: the GPU has it, and rows begin at multiples of 16 bytes."""
    return width % 8 == 0 and (not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (9, 0))


@functools.cache
def memory(device: torch.device) -> int:
    """Bytes on the chip that one program may take."""
    if device.type != "cuda":  # the interpreter
        return tiles.LARGE
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def shape_of(total: ops.Sum) -> dict[str, int]:
    """What a kernel must know that calls `summed`."""
    width = total.x.shape[1]
    count = 0 if total.parts is None else len(total.parts)
    return {"PARTS": count, "D": width, "BLOCK": triton.next_power_of_2(width)}


@triton.jit
def wait(EARLY: tl.constexpr):
    """Until the kernel in front has written all that it writes."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release(EARLY: tl.constexpr):
    """Lets the next kernel come onto the chip, as far as there is room."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def gelu(x):
    """The tanh form: x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x ** 3))."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def inverse_rms(squares, row, M, D: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr):
    """1 / rms of some rows, from the sums of squares over parts of them."""
    part = tl.arange(0, PADDED)
    inside = (row < M)[:, None] & (part < PARTS)[None]
    return tl.rsqrt(tl.sum(tl.load(squares + row[:, None] * PARTS + part[None], inside, 0.0), 1) / D + EPSILON)


@triton.jit
def summed(x, parts, row, col, M, PARTS: tl.constexpr, D: tl.constexpr):
    """A row of a residual stream in float32, after what is to be added to it, which is added in memory too."""
    place, inside = row * D + col, col < D
    v = tl.load(x + place, inside, 0.0).to(tl.float32)
    if PARTS > 0:
        for i in tl.static_range(PARTS):
            v += tl.load(parts + i * M * D + place, inside, 0.0).to(tl.float32)
        after = v.to(x.dtype.element_ty)
        tl.store(x + place, after, inside)
        v = after.to(tl.float32)
    return v
