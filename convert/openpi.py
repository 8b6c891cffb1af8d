"""openpi's JAX checkpoints: `params/` (orbax, with or without "value" leaves) and `assets/<id>/norm_stats.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convert import infer, settings
from convert.source import Source
from openpi_port import orbax_io
from openpi_port.errors import UserError, near
from openpi_port.normalize import NormStats, load_norm_stats


def params_dir(path: str | Path) -> Path | None:
    """The orbax directory of a checkpoint, given it or the directory above; None where there is none."""
    path = Path(path)
    return next((p for p in (path / "params", path) if (p / orbax_io.TREE).exists()), None)


def tensors(path: Path) -> dict[str, Any]:
    """openpi's names ("PaliGemma/...") -> arrays on disk; without the root "params" and trailing "value"s."""
    arrays = orbax_io.Arrays(path)
    return {name.removeprefix("params/").removesuffix("/value"): array for name, array in arrays.items()}


def open_(path: str | Path, *, asset: str | None = None, **overrides: Any) -> Source:
    """Opens an openpi checkpoint.

    Args:
      path: the directory that holds `params/`, or `params/` itself.
      asset: see `formats.open_checkpoint`.
      **overrides: fields of the model that the weights don't determine (`action_horizon`, ...).

    Raises:
      UserError: not such a checkpoint, or one that fits no model of ours.
    """
    found = params_dir(path)
    if found is None:
        raise UserError(f"{path}: no orbax checkpoint (params/{orbax_io.TREE}) here")
    theirs = tensors(found)
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
