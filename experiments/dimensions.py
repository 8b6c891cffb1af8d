"""What a data set calls the dimensions of its state and actions."""

from __future__ import annotations

from collections.abc import Mapping

from openpi_port.data.frames import Frames


def names(frames: Frames | None, column: str, size: int) -> list[str]:
    """A name per dimension: its number, and the data set's word for it where there is one.

    Args:
      frames: the data set, if it is here.
      column: of state or actions.
      size: how many dimensions there are.
    """
    given = getattr(frames, "features", {}).get(column, {}).get("names")
    given = [name for part in given.values() for name in part] if isinstance(given, Mapping) else given
    return [f"{i} {name}" for i, name in enumerate(given)] if given and len(given) == size else [*map(str, range(size))]
