"""Our own checkpoints (see `openpi_port/checkpoint.py`): `params/` from Flax or `model.safetensors` from torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import infer, settings
from convert.source import Source
from openpi_port import base, checkpoint, orbax_io, safetensors_io
from openpi_port.checkpoint import TRAIN_STATE, norm_stats_file
from openpi_port.errors import UserError, near
from openpi_port.normalize import load_norm_stats


def open_(path: Path, tensors: Mapping[str, Any], side: str, asset: str | None, overrides: Mapping[str, Any]) -> Source:
    """Opens a checkpoint of ours.

    Args:
      path: the directory.
      tensors: its weights.
      side: "flax" or "torch", whose names they have.
      asset: a data set of the mixture that it was trained on, whose robot is to be deployed; None for `config.data`.
        Of a checkpoint without a mixture it is not looked at.
      overrides: fields of the model, as everywhere.

    Raises:
      UserError: no description, or no such data set.
    """
    if not (path / settings.POLICY).exists():
        raise UserError(f"{path}: weights of this project, but no {settings.POLICY} beside them that describes it")
    stated = settings.read(path)
    if "base" in stated.policy:  # only what was trained is here
        policy = checkpoint.read_policy(path)
        tensors = base.complete(policy.base, policy.train, tensors, side, str(path))
        stated = settings.without_base(stated)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    model = infer.config(shapes, side, stated.model, overrides)
    policy, state = dict(stated.policy), _train_state(path, side)
    mixture, stats = policy.get("train", {}).get("mixture", {}), path / norm_stats_file("")
    if mixture and asset is not None:
        stats = path / norm_stats_file(asset)
        if asset != policy.get("asset_id"):
            if asset not in mixture:
                known = near(asset, mixture)
                raise UserError(f"{path / settings.POLICY}: no data set {asset!r} in the mixture; {known}")
            policy |= {"data": mixture[asset], "asset_id": asset}
            state = {}  # a run goes on with the robot that it began with
    return Source(
        side, path, side, tensors, model, unused=settings.read_unused(path),
        norm_stats=load_norm_stats(stats) if stats.exists() else None, asset_id=policy.get("asset_id"),
        settings=policy, files=settings.read_files(path), train_state=state,
    )  # fmt: skip


def _train_state(path: Path, side: str) -> Mapping[str, Any]:
    state = path / TRAIN_STATE
    if not state.exists():
        return {}
    if side == "flax":
        return dict(orbax_io.Arrays(state / "params"))
    return dict(safetensors_io.tensors(state / "model.safetensors"))
