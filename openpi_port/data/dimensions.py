"""What a data set calls the dimensions of its state and actions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from openpi_port.check_sample import split_keys
from openpi_port.data.frames import Frames


def names(frames: Frames, columns: str) -> list[str]:
    """A word per dimension: the data set's own, else the end of the column's with a number ("joint_position_0").

    Args:
      frames: the data set.
      columns: that make up the state or the actions, with commas between them.
    """
    found, sample = [], frames.numbers(0)
    for key in split_keys(columns):
        given, size = _flat(frames.features.get(key, {}).get("names")), sample[key].shape[-1]
        found += given if len(given) == size else [f"{re.split('[./]', key)[-1]}_{i}" for i in range(size)]
    return found


def numbered(frames: Frames | None, columns: str, size: int) -> list[str]:
    """A number per dimension, and the data set's word for it, or its column where there are several.

    Args:
      frames, columns: see `names`; None where the data set isn't here.
      size: how many dimensions there are; a robot's steps may have changed it, and then words would mislead.
    """
    words = [] if frames is None or not _tells(frames, columns) else names(frames, columns)
    return [f"{i} {word}" for i, word in enumerate(words)] if len(words) == size else [*map(str, range(size))]


def _tells(frames: Frames, columns: str) -> bool:
    keys = split_keys(columns)
    return len(keys) > 1 or bool(_flat(frames.features.get(keys[0], {}).get("names")))


def _flat(given: Any) -> list[str]:
    """info.json's names in any of the forms that recorders write: ["a", "b"], [["a", "b"]], {"motors": ["a", "b"]}, or
    {"a": 0, "b": 1}."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, Mapping):
        if all(isinstance(place, int) for place in given.values()):
            return sorted(given, key=given.get)
        given = list(given.values())
    return [name for part in given for name in _flat(part)] if isinstance(given, list) else []
