"""The accelerator: which, how much memory, how arrays get there, how exact its products are."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import jax

from openpi_port import host
from openpi_port.config import Compute


def find(name: str | None) -> jax.Device:
    """This process's first device of that name ("cpu", "gpu", "tpu"), or of the default one."""
    return jax.local_devices(backend=name)[0]


def count() -> int:
    """The devices of all processes of a run."""
    return jax.device_count()


def kind(device: jax.Device) -> str:
    """What sort of device it is: "cpu", "gpu" or "tpu"."""
    return device.platform


def put(tree: Any, device: jax.Device) -> Any:
    """Nested numpy arrays to arrays on a device."""
    return jax.device_put(tree, device)


def get(tree: Any) -> Any:
    """Arrays on devices to numpy arrays on the host."""
    return jax.device_get(tree)


def describe(device: jax.Device) -> tuple[str, int]:
    """A name for people, and the bytes of memory that one program may use."""
    if device.platform == "cpu":
        return f"CPU ({os.cpu_count()} cores)", host.memory()
    stats = device.memory_stats() or {}
    return device.device_kind, stats.get("bytes_limit", 0)


def peak(device: jax.Device) -> int:
    """The most bytes that were in use on the device so far; 0 where that isn't counted (CPU)."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)


def precision(compute: Compute) -> contextlib.AbstractContextManager:
    """A context in which float32 products are really float32, on accelerators too."""
    if compute.dtype == "float32":
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()
