"""Linear maps with low-rank adapters (LoRA) in openpi's shapes, so that its checkpoints are carried as they are.

B batch, T tokens, N heads, H head dim, D width, R rank.

Heads have adapters of their own, except that the output projection sums the second factor over heads, as openpi's
does: its rank axis is already summed over heads when it is applied. Everything is in the dtype of the activations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from openpi_port.config import Lora
from openpi_port.pi_flax.layers import Linear


class LoraLinear(Linear):
    """`linear(x) + scaling * (x @ a) @ b`, with a [d_in, R] and b [R, d_out]."""

    def __init__(self, d_in: int, d_out: int, lora: Lora) -> None:
        super().__init__(d_in, d_out)
        self.scaling = lora.scaling
        self.lora_a = nnx.Param(jnp.zeros((d_in, lora.rank)))
        self.lora_b = nnx.Param(jnp.zeros((lora.rank, d_out)))

    def __call__(self, x: jax.Array) -> jax.Array:
        a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
        return super().__call__(x) + self.scaling * (x @ a @ b)


class LoraToHeads(Linear):
    """Into heads, each with its adapter: a [N, D, R], b [N, R, H]; from [B, T, D] to [B, T, (N H)]."""

    def __init__(self, width: int, num_heads: int, head_dim: int, lora: Lora) -> None:
        super().__init__(width, num_heads * head_dim)
        self.scaling = lora.scaling
        self.lora_a = nnx.Param(jnp.zeros((num_heads, width, lora.rank)))
        self.lora_b = nnx.Param(jnp.zeros((num_heads, lora.rank, head_dim)))

    def __call__(self, x: jax.Array) -> jax.Array:
        a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
        y = jnp.einsum("BTNR,NRH->BTNH", jnp.einsum("BTD,NDR->BTNR", x, a), b)
        return super().__call__(x) + self.scaling * rearrange(y, "B T N H -> B T (N H)")


class LoraFromHeads(Linear):
    """Out of heads: a [N, H, R], b [N, R, D], b summed over heads; from [B, T, (N H)] to [B, T, D]."""

    def __init__(self, num_heads: int, head_dim: int, width: int, lora: Lora) -> None:
        super().__init__(num_heads * head_dim, width)
        self.scaling = lora.scaling
        self.lora_a = nnx.Param(jnp.zeros((num_heads, head_dim, lora.rank)))
        self.lora_b = nnx.Param(jnp.zeros((num_heads, lora.rank, width)))

    def __call__(self, x: jax.Array) -> jax.Array:
        a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
        return super().__call__(x) + self.scaling * (x @ rearrange(a, "N H R -> (N H) R") @ b.sum(0))


def plain(d_in: int, d_out: int, lora: Lora | None) -> Linear:
    """A linear map, with an adapter where there is to be one."""
    return Linear(d_in, d_out) if lora is None else LoraLinear(d_in, d_out, lora)


def to_heads(width: int, num_heads: int, head_dim: int, lora: Lora | None) -> Linear:
    """A linear map into heads, likewise."""
    if lora is None:
        return Linear(width, num_heads * head_dim)
    return LoraToHeads(width, num_heads, head_dim, lora)


def from_heads(num_heads: int, head_dim: int, width: int, lora: Lora | None) -> Linear:
    """A linear map out of heads, likewise."""
    if lora is None:
        return Linear(num_heads * head_dim, width)
    return LoraFromHeads(num_heads, head_dim, width, lora)
