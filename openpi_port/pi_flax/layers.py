"""Linear maps, norms and rotary embedding.

B batch, T tokens, N heads, H head dim, D width, C width of the condition.

Parameters stay in the dtype they were loaded in (float32 while training) and are cast to the dtype of the
activations where they are used; norms and softmax are computed in float32. Modules are built with zeros and always
filled from a checkpoint or from `openpi_port.init`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from openpi_port.config import Compute
from openpi_port.pi_flax.fast.apart import apart, is_apart, joined
from openpi_port.pi_flax.fast.backward import layer_norm

KEPT = "product"


class Linear(nnx.Module):
    """`x @ kernel + bias` in the dtype of `x`."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False) -> None:
        self.kernel = nnx.Param(jnp.zeros((d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros(d_out)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalises to mean 0 and variance 1, then scales and shifts."""

    def __init__(self, dim: int) -> None:
        self.scale = nnx.Param(jnp.zeros(dim))
        self.bias = nnx.Param(jnp.zeros(dim))

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.scale[...], self.bias[...])


class RMSNorm(nnx.Module):
    """Gemma's norm: a scale around 1. The condition is not used and there is no gate."""

    def __init__(self, dim: int) -> None:
        self.scale = nnx.Param(jnp.zeros(dim))

    def __call__(self, x: jax.Array, cond: jax.Array | None) -> tuple[jax.Array, None]:
        return (rms_normalize(x) * (1 + self.scale[...].astype(jnp.float32))).astype(x.dtype), None


class AdaRMSNorm(nnx.Module):
    """pi0.5's norm: scale, shift and the gate of the residual are linear in a condition (DiT's adaLN)."""

    def __init__(self, dim: int) -> None:
        self.modulation = Linear(dim, 3 * dim, bias=True)

    def __call__(self, x: jax.Array, cond: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Takes x [B, T, D] and cond [B, D] or [B, T, D]; returns the normed x and a gate that broadcasts to it."""
        modulation = self.modulation(cond.astype(x.dtype))
        scale, shift, gate = jnp.split(modulation[:, None] if cond.ndim == 2 else modulation, 3, axis=-1)
        return (rms_normalize(x) * (1 + scale) + shift).astype(x.dtype), gate


def rms_normalize(x: jax.Array) -> jax.Array:
    """Divides by the root mean square over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + 1e-6)


def add_gated(x: jax.Array, y: jax.Array, gate: jax.Array | None) -> jax.Array:
    """The residual connection, `x + y` or `x + y * gate`."""
    return x + y if gate is None else x + y * gate


class Angles(NamedTuple):
    """Sine and cosine of the rotary angles, float32 [B, T, 1, H/2]: computed once for all layers."""

    sin: jax.Array
    cos: jax.Array

    def of(self, start: int, stop: int) -> Angles:
        """Those of the tokens from `start` up to `stop`."""
        return Angles(self.sin[:, start:stop], self.cos[:, start:stop])


def angles(positions: jax.Array, dim: int, max_wavelength: float = 10_000.0) -> Angles:
    """Rotary angles.

    Args:
      positions: int [B, T].
      dim: H, of the heads.
      max_wavelength: of the slowest pair.
    """
    half = dim // 2
    wavelength = max_wavelength ** (jnp.arange(half, dtype=jnp.float32) * (2.0 / dim))
    # Divided behind a barrier, since XLA would make a product with the rounded inverse of what is broadcast: at
    # position 800 that moves logits by 7e-4, away from torch and from openpi.
    wavelength = jax.lax.optimization_barrier(jnp.broadcast_to(wavelength, (*positions.shape, 1, half)))
    angle = positions[..., None, None].astype(jnp.float32) / wavelength  # [B, T, 1, H/2]
    return Angles(jnp.sin(angle), jnp.cos(angle))


def rope(x: jax.Array, where: Angles) -> jax.Array:
    """Rotary position embedding; channel i is paired with channel i + H/2, not with its neighbour.

    Args:
      x: [B, T, N, H].
      where: the angles of the tokens.

    Returns:
      [B, T, N, H], rotated in float32 and cast back.
    """
    sin, cos = where
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def kept(x: jax.Array) -> jax.Array:
    """Marks what took a matrix product to compute, for `remat`."""
    return checkpoint_name(x, KEPT)


def remat(function: Callable, compute: Compute) -> Callable:
    """What of `function` is computed again in the backward pass, see `Compute.remat`."""
    if compute.remat == "none":
        return function
    policy = _keeps if compute.remat == "dots" else None
    return jax.checkpoint(function, policy=policy, prevent_cse=compute.compile == "unrolled")


def run(body: Callable, x: Any, layers: Any, compute: Compute) -> tuple[Any, Any]:
    """`jax.lax.scan` of a layer over stacked weights and whatever else is stacked, see `Compute.compile`."""
    body = remat(body, compute)
    if compute.compile != "unrolled":
        return jax.lax.scan(body, x, joined(layers))
    leaves, structure = jax.tree.flatten(layers, is_leaf=is_apart)
    outs = []
    for layer in zip(*map(apart, leaves), strict=True):
        x, out = body(x, structure.unflatten(layer))
        outs.append(out)
    return x, jax.tree.map(lambda *parts: jnp.stack(parts), *outs)


def _keeps(primitive: Any, *args: Any, **params: Any) -> bool:
    """Products that are marked, and what cuDNN's attention gives."""
    marked = jax.checkpoint_policies.save_only_these_names(KEPT)
    return "dot_product_attention" in primitive.name or marked(primitive, *args, **params)


def lowered(weights: nnx.State, compute: Compute) -> nnx.State:
    """Layers' weights as they use them, cast once: all but those of the norms, which compute in float32."""

    def cast(path: tuple, leaf: jax.Array) -> jax.Array:
        name = "/".join(str(getattr(part, "key", "")) for part in path)
        return leaf if re.search(r"\bnorm[^/]*/(scale|bias)\b|\b\d+/scale\b", name) else leaf.astype(compute.dtype)

    return jax.tree_util.tree_map_with_path(cast, weights)


def stack(layer: nnx.Module, depth: int) -> nnx.Module:
    """`depth` copies of a layer as one module whose parameters carry a leading axis L, for `jax.lax.scan`."""
    graph, state = nnx.split(layer)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.broadcast_to(x, (depth, *x.shape)), state))
