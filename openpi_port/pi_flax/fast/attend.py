"""Attention of training on NVIDIA GPUs: cuDNN's forward pass, and a backward pass of products.

B batch, T queries, S keys, N heads, H head dim, R = T N rows; all heads share one head of keys and values.

cuDNN's backward pass with heads of 256 reaches a quarter of what an H100 can. Because the heads share keys, all queries
of a sample are the rows of one matrix, and cuBLAS computes the five products in less time, though logits and their
gradients then go through memory.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from openpi_port.pi_flax.layers import kept

try:
    # What JAX offers in public rounds the logarithms of the softmax's sums to bfloat16, which makes probabilities 3 %
    # wrong at sums of e^8; and to sum again would be a pass over all logits.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType
    from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention as cudnn
except ImportError:  # of another JAX: cuDNN's own backward pass then, by its public name (docs/performance.md)
    MaskType = cudnn = None

FEWEST = 256  # channels of a head from which on this is faster than cuDNN's own backward pass


def usable(q: jax.Array, k: jax.Array) -> bool:
    """Whether this JAX has what `attention` needs, and it takes q [B, T, N, H], k [B, S, K, H] faster than cuDNN."""
    return cudnn is not None and k.shape[2] == 1 and q.shape[3] >= FEWEST


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, scale: float) -> jax.Array:
    """Attends to the first keys of each sample.

    Args:
      q: [B, T, N, H].
      k, v: [B, S, 1, H].
      lengths: how many keys are seen, int32 [B].
      scale: of the logits.

    Returns:
      [B, T, N, H].
    """
    return _forward(q, k, v, lengths, scale)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, scale: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    every = jnp.full(len(q), q.shape[1], jnp.int32)
    how = {"scale": scale, "mask_type": MaskType.PADDING, "return_residual": True}
    out, sums = map(kept, cudnn(q, k, v, q_seqlen=every, kv_seqlen=lengths, **how))  # sums: logarithms, [B, N, T]
    return out, (q, k, v, lengths, out, sums)


def _backward(scale: float, saved: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, lengths, out, sums = saved
    return *gradients(q, k, v, lengths, out, sums, gradient, scale), None


attention.defvjp(_forward, _backward)


def gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    out: jax.Array,
    sums: jax.Array,
    gradient: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of queries, keys and values, from the output, its gradient and the logarithms of the softmax's sums [B, N, T]."""
    rows, of_rows = (x.reshape(len(x), -1, x.shape[-1]) for x in (q, gradient))  # [B, R, H]
    keys, values = k[:, :, 0], v[:, :, 0]
    along = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).reshape(len(q), -1, 1)
    logits = jnp.einsum("BRH,BSH->BRS", rows, keys, preferred_element_type=jnp.float32) * scale
    seen = jnp.arange(k.shape[1]) < lengths[:, None, None]
    probs = jnp.where(seen, jnp.exp(logits - sums.swapaxes(1, 2).reshape(along.shape)), 0)
    of_probs = jnp.einsum("BRH,BSH->BRS", of_rows, values)
    of_logits = probs * (of_probs - along) * scale
    probs, of_logits = probs.astype(q.dtype), of_logits.astype(q.dtype)
    of_q = jnp.einsum("BRS,BSH->BRH", of_logits, keys).reshape(q.shape)
    of_k = jnp.einsum("BRS,BRH->BSH", of_logits, rows)[:, :, None]
    return of_q, of_k, jnp.einsum("BRS,BRH->BSH", probs, of_rows)[:, :, None]
