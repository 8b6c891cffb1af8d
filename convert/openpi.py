"""openpi's JAX checkpoints: `params/` (orbax, with or without "value" leaves) and `assets/<id>/norm_stats.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convert import infer, settings
from convert.layout import Translated
from convert.source import Source
from openpi_port import orbax_io
from openpi_port.errors import UserError
from openpi_port.normalize import NormStats, load_norm_stats


def params_dir(path: str | Path) -> Path | None:
    """The orbax directory of a checkpoint, given it or the directory above; None where there is none."""
    path = Path(path)
    return next((p for p in (path / "params", path) if (p / orbax_io.TREE).exists()), None)


def tensors(path: Path) -> dict[str, orbax_io.Stored]:
    """openpi's names ("PaliGemma/...") -> arrays on disk; without the root "params" and trailing "value"s."""
    arrays = orbax_io.Arrays(path)
    return {name.removeprefix("params/").removesuffix("/value"): array for name, array in arrays.items()}


def open_(path: str | Path, **overrides: Any) -> Source:
    """Opens an openpi checkpoint.

    Args:
      path: the directory that holds `params/`, or `params/` itself.
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
    asset_id, stats = read_assets(found.parent)
    return Source(
        "openpi", found.parent, "openpi", theirs, model, unused=settings.read_unused(found.parent),
        norm_stats=stats, asset_id=asset_id, settings=stated.policy,
    )  # fmt: skip


def read(path: str | Path, **overrides: Any) -> tuple[Translated, Any]:
    """Canonical weights, read from disk when asked for, and the model's configuration; see `open_`."""
    source = open_(path, **overrides)
    return source.canonical(), source.model


def read_assets(path: Path) -> tuple[str | None, NormStats | None]:
    """The statistics in `assets/` and the name of their data set, or (None, None)."""
    files = sorted((path / "assets").glob("**/norm_stats.json"))
    if not files:
        return None, None
    if len(files) > 1:
        names = ", ".join(str(f.parent.relative_to(path / "assets")) for f in files)
        raise UserError(f"{path / 'assets'}: statistics of several data sets ({names}); keep the one that is meant")
    return str(files[0].parent.relative_to(path / "assets")), load_norm_stats(files[0])
