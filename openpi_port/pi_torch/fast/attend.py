"""Attention of training to the valid keys of a sample, with a backward pass that leaves the large products to cuBLAS.

B batch, T queries, S keys, N heads, H head dim; all heads share one head of keys and values.

Flash attention's backward pass with heads of 256 reaches a quarter of what an H100 can. Because the heads share keys,
all T N queries of a sample are the rows of one matrix, and three of the five products are plain ones of matrices. The
other two are made together in one kernel, which writes the probabilities and their gradients [T N, S] in bfloat16.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

_TRITON = importlib.util.find_spec("triton") is not None  # found here, because usable is compiled


def usable(q: Tensor, k: Tensor) -> bool:
    """Whether `attention` takes q [B, T, N, H] and k [B, S, K, H]: bfloat16 to be trained, on a GPU with Triton."""
    wanted = _TRITON and q.is_cuda and q.dtype == torch.bfloat16 and torch.is_grad_enabled() and q.requires_grad
    return wanted and k.shape[2] == 1 and q.shape[3] % 64 == 0


def attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    """Attends; queries come scaled.

    Args:
      q: [B, T, N, H].
      k, v: [B, S, H].
      valid: bool [B, S], which keys are seen.
      order: int [B S], valid keys first.
      ends: int32 [B + 1], where each sample's keys begin in that order.

    Returns:
      [B, T, N * H].
    """
    return _Attention.apply(q.contiguous(), k.contiguous(), v.contiguous(), valid, order, ends).flatten(2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, order: Tensor, ends: Tensor) -> Tensor:
        out, sums = _attention(q, k, v, valid, order, ends)
        ctx.save_for_backward(q, k, v, out, sums, valid)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *_attention_gradients(gradient.contiguous(), *ctx.saved_tensors), None, None, None


# The operations are called so that `layers.remat` keeps what the first gives.
@torch.library.custom_op("openpi_port::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, order: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """What `attention` returns, and the logarithms of the softmax's sums, float32 [N, B T]."""
    size, length, heads, dim = q.shape
    if q.is_cuda:
        queries = torch.arange(0, size * length + 1, length, dtype=torch.int32, device=q.device)
        packed = [x.flatten(0, 1)[order][:, None] for x in (k, v)]
        kernel = torch.ops.aten._flash_attention_forward
        out, sums, *_ = kernel(
            q.flatten(0, 1), *packed, queries, ends, length, k.shape[1], 0.0, False, False, scale=1.0
        )
        return out.view_as(q), sums
    logits = _logits(q, k, valid)
    out = (torch.softmax(logits, -1) @ v[:, None].float()).to(v.dtype)  # [B, N, T, H]
    return out.transpose(1, 2).contiguous(), logits.logsumexp(-1).transpose(0, 1).reshape(heads, -1)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, order: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[2], q.shape[0] * q.shape[1], dtype=torch.float32)


@torch.library.custom_op("openpi_port::attention_gradients", mutates_args=())
def _attention_gradients(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries, keys and values."""
    if q.is_cuda:
        from openpi_port.pi_torch.fast import attend_kernel

        made = attend_kernel.weights
    else:
        made = _weights
    rows, of_rows = (x.flatten(1, 2) for x in (q, gradient))  # [B, T N, H]
    p, dp = made(gradient, q, k, v, out, sums, valid)
    return (dp @ k).view_as(q), dp.mT @ rows, p.mT @ of_rows


@_attention_gradients.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _logits(q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
    """float32 [B, N, T, S]."""
    logits = q.transpose(1, 2).float() @ k[:, None].float().mT
    return torch.where(valid[:, None, None], logits, -torch.inf)


def _weights(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Probabilities, and gradients of the logits, [B, T N, S] in the dtype of q."""
    size, length, heads, _ = q.shape
    p = torch.exp(_logits(q, k, valid) - sums.view(heads, size, length, 1).transpose(0, 1))
    around = (gradient.float() * out.float()).sum(-1).transpose(1, 2)[..., None]
    dp = p * (gradient.transpose(1, 2).float() @ v[:, None].float().mT - around)
    return tuple(x.transpose(1, 2).flatten(1, 2).to(q.dtype) for x in (p, dp))
