"""Small programs to be timed: what the device can do, and one operation of the models alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpi_port.config import Compute, Dtype
from openpi_port.masks import blocks
from openpi_port.pi_torch import attention as attentions
from openpi_port.pi_torch import device as devices


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, of passing over an array of `size` bytes."""
    x = torch.ones(size // 4, device=device)
    y = torch.empty_like(x)
    return 2 * size / _seconds(device, lambda: torch.add(x, 1, out=y))


def product_rate(device: torch.device, dtype: Dtype, size: int) -> float:
    """Operations per second of a product of two `size` x `size` matrices of random numbers."""
    x = torch.randn((size, size), device=device).to(getattr(torch, dtype))
    with devices.precision(Compute(dtype=dtype)):
        return 2 * size**3 / _seconds(device, lambda: x @ x)


def attention(
    device: torch.device,
    compute: Compute,
    size: int,
    queries: int,
    keys: int,
    heads: tuple[int, int, int],
    *,
    masked: bool,
    backward: bool,
) -> Callable[[], None]:
    """One attention of random numbers, as a call that waits for its end.

    Args:
      device: where.
      compute: dtype and backend.
      size: B.
      queries: T.
      keys: S.
      heads: N, K, H.
      masked: the last eighth of the keys is not seen.
      backward: with the gradients of queries, keys and values.

    Raises:
      UserError: the device doesn't have the backend.
    """
    compute = attentions.resolve(compute, device)
    torch.compiler.reset()  # shapes that are compiled count, and beyond eight a function is compiled no more
    shapes = [(size, queries, heads[0], heads[2]), *[(size, keys, heads[1], heads[2])] * 2]
    arrays = [torch.randn(s, device=device).to(getattr(torch, compute.dtype)).requires_grad_(backward) for s in shapes]
    valid = (torch.arange(keys, device=device) < keys - keys // 8).expand(size, keys)
    structure = blocks(valid, None)
    if queries != keys:  # a suffix, which has blocks of its own
        structure = structure._replace(queries=torch.zeros((size, queries), dtype=torch.int32, device=device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = attentions.prepare(structure, compute.attention) if masked else None
        return attentions.attention(q * heads[2] ** -0.5, k, v, mask, compute.attention)

    def run() -> None:
        out = attend(*arrays)
        if backward:
            torch.autograd.grad(out.float().sum(), arrays)
        _wait(device)

    return run


def _seconds(device: torch.device, program: Callable[[], Any], calls: int = 10) -> float:
    """Of one call, the median of three times ten in a row."""
    program(), _wait(device)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(calls):
            program()
        _wait(device)
        times.append((time.perf_counter() - begin) / calls)
    return float(np.median(times))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
