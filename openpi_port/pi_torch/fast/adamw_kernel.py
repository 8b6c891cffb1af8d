"""The Triton kernel of `adamw`: one launch per parameter, every number read and written once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from openpi_port.config import Optimizer

if TYPE_CHECKING:
    from openpi_port.pi_torch.fast.adamw import Rows, Slot

BLOCK = 2048


def step(
    slot: Slot, grad: Tensor | Rows, scale: Tensor, first: float, second: float, rate: float, config: Optimizer
) -> None:
    """See `adamw.step`; `first` and `second` are Adam's corrections."""
    weight, mu, nu, average, copy, idle = slot
    where, grad = (None, grad) if isinstance(grad, Tensor) else grad
    _step[(triton.cdiv(weight.numel(), BLOCK),)](
        weight, mu, nu, weight if average is None else average, weight if copy is None else copy, grad, scale,
        weight if where is None else where, weight if idle is None else idle, 1 / first, 1 / second, rate,
        1 - config.b1, 1 - config.b2, config.eps, config.weight_decay, 1 - config.ema, weight.numel(),
        AVERAGE=average is not None, COPY=copy is not None, WIDTH=0 if where is None else weight.shape[1],
        IDLE=idle is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first", "second", "rate"])
def _step(
    weight, mu, nu, average, copy, grad, scale, where, idle, first, second, rate, c1, c2, eps, decay, blend, size,
    AVERAGE: tl.constexpr, COPY: tl.constexpr, WIDTH: tl.constexpr, IDLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    if IDLE:
        inside &= tl.load(idle + at // WIDTH, inside, 1) == 0
    if WIDTH:
        row = tl.load(where + at // WIDTH, inside, -1).to(tl.int64)
        g = tl.load(grad + row * WIDTH + at % WIDTH, inside & (row >= 0), 0.0)
    else:
        g = tl.load(grad + at, inside, 0.0)
    g = g.to(tl.float32) * tl.load(scale)
    m = tl.load(mu + at, inside, 0.0)
    v = tl.load(nu + at, inside, 0.0)
    w = tl.load(weight + at, inside, 0.0)
    m += c1 * (g - m)
    v += c2 * (g * g - v)
    w -= rate * (m * first / (tl.sqrt(v * second) + eps) + decay * w)
    tl.store(mu + at, m, inside)
    tl.store(nu + at, v, inside)
    tl.store(weight + at, w, inside)
    if AVERAGE:
        a = tl.load(average + at, inside, 0.0)
        tl.store(average + at, a + blend * (w - a), inside)
    if COPY:
        tl.store(copy + at, w.to(copy.dtype.element_ty), inside)
