"""Gradients of weights that a batch's parts are added up in by the matrix product itself.

Autograd writes a weight's gradient and adds it to the sum: of base, 22 GB for every part. A product that begins with
the sum reads and writes it once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, total: Tensor) -> Tensor:
    """`x @ weight.T + bias`, whose backward pass adds the weight's gradient to `total` and leaves none at `weight`.

    Args:
      x: [..., D].
      weight: [F, D], in the dtype of `x`.
      bias: [F], or None.
      total: [F, D], bfloat16 or float32, changed in place.
    """
    return _Linear.apply(x, weight, bias, total)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, total: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, total)
        ctx.has_bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        x, weight, total = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        _add_product(total, rows, x.flatten(0, -2))
        return gradient @ weight, None, rows.sum(0) if ctx.has_bias else None, None


@torch.library.custom_op("openpi_port::add_product", mutates_args=("total",))
def _add_product(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    """Adds gradient.T @ x to total."""
    if total.dtype == x.dtype:
        total.addmm_(gradient.T, x)
    elif x.is_cuda:
        torch.addmm(total, gradient.T, x, out_dtype=total.dtype, out=total)
    else:
        total += gradient.T @ x


@_add_product.register_fake
def _(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    pass
