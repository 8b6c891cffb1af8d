"""Every checkpoint format by its function; the work is in one small file per origin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convert import huggingface
from convert.layout import Translated
from convert.openpi import read as read_openpi

__all__ = ["read_huggingface", "read_openpi"]


def read_huggingface(path: str | Path, **overrides: Any) -> tuple[Translated, Any]:
    """Canonical weights and configuration of openpi-PyTorch, LeRobot or Hugging Face PaliGemma."""
    source = huggingface.open_(path, **overrides)
    return source.canonical(), source.model
