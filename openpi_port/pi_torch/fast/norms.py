"""Norms of training in one pass over memory each way, where a compiler makes several.

Of what a norm reads, most layers also keep a copy that goes around what follows. So the backward pass of both is one:
it adds what comes back through the copy.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TRITON = importlib.util.find_spec("triton") is not None  # found here, because usable is compiled


def usable(x: Tensor) -> bool:
    """Whether `fork` takes x and is faster than the plain norm: bfloat16, to be trained, on a GPU with Triton."""
    return _TRITON and x.is_cuda and x.dtype == torch.bfloat16 and torch.is_grad_enabled() and x.requires_grad


def fork(x: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x itself, and normed.

    Args:
      x: [..., D].
      scale: [D].
      bias: [D] for a layer norm; None for Gemma's RMS norm, whose scale is around 1.
    """
    return _Fork.apply(x.contiguous(), scale.float(), None if bias is None else bias.float())


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, scale)
        ctx.centered = bias is not None
        return x.view_as(x), _norm(x, scale, bias)

    @staticmethod
    def backward(ctx: Any, around: Tensor, through: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, scale = ctx.saved_tensors
        dx, sums = _gradients(through.contiguous(), x, scale, around.contiguous(), ctx.centered)
        return dx, sums[0], sums[1] if ctx.centered else None


@torch.library.custom_op("openpi_port::norm", mutates_args=())
def _norm(x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if x.is_cuda:
        from openpi_port.pi_torch.fast import norms_kernel

        return norms_kernel.norm(x, scale, bias)
    if bias is not None:
        return F.layer_norm(x.float(), scale.shape, scale, bias, 1e-6).to(x.dtype)
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6) * (1 + scale)).to(x.dtype)


@_norm.register_fake
def _(x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(x)


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
