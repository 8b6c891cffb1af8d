"""Attention of training in vision: few tokens, which all see each other, and heads with keys of their own.

B batch, T tokens, N heads, H head dim.

All keys of a head fit into a processor, so a softmax is done in one go. Heads of 72 numbers are taken as 64 and 16,
where other kernels take 128. Queries, keys and values lie side by side, as one product makes them, and so do their
gradients, which one product reads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from openpi_port.pi_torch.fast import attend


def usable(x: Tensor, heads: int) -> bool:
    """Whether `attention` takes what is made of x [B, T, D]: bfloat16 to be trained, sizes that fit, on such a GPU."""
    wanted = x.dtype == torch.bfloat16 and torch.is_grad_enabled() and x.requires_grad
    sizes = x.shape[1] in (64, 128, 256) and 32 <= x.shape[2] // heads <= 128
    return wanted and sizes and attend.fits(x.device)


def attention(qkv: Tensor) -> Tensor:
    """Attends.

    Args:
      qkv: [B, T, 3, N, H], queries, keys and values; queries come as they are, and are scaled here.

    Returns:
      [B, T, N * H].
    """
    return _Attention.apply(qkv.contiguous()).flatten(2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        out, sums = _attention(qkv)
        ctx.save_for_backward(qkv, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _attention_gradients(gradient.contiguous(), *ctx.saved_tensors)


# The operations are called so that `layers.remat` keeps what the first gives.
@torch.library.custom_op("openpi_port::own_attention", mutates_args=())
def _attention(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """What is attended, [B, T, N, H], and the logarithms to base 2 of the softmax's sums, float32 [B, N, T]."""
    if qkv.is_cuda:
        from openpi_port.pi_torch.fast import attend_own_kernel

        return attend_own_kernel.forward(qkv)
    q, k, v = qkv.float().permute(2, 0, 3, 1, 4)
    logits = _logits(q, k)
    out = torch.softmax(logits, -1) @ v
    return out.transpose(1, 2).to(qkv.dtype).contiguous(), logits.logsumexp(-1) / math.log(2)


@_attention.register_fake
def _(qkv: Tensor) -> tuple[Tensor, Tensor]:
    size, length, _, heads, _ = qkv.shape
    return torch.empty_like(qkv[:, :, 0]).contiguous(), qkv.new_empty(size, heads, length, dtype=torch.float32)


@torch.library.custom_op("openpi_port::own_attention_gradients", mutates_args=())
def _attention_gradients(gradient: Tensor, qkv: Tensor, out: Tensor, sums: Tensor) -> Tensor:
    """[B, T, 3, N, H]."""
    if qkv.is_cuda:
        from openpi_port.pi_torch.fast import attend_own_kernel

        return attend_own_kernel.gradients(gradient, qkv, out, sums)
    q, k, v = qkv.float().permute(2, 0, 3, 1, 4)
    g, o = (x.float().transpose(1, 2) for x in (gradient, out))
    p = torch.exp(_logits(q, k) - math.log(2) * sums[..., None])
    ds = p * (g @ v.mT - (g * o).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return torch.stack([ds @ k, ds.mT @ q, p.mT @ g]).permute(1, 3, 0, 2, 4).to(qkv.dtype).contiguous()


@_attention_gradients.register_fake
def _(gradient: Tensor, qkv: Tensor, out: Tensor, sums: Tensor) -> Tensor:
    return torch.empty_like(qkv)


def _logits(q: Tensor, k: Tensor) -> Tensor:
    """[B, N, T, T]."""
    return q @ k.mT * q.shape[-1] ** -0.5
