"""Matrix products of training whose backward passes add up as they multiply.

Autograd writes a weight's gradient and adds it to the sum of a batch's parts: of base, 22 GB for every part. And where
several products read the same x, it writes a gradient of x for each and adds them. A product that begins with the sum
reads and writes it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALL = 2**23  # numbers in weights that are laid side by side for a product: copying them takes less than it gains


def several(x: Tensor, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """What linear maps make of x: together in training, one after another with adapters or in a model that is used.

    Args:
      x: [..., D].
      linears: `layers.Linear`, all with a bias or none, or with adapters.
    """
    if any(not linear.training or hasattr(linear, "lora_a") for linear in linears):
        return tuple(linear(x) for linear in linears)
    weights = [linear.weight.to(x.dtype) for linear in linears]
    biases = [None if linear.bias is None else linear.bias.to(x.dtype) for linear in linears]
    totals = [linear.total for linear in linears]
    if sum(weight.numel() for weight in weights) < SMALL:
        together = _Joined.apply(x, len(linears), *weights, *biases, *totals)
        return together.split([len(weight) for weight in weights], -1)
    return products(x, weights, biases, totals)


def products(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], totals: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """`x @ weight.T + bias` of each.

    Args:
      x: [..., D].
      weights: [F, D], in the dtype of `x`.
      biases: [F], or None.
      totals: [F, D], bfloat16 or float32: what the weight's gradient is added to, in place, instead of leaving it at
        the weight; or None.
    """
    return _Products.apply(x, len(weights), *weights, *biases, *totals)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = tensors[:count], tensors[count : 2 * count]
        ctx.save_for_backward(x, *weights, *tensors[2 * count :])
        ctx.count = count
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        weights, totals = tensors[: ctx.count], tensors[ctx.count :]
        flat, rows = x.flatten(0, -2), [gradient.flatten(0, -2) for gradient in gradients]
        of_x, _, *others = ctx.needs_input_grad
        found = _of_weights(flat, rows, totals, others)
        biases = [row.sum(0) if wanted else None for row, wanted in zip(rows, others[ctx.count :], strict=False)]
        dx = None
        if of_x:
            dx = (rows[0] @ weights[0] if ctx.count == 1 else _sum_of_products(rows, weights)).view_as(x)
        return dx, None, *found, *biases, *([None] * ctx.count)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *tensors: Tensor | None) -> Tensor:
        weight = torch.cat(tensors[:count])
        bias = None if tensors[count] is None else torch.cat(tensors[count : 2 * count])
        ctx.save_for_backward(x, weight, *tensors[2 * count :])
        ctx.sizes = [len(tensor) for tensor in tensors[:count]]
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *totals = ctx.saved_tensors
        count, flat, rows = len(totals), x.flatten(0, -2), gradient.flatten(0, -2)
        of_x, _, *others = ctx.needs_input_grad
        if any(others[:count]) and all(total is None for total in totals):
            found = (rows.T @ flat).split(ctx.sizes)
        else:
            found = _of_weights(flat, rows.split(ctx.sizes, 1), totals, others)
        biases = rows.sum(0).split(ctx.sizes) if any(others[count:]) else [None] * count
        dx = (rows @ weight).view_as(x) if of_x else None
        return dx, None, *found, *biases, *([None] * count)


def _of_weights(
    x: Tensor, gradients: Sequence[Tensor], totals: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """What autograd is to have of the weights' gradients: those that are wanted and not added to a total."""
    found: list[Tensor | None] = []
    for gradient, total, want in zip(gradients, totals, wanted, strict=False):
        if total is not None:
            _add_product(total, gradient, x)
        found.append(gradient.T @ x if want and total is None else None)
    return found


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


@torch.library.custom_op("openpi_port::sum_of_products", mutates_args=())
def _sum_of_products(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The sum of gradient @ weight, [rows, D]."""
    total = gradients[0] @ weights[0]
    for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
        total.addmm_(gradient, weight)
    return total


@_sum_of_products.register_fake
def _(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return gradients[0].new_empty(gradients[0].shape[0], weights[0].shape[1])
