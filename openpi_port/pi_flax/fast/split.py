"""Rows over the cores of a CPU, for models whose operations take microseconds: XLA gives those one core each.

Where JAX has a device per core (JAX_NUM_CPU_DEVICES=2, which `--fast` sets), each computes its part of the tokens, and
what all tokens look at, keys and values, is exchanged once per layer.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MOST = 2**30  # bytes: every device has all weights, and larger models' operations are split by XLA


def mesh(device: jax.Device, weights: Any) -> Mesh | None:
    """The devices that share the work of a model with these weights on this one; None where it does all."""
    devices = jax.local_devices(backend=device.platform)
    if device.platform != "cpu" or len(devices) == 1 or sum(x.nbytes for x in jax.tree.leaves(weights)) > MOST:
        return None
    return Mesh(devices, "rows")


def spare(rows: int, mesh: Mesh | None) -> int:
    """How many rows are missing to as many on each device."""
    return 0 if mesh is None else -rows % mesh.size


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays with a copy on each device."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, P()))


def rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Inside a program: x [B, T, ..], of which each device has its part of T."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, "rows")))


def whole(tree: Any, mesh: Mesh | None) -> Any:
    """Inside a program: arrays that all devices have as a whole."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))
