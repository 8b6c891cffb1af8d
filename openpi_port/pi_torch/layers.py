"""Linear maps, norms and rotary embedding.

B batch, T tokens, N heads, H head dim, D width, C width of the condition.

Parameters stay in the dtype they were loaded in (float32 while training) and are cast to the dtype of the
activations where they are used; norms and softmax are computed in float32. Modules are built on the meta device and
always filled from a checkpoint or from `openpi_port.init`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from openpi_port.config import Compute
from openpi_port.pi_torch.fast import products


class Linear(nn.Linear):
    """`x @ weight.T + bias` in the dtype of `x`.

    Attributes:
      total: where the weight's gradient is added up over the parts of a batch, or None for autograd's own way.
    """

    total: Tensor | None = None

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False) -> None:
        super().__init__(d_in, d_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        if self.total is None:
            return F.linear(x, weight, bias)
        return products.products(x, [weight], [bias], [self.total])[0]


class LayerNorm(nn.Module):
    """Normalises to mean 0 and variance 1, then scales and shifts."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.scale.shape, self.scale.float(), self.bias.float(), 1e-6).to(x.dtype)


class RMSNorm(nn.Module):
    """Gemma's norm: a scale around 1. The condition is not used and there is no gate."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, None]:
        return (rms_normalize(x) * (1 + self.scale.float())).to(x.dtype), None


class AdaRMSNorm(nn.Module):
    """pi0.5's norm: scale, shift and the gate of the residual are linear in a condition (DiT's adaLN)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.modulation = Linear(dim, 3 * dim, bias=True)

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """Takes x [B, T, D] and cond [B, D] or [B, T, D]; returns the normed x and a gate that broadcasts to it."""
        modulation = self.modulation(cond.to(x.dtype))
        scale, shift, gate = (modulation[:, None] if cond.ndim == 2 else modulation).chunk(3, dim=-1)
        return (rms_normalize(x) * (1 + scale) + shift).to(x.dtype), gate


def rms_normalize(x: Tensor) -> Tensor:
    """Divides by the root mean square over the last axis, in float32."""
    x32 = x.float()
    return x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """The residual connection, `x + y` or `x + y * gate`."""
    return x + y if gate is None else x + y * gate


class Angles(NamedTuple):
    """Sine and cosine of the rotary angles, float32 [B, T, 1, H/2]: computed once for all layers."""

    sin: Tensor
    cos: Tensor

    def of(self, start: int, stop: int) -> Angles:
        """Those of the tokens from `start` up to `stop`."""
        return Angles(self.sin[:, start:stop], self.cos[:, start:stop])


def angles(positions: Tensor, dim: int, max_wavelength: float = 10_000.0) -> Angles:
    """Rotary angles.

    Args:
      positions: int [B, T].
      dim: H, of the heads.
      max_wavelength: of the slowest pair.
    """
    half = dim // 2
    wavelength = max_wavelength ** (torch.arange(half, dtype=torch.float32, device=positions.device) * (2.0 / dim))
    angle = positions[..., None, None].float() / wavelength  # [B, T, 1, H/2]
    return Angles(torch.sin(angle), torch.cos(angle))


def rope(x: Tensor, where: Angles) -> Tensor:
    """Rotary position embedding; channel i is paired with channel i + H/2, not with its neighbour.

    Args:
      x: [B, T, N, H].
      where: the angles of the tokens.

    Returns:
      [B, T, N, H], rotated in float32 and cast back.
    """
    sin, cos = where
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([(x1 * cos - x2 * sin).to(x.dtype), (x2 * cos + x1 * sin).to(x.dtype)], dim=-1)


def kept(x: Tensor) -> Tensor:
    """What took a matrix product to compute; `remat` knows it by its operation, so nothing is marked."""
    return x


def remat(function: Callable, compute: Compute) -> Callable:
    """What of `function` is computed again in the backward pass, see `Compute.remat`.

    The compiler is told what to keep also where that is nothing, because that of 2.11 keeps what `products` makes; and
    where it is all that reads much memory to be made: the compiler alone keeps GeGLU's product, a third more in all.
    """
    if not torch.is_grad_enabled() or (compute.remat == "none" and not torch.compiler.is_compiling()):
        return function
    wanted = {"full": _keeps_nothing, "dots": _keeps_products, "none": _keeps_products_and_norms}[compute.remat]
    keeps = partial(create_selective_checkpoint_contexts, wanted)
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False, context_fn=keeps)


def run(body: Callable, x: Any, layers: Any, compute: Compute) -> tuple[Any, list]:
    """Carries `x` through `body(x, layer)` for every layer; returns what comes out and what the layers give besides."""
    del compute  # which layers know themselves
    outs = []
    for layer in layers:
        x, out = body(x, layer)
        outs.append(out)
    return x, outs


def _keeps_nothing(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def _keeps_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Matrix products and attention; and what attention reads, which heads are put together for at last."""
    name = str(operation)
    product = name.startswith(("aten.mm.", "aten.addmm.", "aten.bmm.")) or "attention" in name
    heads = name.startswith("aten.cat.") and args[0][0].ndim == 4
    return CheckpointPolicy.MUST_SAVE if product or heads else CheckpointPolicy.PREFER_RECOMPUTE


def _keeps_products_and_norms(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The same, and what `norms` makes."""
    if str(operation).startswith(("openpi_port.norm.", "openpi_port.add_norm.")):
        return CheckpointPolicy.MUST_SAVE
    return _keeps_products(context, operation, *args, **kwargs)


def lowered(module: nn.Module, compute: Compute) -> nn.Module:
    """Gives layers their weights as they use them, cast once: all but those of the norms, which compute in float32."""
    for owner in module.modules():
        for leaf, weight in list(owner.named_parameters(recurse=False)):
            if not isinstance(owner, LayerNorm | RMSNorm):
                cast = weight.detach().to(getattr(torch, compute.dtype))
                setattr(owner, leaf, nn.Parameter(cast, weight.requires_grad))
    return module


def stack(layer: nn.Module, depth: int) -> nn.ModuleList:
    """`depth` copies of a layer."""
    return nn.ModuleList([copy.deepcopy(layer) for _ in range(depth)])
