"""Our own checkpoints (see `openpi_port/checkpoint.py`): `params/` from Flax or `model.safetensors` from torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import infer, settings
from convert.source import Source
from openpi_port import orbax_io, safetensors_io
from openpi_port.checkpoint import NORM_STATS, TRAIN_STATE
from openpi_port.errors import UserError
from openpi_port.normalize import load_norm_stats


def open_(path: Path, tensors: Mapping[str, Any], side: str, overrides: Mapping[str, Any]) -> Source:
    """Opens a checkpoint of ours.

    Args:
      path: the directory.
      tensors: its weights.
      side: "flax" or "torch", whose names they have.
      overrides: fields of the model, as everywhere.
    """
    if not (path / settings.POLICY).exists():
        raise UserError(f"{path}: weights of this project, but no {settings.POLICY} beside them that describes it")
    stated = settings.read(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    model = infer.config(shapes, side, stated.model, overrides)
    stats = load_norm_stats(path / NORM_STATS) if (path / NORM_STATS).exists() else None
    return Source(
        side, path, side, tensors, model, unused=settings.read_unused(path), norm_stats=stats,
        asset_id=stated.policy.get("asset_id"), settings=stated.policy, files=settings.read_files(path),
        train_state=_train_state(path, side),
    )  # fmt: skip


def _train_state(path: Path, side: str) -> Mapping[str, Any]:
    state = path / TRAIN_STATE
    if not state.exists():
        return {}
    arrays = orbax_io.Arrays(state / "params") if side == "flax" else safetensors_io.Arrays(state / "model.safetensors")
    return dict(arrays)
