"""The two frameworks by name; nothing is imported before it is needed."""

from __future__ import annotations

import importlib
from types import ModuleType

NAMES = ("flax", "torch")


class Backend:
    """The modules of `pi_flax` or `pi_torch` as attributes: `device`, `infer`, `train`, `weights`, and `fast`.

    Attributes:
      name: "flax" or "torch"; also the name of its side in `convert.tables`.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, module: str) -> ModuleType:
        if module.startswith("_"):
            raise AttributeError(module)
        path = "fast.prepare" if module == "fast" else module
        return importlib.import_module(f"openpi_port.pi_{self.name}.{path}")


def of(model: object) -> Backend:
    """The framework that an object of `pi_flax` or `pi_torch` belongs to."""
    return Backend(type(model).__module__.split(".")[1].removeprefix("pi_"))
