"""openpi's JAX checkpoints: `params/` (orbax, with or without "value" leaves) and `assets/<id>/norm_stats.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from convert import infer, settings
from convert.source import Source
from openpi_port import orbax_io
from openpi_port.errors import UserError, near
from openpi_port.normalize import NormStats, load_norm_stats


def params_dir(path: str | Path) -> Path | None:
    """The orbax directory of a checkpoint, given it or the directory above; None where there is none."""
    path = Path(path)
    return next((p for p in (path / "params", path) if (p / orbax_io.TREE).exists()), None)


def tensors(path: Path, *, merge_lora: bool = False) -> dict[str, Any]:
    """openpi's names ("PaliGemma/...") -> arrays on disk; without the root "params" and trailing "value"s."""
    arrays = orbax_io.Arrays(path)
    theirs = {name.removeprefix("params/").removesuffix("/value"): array for name, array in arrays.items()}
    adapters = sorted(name for name in theirs if name.endswith("lora_a"))
    if adapters and not merge_lora:
        raise UserError(f"{path}: {len(adapters)} LoRA adapters ({adapters[0]}, ...); add them with --merge-lora")
    for name in adapters:
        # `q_einsum/lora_a` adapts `q_einsum/w`; `mlp/linear_lora_a` adapts `mlp/linear`.
        stem = name.removesuffix("lora_a")
        adapted = f"{stem}w" if stem.endswith("/") else stem.removesuffix("_")
        theirs[adapted] = Merged(theirs[adapted], theirs.pop(name), theirs.pop(f"{stem}lora_b"))
    return theirs


class Merged:
    """A weight with its LoRA adapter added, `w + a @ b` (openpi's alpha is its rank), made when indexed."""

    def __init__(self, w: Any, a: Any, b: Any) -> None:
        self._w, self._a, self._b = w, a, b
        self.shape, self.dtype = w.shape, w.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        w, a, b = (np.asarray(x[index], np.float32) for x in (self._w, self._a, self._b))
        return (w + a @ b).astype(self.dtype)


def open_(path: str | Path, *, merge_lora: bool = False, asset: str | None = None, **overrides: Any) -> Source:
    """Opens an openpi checkpoint.

    Args:
      path: the directory that holds `params/`, or `params/` itself.
      merge_lora, asset: see `formats.open_checkpoint`.
      **overrides: fields of the model that the weights don't determine (`action_horizon`, ...).

    Raises:
      UserError: not such a checkpoint, or one that fits no model of ours.
    """
    found = params_dir(path)
    if found is None:
        raise UserError(f"{path}: no orbax checkpoint (params/{orbax_io.TREE}) here")
    theirs = tensors(found, merge_lora=merge_lora)
    stated = settings.read(found.parent)
    model = infer.config({n: a.shape for n, a in theirs.items()}, "openpi", stated.model, overrides)
    asset_id, stats = read_assets(found.parent, asset)
    return Source(
        "openpi", found.parent, "openpi", theirs, model, unused=settings.read_unused(found.parent),
        norm_stats=stats, asset_id=asset_id, settings=settings.of_openpi(stated, model),
        files=settings.read_files(found.parent),
    )  # fmt: skip


def read_assets(path: Path, asset: str | None) -> tuple[str | None, NormStats | None]:
    """The statistics in `assets/` and the name of their data set; (None, None) where there are none or several.

    Args:
      path: of the checkpoint.
      asset: which data set's; None takes the only one. openpi's base checkpoints hold those of many robots.

    Raises:
      UserError: that data set is not there.
    """
    files = {
        str(f.parent.relative_to(path / "assets")): f for f in sorted((path / "assets").glob("**/norm_stats.json"))
    }
    if asset is None:
        asset = next(iter(files)) if len(files) == 1 else None
    elif asset not in files:
        raise UserError(
            f"{path / 'assets'}: no statistics of {asset!r}; {near(asset, files) if files else 'none at all'}"
        )
    return (None, None) if asset is None else (asset, load_norm_stats(files[asset]))
