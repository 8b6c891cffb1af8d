"""Devices that hold copies of the state: each computes its samples' gradients, which are then added up at once.

Left to itself XLA adds up every gradient as soon as it is there: a hundred sums in the middle of the backward pass, for
which devices wait for each other, and which take from the products beside them. One sum at the end takes less time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec


def add_up(gradients: Callable[..., Any], mesh: Mesh, dtype: str) -> Callable[..., Any]:
    """Sums over devices of what each computes from its part of a batch.

    Args:
      gradients: (trained, frozen, batch, anything) -> a tree of arrays; it is called with one device's samples.
      mesh: of devices that each hold everything but the batch.
      dtype: that bfloat16 gradients are added up in.

    Returns:
      The same function, of the whole batch.
    """
    axes, whole = mesh.axis_names, PartitionSpec()

    def on_each(*given: Any) -> Any:
        found = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.bfloat16 else x, gradients(*given))
        # Behind a barrier, so that no sum begins before the last gradient is there.
        return jax.lax.psum(jax.lax.optimization_barrier(found), axes)

    parts = (whole, whole, PartitionSpec(axes), whole)
    return jax.shard_map(on_each, mesh=mesh, in_specs=parts, out_specs=whole, check_vma=False)
