"""How long attention takes, for `experiments.bench --only=attention`."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from openpi_port.config import Compute
from openpi_port.masks import Blocks
from openpi_port.pi_torch import attention as attentions
from openpi_port.pi_torch import device as devices


def measure(
    shape: tuple[int, int, int, int, int, int], mask: Blocks | None, compute: Compute, repeat: int
) -> tuple[float, float]:
    """Median seconds forward, and forward and backward, on random numbers.

    Args:
      shape: B, T, S, N, K, H.
      mask: numpy, or None.
      compute: backend and dtype.
      repeat: timed calls.
    """
    device, dtype = devices.find(None), getattr(torch, compute.dtype)
    size, queries, keys, heads, kv_heads, dim = shape
    if mask is not None:
        mask = Blocks(*(None if x is None else devices.put(x, device) for x in mask))
        mask = attentions.prepare(mask, compute.attention)
    shapes = ((size, queries, heads, dim), (size, keys, kv_heads, dim), (size, keys, kv_heads, dim))
    inputs = [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes]
    gradient = torch.randn(size, queries, heads * dim, device=device, dtype=dtype)

    def forward() -> Tensor:
        return attentions.attention(*inputs, mask, compute.attention)

    def both() -> None:
        torch.autograd.grad(forward(), inputs, gradient)

    with torch.no_grad():
        alone = _median(forward, repeat, device)
    return alone, _median(both, repeat, device)


def _median(call: Callable[[], object], repeat: int, device: torch.device) -> float:
    times = []
    for _ in range(repeat + 2):
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return float(np.median(times[2:]))  # the first two compile and choose
