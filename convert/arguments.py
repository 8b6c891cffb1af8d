"""Command lines: mistakes in one line, and `--model.FIELD=VALUE` for what weights don't say."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from openpi_port.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and end the program."""

    def error(self, message: str) -> NoReturn:
        """See the class."""
        raise UserError(f"{message}; see {self.prog} --help")


def overrides(rest: Sequence[str], command: str) -> dict[str, Any]:
    """`--model.vision.num_heads=4` to {"vision": {"num_heads": 4}}.

    Args:
      rest: what argparse did not know.
      command: whose --help knows more, for messages.

    Raises:
      UserError: an argument of another form.
    """
    nested: dict[str, Any] = {}
    for argument in rest:
        name, equals, text = argument.partition("=")
        if not name.startswith("--model.") or not equals:
            raise UserError(f"{argument}: no such argument; --model.FIELD=VALUE sets a field, see {command} --help")
        *outer, field = name.removeprefix("--model.").split(".")
        level = nested
        for part in outer:
            level = level.setdefault(part, {})
        level[field] = tuple(text.split(",")) if field == "cameras" else int(text) if text.isdigit() else text
    return nested
