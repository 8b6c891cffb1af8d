"""Softmax attention with grouped queries, by one of several backends that all compute the same.

B batch, T queries, S keys, N heads, K kv heads, G = N / K, H head dim.

- "plain": einsum; the logits exist in float32. The reference, and the only one for float32.
- "cudnn": cuDNN's fused kernels, on NVIDIA GPUs, in bfloat16. Where all queries see the same keys the valid keys are
  brought to the front and counted; other masks become a bias, but where few queries have one, attention is plain.
- "splash": the Pallas kernel for TPUs (interpreted on a CPU), where heads share keys and all queries see the same ones:
  invalid keys form a segment of their own. Passes with another mask (the 51 queries of pi0's suffix) are plain, and so
  is vision: a head of 72 would fill half of a tile.

"auto" is resolved once per device by `resolve`. The output at a padding query is nobody's: backends differ there.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import AxisType, PartitionSpec

from openpi_port.config import Compute
from openpi_port.errors import UserError
from openpi_port.masks import UNSEEN, Blocks, dense
from openpi_port.pi_flax.fast import attend
from openpi_port.pi_flax.layers import KEPT

MASKED = -2.3819763e38  # big_vision's value for a forbidden logit; a fully masked row becomes uniform
BACKENDS = ("plain", "cudnn", "splash")
FEW = 64  # queries with a mask of their own (pi0's suffix) for which plain attention is faster than cuDNN with a bias
TILE = 128  # of the splash kernel, along queries, keys and head dim
LONGEST = 1024  # tokens that the splash kernel takes at a time; in tiles its thousand steps take longer than the work


class _Front(NamedTuple):
    """For "cudnn": an order that brings the valid keys to the front, int32 [B, S], and how many they are, int32 [B]."""

    order: jax.Array
    length: jax.Array


def resolve(compute: Compute, device: jax.Device) -> Compute:
    """Settles "auto": "cudnn" for bfloat16 on an NVIDIA GPU of compute capability 8.0 or more, else "plain".

    Raises:
      UserError: a backend that JAX, the device or the dtype can't honour.
    """
    fused = device.platform == "gpu" and float(getattr(device, "compute_capability", 0)) >= 8.0
    name = compute.attention
    if name == "auto":
        name = "cudnn" if fused and compute.dtype == "bfloat16" else "plain"
    if name not in BACKENDS:
        raise UserError(f"config.compute.attention={name!r}: Flax has auto, {', '.join(BACKENDS)}")
    if name == "cudnn" and not (fused and compute.dtype == "bfloat16"):
        raise UserError(
            f"config.compute.attention='cudnn' needs an NVIDIA GPU (Ampere or newer) and compute.dtype='bfloat16', not "
            f"{device.device_kind} and {compute.dtype!r}; use 'plain' or 'auto'"
        )
    if name == "splash" and device.platform == "gpu":
        raise UserError("config.compute.attention='splash' is for TPUs; use 'cudnn', 'plain' or 'auto'")
    return dataclasses.replace(compute, attention=name)


def prepare(mask: jax.Array | Blocks, backend: str) -> Any:
    """What a backend needs of a mask, made once for all layers; `attention` takes it."""
    alike = isinstance(mask, Blocks) and mask.queries is None
    if backend == "splash" and alike:
        return mask
    if backend == "cudnn" and alike:
        unseen = mask.keys >= UNSEEN
        order = jnp.argsort(unseen, axis=1, stable=True)
        return _Front(order.astype(jnp.int32), (~unseen).sum(1, dtype=jnp.int32))
    mask = dense(mask) if isinstance(mask, Blocks) else mask
    return mask if backend != "cudnn" else mask | ~mask.any(-1, keepdims=True)  # no row without a key


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Any, backend: str = "plain", scale: float = 1.0
) -> jax.Array:
    """Attends; queries come scaled, or `scale` is given, which cuDNN applies in its kernel.

    Args:
      q: [B, T, N, H].
      k, v: [B, S, K, H]; query head n reads kv head n // G.
      mask: bool [B, T, S] or [B, 1, S], or what `prepare` made of a mask, or None for full attention.
      backend: "plain", "cudnn" or "splash".

    Returns:
      [B, T, N * H].
    """
    if backend == "cudnn" and not (isinstance(mask, jax.Array) and q.shape[1] <= FEW):
        return _cudnn(q, k, v, mask, scale)
    q = q if scale == 1 else q * scale
    if backend == "splash" and isinstance(mask, Blocks):
        return _splash(q, k, v, mask)
    if backend == "cudnn" and k.shape[1] % 8:  # cuBLAS wants it so, and XLA would pad every product by itself
        k, v = (_padded(x, -k.shape[1] % 8) for x in (k, v))
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, k.shape[1] - mask.shape[2])))
    return _plain(q, k, v, mask)


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    if k.shape[2] == 1 < q.shape[2] and (mask is None or mask.shape[1] == 1):
        # Heads that share keys, and what is seen of them, are rows of one product. XLA for TPUs otherwise lays out the
        # logits anew, which is half of the forward pass's traffic.
        rows = _plain(rearrange(q, "B T N H -> B (T N) 1 H"), k, v, mask)
        return rearrange(rows, "B (T N) H -> B T (N H)", N=q.shape[2])
    q = rearrange(q, "B T (K G) H -> B T K G H", K=k.shape[2])
    logits = _logits(q, k)
    if mask is not None:
        logits = jnp.where(mask[:, None, :, None], logits, MASKED)
    probs = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return rearrange(jnp.einsum("BKTGS,BSKH->BTKGH", probs, v), "B T K G H -> B T (K G H)")


@jax.custom_vjp
def _logits(q: jax.Array, k: jax.Array) -> jax.Array:
    """float32 [B, K, T, G, S] of q [B, T, K, G, H] and k [B, S, K, H].

    Their gradient goes into products in the dtype of q and k, as in fused kernels, not in float32.
    """
    return jnp.einsum("BTKGH,BSKH->BKTGS", q, k, preferred_element_type=jnp.float32)


def _logits_backward(operands: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    q, k = operands
    gradient = gradient.astype(q.dtype)
    return jnp.einsum("BKTGS,BSKH->BTKGH", gradient, k), jnp.einsum("BKTGS,BTKGH->BSKH", gradient, q)


_logits.defvjp(lambda q, k: (_logits(q, k), (q, k)), _logits_backward)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | _Front | None, scale: float) -> jax.Array:
    (size, length), keys = q.shape[:2], k.shape[1]
    if mask is None and (length % 2 or keys % 2):
        mask = _Front(jnp.broadcast_to(jnp.arange(keys), (size, keys)), jnp.full(size, keys, jnp.int32))
    if isinstance(mask, _Front):
        k, v = (_bring(x, mask.order) for x in (k, v))
    products = isinstance(mask, _Front) and attend.usable(q, k)
    q, *kv = (_padded(x, -x.shape[1] % (8 if products else 2)) for x in (q, k, v))  # the kernels want even lengths
    fused = partial(jax.nn.dot_product_attention, q, *kv, scale=scale, implementation="cudnn")
    if products:
        out = attend.attention(q, *kv, mask.length, scale)
    elif mask is None:
        out = fused()
    elif isinstance(mask, _Front):
        out = fused(key_value_seq_lengths=mask.length)
    else:
        mask = jnp.broadcast_to(mask, (size, length, keys))
        out = fused(mask=jnp.pad(mask, ((0, 0), (0, length % 2), (0, keys % 2)))[:, None])
    return rearrange(out[:, :length], "B T N H -> B T (N H)")


@jax.custom_vjp
def _bring(x: jax.Array, order: jax.Array) -> jax.Array:
    """x [B, S, K, H] with its tokens in another order, int [B, S]; the gradient is a gather too, not a scatter."""
    return jnp.take_along_axis(x, order[:, :, None, None], axis=1, mode="promise_in_bounds")


def _bring_forward(x: jax.Array, order: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _bring(x, order), order


def _bring_backward(order: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    return _bring(gradient, jnp.argsort(order, axis=1)), None


_bring.defvjp(_bring_forward, _bring_backward)


def _padded(x: jax.Array, tokens: int, dims: int = 0) -> jax.Array:
    """x [B, S, N, H] with zeros added to S and H."""
    return jnp.pad(x, ((0, 0), (0, tokens), (0, 0), (0, dims)))


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: Blocks) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    split = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto)
    call = _splash_kernel
    if split:  # XLA splits no kernel among devices: each takes its own samples
        call = jax.shard_map(call, in_specs=PartitionSpec(split), out_specs=PartitionSpec(split), check_vma=False)
    return call(q, k, v, (mask.keys < UNSEEN).astype(jnp.int32))


def _splash_kernel(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    # Imported here, since it takes long.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks

    (size, length, heads, dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    blocks = [min(-(-n // TILE) * TILE, LONGEST) for n in (length, keys)]
    more = [-n % block for n, block in zip((length, keys), blocks, strict=True)]
    q, k, v = (_padded(x, n, -dim % TILE) for x, n in zip((q, k, v), (more[0], more[1], more[1]), strict=True))
    q, k, v = (rearrange(x, "B S N H -> B N S H") for x in (q, k, v))
    ones = jnp.ones((size, q.shape[2]), jnp.int32)
    segments = splash.SegmentIds(q=ones, kv=jnp.pad(seen, ((0, 0), (0, more[1]))))

    full = splash_masks.FullMask((q.shape[2], k.shape[2]))
    of_queries, of_keys = blocks
    kernel = splash.make_splash_mqa(
        splash_masks.MultiHeadMask([full] * (heads // kv_heads)),
        block_sizes=splash.BlockSizes(*(of_queries, of_keys, of_keys) * 2, of_queries, of_keys),
        head_shards=1, q_seq_shards=1, residual_checkpoint_name=KEPT, interpret=jax.default_backend() == "cpu",
    )  # fmt: skip
    q = rearrange(q, "B (K G) T H -> B K G T H", K=kv_heads)
    per_head = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    out = jax.vmap(per_head)(q, k, v, segments)
    return rearrange(out[:, :, :, :length, :dim], "B K G T H -> B T (K G H)")
