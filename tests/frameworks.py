"""Both frameworks behind one face, so that a test is written once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import formats, tables
from openpi_port.backends import NAMES, Backend
from openpi_port.config import Compute, Pi0

__all__ = ["NAMES", "Framework", "batch_of", "golden_model"]


class Framework:
    """Arrays, modules and gradients of one framework.

    Attributes:
      name: "flax" or "torch".
      backend: its modules.
    """

    def __init__(self, name: str) -> None:
        self.name, self.backend = name, Backend(name)

    def load(self, config: Pi0, weights: Mapping[str, Any], compute: Compute | None = None) -> Any:
        """An inference model on the CPU, filled with canonical weights."""
        weights = tables.translate(weights, config, "flax", self.name)
        return self.backend.infer.load(config, weights, compute or Compute(), "cpu")

    def array(self, tree: Any) -> Any:
        """Nested numpy arrays as the framework's."""
        return self.backend.device.put(tree, self.backend.device.find("cpu"))

    def numpy(self, array: Any) -> np.ndarray:
        """A float32, integer or boolean array of the framework as numpy."""
        return (
            array.detach().float().numpy() if self.name == "torch" and array.is_floating_point() else np.asarray(array)
        )

    def gradients(self, model: Any, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Gradient of the mean loss by canonical name."""
        inputs = self.array((dict(batch), batch["noise"], batch["time"]))
        if self.name == "torch":
            model.module.loss(*inputs).mean().backward()
            named = {
                n: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
                for n, p in model.module.named_parameters()
            }
        else:
            import jax
            from flax import nnx

            graph, state = nnx.split(model.module)
            grads = jax.jit(jax.grad(lambda s: nnx.merge(graph, s).loss(*inputs).mean()))(state)
            named = {"/".join(map(str, p)): np.asarray(v.get_value()) for p, v in nnx.to_flat_state(grads)}
        return dict(tables.translate(named, model.config, self.name, "flax"))


def golden_model(path: Path, **overrides: Any) -> tuple[Mapping[str, np.ndarray], Pi0]:
    """Canonical weights and configuration of a golden openpi checkpoint."""
    return formats.read_openpi(path, **overrides)


def batch_of(path: Path) -> dict[str, Any]:
    """The golden inputs as a batch."""
    batch: dict[str, Any] = {}
    for name, value in np.load(path / "inputs.npz").items():
        group, _, key = name.partition("/")
        if key:
            batch.setdefault(group, {})[key] = value
        else:
            batch[group] = value
    return batch
