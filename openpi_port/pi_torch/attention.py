"""Softmax attention with grouped queries, by one of several backends that all compute the same.

B batch, T queries, S keys, N heads, K kv heads, G = N / K, H head dim.

- "plain": einsum; the logits exist in float32. The reference.
- "sdpa": the fused kernels behind `F.scaled_dot_product_attention`. Where all queries see the same keys, those keys are
  packed for the flash kernel, which is twice as fast without a mask. Else the G query heads that share keys are laid
  one after another along the queries, so that no keys are repeated. Training has kernels of its own for heads that all
  share their keys (`fast/attend.py`).
- "flex": FlexAttention, compiled. Its block mask comes from the blocks of the mask, tile by tile; nothing of size
  [B, T, S] is made. On NVIDIA GPUs only.

"auto" is resolved once per device by `resolve`. The output at a padding query is nobody's: backends differ there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from openpi_port.config import Compute
from openpi_port.errors import UserError
from openpi_port.masks import UNSEEN, Blocks, dense
from openpi_port.pi_torch.fast import attend

MASKED = -2.3819763e38  # big_vision's value for a forbidden logit; a fully masked row becomes uniform
BACKENDS = ("plain", "sdpa", "flex")
# The fastest first, forward and backward at pi0's shapes on an H100; the last takes everything.
PREFERRED = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
TILE = 128  # of FlexAttention's block mask


def resolve(compute: Compute, device: torch.device) -> Compute:
    """Settles "auto": "sdpa" for bfloat16 on a GPU, else "plain".

    Raises:
      UserError: a backend that torch or the device can't honour.
    """
    name = compute.attention
    if name == "auto":
        name = "sdpa" if device.type == "cuda" and compute.dtype == "bfloat16" else "plain"
    if name not in BACKENDS:
        raise UserError(f"config.compute.attention={name!r}: torch has auto, {', '.join(BACKENDS)}")
    if name == "flex" and device.type != "cuda":
        raise UserError(f"config.compute.attention={name!r} needs an NVIDIA GPU; use 'sdpa', 'plain' or 'auto'")
    return dataclasses.replace(compute, attention=name)


def prepare(mask: Tensor | Blocks, backend: str) -> Any:
    """What a backend needs of a mask, made once for all layers; `attention` takes it."""
    if backend == "flex" and isinstance(mask, Blocks):
        return _block_mask(mask)
    seen = dense(mask) if isinstance(mask, Blocks) else mask
    if backend == "plain":
        return seen
    seen = seen | ~seen.any(-1, keepdim=True)  # no row without a key
    if not isinstance(mask, Blocks):
        return seen
    if mask.queries is None and _has_flash(mask.keys.device):
        seen = _packed(mask.keys < UNSEEN)
    if not (torch.is_grad_enabled() and attend.fits(mask.keys.device)):
        return seen
    return _Trained(Blocks(*(None if x is None else x.int().contiguous() for x in mask)), seen)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any, backend: str = "plain") -> Tensor:
    """Attends; queries come scaled.

    Args:
      q: [B, T, N, H].
      k, v: [B, S, K, H]; query head n reads kv head n // G.
      mask: bool [B, T, S] or [B, 1, S], or what `prepare` made of a mask, or None for full attention.
      backend: one of `BACKENDS`.

    Returns:
      [B, T, N * H].
    """
    if backend == "flex" and not isinstance(mask, Tensor):
        return _flex(q, k, v, mask)
    if isinstance(mask, _Trained):
        if attend.usable(q, k):
            return attend.attention(q, k[:, :, 0], v[:, :, 0], mask.blocks)
        mask = mask.seen
    if isinstance(mask, _Packed):
        return _flash(q, k, v, mask)
    return _plain(q, k, v, mask) if backend == "plain" else _sdpa(q, k, v, mask)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q = rearrange(q, "B T (K G) H -> B T K G H", K=k.shape[2])
    logits = torch.einsum("BTKGH,BSKH->BKGTS", q.float(), k.float())
    if mask is not None:
        logits = torch.where(mask[:, None, None], logits, MASKED)
    probs = torch.softmax(logits, dim=-1).to(v.dtype)
    return rearrange(torch.einsum("BKGTS,BSKH->BTKGH", probs, v), "B T K G H -> B T (K G H)")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    length, kv_heads = q.shape[1], k.shape[2]
    q = rearrange(q, "B T (K G) H -> B K (T G) H", K=kv_heads)
    k, v = (rearrange(x, "B S K H -> B K S H") for x in (k, v))
    if mask is not None:
        rows = q.shape[2] // mask.shape[1]  # 1 is for all; the kernels read a repeated row without a copy
        mask = mask.expand(-1, rows, -1) if mask.shape[1] == 1 else mask.repeat_interleave(rows, dim=1)
        mask = mask[:, None]
    with sdpa_kernel(PREFERRED, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    return rearrange(out, "B K (T G) H -> B T (K G H)", T=length)


class _Packed(NamedTuple):
    """For the flash kernel, which knows lengths but no masks: the valid keys of all samples, one after another.

    Attributes:
      order: int [B S], which key comes where; those that aren't valid are at the end.
      place: int [B S], where each key has gone.
      valid: bool [B S].
      keys: int32 [B + 1], where each sample begins.
    """

    order: Tensor
    place: Tensor
    valid: Tensor
    keys: Tensor


class _Trained(NamedTuple):
    """A mask in training: int32 blocks for `fast/attend.py`, and what the kernels take for heads that it doesn't."""

    blocks: Blocks
    seen: _Packed | Tensor


def _packed(valid: Tensor) -> _Packed:
    order = torch.argsort(~valid.flatten(), stable=True)
    keys = F.pad(valid.sum(1).cumsum(0), (1, 0)).int()
    return _Packed(order, torch.argsort(order), valid.flatten(), keys)


class _Pack(torch.autograd.Function):
    """Keys or values [B S, K, H] in packed order; the kernel leaves gradients of what it doesn't read unwritten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, valid: Tensor) -> Tensor:
        ctx.save_for_backward(place, valid)
        return x[order]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        place, valid = ctx.saved_tensors
        return torch.where(valid[:, None, None], gradient[place], 0), None, None, None


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: _Packed) -> Tensor:
    """Attention to packed keys."""
    size, length, heads, dim = q.shape
    longest = (length, k.shape[1])
    queries = torch.arange(0, size * length + 1, length, dtype=torch.int32, device=q.device)
    k, v = (_Pack.apply(x.flatten(0, 1), mask.order, mask.place, mask.valid) for x in (k, v))
    out = _flash_kernel(q.flatten(0, 1), k, v, queries, mask.keys, longest)
    return out.reshape(size, length, heads * dim)


def _flash_kernel(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, longest: tuple[int, int]) -> Tensor:
    """[B T, N, H] of packed sequences; their queries and keys are no more than `longest`.

    torch's public way to it, `torch.nn.attention.varlen`, knows no heads that share keys before torch 2.13.
    """
    kernel = torch.ops.aten._flash_attention_forward
    return kernel(q, k, v, queries, keys, *longest, 0.0, False, False, scale=1.0)[0]


def _has_flash(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    q, k, v = (rearrange(x, "B S N H -> B N S H") for x in (q, k, v))
    options = {"FORCE_USE_FLEX_ATTENTION": True}  # not the kernel for few queries, which takes no 51 of them
    out = _compiled_flex()(q, k, v, block_mask=mask, scale=1.0, enable_gqa=True, kernel_options=options)
    return rearrange(out, "B N T H -> B T (N H)")


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _block_mask(mask: Blocks, tile: int = TILE) -> Any:
    """FlexAttention's block mask: per tile of queries, which tiles of keys are seen in part and which as a whole."""
    from torch.nn.attention.flex_attention import BlockMask

    keys, queries = mask.keys, mask.queries
    length = keys.shape[1] if queries is None else queries.shape[1]
    if queries is None:
        queries = torch.full((1, 1), UNSEEN - 1, device=keys.device).expand(len(keys), length)
    first, last = (x[:, None] for x in torch.aminmax(_tiles(keys, UNSEEN, tile), dim=-1))  # [B, 1, S / tile]
    least = _tiles(queries, UNSEEN, tile).amin(-1)[:, :, None]
    most = _tiles(queries, -1, tile).amax(-1)[:, :, None]
    whole = last <= least  # every query sees every key; tiles at the end are filled with unseen keys
    part = (first <= most) & ~whole
    tables = [x for seen in (part, whole) for x in _listed(seen[:, None])]

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return keys[b, k] <= queries[b, q]

    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=tile, mask_mod=sees, seq_lengths=(length, keys.shape[1]))


def _tiles(x: Tensor, fill: int, tile: int) -> Tensor:
    """int [B, S] as [B, S / tile, tile], filled up at the end."""
    return F.pad(x, (0, -x.shape[1] % tile), value=fill).unflatten(1, (-1, tile))


def _listed(seen: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, 1, Q, K] as how many are true per row and their places, true ones first."""
    order = torch.argsort(seen.int(), dim=-1, descending=True, stable=True)
    return seen.sum(-1, dtype=torch.int32), order.int()
