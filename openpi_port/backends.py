"""The two frameworks by name; nothing is imported before it is needed."""

from __future__ import annotations

import importlib
import os
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


def share_cores() -> None:
    """Lets a prepared model in Flax share its work among cores where it runs on a CPU; called before JAX is imported.

    XLA computes operations as small as those of `mini` on one core each. So JAX gets two devices, unless the
    environment says how many, and `pi_flax.fast.split` gives each half of the rows. torch shares every operation.
    """
    if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(min(2, os.cpu_count() or 1)))


def of(model: object) -> Backend:
    """The framework that an object of `pi_flax` or `pi_torch` belongs to."""
    return Backend(type(model).__module__.split(".")[1].removeprefix("pi_"))
