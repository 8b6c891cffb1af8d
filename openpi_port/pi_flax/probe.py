"""Small programs to be timed: what the device can do, and one operation of the models alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from openpi_port.config import Compute, Dtype
from openpi_port.masks import blocks
from openpi_port.pi_flax import attention as attentions


def copy_rate(device: jax.Device, size: int) -> float:
    """Bytes per second, read and written, of passing over an array of `size` bytes."""
    x = jax.device_put(np.ones(size // 4, np.float32), device)
    return 2 * size / _seconds(jax.jit(lambda x: x + 1), x)


def product_rate(device: jax.Device, dtype: Dtype, size: int) -> float:
    """Operations per second of a product of two `size` x `size` matrices of random numbers."""
    x = jax.device_put(np.random.default_rng(0).standard_normal((size, size), np.float32), device).astype(dtype)
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        return 2 * size**3 / _seconds(jax.jit(lambda a, b: a @ b), x, x)


def attention(
    device: jax.Device,
    compute: Compute,
    size: int,
    queries: int,
    keys: int,
    heads: tuple[int, int, int],
    *,
    masked: bool,
    backward: bool,
) -> Callable[[], None]:
    """One attention of random numbers, as a call that waits for its end.

    Args:
      device: where.
      compute: dtype and backend.
      size: B.
      queries: T.
      keys: S.
      heads: N, K, H.
      masked: the last eighth of the keys is not seen.
      backward: with the gradients of queries, keys and values.

    Raises:
      UserError: the device doesn't have the backend.
    """
    compute = attentions.resolve(compute, device)
    rng = np.random.default_rng(0)
    shapes = [(size, queries, heads[0], heads[2]), *[(size, keys, heads[1], heads[2])] * 2]
    arrays = [jax.device_put(rng.standard_normal(s, np.float32), device).astype(compute.dtype) for s in shapes]
    valid = jnp.broadcast_to(jnp.arange(keys) < keys - keys // 8, (size, keys))
    structure = blocks(valid, None)
    if queries != keys:  # a suffix, which has blocks of its own
        structure = structure._replace(queries=jnp.zeros((size, queries), jnp.int32))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        mask = attentions.prepare(structure, compute.attention) if masked else None
        return attentions.attention(q * heads[2] ** -0.5, k, v, mask, compute.attention)

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v).astype(jnp.float32).sum()

    program = jax.jit(jax.grad(total, argnums=(0, 1, 2)) if backward else attend)
    return lambda: jax.block_until_ready(program(*arrays))


def _seconds(program: Callable[..., Any], *args: jax.Array, calls: int = 10) -> float:
    """Of one call, the median of three times ten in a row."""
    jax.block_until_ready(program(*args))
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(calls):
            last = program(*args)  # alone kept: ten results would be the most memory that a small run takes
        jax.block_until_ready(last)
        times.append((time.perf_counter() - begin) / calls)
    return float(np.median(times))
