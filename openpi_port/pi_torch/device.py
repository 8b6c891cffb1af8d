"""The accelerator: which, how much memory, how arrays get there, how exact its products are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.distributed as dist

from openpi_port import host
from openpi_port.config import Compute


def find(name: str | None) -> torch.device:
    """The device of that name ("cpu", "cuda:1"); of none or "cuda" this process's GPU (the first, without torchrun).

    Without a GPU, None is the CPU.
    """
    if name is None and not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name in (None, "cuda") else name)


def count() -> int:
    """The devices of all processes of a run: one each."""
    return dist.get_world_size() if dist.is_initialized() else 1


def kind(device: torch.device) -> str:
    """What sort of device it is: "cpu" or "gpu"."""
    return "gpu" if device.type == "cuda" else device.type


def put(tree: Any, device: torch.device) -> Any:
    """Nested numpy arrays to tensors on a device."""
    if isinstance(tree, Mapping):
        return {key: put(value, device) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return [put(value, device) for value in tree]
    tensor = torch.from_numpy(np.require(tree, requirements=["C", "W"]))
    if device.type == "cuda":  # from pageable memory the host would wait until the device has done all it has to
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def get(tensor: torch.Tensor) -> np.ndarray:
    """A copy on the host; bfloat16 stays bfloat16."""
    tensor = tensor.detach().to("cpu", copy=True).contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def describe(device: torch.device) -> tuple[str, int]:
    """A name for people, and the bytes of memory that one program may use."""
    if device.type == "cpu":
        return f"CPU ({os.cpu_count()} cores)", host.memory()
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.total_memory


def peak(device: torch.device) -> int:
    """The most bytes that were in use on the device so far; 0 where that isn't counted (CPU)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


@contextlib.contextmanager
def precision(compute: Compute) -> Iterator[None]:
    """A context in which float32 products are really float32, on accelerators too.

    Beside bfloat16 they read 10 bits of what they multiply (TF32), as JAX's do on GPUs unless it is told otherwise.
    """
    finer = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # which it sets, too
    before, apart = _matmul_precision(), [setting.fp32_precision for setting in finer]
    torch.set_float32_matmul_precision("highest" if compute.dtype == "float32" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for setting, value in zip(finer, apart, strict=True):
            setting.fp32_precision = value


def _matmul_precision() -> str:
    """torch's setting, which refuses to be read once it has been set by `torch.backends.cuda.matmul.fp32_precision`."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"
