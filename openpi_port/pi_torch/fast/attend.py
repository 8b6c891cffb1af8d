"""Attention of training, with a backward pass that leaves the large products to cuBLAS.

B batch, T queries, S keys, N heads, H head dim; all heads share one head of keys and values.

Flash attention's backward pass with heads of 256 reaches a quarter of what an H100 can. Because the heads share keys,
all T N queries of a sample are the rows of one matrix, and three of the five products are plain ones of matrices. The
other two are made together in one kernel, which writes the probabilities and their gradients [T N, S] in bfloat16. The
forward pass is a kernel too: it looks at blocks of tokens instead of a mask of [T, S].
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from openpi_port.masks import Blocks, dense

SHARED = 200 * 1024  # bytes of a processor's memory that the kernels' tiles take


def fits(device: torch.device) -> bool:
    """Whether a GPU has Triton, and room for the kernels' tiles: an H100 has, smaller ones don't."""
    if importlib.util.find_spec("triton") is None or device.type != "cuda":
        return False
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= SHARED


def usable(q: Tensor, k: Tensor) -> bool:
    """Whether `attention` takes q [B, T, N, H] and k [B, S, K, H]: bfloat16 to be trained."""
    wanted = q.dtype == torch.bfloat16 and torch.is_grad_enabled() and q.requires_grad
    return wanted and k.shape[2] == 1 and q.shape[3] in (64, 128, 256)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Blocks) -> Tensor:
    """Attends; queries come scaled.

    Args:
      q: [B, T, N, H].
      k, v: [B, S, H].
      mask: int32 blocks.

    Returns:
      [B, T, N * H].
    """
    return _Attention.apply(q.contiguous(), k.contiguous(), v.contiguous(), *mask).flatten(2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, queries: Tensor | None, keys: Tensor) -> Tensor:
        out, sums = _attention(q, k, v, queries, keys)
        ctx.save_for_backward(q, k, v, out, sums, queries, keys)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint gives them no second time
        dq, dk, dv = _attention_gradients(gradient.contiguous(), *saved)
        count = saved[1].shape[1]
        return dq, dk[:, :count], dv[:, :count], None, None


# The operations are called so that `layers.remat` keeps what the first gives.
@torch.library.custom_op("openpi_port::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, queries: Tensor | None, keys: Tensor) -> tuple[Tensor, Tensor]:
    """What `attention` returns, [B, T, N, H], and the logarithms of the softmax's sums, float32 [B, T, N]."""
    if q.is_cuda:
        from openpi_port.pi_torch.fast import attend_kernel

        return attend_kernel.forward(q, k, v, queries, keys)
    logits = _logits(q, k, queries, keys)
    out = (torch.softmax(logits, -1) @ v[:, None].float()).to(v.dtype)  # [B, N, T, H]
    return out.transpose(1, 2).contiguous(), logits.logsumexp(-1).transpose(1, 2).contiguous()


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, queries: Tensor | None, keys: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("openpi_port::attention_gradients", mutates_args=())
def _attention_gradients(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    queries: Tensor | None,
    keys: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries, and of keys and values, [B, S', H]: cuBLAS is slow unless their count is a multiple of 8."""
    if q.is_cuda:
        from openpi_port.pi_torch.fast import attend_kernel

        made = attend_kernel.weights
    else:
        made = _weights
    rows, of_rows = (x.flatten(1, 2) for x in (q, gradient))  # [B, T N, H]
    p, dp = made(gradient, q, k, v, out, sums, queries, keys)
    k = F.pad(k, (0, 0, 0, dp.shape[-1] - k.shape[1])) if dp.shape[-1] > k.shape[1] else k
    return (dp @ k).view_as(q), dp.mT @ rows, p.mT @ of_rows


@_attention_gradients.register_fake
def _(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    queries: Tensor | None,
    keys: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    size, count, dim = k.shape
    return torch.empty_like(q), *(k.new_empty(size, count + -count % 8, dim) for _ in range(2))


def _logits(q: Tensor, k: Tensor, queries: Tensor | None, keys: Tensor) -> Tensor:
    """float32 [B, N, T, S]."""
    logits = q.transpose(1, 2).float() @ k[:, None].float().mT
    return torch.where(dense(Blocks(queries, keys))[:, None], logits, -torch.inf)


def _weights(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    queries: Tensor | None,
    keys: Tensor,
) -> tuple[Tensor, Tensor]:
    """Probabilities, and gradients of the logits, [B, T N, S'] in the dtype of q: zeros up to a multiple of 8 keys."""
    p = torch.exp(_logits(q, k, queries, keys) - sums.transpose(1, 2)[..., None])
    around = (gradient.float() * out.float()).sum(-1).transpose(1, 2)[..., None]
    dp = p * (gradient.transpose(1, 2).float() @ v[:, None].float().mT - around)
    return tuple(F.pad(x.transpose(1, 2).flatten(1, 2).to(q.dtype), (0, -x.shape[-1] % 8)) for x in (p, dp))
