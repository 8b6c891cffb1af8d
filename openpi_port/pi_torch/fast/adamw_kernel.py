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
    if isinstance(grad, Tensor):
        programs, width, block, where, idle = triton.cdiv(weight.numel(), BLOCK), 0, BLOCK, weight, weight
    else:  # a row each
        (programs, width), (where, grad) = weight.shape, grad
        block = triton.next_power_of_2(width)
    _step[(programs,)](
        weight, mu, nu, weight if average is None else average, weight if copy is None else copy, grad, scale,
        where, idle, 1 / first, 1 / second, rate,
        1 - config.b1, 1 - config.b2, config.eps, config.weight_decay, 1 - config.ema, weight.numel(),
        AVERAGE=average is not None, COPY=copy is not None, WIDTH=width, BLOCK=block, num_warps=8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first", "second", "rate"])
def _step(
    weight, mu, nu, average, copy, grad, scale, where, idle, first, second, rate, c1, c2, eps, decay, blend, size,
    AVERAGE: tl.constexpr, COPY: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, column = tl.program_id(0), tl.arange(0, BLOCK)
    if WIDTH:
        if tl.load(idle + program):
            return
        at, inside, row = program.to(tl.int64) * WIDTH + column, column < WIDTH, tl.load(where + program)
        g = tl.load(grad + row.to(tl.int64) * WIDTH + column, inside & (row >= 0), 0.0)
    else:
        at = program.to(tl.int64) * BLOCK + column
        inside = at < size
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
