"""Folds a loaded model's weights into the prepared form; every line is exact algebra.

A norm's scale is a diagonal matrix, so it goes into the rows of the next weights (`(n * s) W = n (diag(s) W)`), and
its bias through them into theirs. The scale of the queries goes into their columns. Products that share their input
share one matrix. Everything is multiplied in float32 and rounded once, to the dtype that the model computes in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from openpi_port.errors import UserError
from openpi_port.pi_flax.fast.layers import Block, Layer
from openpi_port.pi_flax.gemma import Expert, Gemma
from openpi_port.pi_flax.layers import AdaRMSNorm, LayerNorm, Linear, RMSNorm
from openpi_port.pi_flax.lora import LoraFromHeads, LoraLinear, LoraToHeads
from openpi_port.pi_flax.siglip import Block as PlainBlock
from openpi_port.pi_flax.siglip import Siglip

Dtype = Any


class Vision(NamedTuple):
    """The vision transformer: patches are embedded in float32, as in the plain model."""

    patch: jax.Array  # float32 [3 p p, D]
    position: jax.Array  # float32 [T, D], the patches' bias included
    blocks: tuple[Block, ...]
    head: jax.Array  # [D, width of the language model]
    head_bias: jax.Array


class Language(NamedTuple):
    """The language model up to the last layer's keys and values."""

    embedding: jax.Array  # [V, D], the model's own array
    layers: tuple[Layer, ...]


def vision(siglip: Siglip, dtype: Dtype) -> Vision:
    """See `Vision`."""
    head, head_bias = _after_norm(siglip.norm, siglip.head)
    return Vision(
        f32(siglip.patch_embed.kernel),
        f32(siglip.pos_embedding) + f32(siglip.patch_embed.bias),
        _each(siglip.blocks, lambda b: _block(b, dtype), "vision"),
        head.astype(dtype),
        head_bias.astype(dtype),
    )


def experts(gemma: Gemma, index: int, dtype: Dtype) -> tuple[Layer, ...]:
    """The layers of expert number `index`."""
    _refuse_adapters(gemma)
    return _each(gemma.layers, lambda layer: _layer(layer.experts[index], dtype), f"expert {index}")


def scale_of(norm: RMSNorm) -> jax.Array:
    """float32 [D, 1], ready for the rows of the weights that follow."""
    return 1 + f32(norm.scale)[:, None]


def f32(x: nnx.Param) -> jax.Array:
    """A parameter in float32."""
    return x[...].astype(jnp.float32)


def _block(b: PlainBlock, dtype: Dtype) -> Block:
    heads = b.attn.num_heads
    scale = (b.attn.q.kernel.shape[1] // heads) ** -0.5
    (q, q_bias), (k, k_bias), (v, v_bias) = (_after_norm(b.norm_attn, x) for x in (b.attn.q, b.attn.k, b.attn.v))
    up, up_bias = _after_norm(b.norm_mlp, b.mlp.up)
    folded = Block(
        jnp.concatenate([q * scale, k, v], 1),
        jnp.concatenate([q_bias * scale, k_bias, v_bias]),
        f32(b.attn.o.kernel),
        f32(b.attn.o.bias),
        up,
        up_bias,
        f32(b.mlp.down.kernel),
        f32(b.mlp.down.bias),
    )
    return Block(*(x.astype(dtype) for x in folded))


def _layer(e: Expert, dtype: Dtype) -> Layer:
    attn, mlp = (1.0 if isinstance(n, AdaRMSNorm) else scale_of(n) for n in (e.norm_attn, e.norm_mlp))
    folded = Layer(
        attn * jnp.concatenate([f32(e.q.kernel) * e.head_dim**-0.5, f32(e.k.kernel), f32(e.v.kernel)], 1),
        f32(e.o.kernel),
        mlp * jnp.concatenate([f32(e.gate.kernel), f32(e.up.kernel)], 1),
        f32(e.down.kernel),
    )
    return Layer(*(x.astype(dtype) for x in folded))


def _after_norm(norm: LayerNorm, linear: Linear) -> tuple[jax.Array, jax.Array]:
    """The weights and bias of a linear map that is given the norm without its scale and bias."""
    kernel = f32(linear.kernel)
    return f32(norm.scale)[:, None] * kernel, f32(norm.bias) @ kernel + f32(linear.bias)


def _each(stacked: nnx.Module, fold: Callable[[nnx.Module], Any], what: str) -> tuple:
    """Folds layer by layer, so that no more than one lies there twice."""
    graph, state = nnx.split(stacked)
    depth = jax.tree.leaves(state)[0].shape[0]

    @jax.jit
    def one(state: nnx.State, index: jax.Array) -> Any:
        return fold(nnx.merge(graph, jax.tree.map(lambda x: x[index], state)))

    return tuple(one(state, i) for i in tqdm(range(depth), f"preparing {what}", leave=False, delay=2))


def _refuse_adapters(gemma: Gemma) -> None:
    if any(isinstance(m, LoraLinear | LoraToHeads | LoraFromHeads) for _, m in nnx.iter_graph(gemma)):
        raise UserError(
            "fast inference: the checkpoint has LoRA adapters beside its weights; load it with merge_lora=True"
        )
