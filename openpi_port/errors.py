"""The one exception a user is meant to read."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake outside the code: its message is one line that names the file, field or key and the remedy.

    Command-line programs print the message alone, without a traceback, and exit with status 2.
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
