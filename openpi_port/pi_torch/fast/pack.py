"""A module's weights as the prepared path wants them: merged, reordered, and what doesn't depend on the input computed.

Where merged or padded weights hold those of the module unchanged, the module's become views of them: memory holds most
weights once.

D width, F width of the MLP, N heads, H head dim, J action dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openpi_port.errors import UserError
from openpi_port.pi_torch import gemma, lora, siglip
from openpi_port.pi_torch.pi0 import Pi0, embed_time
from openpi_port.schedule import euler_times


class VisionLayer(NamedTuple):
    """One block of SigLIP. What the biases of earlier projections add to the residual stream is in `offset_*`.

    Attributes:
      offset_attn, scale_attn, bias_attn: float32 [D], of the first norm.
      qkv, qkv_bias: [3D, D] and [3D]; queries scaled by H ** -0.5.
      o: [D, D].
      offset_mlp, scale_mlp, bias_mlp: float32 [D], of the second norm.
      up, up_bias, down: [F, D], [F] and [D, F], F filled up with zeros.
    """

    offset_attn: Tensor
    scale_attn: Tensor
    bias_attn: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    o: Tensor
    offset_mlp: Tensor
    scale_mlp: Tensor
    bias_mlp: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor


class Vision(NamedTuple):
    """SigLIP: from pixels 0..255.

    Attributes:
      patch: float32 [D, 3 * p * p], for pixels.
      start: float32 [tokens, D], bias and position.
      layers: the blocks.
      offset, scale, bias: float32 [D], of the last norm.
      head, head_bias: to the language width.
    """

    patch: Tensor
    start: Tensor
    layers: list[VisionLayer]
    offset: Tensor
    scale: Tensor
    bias: Tensor
    head: Tensor
    head_bias: Tensor


class GateUp(NamedTuple):
    """The halves of a GeGLU's weights, [F, D] each, where they are not one matrix (see `onednn`)."""

    gate: Tensor
    up: Tensor


class Block(NamedTuple):
    """One layer of one Gemma expert, without norms.

    Attributes:
      qkv: [(N + 2) * H, D]; queries scaled by H ** -0.5, rotary pairs side by side.
      o: [D, N * H].
      gate_up: [2F, D].
      down: [D, F].
      gate_up_factor, down_factor: float32 [], what those two are to be multiplied by where they are float8; else None.
    """

    qkv: Tensor
    o: Tensor
    gate_up: Tensor | GateUp
    down: Tensor
    gate_up_factor: Tensor | None = None
    down_factor: Tensor | None = None


class Norm(NamedTuple):
    """A norm with what follows it.

    Attributes:
      scale: float32 [D].
      bias: float32, AdaRMS's shift through the following weights; None without one.
      gate: float32 [D] of the residual that follows; None without one.
    """

    scale: Tensor
    bias: Tensor | None
    gate: Tensor | None


class Entry(NamedTuple):
    """The way of noisy actions into the expert: `y = x_t @ first.T + step.entry`, in pi0 then `swish(y) @ w.T + b`.

    Attributes:
      first: float32 [D, J].
      w: [D, D], or None.
      b: [D], or None.
    """

    first: Tensor
    w: Tensor | None
    b: Tensor | None


class Step(NamedTuple):
    """What one Euler step knows before the first observation.

    Attributes:
      dt: by how much the flow time changes.
      entry: float32 [D], the time's part of the action MLP (pi0) or the bias of the action projection.
      norms: before the attention and the MLP of every layer in turn, and the last, whose bias includes that of the
        action projection.
    """

    dt: float
    entry: Tensor
    norms: list[Norm]


def pack_vision(module: siglip.Siglip) -> Vision:
    """Merged weights of a vision transformer, of which the module's become views where they can."""
    dtype = getattr(torch, module.compute.dtype)
    patch = module.patch_embed.weight.float() * (2 / 255)
    start = module.patch_embed.bias.float() - module.patch_embed.weight.float().sum(1) + module.pos_embedding.float()
    offset = torch.zeros_like(start[0])
    layers = []
    for block in module.blocks:
        attn, mlp = block.attn, block.mlp
        scale = (attn.q.weight.shape[0] // attn.num_heads) ** -0.5
        padding = -mlp.up.weight.shape[0] % 64  # 4304 channels and 48 that are nothing make faster products
        after_attn = offset + attn.o.bias.float()
        q = (attn.q.weight.float() * scale).to(dtype)
        qkv = torch.cat([q, attn.k.weight.to(dtype), attn.v.weight.to(dtype)])
        up, down = F.pad(mlp.up.weight.to(dtype), (0, 0, 0, padding)), F.pad(mlp.down.weight.to(dtype), (0, padding))
        layers.append(
            VisionLayer(
                offset,
                *(p.float() for p in (block.norm_attn.scale, block.norm_attn.bias)),
                qkv,
                torch.cat([attn.q.bias.float() * scale, attn.k.bias.float(), attn.v.bias.float()]).to(dtype),
                attn.o.weight.to(dtype),
                after_attn,
                *(p.float() for p in (block.norm_mlp.scale, block.norm_mlp.bias)),
                up,
                F.pad(mlp.up.bias.to(dtype), (0, padding)),
                down,
            )
        )
        width = mlp.up.weight.shape[0]
        views = (*qkv.chunk(3)[1:], up[:width], down[:, :width])
        _share((attn.k, attn.v, mlp.up, mlp.down), views)
        offset = after_attn + mlp.down.bias.float()
    norm = (module.norm.scale.float(), module.norm.bias.float())
    return Vision(patch, start, layers, offset, *norm, module.head.weight.to(dtype), module.head.bias.to(dtype))


def pack_blocks(module: gemma.Gemma, index: int) -> list[Block]:
    """Merged weights of one expert's layers, of which the module's become views where they can.

    Raises:
      UserError: adapters that are not merged, or several heads of keys and values.
    """
    dtype = getattr(torch, module.compute.dtype)
    blocks = []
    for layer in module.layers:
        expert = layer.experts[index]
        dim = expert.head_dim
        if isinstance(expert.q, lora.LoraToHeads) or isinstance(expert.gate, lora.LoraLinear):
            raise UserError("LoRA's adapters must be merged before a model is prepared: load it with merge_lora=True")
        if expert.k.weight.shape[0] != dim:
            raise UserError(
                f"num_kv_heads={expert.k.weight.shape[0] // dim}: models are prepared with one head of keys and values"
            )
        q = (expert.q.weight.float() * dim**-0.5).to(dtype)
        qkv = [_side_by_side(q, dim), _side_by_side(expert.k.weight.to(dtype), dim), expert.v.weight.to(dtype)]
        gate_up = torch.cat([expert.gate.weight.to(dtype), expert.up.weight.to(dtype)])
        blocks.append(Block(torch.cat(qkv), expert.o.weight.to(dtype), gate_up, expert.down.weight.to(dtype)))
        _share((expert.gate, expert.up), gate_up.chunk(2))
    return blocks


def pack_norms(module: gemma.Gemma, index: int = 0) -> list[Norm]:
    """The norms of an expert without conditions: before attention and MLP of every layer in turn, and the last."""
    experts = [layer.experts[index] for layer in module.layers]
    norms = [norm for expert in experts for norm in (expert.norm_attn, expert.norm_mlp)]
    return [Norm(1 + norm.scale.float(), None, None) for norm in (*norms, module.norms[index])]


def pack_steps(module: Pi0, blocks: list[Block], num_steps: int) -> list[Step]:
    """All that the Euler steps need of time."""
    times, dt = euler_times(num_steps)
    device = module.gemma.embedding.device
    emb = embed_time(torch.from_numpy(times).to(device), module.config.expert.width)  # [steps, D]
    out = module.action_out_proj
    if module.config.time_in == "mlp":
        to_actions, to_time = module.action_time_mlp_in.weight.float().chunk(2, 1)
        entry = to_actions @ module.action_in_proj.bias.float() + module.action_time_mlp_in.bias.float()
        norms = pack_norms(module.gemma, 1)
        norms[-1] = norms[-1]._replace(bias=out.bias.float())
        return [Step(float(dt), row, norms) for row in entry + emb @ to_time.t()]

    cond = F.silu(module.time_mlp_out(F.silu(module.time_mlp_in(emb))))
    rows = []  # a list per norm, of that norm at every step
    for layer, block in zip(module.gemma.layers, blocks, strict=True):
        rows.append(_modulated(layer.experts[1].norm_attn, cond, block.qkv))
        rows.append(_modulated(layer.experts[1].norm_mlp, cond, block.gate_up))
    last = _modulated(module.gemma.norms[1], cond, out.weight)
    rows.append([norm._replace(bias=norm.bias + out.bias.float()) for norm in last])
    return [Step(float(dt), module.action_in_proj.bias.float(), list(norms)) for norms in zip(*rows, strict=True)]


def pack_entry(module: Pi0) -> Entry:
    """How noisy actions enter the expert."""
    first = module.action_in_proj.weight.float()
    if module.config.time_in == "adarms":
        return Entry(first, None, None)
    to_actions = module.action_time_mlp_in.weight.float().chunk(2, 1)[0]
    last, dtype = module.action_time_mlp_out, getattr(torch, module.compute.dtype)
    return Entry((to_actions.double() @ first.double()).float(), last.weight.to(dtype), last.bias.to(dtype))


def turns(length: int, dim: int, device: torch.device, max_wavelength: float = 10_000.0) -> Tensor:
    """cos and sin of the rotary angles, float32 [length, dim / 2, 2]; see `layers.rope`."""
    half = torch.arange(dim // 2, dtype=torch.float32, device=device)
    angle = torch.arange(length, device=device)[:, None].float() / max_wavelength ** (half * (2.0 / dim))
    return torch.stack([torch.cos(angle), torch.sin(angle)], -1)


def embedding_scale(width: int, dtype: torch.dtype) -> float:
    """What token embeddings are multiplied by, rounded as the reference rounds it."""
    return torch.tensor(math.sqrt(width), dtype=dtype).item()


def _modulated(norm: torch.nn.Module, cond: Tensor, after: Tensor) -> list[Norm]:
    """An AdaRMS norm at every step, before the weights `after` [F, D]."""
    modulation = F.linear(cond, norm.modulation.weight.float(), norm.modulation.bias.float())
    scale, shift, gate = modulation.chunk(3, -1)
    return [Norm(*rows) for rows in zip(1 + scale, shift @ after.float().t(), gate, strict=True)]


def _share(linears: Sequence[torch.nn.Module], views: Sequence[Tensor]) -> None:
    """Puts weights where packed ones hold the same values."""
    for linear, view in zip(linears, views, strict=True):
        if linear.weight.dtype == view.dtype:
            linear.weight.data = view


def _side_by_side(w: Tensor, dim: int) -> Tensor:
    """Reorders the rows [N * H] of a projection into heads: channel i and i + H/2 become 2i and 2i + 1."""
    return w.unflatten(0, (-1, 2, dim // 2)).transpose(1, 2).flatten(0, 2)
