"""Opening any checkpoint; the work is in one small file per origin.

openpi.py       orbax with openpi's names        ours.py         our Flax and torch checkpoints
huggingface.py  openpi-PyTorch, PaliGemma        big_vision.py   PaliGemma's .npz
lerobot.py      LeRobot's directories            remote.py       gs://, hf:// and the like
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import big_vision, huggingface, lora, openpi, ours, remote, settings
from convert.source import Source
from openpi_port import orbax_io
from openpi_port.backends import Backend
from openpi_port.errors import UserError


def open_checkpoint(
    path: str | Path, *, merge_lora: bool = False, asset: str | None = None, **overrides: Any
) -> Source:
    """Opens a checkpoint of any supported format; which one shows in the names of its tensors.

    Args:
      path: a directory or file, or a URL (`hf://user/name`, `gs://...`), which is fetched first.
      merge_lora: whether to add LoRA weights to those that they adapt; without it they stay what they are.
      asset: which of several data sets' statistics in `assets/`, also where they came along from openpi's; None takes
        the only one of openpi's, and those of the deployed robot of ours.
      **overrides: fields of the model that the weights don't determine: `action_horizon`, `max_token_len`,
        `cameras`, `vision={"num_heads": 4}`.

    Raises:
      UserError: nothing that we can open, a damaged file, or one that fits no model of ours.
    """
    path = remote.fetch(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    source = _open(path, asset, overrides)
    if asset is not None and source.asset_id != asset:  # assets of openpi's that came along in another format
        asset_id, stats = openpi.read_assets(source.path, asset)
        source = dataclasses.replace(source, asset_id=asset_id, norm_stats=stats)
    if left := source.settings.get("assumed"):
        left = [field for field in left if field not in overrides]
        source = dataclasses.replace(source, settings={**source.settings, "assumed": left})
    return lora.merge(source) if merge_lora else lora.check(source)


def _open(path: Path, asset: str | None, overrides: Mapping[str, Any]) -> Source:
    policy = settings.read_json(path / settings.POLICY)
    if "base" in policy:  # some tensors of ours, whose names may not tell
        side = policy.get("framework")
        tensors = Backend(side).weights.read_params(path / Backend(side).weights.PARAMS)
        return ours.open_(path, tensors, side, asset, overrides)
    orbax = openpi.params_dir(path)
    if orbax is not None:
        arrays = orbax_io.Arrays(orbax)
        if any(name.startswith("gemma/") for name in arrays):
            return ours.open_(orbax.parent, dict(arrays), "flax", asset, overrides)
        return openpi.open_(path, asset=asset, **overrides)
    if path.suffix == ".npz":
        return big_vision.open_(path, **overrides)
    if path.is_file() or any((path / name).exists() for name in (huggingface.WEIGHTS, huggingface.INDEX)):
        tensors, _ = huggingface.load(path)
        if huggingface.kind(tensors) == "torch":
            return ours.open_(path if path.is_dir() else path.parent, tensors, "torch", asset, overrides)
        return huggingface.open_(path, asset=asset, **overrides)
    raise UserError(f"{path}: no checkpoint here ({_guess(path)})")


def _guess(path: Path) -> str:
    """What might have been meant by a directory without weights."""
    pickles = [p.name for p in path.iterdir() if p.suffix in huggingface.PICKLES]
    if pickles:
        return f"{pickles[0]} is a pickle, which can run code and is never opened; save the weights as safetensors"
    below = [p for p in sorted(path.glob("*/")) if openpi.params_dir(p) or (p / huggingface.WEIGHTS).exists()]
    if below:
        return f"did you mean {', '.join(str(p) for p in below[-3:])}?"
    return "expected params/ of orbax, model.safetensors, or a .npz of big_vision"
