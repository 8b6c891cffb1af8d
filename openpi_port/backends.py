"""The two frameworks by name; nothing is imported before it is needed."""

from __future__ import annotations

import importlib
from types import ModuleType

NAMES = ("flax", "torch")


class Backend:
    """The modules of `pi_flax` or `pi_torch` as attributes: `device`, `infer`, `train`, `weights`.

    Attributes:
      name: "flax" or "torch"; also the name of its side in `convert.tables`.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, module: str) -> ModuleType:
        if module.startswith("_"):
            raise AttributeError(module)
        return importlib.import_module(f"openpi_port.pi_{self.name}.{module}")
