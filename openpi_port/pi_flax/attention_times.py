"""How long attention takes, for `experiments.bench --only=attention`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from openpi_port.config import Compute
from openpi_port.masks import Blocks
from openpi_port.pi_flax import attention as attentions


def measure(
    shape: tuple[int, int, int, int, int, int], mask: Blocks | None, compute: Compute, repeat: int
) -> tuple[float, float]:
    """Median seconds forward, and forward and backward, on random numbers.

    Args:
      shape: B, T, S, N, K, H.
      mask: numpy, or None.
      compute: backend and dtype.
      repeat: timed calls.
    """
    size, queries, keys, heads, kv_heads, dim = shape
    if mask is not None:
        mask = attentions.prepare(jax.tree.map(jnp.asarray, mask), compute.attention)
    rng = np.random.default_rng(0)
    shapes = ((size, queries, heads, dim), (size, keys, kv_heads, dim), (size, keys, kv_heads, dim))
    *inputs, gradient = (
        jnp.asarray(rng.standard_normal(s, np.float32), compute.dtype) for s in (*shapes, (size, queries, heads * dim))
    )

    @jax.jit
    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attentions.attention(q, k, v, mask, compute.attention)

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> Any:
        return jax.vjp(forward, q, k, v)[1](gradient)

    return _median(lambda: forward(*inputs), repeat), _median(lambda: both(*inputs, gradient), repeat)


def _median(call: Callable[[], Any], repeat: int) -> float:
    times = []
    for _ in range(repeat + 2):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return float(np.median(times[2:]))  # the first two compile and choose
