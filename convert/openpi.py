"""openpi's JAX checkpoints: `params/` (orbax, with or without "value" leaves), `assets/<id>/norm_stats.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import infer, tables
from convert.layout import OURS, Translated
from openpi_port import orbax_io
from openpi_port.errors import UserError


def params_dir(path: str | Path) -> Path | None:
    """The orbax directory of an openpi checkpoint, given it or its parent; None where there is none."""
    path = Path(path)
    return next((p for p in (path / "params", path) if (p / orbax_io.TREE).exists()), None)


def tensors(path: Path) -> dict[str, orbax_io.Stored]:
    """openpi's names ("PaliGemma/...") -> arrays on disk; strips the root "params" and trailing "value"s."""
    arrays = orbax_io.Arrays(path)
    return {name.removeprefix("params/").removesuffix("/value"): array for name, array in arrays.items()}


def read(path: str | Path, **overrides: Any) -> tuple[Translated, Any]:
    """Opens an openpi checkpoint.

    Args:
      path: the directory that holds `params/`, or `params/` itself.
      **overrides: fields of `config.Pi0` that the weights don't determine (`action_horizon`, ...).

    Returns:
      Canonical weights, read from disk when asked for, and the model's configuration.

    Raises:
      UserError: not such a checkpoint, or its tensors don't fit a model of ours.
    """
    found = params_dir(path)
    if found is None:
        raise UserError(f"{path}: no orbax checkpoint (params/{orbax_io.TREE}) here")
    theirs = tensors(found)
    shapes = {name: array.shape for name, array in theirs.items()}
    config = infer.finish(infer.from_openpi(shapes), described(found.parent), overrides)
    return tables.translate(theirs, config, "openpi", OURS), config


def described(path: Path) -> dict[str, Any]:
    """Model fields that a `config.json` beside `params/` states; openpi itself writes none."""
    file = path / "config.json"
    if not file.exists():
        return {}
    try:
        stated = json.loads(file.read_text())
    except ValueError as e:
        raise UserError(f"{file}: not JSON ({e})") from None
    if not isinstance(stated, Mapping):
        raise UserError(f"{file}: expected an object with the model's fields")
    fields = {k: stated[k] for k in ("action_horizon", "max_token_len") if k in stated}
    if "image_keys" in stated:
        fields["cameras"] = stated["image_keys"]
    return fields
