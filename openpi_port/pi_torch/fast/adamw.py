"""AdamW, clipping, the moving average and the rounded copy of the weights in one pass over memory.

Per trained parameter that is 36 bytes read or written instead of the 58 that separate passes take, and this pass is
bound by memory alone. Of an embedding, rows that no prompt has ever read are left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openpi_port.config import Optimizer


class Slot(NamedTuple):
    """What belongs to one parameter; float32 except where noted, all of one shape.

    Attributes:
      weight: the master weight.
      mu, nu: Adam's moments.
      average: the moving average, or None.
      copy: what the model computes with, in a lower dtype, or None where that is `weight` itself.
      idle: bool [rows], for gradients that come as `Rows`, else None: which rows don't change, because they have
        never had a gradient: their moments are zero, and their average is the weight itself.
    """

    weight: Tensor
    mu: Tensor
    nu: Tensor
    average: Tensor | None
    copy: Tensor | None
    idle: Tensor | None

    def find_idle(self) -> None:
        """Brings `idle` up to date with the other tensors, which have changed otherwise than by steps."""
        if self.idle is None:
            return
        still = (self.mu == 0).logical_and_(self.nu == 0)
        if self.average is not None:
            still &= self.average == self.weight
        torch.all(still, 1, out=self.idle)


def slot(weight: Tensor, mu: Tensor, nu: Tensor, average: Tensor | None, copy: Tensor | None, *, by_rows: bool) -> Slot:
    """What belongs to one parameter; `by_rows` says that its gradients are `Rows`."""
    idle = torch.empty(len(weight), dtype=torch.bool, device=weight.device) if by_rows else None
    found = Slot(weight, mu, nu, average, copy, idle)
    found.find_idle()
    return found


class Rows(NamedTuple):
    """The gradient of a matrix most of whose rows have none.

    Attributes:
      where: int32 [rows of the matrix], which row of `values` is a row's gradient; -1 for none.
      values: [N, columns], no two of the same row.
    """

    where: Tensor
    values: Tensor

    def dense(self) -> Tensor:
        """The same, with zeros."""
        return torch.where(self.where[:, None] < 0, 0, self.values[self.where.clamp(min=0)])


def rows(indices: Tensor, values: Tensor, size: int, parts: int = 1) -> Rows:
    """Adds up what belongs to the same row, without waiting for the device.

    Args:
      indices: int [N], of rows, in any order, any of them several times.
      values: [N, columns].
      size: rows of the matrix.
      parts: each from `once`, one after another; they are added up in this order.
    """
    place = _places(indices)
    where = torch.full((size,), -1, dtype=torch.int32, device=indices.device)
    where[indices] = place.int()
    total = torch.zeros_like(values)
    for at, part in zip(place.chunk(parts), values.chunk(parts), strict=True):
        total.index_add_(0, at, part)
    return Rows(where, total)


def once(indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The same sums of rows, each row once; zeros beside.

    A GPU adds what belongs to one row in the order in which it comes to it. Devices that hold the same weights must
    agree to the bit, or they drift apart; so each adds up its own before all are told, and no order is left open.
    """
    place = _places(indices)
    where = indices.clone()
    where[place] = indices
    return where, torch.zeros_like(values).index_add_(0, place, values)


def _places(indices: Tensor) -> Tensor:
    """int [N], the same number for the same row, from 0."""
    ordered, order = torch.sort(indices)
    first = F.pad(ordered[1:] != ordered[:-1], (1, 0), value=True)
    place = torch.empty_like(order)
    place[order] = first.cumsum(0) - 1
    return place


@torch.no_grad()
def step(
    slots: list[Slot], grads: list[Tensor | Rows], scale: Tensor, count: int, rate: float, config: Optimizer
) -> None:
    """One step, in place.

    Args:
      slots: of all parameters.
      grads: theirs, in any dtype. What has none still decays.
      scale: [], what the gradients are multiplied by (clipping).
      count: of steps, this one included.
      rate: the learning rate.
      config: the other constants.
    """
    first, second = 1 - config.b1**count, 1 - config.b2**count  # Adam's correction of moments that began at zero
    fused = _fused() if scale.is_cuda else None
    decays = rate * config.weight_decay >= 2**-25  # less changes no float32
    for slot, grad in zip(slots, grads, strict=True):
        if slot.idle is not None:
            slot.idle.zero_() if decays else slot.idle.logical_and_(grad.where < 0)
        tensors = (*slot, *(grad if isinstance(grad, Rows) else (grad,)))
        if fused is not None and all(x is None or x.is_contiguous() for x in tensors):
            fused(slot, grad, scale, first, second, rate, config)
        else:
            _plain(slot, grad, scale, first, second, rate, config)


def _plain(
    slot: Slot, grad: Tensor | Rows, scale: Tensor, first: float, second: float, rate: float, config: Optimizer
) -> None:
    weight, mu, nu, average, copy, _ = slot
    grad = (grad.dense() if isinstance(grad, Rows) else grad).float() * scale
    mu.lerp_(grad, 1 - config.b1)
    nu.mul_(config.b2).addcmul_(grad, grad, value=1 - config.b2)
    update = (mu / first) / ((nu / second).sqrt_() + config.eps)
    weight.sub_(update.add_(weight, alpha=config.weight_decay), alpha=rate)
    if average is not None:
        average.lerp_(weight, 1 - config.ema)
    if copy is not None:
        copy.copy_(weight)


def _fused() -> Callable[..., None] | None:
    """The kernel, where Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from openpi_port.pi_torch.fast.adamw_kernel import step

    return step
