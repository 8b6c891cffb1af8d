"""One optimizer step: loss, gradient, clipping, AdamW, moving average; and the state that goes to disk.

B batch, A actions in a chunk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openpi_port import batch as batches
from openpi_port import strict
from openpi_port.batch import Batch
from openpi_port.config import Train as Config
from openpi_port.pi_torch import attention, insulated
from openpi_port.pi_torch import device as devices
from openpi_port.pi_torch import weights as weights_io
from openpi_port.pi_torch.infer import build
from openpi_port.pi_torch.pi0_fast import Pi0Fast
from openpi_port.schedule import learning_rate


class State(NamedTuple):
    """Everything that a step reads and writes, beside the parameters of the module."""

    trained: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    average: dict[str, Tensor] | None


class Trainer:
    """A model in training.

    Attributes:
      step: number of optimizer steps done.
    """

    def __init__(self, config: Config, weights: Mapping[str, np.ndarray], device: str | None = None) -> None:
        """Fills a model with `weights` (by torch name, all of them) and makes a fresh optimizer state."""
        self.config = config
        self.step = 0
        self._device = devices.find(device)
        compute = attention.resolve(config.compute, self._device)
        self._keys = batches.training(config.model, insulate=config.insulate)
        self._module = weights_io.load(build(config.model, compute), weights, self._device)
        for name, parameter in self._module.named_parameters():
            parameter.requires_grad_(is_trained(config, tuple(name.split("."))))
        trained = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            trained.values(),
            betas=(config.optimizer.b1, config.optimizer.b2),
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        average = None
        if config.optimizer.ema:
            average = {name: p.detach().clone() for name, p in trained.items()}
        self._state = State(trained, optimizer, average)

    def update(self, batch: Batch) -> dict[str, Any]:
        """One optimizer step on a numpy batch; returns scalars that are still being computed."""
        batch = devices.put(batches.select(batch, self._keys), self._device)
        rate = learning_rate(self.step, self.config.optimizer)
        with devices.precision(self.config.compute):
            metrics = self._update_fn(batch, rate)
        self.step += 1
        return metrics

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        """The loss of the averaged weights on a numpy batch."""
        batch = devices.put(batches.select(batch, self._keys), self._device)
        with devices.precision(self.config.compute):
            if self._state.average is None:
                return float(self._loss(batch)[0])
            self._swap()
            try:
                return float(self._loss(batch)[0])
            finally:
                self._swap()

    def weights(self) -> dict[str, np.ndarray]:
        """What is deployed, by torch name: averaged where an average is kept."""
        return _to_host(dict(self._module.named_parameters()) | (self._state.average or {}))

    def train_state(self) -> dict[str, np.ndarray]:
        """What else a resume needs: Adam's moments, and the raw weights where `weights` are averaged."""
        moments, zero = self._state.optimizer.state, torch.zeros_like
        parts = {
            part: {n: moments[p][key] if p in moments else zero(p) for n, p in self._state.trained.items()}
            for part, key in (("mu", "exp_avg"), ("nu", "exp_avg_sq"))
        }
        if self._state.average is not None:
            parts["raw"] = self._state.trained
        return {f"{part}/{name}": value for part, tensors in parts.items() for name, value in _to_host(tensors).items()}

    def restore(self, step: int, train_state: Mapping[str, np.ndarray]) -> None:
        """Continues after `step` steps; the trainer was built from what `weights` gave at that step."""
        parts = ["mu", "nu", *([] if self._state.average is None else ["raw"])]
        names = [f"{part}/{name}" for part in parts for name in self._state.trained]
        strict.check(dict.fromkeys(train_state, ()), dict.fromkeys(names, ()), "train_state")
        for name, parameter in self._state.trained.items():
            arrays = (np.asarray(train_state[f"{part}/{name}"]) for part in parts)
            mu, nu, *raw = (torch.tensor(array, device=self._device) for array in arrays)
            count = torch.tensor(float(step), device=self._device)
            self._state.optimizer.state[parameter] = {"step": count, "exp_avg": mu, "exp_avg_sq": nu}
            if raw:  # what was deployed, and so loaded, is the average
                self._state.average[name].copy_(parameter.detach())
                parameter.data.copy_(raw[0])
        self.step = step

    def _swap(self) -> None:
        """Exchanges the raw and the averaged weights."""
        for name, parameter in self._state.trained.items():
            parameter.data, self._state.average[name] = self._state.average[name], parameter.data

    def _update_fn(self, batch: Batch, rate: float) -> dict[str, Any]:
        parameters = list(self._state.trained.values())
        loss, parts = self._loss(batch)
        loss.backward()
        for parameter in parameters:  # what the loss doesn't reach still decays, as in optax
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [p.grad for p in parameters]
        norm = torch.nn.utils.get_total_norm(grads)
        limit = self.config.optimizer.clip_norm
        torch._foreach_mul_(grads, limit / norm.clamp(min=limit))
        for group in self._state.optimizer.param_groups:
            group["lr"] = rate
        self._state.optimizer.step()
        self._state.optimizer.zero_grad(set_to_none=True)
        if self._state.average is not None:
            averages = [self._state.average[name] for name in self._state.trained]
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 1 - self.config.optimizer.ema)
        return {"loss": loss.detach(), **parts, "grad_norm": norm, "learning_rate": rate}

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss, and what it consists of where it has parts."""
        if isinstance(self._module, Pi0Fast):
            return self._module.loss(batch).mean(), {}
        if self.config.insulate:
            flow, tokens = insulated.losses(self._module, batch, batch["noise"], batch["time"])
            flow, tokens = self._mean(flow, batch), tokens.mean()
            parts = {"loss_flow": flow.detach(), "loss_tokens": tokens.detach()}
            return self.config.flow_weight * flow + tokens, parts
        return self._mean(self._module.loss(batch, batch["noise"], batch["time"]), batch), {}

    def _mean(self, loss: Tensor, batch: Batch) -> Tensor:
        """Of a loss [B, A] over the actions that count."""
        counted = torch.ones_like(loss) if self.config.loss_on_padding else 1.0 - batch["action_is_pad"].float()
        return (loss * counted).sum() / counted.sum()


def is_trained(config: Config, path: tuple) -> bool:
    """Whether a parameter is trained: no pattern of `config.frozen` is found in its Flax path.

    The Flax path differs from the torch name in the numbers of stacked layers and in `kernel` for `weight`.
    """
    name = re.sub(r"(blocks|layers)/\d+", r"\1", "/".join(path))
    name = re.sub(r"/weight$", "/kernel", name)
    return not any(re.search(pattern, name) for pattern in config.frozen)


def _to_host(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Copies on the host by name."""
    return {name: tensor.detach().to("cpu", copy=True).numpy() for name, tensor in tensors.items()}
