"""Weights of a torch model by name: what a model needs, filling it, and `model.safetensors`.

Names are torch's: `gemma.layers.0.experts.0.q.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from openpi_port import safetensors_io, strict
from openpi_port.config import Dtype
from openpi_port.pi_torch import device as devices

PARAMS = "model.safetensors"  # where the weights lie in a checkpoint


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter; the model may be on the meta device."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """Name -> array on the host of every parameter."""
    return {name: devices.get(p) for name, p in model.named_parameters()}


def load(
    model: nn.Module,
    mapping: Mapping[str, Any],
    device: torch.device | None = None,
    dtype: Dtype | Callable[[str], Dtype] | None = None,
) -> nn.Module:
    """Fills every parameter of a model, strictly.

    Args:
      model: built on the meta device (nothing is allocated twice) or in earnest.
      mapping: torch name -> array; each is asked for once, in the mapping's order (neighbours may share a chunk).
      device: where the parameters go, one by one; None leaves them on the CPU.
      dtype: what they are rounded to, there, or what says so by name; None keeps the arrays' dtype.

    Returns:
      The same model.

    Raises:
      UserError: a missing, unknown or misshapen tensor, with the nearest candidates.
    """
    found = mapping.shapes if hasattr(mapping, "shapes") else {k: tuple(v.shape) for k, v in mapping.items()}
    strict.check(found, shapes(model), "weights")
    for name in tqdm(found, "reading weights", unit=" tensors", leave=False, delay=2):
        owner, _, leaf = name.rpartition(".")
        wanted = dtype(name) if callable(dtype) else dtype
        array = _from_numpy(mapping[name])
        value = array.to(device).to(None if wanted is None else getattr(torch, wanted))
        value = value.clone() if value is array else value  # of its own; what came to another device is that already
        module = model.get_submodule(owner)
        setattr(module, leaf, nn.Parameter(value, requires_grad=getattr(module, leaf).requires_grad))
    return model


def read_params(path: str | Path) -> dict[str, Any]:
    """The arrays of a `model.safetensors` file (or of its parts) or of the directory that holds it, read when indexed.

    Raises:
      UserError: no such file, not safetensors, or cut off.
    """
    return dict(safetensors_io.tensors(_file(path)))


def write_params(path: str | Path, mapping: Mapping[str, Any], part: tuple[int, int] = (0, 1)) -> None:
    """Writes torch-named weights to a file, or to `model.safetensors` in a directory, one tensor at a time.

    Args:
      path: the file.
      mapping: all tensors, or this process's share.
      part: this process's number, and how many there are; when all have written, one calls `seal_params`.
    """
    index, count = part
    file = _file(path) if count == 1 else safetensors_io.part_of(_file(path), index, count)
    safetensors_io.write(file, mapping, {"format": "pt"})


def seal_params(path: str | Path, count: int) -> None:
    """Makes the parts of `count` processes one."""
    if count > 1:
        safetensors_io.seal(_file(path), count)


def _from_numpy(array: Any) -> torch.Tensor:
    """A tensor on the array's memory, if that may be written and is in order; bfloat16 stays bfloat16."""
    array = np.require(array, requirements=["C", "W"])
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path / "model.safetensors" if path.is_dir() else path
