"""Writing a checkpoint in any two-way format: whole or not at all, one tensor at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import huggingface, lerobot, lora, settings, tables
from convert.layout import OURS, Translated
from convert.source import Source
from openpi_port import orbax_io, safetensors_io
from openpi_port.checkpoint import FORMAT, NORM_STATS, TRAIN_STATE
from openpi_port.errors import UserError
from openpi_port.fields import to_dict
from openpi_port.normalize import save_norm_stats
from openpi_port.whole import directory, refuse_existing

SIDES = {"flax": OURS, "torch": "torch", "openpi": "openpi", "openpi-torch": "hf", "lerobot": "hf"}
PARAMS = {"flax": "params", "torch": "model.safetensors"}
Progress = Callable[[int], None]


def write(source: Source, path: str | Path, to: str, progress: Progress = lambda num_bytes: None) -> Translated:
    """Converts an opened checkpoint.

    Args:
      source: what to convert.
      path: a directory that doesn't exist yet; it appears only when it is complete.
      to: of `SIDES`.
      progress: called with the number of bytes of each tensor written.

    Returns:
      The weights as they were written, for the report.

    Raises:
      UserError: tensors that don't fit, something at `path` already, or a full disk.
    """
    path = Path(path)
    refuse_existing(path)
    if to == "openpi":
        lora.refuse_scaled(source.model)
    weights = source.to(SIDES[to])
    needed = num_bytes(weights)
    with _whole(path, needed) as part:
        _write_weights(source, weights, part, to, progress)
        _write_policy(source, part, to)
    return weights


def num_bytes(weights: Translated) -> int:
    """Size of all tensors."""
    return sum(int(np.prod(s, dtype=np.int64)) * weights.dtypes[n].itemsize for n, s in weights.shapes.items())


def size(count: int) -> str:
    """Bytes, for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


@contextlib.contextmanager
def _whole(path: Path, needed: int) -> Iterator[Path]:
    """As `whole.directory`, where there is room for so many bytes."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{path}: its parent {parent} is no directory")
    try:
        with directory(path) as part:
            free = shutil.disk_usage(parent).free
            if free < needed:
                raise UserError(f"{parent}: {size(needed)} needed, {size(free)} free; make room or go elsewhere")
            yield part
    except (OSError, ValueError) as e:
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(e):
            raise UserError(f"{path}: the disk is full ({size(needed)} needed); nothing is left behind") from None
        raise


class _Under(Mapping[str, Any]):
    """The same tensors under a root."""

    def __init__(self, weights: Translated, root: str) -> None:
        self._weights, self._root = weights, root

    def __getitem__(self, name: str) -> np.ndarray:
        return self._weights[name.removeprefix(self._root)]

    def __iter__(self) -> Iterator[str]:
        return (self._root + name for name in self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _write_weights(source: Source, weights: Translated, part: Path, to: str, progress: Progress) -> None:
    file = part / huggingface.WEIGHTS
    if to == "flax":
        orbax_io.write(part / PARAMS[to], weights, progress)
    elif to == "torch":
        safetensors_io.write(file, weights, {"format": "pt"}, progress)
    elif to == "openpi":
        orbax_io.write(part / "params", _Under(weights, "params/"), progress)
    else:
        root = lerobot.ROOT if to == "lerobot" else ""
        untied = to == "lerobot" and source.settings.get("semantics") == "lerobot-0.6"
        tensors = huggingface.Written(weights, source.unused, root, untied=untied)
        safetensors_io.write(file, tensors, tensors.metadata, progress)
    if source.unused and SIDES[to] != "hf":
        safetensors_io.write(part / settings.UNUSED, source.unused)
    if source.train_state and to in PARAMS:
        state = part / TRAIN_STATE
        state.mkdir()
        tensors = tables.translate_state(source.train_state, source.model, source.side, SIDES[to])
        if to == "flax":
            orbax_io.write(state / PARAMS[to], tensors)
        else:
            safetensors_io.write(state / PARAMS[to], tensors, {"format": "pt"})


def _write_policy(source: Source, part: Path, to: str) -> None:
    """Everything beside the weights: our description, the statistics, and the format's own files."""
    framework = "flax" if to in ("flax", "openpi") else "torch"
    policy = {"format": FORMAT, "framework": framework, "step": 0, "model": to_dict(source.model)}
    policy["step"] = source.settings.get("step", 0)
    policy |= {k: v for k, v in source.settings.items() if k not in policy}
    if source.asset_id is not None:
        policy["asset_id"] = source.asset_id
    (part / settings.POLICY).write_text(json.dumps(policy, indent=1) + "\n", encoding="utf-8")
    if source.norm_stats is not None:
        save_norm_stats(part / NORM_STATS, source.norm_stats)
        if to in ("openpi", "openpi-torch"):
            save_norm_stats(part / "assets" / (source.asset_id or "default") / NORM_STATS, source.norm_stats)
    for name, file in source.files.items():
        if to == "lerobot" and name.startswith(f"{settings.LEROBOT}/"):
            continue  # they go where they came from, if they still hold
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, part / name)
    if to == "openpi-torch":
        model = source.model
        about = {
            "action_dim": model.action_dim,
            "action_horizon": model.action_horizon,
            "paligemma_variant": "gemma_2b",
            "action_expert_variant": "gemma_300m",
            "precision": huggingface.precision(source.to("hf")),
        }
        (part / "config.json").write_text(json.dumps(about, indent=2), encoding="utf-8")  # no newline, as openpi
    if to == "lerobot":
        lerobot.write_files(part, source, huggingface.precision(source.to("hf")))
