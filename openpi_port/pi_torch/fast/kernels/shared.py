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


@functools.cache
def memory(device: torch.device) -> int:
    """Bytes on the chip that one program may take."""
    if device.type != "cuda":  # the interpreter
        return tiles.LARGE
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


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
