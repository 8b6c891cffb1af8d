"""Both frameworks behind one face, so that a test is written once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from convert import formats, tables
from openpi_port import init
from openpi_port.backends import NAMES, Backend
from openpi_port.config import Compute, Pi0, Pi0Fast, Train

__all__ = ["NAMES", "Framework", "batch_of", "golden_reference", "opened"]


class Framework:
    """Arrays, modules and gradients of one framework.

    Attributes:
      name: "flax" or "torch".
      backend: its modules.
    """

    def __init__(self, name: str) -> None:
        self.name, self.backend = name, Backend(name)

    def load(self, config: Pi0 | Pi0Fast, weights: Mapping[str, Any], compute: Compute | None = None) -> Any:
        """An inference model on the CPU, filled with canonical weights."""
        weights = tables.translate(weights, config, "flax", self.name)
        return self.backend.infer.load(config, weights, compute or Compute(), "cpu")

    def trainer(self, config: Train) -> Any:
        """A trainer on the CPU, which begins with fresh weights."""
        weights = tables.translate(init.Fresh(config.model, 0), config.model, "flax", self.name)
        return self.backend.train.Trainer(config, weights, "cpu")

    def array(self, tree: Any) -> Any:
        """Nested numpy arrays as the framework's."""
        return self.backend.device.put(tree, self.backend.device.find("cpu"))

    def numpy(self, tree: Any) -> Any:
        """Arrays of the framework (float32, integer or boolean), or lists of them, as numpy."""
        if isinstance(tree, list | tuple):
            return [self.numpy(x) for x in tree]
        if self.name == "torch":
            return (tree.float() if tree.is_floating_point() else tree).detach().numpy()
        return np.asarray(tree)

    def compiled(self, model: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the model's module and of arrays as one of numpy, without gradients; Flax's is compiled."""
        if self.name == "torch":
            import torch

            return torch.no_grad()(lambda *args: self.numpy(function(model.module, *self.array(args))))
        import jax
        from flax import nnx

        graph, state = nnx.split(model.module)
        jitted = jax.jit(lambda state, args: function(nnx.merge(graph, state), *args))
        return lambda *args: self.numpy(jitted(state, self.array(args)))

    def gradients(self, model: Any, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Gradient of the mean loss by canonical name."""
        drawn = () if isinstance(model.config, Pi0Fast) else (batch["noise"], batch["time"])
        inputs = self.array((dict(batch), *drawn))
        if self.name == "torch":
            model.module.zero_grad()
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


def opened(path: str | Path, **overrides: Any) -> tuple[Mapping[str, np.ndarray], Pi0 | Pi0Fast]:
    """Canonical weights and configuration of any checkpoint."""
    source = formats.open_checkpoint(path, **overrides)
    return source.canonical(), source.model


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


def golden_reference(path: Path) -> SimpleNamespace:
    """A golden openpi checkpoint: weights, config, the golden batch, and what openpi computes of it in float32."""
    weights, config = opened(path)
    outputs = dict(np.load(path / "outputs_float32.npz"))
    return SimpleNamespace(weights=dict(weights), config=config, batch=batch_of(path), outputs=outputs, path=path)
