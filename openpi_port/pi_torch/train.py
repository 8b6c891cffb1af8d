"""One optimizer step: loss, gradient, clipping, AdamW, moving average; and the state that goes to disk.

B batch, A actions in a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from openpi_port import batch as batches
from openpi_port import meshes, strict
from openpi_port.batch import Batch
from openpi_port.config import Train as Config
from openpi_port.pi_torch import attention, insulated
from openpi_port.pi_torch import device as devices
from openpi_port.pi_torch.infer import build
from openpi_port.pi_torch.pi0 import Pi0
from openpi_port.pi_torch.pi0_fast import Pi0Fast
from openpi_port.pi_torch.sharding import Layout
from openpi_port.schedule import learning_rate


class State(NamedTuple):
    """Everything that a step reads and writes: this device's parts of what is trained."""

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
        self._layout = Layout(config, device)
        compute = attention.resolve(config.compute, self._layout.device)
        self._keys = batches.training(config.model, insulate=config.insulate)
        module = build(config.model, compute)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(is_trained(config, tuple(name.split("."))))
        self._loss = self._layout.fill(_Loss(module, config), weights)
        trained = {n: self._layout.parts[n] for n, p in self._layout.parameters.items() if p.requires_grad}
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
        """One optimizer step on this process's part of a batch; returns scalars that are still being computed."""
        batch = self._layout.put(batches.select(batch, self._keys))
        rate = learning_rate(self.step, self.config.optimizer)
        with devices.precision(self.config.compute):
            metrics = self._update_fn(batch, rate)
        self.step += 1
        return metrics

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        """The loss of the averaged weights on a batch, of which this process gives its part."""
        batch = self._layout.put(batches.select(batch, self._keys))
        with devices.precision(self.config.compute):
            if self._state.average is None:
                return float(self._mean_loss(batch)["loss"])
            self._swap()
            try:
                return float(self._mean_loss(batch)["loss"])
            finally:
                self._swap()

    def weights(self, *, only_trained: bool = False) -> dict[str, np.ndarray]:
        """What is deployed, by torch name: averaged where an average is kept; see `Layout.gather`."""
        parts = self._state.trained if only_trained else self._layout.parts
        return self._layout.gather(parts | (self._state.average or {}))

    def train_state(self) -> dict[str, np.ndarray]:
        """What else a resume needs: Adam's moments, and the raw weights where `weights` are averaged."""
        moments, zero = self._state.optimizer.state, torch.zeros_like
        parts = {
            part: {n: moments[p][key] if p in moments else zero(p) for n, p in self._state.trained.items()}
            for part, key in (("mu", "exp_avg"), ("nu", "exp_avg_sq"))
        }
        if self._state.average is not None:
            parts["raw"] = self._state.trained
        named = {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}
        return self._layout.gather(named)

    def restore(self, step: int, train_state: Mapping[str, np.ndarray]) -> None:
        """Continues after `step` steps; the trainer was built from what `weights` gave at that step."""
        parts = ["mu", "nu", *([] if self._state.average is None else ["raw"])]
        names = [f"{part}/{name}" for part in parts for name in self._state.trained]
        strict.check(dict.fromkeys(train_state, ()), dict.fromkeys(names, ()), "train_state")
        for name, parameter in self._state.trained.items():
            mu, nu, *raw = (self._layout.place(train_state[f"{part}/{name}"], name) for part in parts)
            count = torch.tensor(float(step), device=self._layout.device)
            self._state.optimizer.state[parameter] = {"step": count, "exp_avg": mu, "exp_avg_sq": nu}
            if raw:  # what was deployed, and so loaded, is the average
                self._state.average[name].copy_(parameter.detach())
                parameter.data.copy_(raw[0])
        self.step = step

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchanges the raw and the averaged weights, in place: FSDP and DDP know where they lie."""
        for name, parameter in self._state.trained.items():
            average, raw = self._state.average[name], parameter.clone()
            parameter.copy_(average), average.copy_(raw)

    def _update_fn(self, batch: Batch, rate: float) -> dict[str, Any]:
        metrics = self._mean_loss(batch, backward=True)
        for name in self._state.trained:  # what the loss doesn't reach still decays, as in optax
            parameter = self._layout.parameters[name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = self._layout.complete(self._state.trained)
        parameters = list(self._state.trained.values())
        grads = [p.grad for p in parameters]
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
        return {**metrics, "grad_norm": norm, "learning_rate": rate}

    def _mean_loss(self, batch: Batch, *, backward: bool = False) -> dict[str, Tensor]:
        """The loss, and what it consists of where it has parts, over all devices."""
        losses = self._loss(batch)
        if backward:
            losses["loss"].backward()
        count = devices.count()
        means = _total(torch.stack([loss.detach() for loss in losses.values()])) / count
        return dict(zip(losses, means, strict=True))


class _Loss(nn.Module):
    """The mean loss as a module, because DDP and FSDP act on modules that are called.

    The mean of what it gives on all devices is the loss of the whole batch.
    """

    def __init__(self, model: Pi0 | Pi0Fast, config: Config) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of this device's part of a batch, and what it consists of where it has parts."""
        if isinstance(self.model, Pi0Fast):
            return {"loss": self.model.loss(batch).mean()}
        if self.config.insulate:
            flow, tokens = insulated.losses(self.model, batch, batch["noise"], batch["time"])
            flow, tokens = self._mean(flow, batch), tokens.mean()
            parts = {"loss_flow": flow.detach(), "loss_tokens": tokens.detach()}
            return {"loss": self.config.flow_weight * flow + tokens, **parts}
        return {"loss": self._mean(self.model.loss(batch, batch["noise"], batch["time"]), batch)}

    def _mean(self, loss: Tensor, batch: Batch) -> Tensor:
        """Of a loss [B, A] over the actions that count, which are not equally many on all devices."""
        counted = torch.ones_like(loss) if self.config.loss_on_padding else 1.0 - batch["action_is_pad"].float()
        if self.config.max_delay:  # what is given, in all draws alike, is not learned
            counted = counted * (batch["time"].reshape(len(loss), -1, loss.shape[1])[:, 0] > 0)
        return (loss * counted).sum() / (_total(counted.sum()) / devices.count())


def is_trained(config: Config, path: tuple) -> bool:
    """Whether the parameter at that path is trained."""
    return not meshes.is_frozen(config, "/".join(path))


def _total(part: Tensor) -> Tensor:
    """The sum over all devices."""
    if devices.count() > 1:
        dist.all_reduce(part)
    return part
