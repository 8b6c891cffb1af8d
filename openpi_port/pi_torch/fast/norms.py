"""Norms of training in one pass over memory each way, where a compiler makes several.

Of what a norm reads, most layers also keep a copy that goes around what follows. So the backward pass of both is one:
it adds what comes back through the copy. And where a norm reads the sum of such a copy and what it went around, the
forward pass adds them up.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_TRITON = importlib.util.find_spec("triton") is not None  # found here, because usable is compiled


def usable(x: Tensor) -> bool:
    """Whether `fork` takes x and is faster than the plain norm: bfloat16, to be trained, on a GPU with Triton."""
    return _TRITON and x.is_cuda and x.dtype == torch.bfloat16 and torch.is_grad_enabled() and x.requires_grad


def fork(x: Tensor, scale: Tensor, bias: Tensor | None, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x + more itself, and normed.

    Args:
      x: [..., D].
      scale: [D].
      bias: [D] for a layer norm; None for Gemma's RMS norm, whose scale is around 1.
      more: [..., D], or None for x itself.
    """
    more = None if more is None else more.contiguous()
    return _Fork.apply(x.contiguous(), more, scale.float(), None if bias is None else bias.float())


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Tensor | None, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        whole, normed = (x.view_as(x), _norm(x, scale, bias)) if more is None else _add_norm(x, more, scale, bias)
        ctx.save_for_backward(x if more is None else whole, scale)
        ctx.centered, ctx.added = bias is not None, more is not None
        return whole, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, around: Tensor, through: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        dx, sums = _gradients(through.contiguous(), x, scale, around.contiguous(), ctx.centered)
        return dx, dx if ctx.added else None, sums[0], sums[1] if ctx.centered else None


@torch.library.custom_op("openpi_port::norm", mutates_args=())
def _norm(x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if x.is_cuda:
        from openpi_port.pi_torch.fast import norms_kernel

        return norms_kernel.norm(x, None, scale, bias)[1]
    if bias is not None:
        return F.layer_norm(x.float(), scale.shape, scale, bias, 1e-6).to(x.dtype)
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6) * (1 + scale)).to(x.dtype)


@_norm.register_fake
def _(x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("openpi_port::add_norm", mutates_args=())
def _add_norm(x: Tensor, more: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x + more, and normed."""
    if x.is_cuda:
        from openpi_port.pi_torch.fast import norms_kernel

        return norms_kernel.norm(x, more, scale, bias)
    whole = x + more
    return whole, _norm(whole, scale, bias)


@_add_norm.register_fake
def _(x: Tensor, more: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("openpi_port::norm_gradients", mutates_args=())
def _gradients(gradient: Tensor, x: Tensor, scale: Tensor, around: Tensor, centered: bool) -> tuple[Tensor, Tensor]:
    """Of x, `around` added; and of scale and bias, [2, D], or of the scale, [1, D]."""
    if x.is_cuda:
        from openpi_port.pi_torch.fast import norms_kernel

        return norms_kernel.gradients(gradient, x, scale, around, centered)
    v, g = x.float(), gradient.float()
    v = v - v.mean(-1, keepdim=True) if centered else v
    r = torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-6)
    v, scaled = v * r, g * (scale if centered else 1 + scale)
    d = scaled - v * (scaled * v).mean(-1, keepdim=True)
    d = d - scaled.mean(-1, keepdim=True) if centered else d
    sums = [(g * v).flatten(0, -2).sum(0), *([g.flatten(0, -2).sum(0)] if centered else [])]
    return (d * r + around.float()).to(x.dtype), torch.stack(sums)


@_gradients.register_fake
def _(gradient: Tensor, x: Tensor, scale: Tensor, around: Tensor, centered: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), scale.new_empty(2 if centered else 1, *scale.shape)
