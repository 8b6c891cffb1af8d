"""SigLIP's vision transformer, ending in a projection to the language width; no pooling.

B batch, T patches, D width, N heads, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from openpi_port.config import Compute
from openpi_port.config import Siglip as Config
from openpi_port.pi_flax.attention import attention
from openpi_port.pi_flax.fast.backward import add_to_each, finished, gelu
from openpi_port.pi_flax.layers import LayerNorm, Linear, kept, lowered, run, stack


class Attention(nnx.Module):
    """Full self-attention with biases."""

    def __init__(self, config: Config, compute: Compute) -> None:
        self.num_heads = config.num_heads
        self.backend = compute.attention
        self.q = Linear(config.width, config.width, bias=True)
        self.k = Linear(config.width, config.width, bias=True)
        self.v = Linear(config.width, config.width, bias=True)
        self.o = Linear(config.width, config.width, bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (rearrange(kept(f(x)), "B T (N H) -> B T N H", N=self.num_heads) for f in (self.q, self.k, self.v))
        return self.o(kept(attention(q, k, v, None, self.backend, scale=q.shape[-1] ** -0.5)))


class Mlp(nnx.Module):
    """Two layers with the tanh form of gelu between them."""

    def __init__(self, config: Config) -> None:
        self.up = Linear(config.width, config.mlp_dim, bias=True)
        self.down = Linear(config.mlp_dim, config.width, bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(gelu(kept(finished(self.up(x)))))


class Block(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: Config, compute: Compute) -> None:
        self.norm_attn = LayerNorm(config.width)
        self.attn = Attention(config, compute)
        self.norm_mlp = LayerNorm(config.width)
        self.mlp = Mlp(config)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = kept(x + self.attn(self.norm_attn(x)))
        return x + self.mlp(self.norm_mlp(x))


class Siglip(nnx.Module):
    """Images in [-1, 1] to tokens of the language model."""

    def __init__(self, config: Config, d_out: int, compute: Compute) -> None:
        self.patch_size = config.patch_size
        self.compute = compute
        self.patch_embed = Linear(3 * config.patch_size**2, config.width, bias=True)
        self.pos_embedding = nnx.Param(jnp.zeros((config.num_tokens, config.width)))
        self.blocks = stack(Block(config, compute), config.depth)
        self.norm = LayerNorm(config.width)
        self.head = Linear(config.width, d_out, bias=True)

    def embed(self, images: jax.Array) -> jax.Array:
        """Patches of float32 images [B, H, W, 3] with their positions, [B, T, W] in the working dtype."""
        p = self.patch_size
        patches = rearrange(images, "B (h p) (w q) c -> B (h w) (p q c)", p=p, q=p)
        x = add_to_each(self.patch_embed(patches), self.pos_embedding[...])  # in float32, as the reference
        return x.astype(self.compute.dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Takes float32 images [B, H, W, 3]; returns tokens [B, T, D] in the working dtype."""
        x = self.embed(images)

        graph, layers = nnx.split(self.blocks)

        def body(x: jax.Array, layer: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(graph, layer)(x), None

        x, _ = run(body, x, lowered(layers, self.compute), self.compute)
        return self.head(self.norm(x))
