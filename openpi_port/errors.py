"""The one exception a user is meant to read, and what command-line programs make of it and of others."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake outside the code: its message is one line that names the file, field or key and the remedy.

    Command-line programs print the message alone, without a traceback, and exit with status 2 (`guarded`).
    """


def near(name: str, known: Iterable[str], most: int = 3) -> str:
    """Words for an error message: the known names closest to a wrong one.

    Args:
      name: what was given.
      known: what would have been right.
      most: how many candidates to show.

    Returns:
      "did you mean a, b?" or, where nothing is close, "known: a, b, c".
    """
    known = sorted(known)
    close = get_close_matches(name, known, n=most, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known)}"


def guarded(program: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Runs a command-line program.

    Args:
      program: returns its exit status, None for 0.
      interrupted: what to say where Ctrl-C ends it.

    Returns:
      The exit status: the program's own, 130 after a Ctrl-C, or 2 after a UserError, a full disk or a file that can't
      be read or written, each of which is one line on stderr.
    """
    try:
        return program() or 0
    except UserError as error:
        message, status = str(error), 2
    except OSError as error:
        message, status = _told(error), 2
        if message is None:
            raise
    except KeyboardInterrupt:
        message, status = interrupted, 130
    print(f"error: {message}", file=sys.stderr)
    return status


def _told(error: OSError) -> str | None:
    """A file's trouble in a line; None where it is none of a file's."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    why = "the disk is full; make room, or write elsewhere" if full else error.strerror
    if error.filename is None:
        return why if full else None
    return f"{error.filename}: {why}"
