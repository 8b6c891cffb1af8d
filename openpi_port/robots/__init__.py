"""Robots: one file each, found by its name.

A robot is a module with three names: `STATE_DIM` and `ACTION_DIM` (None where the data say) and
`steps(data) -> tuple[Transform, ...]`, what lies between the data set's renamed sample and normalisation.
docs/adding_a_robot.md walks through one.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from openpi_port.errors import UserError, near


def load(name: str) -> ModuleType:
    """The module `openpi_port.robots.<name>`.

    Raises:
      UserError: there is none; the message has the nearest names.
    """
    if name not in names():
        raise UserError(f"config.data.robot={name!r}: no such robot; {near(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


def names() -> list[str]:
    """All that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))
