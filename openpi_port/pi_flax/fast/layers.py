"""What the prepared layers compute: the plain ones' algebra on merged weights.

B batch, T queries, S keys, N heads, K kv heads, G = N / K, H head dim, D width, F width of the MLP.

Weights are one small tuple of arrays per layer, and layers are unrolled: a scan over stacked weights would copy every
layer's weights out of the stack before it reads them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh

from openpi_port.pi_flax.attention import MASKED
from openpi_port.pi_flax.fast import split


class Block(NamedTuple):
    """A layer of the vision transformer."""

    norm_attn: tuple[jax.Array, jax.Array]  # float32 scale and bias [D]
    qkv: jax.Array  # [D, 3D]
    qkv_bias: jax.Array
    o: jax.Array  # [D, D]
    o_bias: jax.Array
    norm_mlp: tuple[jax.Array, jax.Array]
    up: jax.Array  # [D, F]
    up_bias: jax.Array
    down: jax.Array  # [F, D]
    down_bias: jax.Array


class Modulation(NamedTuple):
    """What follows a normalisation, float32 [D] or [.., D]; of AdaRMS at one flow time also a shift and a gate."""

    scale: jax.Array  # 1 + scale
    shift: jax.Array | None = None
    gate: jax.Array | None = None


class Layer(NamedTuple):
    """One expert's weights in one layer; the norms are None where they depend on the flow time."""

    norm_attn: Modulation | None
    qkv: jax.Array  # [D, (N + 2K) H]
    o: jax.Array  # [N H, D]
    norm_mlp: Modulation | None
    gate_up: jax.Array  # [D, 2F]
    down: jax.Array  # [F, D]


class Rotation(NamedTuple):
    """Cosines and sines of the rotary embedding, float32 [B, T, 1, H / 2]; the same for all layers."""

    cos: jax.Array
    sin: jax.Array


class Keys(NamedTuple):
    """Rotated keys and values of one layer, [B, S, K, H]."""

    k: jax.Array
    v: jax.Array


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ w`. On a CPU by way of float32: XLA has bfloat16 kernels for that, and before JAX 0.11 for that alone."""

    def wide(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)

    return jax.lax.platform_dependent(x, w, cpu=wide, default=jnp.matmul)


def rotation(positions: jax.Array, head_dim: int, max_wavelength: float = 10_000.0) -> Rotation:
    """See `pi_flax.layers.rope`, whose angles these are."""
    half = head_dim // 2
    wavelength = max_wavelength ** (jnp.arange(half, dtype=jnp.float32) * (2.0 / head_dim))
    # Divided behind a barrier for the reason given there.
    wavelength = jax.lax.optimization_barrier(jnp.broadcast_to(wavelength, (*positions.shape, 1, half)))
    angle = positions[..., None, None].astype(jnp.float32) / wavelength
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotates x [B, T, N, H] in float32."""
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * by.cos - x2 * by.sin, x2 * by.cos + x1 * by.sin], axis=-1).astype(x.dtype)


def rms(x: jax.Array, by: Modulation) -> jax.Array:
    """RMS norm, constant or AdaRMS, in float32."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + 1e-6) * by.scale
    return (y if by.shift is None else y + by.shift).astype(x.dtype)


def add(x: jax.Array, y: jax.Array, by: Modulation) -> jax.Array:
    """The residual connection, gated by AdaRMS."""
    return x + y if by.gate is None else (x + y * by.gate).astype(x.dtype)


def layer_norm(x: jax.Array, by: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Layer norm with scale and bias, in float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
    return (normed * by[0] + by[1]).astype(x.dtype)


def attend(q: jax.Array, keys: Keys, seen: jax.Array | None, *, fused: bool = False) -> jax.Array:
    """Softmax attention with grouped queries.

    Args:
      q: [B, T, N, H].
      keys: [B, S, K, H] both.
      seen: int [B], how many keys are, counted from the front; or bool [B, 1 or T, S]; or None for all.
      fused: by cuDNN's kernel, which holds no logits, in place of two matrix products; not for a bool `seen`.

    Returns:
      [B, T, N H].
    """
    B, T, N, H = q.shape
    K = keys.k.shape[2]
    if fused:
        out = jax.nn.dot_product_attention(q, *keys, key_value_seq_lengths=seen, implementation="cudnn")
        return out.reshape(B, T, N * H)
    if seen is not None and seen.ndim == 1:
        seen = (jnp.arange(keys.k.shape[1]) < seen[:, None])[:, None]
    # Heads that share keys are rows of one product. Written as products of matrices in this order, since from an
    # einsum XLA makes transposed copies of the logits.
    rows = rearrange(q, "B T (K G) H -> B K (T G) H", K=K)
    k, v = (rearrange(x, "B S K H -> B K S H") for x in keys)
    logits = jnp.einsum("BKRH,BKSH->BKRS", rows, k, preferred_element_type=jnp.float32) * H**-0.5
    if seen is not None:
        by_token = logits.reshape(B, K, T, N // K, -1)
        logits = jnp.where(seen[:, None, :, None], by_token, MASKED).reshape(logits.shape)
    probs = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    return rearrange(product(probs, v), "B K (T G) H -> B T (K G H)", T=T)


def block(x: jax.Array, w: Block, heads: int, *, fused: bool, mesh: Mesh | None = None) -> jax.Array:
    """One layer of the vision transformer, x [B, T, D]; see `split` for `mesh`."""
    B, T, D = x.shape
    qkv = (product(layer_norm(x, w.norm_attn), w.qkv) + w.qkv_bias).reshape(B, T, 3 * heads, D // heads)
    q, keys = qkv[:, :, :heads], split.whole(qkv[:, :, heads:], mesh)
    x = x + (product(attend(q, Keys(*jnp.split(keys, 2, axis=2)), None, fused=fused), w.o) + w.o_bias)
    hidden = jax.nn.gelu(product(layer_norm(x, w.norm_mlp), w.up) + w.up_bias, approximate=True)
    return x + (product(hidden, w.down) + w.down_bias)


def qkv(
    x: jax.Array, w: jax.Array, heads: int, kv_heads: int, by: Rotation, mesh: Mesh | None = None
) -> tuple[jax.Array, Keys]:
    """Rotated queries [B, T, N, H] and the keys of a normed x [B, T, D]; `heads` may be 0; see `split` for `mesh`."""
    B, T, _ = x.shape
    y = product(x, w).reshape(B, T, heads + 2 * kv_heads, -1)
    q, k, v = jnp.split(y, [heads, heads + kv_heads], axis=2)
    if mesh is None:
        return rotate(q, by), Keys(rotate(k, by), v)
    keys = split.whole(jnp.concatenate([rotate(k, by), v], axis=2), mesh)  # in one exchange
    return rotate(q, by), Keys(*jnp.split(keys, 2, axis=2))


def mlp(x: jax.Array, w: Layer) -> jax.Array:
    """GeGLU."""
    gate, up = jnp.split(product(x, w.gate_up), 2, axis=-1)
    return product(jax.nn.gelu(gate, approximate=True) * up, w.down)
