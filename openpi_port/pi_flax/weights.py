"""Weights of an NNX model by name: what a model needs, filling it, and the `params/` directory (orbax).

Names are the paths in the model, joined by "/": `gemma/layers/experts/0/q/kernel`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from openpi_port import orbax_io, strict
from openpi_port.config import Dtype

PARAMS = "params"  # where the weights lie in a checkpoint


def shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter; the model may be abstract (`nnx.eval_shape`)."""
    return {_name(path): tuple(leaf.get_value().shape) for path, leaf in _flat(model)}


def arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """Name -> array on the host of every parameter."""
    return {_name(path): np.asarray(leaf.get_value()) for path, leaf in _flat(model)}


def load(
    model: nnx.Module,
    mapping: Mapping[str, Any],
    device: jax.Device | Callable[[np.ndarray], jax.Array] | None = None,
    dtype: Dtype | Callable[[str], Dtype] | None = None,
) -> nnx.Module:
    """Fills every parameter of a model, strictly.

    Args:
      model: built under `nnx.eval_shape` (nothing is allocated twice) or in earnest.
      mapping: canonical name -> array; each is asked for once, in the mapping's order (neighbours may share a chunk).
      device: where the parameters go, one by one, or what takes them there; None takes the default device.
      dtype: what they are rounded to, there, or what says so by name; None keeps the arrays' dtype.

    Returns:
      A model of the same structure that holds the arrays.

    Raises:
      UserError: a missing, unknown or misshapen tensor, with the nearest candidates.
    """
    found = mapping.shapes if hasattr(mapping, "shapes") else {k: tuple(v.shape) for k, v in mapping.items()}
    strict.check(found, shapes(model), "weights")
    place = device if callable(device) else partial(jax.device_put, device=device)
    graph, state = nnx.split(model)
    leaves = {_name(path): (path, leaf) for path, leaf in _flat_state(state)}
    filled = {}
    for name in tqdm(found, "reading weights", unit=" tensors", leave=False, delay=2):
        path, leaf = leaves[name]
        value = place(np.asarray(mapping[name]))
        wanted = dtype(name) if callable(dtype) else dtype
        filled[path] = leaf.replace(value if wanted is None else value.astype(wanted))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def read_params(path: str | Path) -> dict[str, Any]:
    """The arrays of a `params/` directory: canonical name -> array on disk, read when indexed.

    Raises:
      UserError: no orbax checkpoint there.
    """
    return dict(orbax_io.Arrays(path))


def write_params(path: str | Path, mapping: Mapping[str, Any], part: tuple[int, int] = (0, 1)) -> None:
    """Writes canonical weights as a `params/` directory, one array at a time.

    Args:
      path: the directory.
      mapping: all arrays, or this process's share.
      part: this process's number, and how many there are; when all have written, one calls `seal_params`.
    """
    if part[1] == 1:
        orbax_io.write(path, mapping)
    else:
        orbax_io.write_part(path, mapping)


def seal_params(path: str | Path, count: int) -> None:
    """Makes the parts of `count` processes one."""
    if count > 1:
        orbax_io.seal(path)


def _flat(model: nnx.Module) -> list[tuple[tuple, Any]]:
    return _flat_state(nnx.state(model, nnx.Param))


def _flat_state(state: nnx.State) -> list[tuple[tuple, Any]]:
    return list(nnx.to_flat_state(state))


def _name(path: tuple) -> str:
    return "/".join(map(str, path))
