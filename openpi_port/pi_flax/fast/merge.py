"""A loaded model's weights, laid out for the prepared path: products that share their input share one matrix.

The weights themselves are the plain model's, to the bit. A norm's scale could be multiplied into the next weights, but
rounding those a second time made bfloat16 less exact (see docs/performance.md) and saves nothing: it is one factor in a
kernel that runs anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from openpi_port.errors import UserError
from openpi_port.pi_flax.fast.layers import Block, Layer, Modulation
from openpi_port.pi_flax.gemma import Expert, Gemma
from openpi_port.pi_flax.layers import AdaRMSNorm, LayerNorm, RMSNorm
from openpi_port.pi_flax.lora import LoraFromHeads, LoraLinear, LoraToHeads
from openpi_port.pi_flax.siglip import Block as PlainBlock
from openpi_port.pi_flax.siglip import Siglip

Dtype = Any


class Vision(NamedTuple):
    """The vision transformer: patches are embedded in float32, as in the plain model."""

    patch: jax.Array  # float32 [3 p p, D]
    position: jax.Array  # float32 [T, D], the patches' bias included
    blocks: tuple[Block, ...]
    norm: tuple[jax.Array, jax.Array]
    head: jax.Array  # [D, width of the language model]
    head_bias: jax.Array


def vision(siglip: Siglip, dtype: Dtype) -> Vision:
    """See `Vision`."""
    return Vision(
        f32(siglip.patch_embed.kernel),
        f32(siglip.pos_embedding) + f32(siglip.patch_embed.bias),
        _each(siglip.blocks, lambda b: _block(b, dtype), "vision"),
        _layer_norm(siglip.norm),
        siglip.head.kernel[...].astype(dtype),
        siglip.head.bias[...].astype(dtype),
    )


def experts(gemma: Gemma, index: int, dtype: Dtype) -> tuple[Layer, ...]:
    """The layers of expert number `index`.

    Raises:
      UserError: it has LoRA adapters.
    """
    if any(isinstance(m, LoraLinear | LoraToHeads | LoraFromHeads) for _, m in nnx.iter_graph(gemma)):
        raise UserError("fast inference: the weights have LoRA adapters beside them; load them with merge_lora=True")
    return _each(gemma.layers, lambda layer: _layer(layer.experts[index], dtype), f"expert {index}")


def norm(plain: RMSNorm | AdaRMSNorm) -> Modulation | None:
    """Of a norm that doesn't depend on the flow time; else None."""
    return None if isinstance(plain, AdaRMSNorm) else Modulation(1 + f32(plain.scale))


def f32(x: nnx.Param) -> jax.Array:
    """A parameter in float32."""
    return x[...].astype(jnp.float32)


def _layer_norm(plain: LayerNorm) -> tuple[jax.Array, jax.Array]:
    return f32(plain.scale), f32(plain.bias)


def _block(b: PlainBlock, dtype: Dtype) -> Block:
    attn, mlp = b.attn, b.mlp
    cast = lambda *params: jnp.concatenate([p[...].astype(dtype) for p in params], -1)  # noqa: E731
    return Block(
        _layer_norm(b.norm_attn),
        cast(attn.q.kernel, attn.k.kernel, attn.v.kernel),
        cast(attn.q.bias, attn.k.bias, attn.v.bias),
        cast(attn.o.kernel),
        cast(attn.o.bias),
        _layer_norm(b.norm_mlp),
        cast(mlp.up.kernel),
        cast(mlp.up.bias),
        cast(mlp.down.kernel),
        cast(mlp.down.bias),
    )


def _layer(e: Expert, dtype: Dtype) -> Layer:
    cast = lambda *maps: jnp.concatenate([m.kernel[...].astype(dtype) for m in maps], -1)  # noqa: E731
    qkv, gate_up = cast(e.q, e.k, e.v), cast(e.gate, e.up)
    return Layer(norm(e.norm_attn), qkv, cast(e.o), norm(e.norm_mlp), gate_up, cast(e.down))


def _each(stacked: nnx.Module, lay_out: Callable[[nnx.Module], Any], what: str) -> tuple:
    """Lays out layer by layer, so that no more than one lies there twice."""
    graph, state = nnx.split(stacked)
    depth = jax.tree.leaves(state)[0].shape[0]

    @jax.jit
    def one(state: nnx.State, index: jax.Array) -> Any:
        return lay_out(nnx.merge(graph, jax.tree.map(lambda x: x[index], state)))

    return tuple(one(state, i) for i in tqdm(range(depth), f"preparing {what}", leave=False, delay=2))
