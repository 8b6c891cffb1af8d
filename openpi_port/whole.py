"""Files and directories that are there whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from openpi_port.errors import UserError


def refuse_existing(path: Path) -> None:
    """Raises UserError where something is in the way of a new directory."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists already and is not overwritten: remove it or choose another")


def free(path: Path) -> Path:
    """The path, or with _2, _3, ... behind it where something is there."""
    others = (path.with_name(f"{path.name}_{i}") for i in itertools.count(2))
    return next(p for p in itertools.chain([path], others) if not p.exists())


@contextlib.contextmanager
def directory(path: Path) -> Iterator[Path]:
    """Makes a directory that takes its name when the block ends well, and vanishes when it doesn't.

    Args:
      path: the name, in a directory that exists.

    Yields:
      The directory under its temporary name.

    Raises:
      UserError: something has that name, before the block or at its end.
    """
    refuse_existing(path)
    parent = path.absolute().parent
    for left_over in filter(_abandoned, parent.glob(f".{path.name}.partial-*")):
        shutil.rmtree(left_over, ignore_errors=True)
    part = parent / f".{path.name}.partial-{os.getpid()}"
    part.mkdir()
    try:
        yield part
        refuse_existing(path)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def file(path: Path) -> Iterator[Path]:
    """Lets the block write a file that takes its name, from one that is there, when it ends well. Makes its directory.

    Args:
      path: the name.

    Yields:
      The temporary name to write to; what is there vanishes when the block fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, see `file`."""
    with file(path) as part:
        part.write_text(text, encoding="utf-8")


def _abandoned(part: Path) -> bool:
    """Whether the process whose number the name ends with is gone, killed."""
    try:
        os.kill(int(part.name.rpartition("-")[2]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError):  # another user's, or another program's
        return False
    return False
