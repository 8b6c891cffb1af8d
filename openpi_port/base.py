"""Checkpoints that hold only what was trained: where the other weights are, and how they are recognised.

`policy.json` then has "base": the checkpoint (or the seed of fresh weights) that the run began with, and a checksum of
what it left as it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from openpi_port import meshes
from openpi_port.config import Train
from openpi_port.errors import UserError

SAMPLES = 1024  # of each tensor


@dataclasses.dataclass(frozen=True)
class Base:
    """Where frozen weights are.

    Attributes:
      init: a checkpoint (`Train.init`); None: fresh weights of `seed`.
      seed: of the run.
      sha256: of names, shapes and samples of the frozen weights.
    """

    init: str | None
    seed: int
    sha256: str


def of(config: Train, weights: Mapping[str, np.ndarray]) -> Base:
    """Describes the base of a run.

    Args:
      config: the run.
      weights: canonical, those that it begins with.
    """
    return Base(config.init, config.seed, _checksum(config, weights))


def complete(base: Base, config: Train, trained: Mapping[str, Any], side: str, where: str) -> dict[str, Any]:
    """All weights of a checkpoint that holds the trained ones.

    Args:
      base: of that checkpoint.
      config: of its run.
      trained: its tensors.
      side: whose names they have, "flax" or "torch".
      where: what messages call it.

    Returns:
      Name -> tensor, read when indexed.

    Raises:
      UserError: the base is not there, or is another.
    """
    from convert import layout, tables  # they import this package
    from openpi_port import starting

    begun = dataclasses.replace(config, init=base.init, seed=base.seed)
    try:
        weights = starting.weights(begun)
    except UserError as error:
        raise UserError(
            f"{where} holds only what was trained; the other weights should be at {base.init}: {error}. "
            f'Put them there, or write their new place into its policy.json ("base", "init")'
        ) from None
    if _checksum(config, weights) != base.sha256:
        raise UserError(
            f"{where} was trained on other weights than {base.init or f'those of seed {base.seed}'} has now"
        )
    rest = tables.translate(weights, config.model, layout.OURS, side)
    shared = _Last(rest)
    return {name: trained[name] if name in trained else _Frozen(shared, name) for name in rest}


def _checksum(config: Train, weights: Mapping[str, np.ndarray]) -> str:
    parts = {}
    # In their own order, in which checkpoints read fastest.
    for name in tqdm(weights, "checksum of frozen weights", unit=" tensors", leave=False, delay=2):
        if meshes.is_frozen(config, name):
            array = np.asarray(weights[name])
            flat = array.reshape(-1)
            some = np.ascontiguousarray(flat[:: max(1, flat.size // SAMPLES)][:SAMPLES], np.float32)
            parts[name] = f"{name} {array.shape} ".encode() + some.tobytes()
    return hashlib.sha256(b"".join(parts[name] for name in sorted(parts))).hexdigest()


class _Last:
    """A mapping whose last value is kept: stacked tensors are asked for layer by layer."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.tensors = tensors
        self._name, self._value = "", np.empty(0)

    def __getitem__(self, name: str) -> np.ndarray:
        if name != self._name:
            self._value = np.empty(0)  # freed before the next one is made
            self._name, self._value = name, self.tensors[name]
        return self._value


class _Frozen:
    """A tensor of the base, made when it is indexed."""

    def __init__(self, base: _Last, name: str) -> None:
        self._base, self._name = base, name
        self.shape, self.dtype = tuple(base.tensors.shapes[name]), np.dtype(base.tensors.dtypes[name])

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._base[self._name][index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._base[self._name], dtype)
