"""pi0 and pi0.5 on packed weights: vision, prefix, Euler steps.

B batch, C cameras that are there, T prompt tokens, P prefix tokens, A actions, J action dim, S = P + suffix keys.

Everything is in static shapes and without a look at a value, so that a graph can hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from openpi_port.pi_torch.fast import float8, onednn, ops, pack
from openpi_port.pi_torch.fast.ops import Residual, Seen, Sum
from openpi_port.pi_torch.fast.pack import Block, Norm, Step, Vision
from openpi_port.pi_torch.pi0 import Pi0
from openpi_port.pi_torch.pi0_fast import Pi0Fast


class Inputs(NamedTuple):
    """An observation on the device.

    Attributes:
      images: [B, C, height, width, 3], uint8, or float in [-1, 1].
      tokens: int [B, T].
      order: int [B * P], the rows of the prefix, valid ones first in every sample.
      length: int32 [B], how many those are.
      state: float32 [B, J].
      noise: float32 [B, A, J].
    """

    images: Tensor
    tokens: Tensor
    order: Tensor
    length: Tensor
    state: Tensor
    noise: Tensor


class Past(NamedTuple):
    """What new tokens are computed with.

    Attributes:
      k, v: keys and values of every layer, [L, B, S, H], with room for those of the new tokens.
      seen: which of them.
      turns: float32 [M, H/2, 2], cos and sin of the new tokens' angles.
      base: what the action tokens' projection is added to, see `ops.enter`; None for pi0.5.
    """

    k: Tensor
    v: Tensor
    seen: Seen
    turns: Tensor
    base: Tensor | None


def run(blocks: Sequence[Block], norms: Sequence[Norm], stream: Residual, past: Past) -> Residual:
    """New tokens through all layers.

    Args:
      blocks: the layers.
      norms: before the attention and before the MLP of every layer in turn, and the last one.
      stream: the tokens, ready for the first norm.
      past: their keys and values are written into it.

    Returns:
      The stream, ready for what follows the last norm.
    """
    for i, block in enumerate(blocks):
        attn, mlp, after = norms[2 * i : 2 * i + 3]
        q = ops.normed_qkv(stream, block.qkv, attn.bias, past.turns, past.k[i], past.v[i], past.seen)
        y = ops.attend(q, past.k[i], past.v[i], past.seen)
        stream = ops.add_projected(stream, y, block.o, attn.gate, mlp.scale)
        y = ops.normed_geglu(stream, block.gate_up, mlp.bias, block.gate_up_factor)
        stream = ops.add_projected(stream, y, block.down, mlp.gate, after.scale, block.down_factor)
    return stream


class Language:
    """Vision and language model on packed weights.

    Args:
      module: whose weights.
      turns: cos and sin of all positions in the prefix, from `pack.turns`.
      eight: MLPs in float8.
      traced: for a CPU, to be compiled: weights are not laid out, and no value is looked at before the steps.

    Attributes:
      writing: blocks and norms for generated tokens; see `run`.
    """

    def __init__(self, module: Pi0 | Pi0Fast, turns: Tensor, *, eight: bool, traced: bool = False) -> None:
        config = module.config
        self.dtype = getattr(torch, module.compute.dtype)
        self.turns, self._traced = turns, traced
        self.embedding = module.gemma.embedding
        self.vision = pack.pack_vision(module.vision)
        self.heads, self.patch_size = config.vision.num_heads, config.vision.patch_size
        self.blocks = blocks = pack.pack_blocks(module.gemma, 0)
        self.last = blocks[-1].qkv[-2 * config.language.head_dim :]  # nothing comes of its queries
        if not traced and onednn.takes(module, self.dtype):
            self.vision, self.last = onednn.lay_out_vision(self.vision), onednn.lay_out(self.last)
            self.blocks = [onednn.lay_out_block(block) for block in blocks]
        self.norms = pack.pack_norms(module.gemma)
        self.scale = pack.embedding_scale(config.language.width, self.dtype)
        self._mlps = [float8.pack(*of) for of in zip(blocks, self.norms[1::2], strict=True)] if eight else None
        self.writing = self.blocks, self.norms  # of generated tokens
        if self._mlps is not None:
            self.writing = float8.of_tokens(self.blocks, self.norms, self._mlps)

    def see(self, images: Tensor) -> Tensor:
        """Images [B, C, height, width, 3] to tokens [B, C * tokens, D]."""
        packed: Vision = self.vision
        pixels = images.float() if images.dtype == torch.uint8 else (images + 1) * 127.5
        p = self.patch_size
        patches = rearrange(pixels, "B C (h p) (w q) c -> (B C) (h w) (p q c)", p=p, q=p)
        x = (onednn.linear(patches, packed.patch) + packed.start).to(self.dtype)
        total = Sum(x.flatten(0, 1))
        for layer in packed.layers:
            x, y = ops.layer_norm(total, layer.offset_attn, layer.scale_attn, layer.bias_attn)
            y = ops.attend_all(onednn.linear(y, layer.qkv, layer.qkv_bias), len(patches), self.heads)
            total = ops.add_linear(x, y, layer.o)
            x, y = ops.layer_norm(total, layer.offset_mlp, layer.scale_mlp, layer.bias_mlp)
            total = ops.add_linear(x, ops.linear_gelu(y, layer.up, layer.up_bias), layer.down)
        _, y = ops.layer_norm(total, packed.offset, packed.scale, packed.bias)
        return onednn.linear(y, packed.head, packed.head_bias).view(images.shape[0], -1, packed.head.shape[0])

    def embed(self, tokens: Tensor) -> Tensor:
        """Prompt tokens [B, T] to [B, T, D]."""
        return F.embedding(tokens, self.embedding).to(self.dtype) * self.scale

    def embed_prefix(self, images: Tensor, tokens: Tensor, order: Tensor) -> Tensor:
        """Tokens [B, P, D] of images, [B, C, height, width, 3], and prompt, [B, T], in that order of all rows."""
        x = self.embed(tokens)
        if images.shape[1]:
            x = torch.cat([self.see(images), x], 1)
        return x.flatten(0, 1).index_select(0, order).view(x.shape)

    def prefill(self, x: Tensor, length: Tensor, extra: int) -> tuple[Tensor, Tensor]:
        """The prefix [B, P, D] through all layers, as far as its keys and values need it.

        Args:
          x: tokens, valid ones first; overwritten.
          length: int32 [B], how many are valid.
          extra: room for so many more keys.

        Returns:
          Keys and values [L, B, P + extra, H].
        """
        size, prefix, _ = x.shape
        dim = self.turns.shape[1] * 2
        shape = (len(self.blocks), size, prefix + extra, dim)
        make = torch.empty if ops.on_gpu(x) else torch.zeros  # kernels don't read what isn't written
        k, v = (make(shape, dtype=x.dtype, device=x.device) for _ in range(2))
        turns = self.turns[:prefix].repeat(size, 1, 1)
        seen = ops.see(length, None, 0, prefix, 1, x, look=not self._traced)
        total = Sum(x.flatten(0, 1))
        for i, block in enumerate(self.blocks):
            x, y = ops.rms_norm(total, self.norms[2 * i].scale)
            if i + 1 == len(self.blocks):
                ops.split_qkv(onednn.linear(y, self.last), turns, k[i], v[i])
                break
            q = ops.split_qkv(onednn.linear(y, block.qkv), turns, k[i], v[i])
            y = ops.attend(q, k[i, :, :prefix], v[i, :, :prefix], seen)
            total = ops.add_linear(x, y, block.o)
            if self._mlps is not None:
                total = Sum(float8.add_mlp(total, self._mlps[i]))
                continue
            x, y = ops.rms_norm(total, self.norms[2 * i + 1].scale)
            total = ops.add_linear(x, ops.linear_geglu(y, block.gate_up), block.down)
        return k, v


class Flow:
    """The whole of pi0 or pi0.5 on packed weights.

    Args:
      module: whose weights.
      eight, traced: see `Language`.
    """

    def __init__(self, module: Pi0, *, eight: bool, traced: bool = False) -> None:
        config = self.config = module.config
        self.module, self.heads, self._traced = module, config.language.num_heads, traced
        dim, device = config.language.head_dim, module.gemma.embedding.device
        turns = pack.turns(config.prefix_len + config.suffix_len, dim, device)
        self.language = Language(module, turns, eight=eight, traced=traced)
        self.blocks: list[Block] = pack.pack_blocks(module.gemma, 1)
        self.entry = pack.pack_entry(module)
        self.state = None
        if config.state_in == "suffix":
            self.state = module.state_proj.weight.float(), module.state_proj.bias.float()
        if not traced and onednn.takes(module, self.language.dtype):
            self.blocks = [onednn.lay_out_block(block) for block in self.blocks]
            if self.entry.w is not None:
                self.entry = self.entry._replace(w=onednn.lay_out(self.entry.w))
        self.out = module.action_out_proj.weight.to(self.language.dtype)
        self._steps: dict[int, list[Step]] = {}

    def steps(self, num_steps: int) -> list[Step]:
        """What every Euler step knows beforehand."""
        if num_steps not in self._steps:
            self._steps[num_steps] = pack.pack_steps(
                self.module, [onednn.plain_block(block) for block in self.blocks], num_steps
            )
        return self._steps[num_steps]

    def prefix(self, inputs: Inputs) -> Tensor:
        """Tokens [B, P, D] of images and prompt."""
        return self.language.embed_prefix(inputs.images, inputs.tokens, inputs.order)

    def prefill(self, x: Tensor, length: Tensor, state: Tensor) -> Past:
        """The prefix [B, P, D], of which so many are valid, and the state, as the steps need them; x is overwritten."""
        suffix, (size, prefix, _) = self.config.suffix_len, x.shape
        k, v = self.language.prefill(x, length, suffix)
        number = torch.arange(suffix, dtype=torch.int32, device=x.device)
        extra, base = torch.full_like(number, suffix), None
        if self.entry.b is not None:
            base = self.entry.b.expand(size, suffix, -1)
        if self.config.state_in == "suffix":
            extra = torch.where(number == 0, 1, extra)  # the state doesn't see the actions
            token = F.linear(state, *self.state)[:, None].to(x.dtype)
            base = torch.cat([token, base[:, 1:]], 1)
        seen = ops.see(length, extra, suffix, prefix + suffix, self.heads, x, look=not self._traced)
        turns = self.language.turns[length[:, None] + number].flatten(0, 1)
        return Past(k, v, seen, turns, None if base is None else base.flatten(0, 1).contiguous())

    def step(self, step: Step, past: Past, x_t: Tensor) -> Tensor:
        """One Euler step, x_t [B, A, J] to the next."""
        stream = ops.enter(x_t, past.base, self.entry, step.entry, step.norms[0].scale, self.language.dtype)
        stream = run(self.blocks, step.norms, stream, past)
        return ops.leave(stream, self.out, step.norms[-1].bias, x_t, step.dt)

    def sample_actions(self, inputs: Inputs, num_steps: int) -> Tensor:
        """See `Pi0.sample_actions`."""
        past, x_t = self.prefill(self.prefix(inputs), inputs.length, inputs.state), inputs.noise
        first, *later = self.steps(num_steps)
        x_t = self.step(first, past, x_t)
        if self.config.state_in == "suffix" and x_t.device.type == "cpu":
            past = self.without_state(past, inputs.length)
        for step in later:
            x_t = self.step(step, past, x_t)
        return x_t

    def without_state(self, past: Past, length: Tensor) -> Past:
        """For steps after the first: the state's keys and values, which no action changes, are there already.

        Then all tokens see the same keys, and on a CPU no mask is added. On a GPU a row less saves nothing.
        """
        size, tokens = len(length), self.config.action_horizon
        extra = torch.full((tokens,), tokens, dtype=torch.int32)
        seen = ops.see(length + 1, extra, tokens, past.k.shape[2], self.heads, past.k)
        turns, base = (t.unflatten(0, (size, -1))[:, 1:].flatten(0, 1) for t in (past.turns, past.base))
        return past._replace(seen=seen, turns=turns, base=base)
