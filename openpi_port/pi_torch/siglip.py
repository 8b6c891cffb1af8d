"""SigLIP's vision transformer, ending in a projection to the language width; no pooling.

B batch, T patches, D width, N heads, H head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from openpi_port.config import Compute
from openpi_port.config import Siglip as Config
from openpi_port.pi_torch.attention import attention
from openpi_port.pi_torch.fast import norms, products
from openpi_port.pi_torch.layers import LayerNorm, Linear, kept, remat, run, stack


class Attention(nn.Module):
    """Full self-attention with biases."""

    def __init__(self, config: Config, compute: Compute) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.backend = compute.attention
        self.q = Linear(config.width, config.width, bias=True)
        self.k = Linear(config.width, config.width, bias=True)
        self.v = Linear(config.width, config.width, bias=True)
        self.o = Linear(config.width, config.width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        made = products.several(x, (self.q, self.k, self.v))
        q, k, v = (rearrange(kept(y), "B T (N H) -> B T N H", N=self.num_heads) for y in made)
        return self.o(kept(attention(q * q.shape[-1] ** -0.5, k, v, None, self.backend)))


class Mlp(nn.Module):
    """Two layers with the tanh form of gelu between them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = Linear(config.width, config.mlp_dim, bias=True)
        self.down = Linear(config.mlp_dim, config.width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(kept(self.up(x)), approximate="tanh"))


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: Config, compute: Compute) -> None:
        super().__init__()
        self.compute = compute
        self.norm_attn = LayerNorm(config.width)
        self.attn = Attention(config, compute)
        self.norm_mlp = LayerNorm(config.width)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        return remat(self._forward, self.compute)(x)

    def _forward(self, x: Tensor) -> Tensor:
        x, y = self._forked(self.norm_attn, x)
        x, y = self._forked(self.norm_mlp, x, self.attn(y))
        return x + self.mlp(y)

    def _forked(self, norm: LayerNorm, x: Tensor, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + more, which goes around what follows, and normed."""
        if self.training and norms.usable(x):
            return norms.fork(x, norm.scale, norm.bias, more)
        x = x if more is None else kept(x + more)
        return x, norm(x)


class Siglip(nn.Module):
    """Images in [-1, 1] to tokens of the language model."""

    def __init__(self, config: Config, d_out: int, compute: Compute) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.compute = compute
        self.patch_embed = Linear(3 * config.patch_size**2, config.width, bias=True)
        self.pos_embedding = nn.Parameter(torch.zeros(config.num_tokens, config.width))
        self.blocks = stack(Block(config, compute), config.depth)
        self.norm = LayerNorm(config.width)
        self.head = Linear(config.width, d_out, bias=True)

    def embed(self, images: Tensor) -> Tensor:
        """Patches of float32 images [B, H, W, 3] with their positions, [B, T, W] in the working dtype."""
        p = self.patch_size
        patches = rearrange(images, "B (h p) (w q) c -> B (h w) (p q c)", p=p, q=p)
        x = self.patch_embed(patches) + self.pos_embedding  # in float32, as the reference
        return x.to(getattr(torch, self.compute.dtype))

    def forward(self, images: Tensor) -> Tensor:
        """Takes float32 images [B, H, W, 3]; returns tokens [B, T, D] in the working dtype."""
        x = self.embed(images)

        x, _ = run(lambda x, block: (block(x), None), x, self.blocks, self.compute)
        return self.head(self.norm(x))
