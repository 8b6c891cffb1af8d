"""One optimizer step: loss, gradient, clipping, AdamW, moving average; and the state that goes to disk.

B batch, A actions in a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from openpi_port import batch as batches
from openpi_port import config as configs
from openpi_port import meshes, strict
from openpi_port.batch import Batch
from openpi_port.config import Train as Config
from openpi_port.errors import UserError
from openpi_port.pi_torch import attention, insulated
from openpi_port.pi_torch import device as devices
from openpi_port.pi_torch.fast import adamw
from openpi_port.pi_torch.fast.gradients import Gradients
from openpi_port.pi_torch.fast.replay import Replayed
from openpi_port.pi_torch.infer import build
from openpi_port.pi_torch.pi0 import Pi0
from openpi_port.pi_torch.pi0_fast import Pi0Fast
from openpi_port.pi_torch.sharding import Layout
from openpi_port.schedule import learning_rate


class State(NamedTuple):
    """Everything that a step reads and writes: this device's parts of what is trained, in float32, by name."""

    trained: dict[str, Tensor]
    mu: dict[str, Tensor]
    nu: dict[str, Tensor]
    average: dict[str, Tensor] | None


class Trainer:
    """A model in training.

    Attributes:
      config: the run, its remat settled.
      step: number of optimizer steps done.
    """

    def __init__(self, config: Config, weights: Mapping[str, np.ndarray], device: str | None = None) -> None:
        """Fills a model with `weights` (by torch name, all of them) and makes a fresh optimizer state."""
        self._layout = Layout(config, device)
        self.config = config = self._layout.config
        self.step = 0
        compute = attention.resolve(config.compute, self._layout.device)
        split = self._layout.shape[1] > 1
        self._keys = batches.training(config.model, insulate=config.insulate)
        module = build(config.model, compute)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(is_trained(config, tuple(name.split("."))))
        loss = _Loss(module, config)
        self._counted = loss.counted
        self._loss = self._layout.fill(loss, weights)
        how = _compile(config, self._layout.device)
        if how != "none":
            _compile_layers([*module.vision.blocks, *module.gemma.layers])  # inside FSDP's hooks
        trained = {n: self._layout.parts[n] for n, p in self._layout.parameters.items() if p.requires_grad}
        mu, nu = ({name: torch.zeros_like(p) for name, p in trained.items()} for _ in range(2))
        average = {name: p.detach().clone() for name, p in trained.items()} if config.optimizer.ema else None
        self._state = State(trained, mu, nu, average)
        copies = self._layout.copies
        parts, sent = config.microbatches, devices.count() > 1 and not split
        stream = torch.cuda.Stream(self._layout.device) if how == "graph" else None
        with torch.cuda.stream(stream):  # where gradients are added up
            self._gradients = Gradients(
                module,
                {name: self._layout.parameters[name] for name in trained},
                [name for name in trained if name in copies and (parts > 1 or sent)],
                getattr(torch, config.compute.gradients),
                parts,
                sparse=isinstance(config.model, configs.Pi0) and not (split or config.insulate),
            )
        self._slots = [
            adamw.slot(p, mu[n], nu[n], average and average[n], copies.get(n), by_rows=n == self._gradients.by_rows)
            for n, p in trained.items()
        ]
        self._replayed = Replayed(self._backward, self._gradients.stay, stream) if how == "graph" else None
        self._shares = parts * (devices.count() if sent else 1)  # of the gradient, which are added up

    def update(self, batch: Batch) -> dict[str, Any]:
        """One optimizer step on this process's part of a batch; returns scalars that are still being computed.

        Raises:
          UserError: the batch doesn't divide into `config.microbatches` parts.
        """
        size, parts = len(batch["tokenized_prompt"]), self.config.microbatches
        if size % parts:
            raise UserError(f"a batch of {size} samples doesn't divide into config.microbatches={parts} parts")
        batch = self._layout.put(batches.leave_out(batches.select(batch, self._keys), self.config.cameras))
        rate = learning_rate(self.step, self.config.optimizer)
        with devices.precision(self.config.compute):
            try:
                metrics = self._update_fn(batch, rate)
            finally:  # whoever goes on after an error, out of memory or Ctrl-C, begins with none
                self._gradients.clear()
        self.step += 1
        return metrics

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        """The loss of the averaged weights on a batch, of which this process gives its part."""
        batch = self._layout.put(batches.leave_out(batches.select(batch, self._keys), self.config.cameras))
        with devices.precision(self.config.compute):
            if self._state.average is None:
                return self._mean_loss(batch)
            self._swap()
            try:
                return self._mean_loss(batch)
            finally:
                self._swap()

    def weights(self, *, only_trained: bool = False) -> dict[str, np.ndarray]:
        """What is deployed, by torch name: averaged where an average is kept; see `Layout.gather`."""
        parts = self._state.trained if only_trained else self._layout.parts
        return self._layout.gather(parts | (self._state.average or {}))

    def train_state(self) -> dict[str, np.ndarray]:
        """What else a resume needs: Adam's moments, and the raw weights where `weights` are averaged."""
        parts = {"mu": self._state.mu, "nu": self._state.nu}
        if self._state.average is not None:
            parts["raw"] = self._state.trained
        named = {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}
        return self._layout.gather(named)

    @torch.no_grad()
    def restore(self, step: int, train_state: Mapping[str, np.ndarray]) -> None:
        """Continues after `step` steps; the trainer was built from what `weights` gave at that step."""
        parts = ["mu", "nu", *([] if self._state.average is None else ["raw"])]
        shapes = {f"{part}/{n}": tuple(self._layout.parameters[n].shape) for part in parts for n in self._state.trained}
        strict.check({name: tuple(value.shape) for name, value in train_state.items()}, shapes, "train_state")
        for name, parameter in self._state.trained.items():
            mu, nu, *raw = (self._layout.place(train_state[f"{part}/{name}"], name) for part in parts)
            self._state.mu[name].copy_(mu), self._state.nu[name].copy_(nu)
            if raw:  # what was deployed, and so loaded, is the average
                self._state.average[name].copy_(parameter)
                parameter.copy_(raw[0])
        for slot in self._slots:
            slot.find_idle()
        self._round()
        self.step = step

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchanges the raw and the averaged weights, in place: FSDP knows where they lie; and piece by piece."""
        for name, parameter in self._state.trained.items():
            tensors = parameter, self._state.average[name]
            for here, there in zip(*(x.view(-1).split(2**26) for x in tensors), strict=True):
                raw = here.clone()
                here.copy_(there), there.copy_(raw)
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        """Brings what was made of the weights up to date: rounded copies, and what FSDP has gathered.

        Of what isn't in a layer, an evaluation, which has no backward pass, leaves it gathered for the next pass.
        """
        for name, copy in self._layout.copies.items():
            copy.copy_(self._layout.parts[name])
        if isinstance(self._loss, FSDPModule):
            self._loss.reshard()

    def _update_fn(self, batch: Batch, rate: float) -> dict[str, Any]:
        run = self._replayed.of_step() if self._replayed else self._backward
        found, rows = zip(*(run(part) for part in self._parts(batch)), strict=True)
        grads, norm = self._layout.complete(self._gradients.complete(rows), self._gradients.together)
        limit = self.config.optimizer.clip_norm
        scale = limit / norm.clamp(min=limit)
        adamw.step(self._slots, grads, scale, self.step + 1, rate, self.config.optimizer)
        return {**self._mean_losses(found), "grad_norm": norm, "learning_rate": rate}

    def _backward(self, part: Batch) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Adds a part's share to the gradients; returns its losses, and what it leaves of the embedding's rows."""
        losses = self._loss(part)
        (losses["loss"] / self._shares).backward()
        return {name: loss.detach() for name, loss in losses.items()}, self._gradients.take_rows()

    def _mean_loss(self, batch: Batch) -> float:
        return float(self._mean_losses([self._loss(part) for part in self._parts(batch)])["loss"])

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        """Of all parts of a batch the same number of samples, and by how many actions their losses are divided."""
        count = self.config.microbatches
        count = 1 if len(batch["tokenized_prompt"]) % count else count  # of an evaluation
        if "action_is_pad" in batch:
            batch["num_counted"] = self._counted(batch) / count
        return (_part(batch, i, count) for i in range(count))

    def _mean_losses(self, found: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The means over all parts of a batch and all devices."""
        sums = torch.stack([torch.stack([*losses.values()]) for losses in found]).mean(0)
        return dict(zip(found[0], _total(sums) / devices.count(), strict=True))


class _Loss(nn.Module):
    """The mean loss as a module, because FSDP acts on modules that are called.

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

    def counted(self, batch: Batch) -> Tensor:
        """How many actions of a batch count, one at least, as a mean over the devices."""
        return _total(self._counts(batch).sum()).clamp(min=1) / devices.count()

    def _mean(self, loss: Tensor, batch: Batch) -> Tensor:
        """Of a loss [B, A] over the actions that count, which are not equally many on all devices and in all parts."""
        counted = self._counts(batch)
        return (loss * counted).sum() / (batch["num_counted"] if "num_counted" in batch else self.counted(batch))

    def _counts(self, batch: Batch) -> Tensor:
        """Which actions of a batch count, float32 [B, A]."""
        padding = batch["action_is_pad"].float()
        counted = torch.ones_like(padding) if self.config.loss_on_padding else 1.0 - padding
        if self.config.max_delay:  # what is given, in all draws alike, is not learned
            counted = counted * (batch["time"].reshape(len(padding), -1, padding.shape[1])[:, 0] > 0)
        return counted


def is_trained(config: Config, path: tuple) -> bool:
    """Whether the parameter at that path is trained."""
    return not meshes.is_frozen(config, "/".join(path))


def _compile(config: Config, device: torch.device) -> str:
    """Settles `Compute.compile`.

    Raises:
      UserError: what torch or the device can't honour.
    """
    on_gpu, whole = device.type == "cuda", config.mesh.fsdp == 1 and isinstance(config.model, configs.Pi0)
    whole = whole and not config.insulate  # which picks tokens by their values
    name = config.compute.compile
    if name == "auto":
        return "none" if not on_gpu else "graph" if whole else "layers"
    if name not in ("none", "layers", "graph"):
        raise UserError(f"config.compute.compile={name!r}: torch has auto, none, layers, graph")
    if name == "graph" and not (whole and on_gpu):
        raise UserError("config.compute.compile='graph' is for pi0 and pi0.5 on GPUs, neither split nor insulated")
    if name == "layers" and not on_gpu:
        from openpi_port.pi_torch.fast import compiled  # which imports torch's exporter

        if not compiled.has_compiler():
            raise UserError("config.compute.compile='layers' needs a C++ compiler on a CPU (apt-get install g++)")
    return name


def _compile_layers(layers: Sequence[nn.Module]) -> None:
    """Compiles their `forward`, in place; all of a kind share what is compiled.

    torch counts what it has compiled of a piece of code for whomever, and beyond eight compiles no more. So this is a
    copy of the code, which another trainer of the process has no part in.
    """
    options = {"comprehensive_padding": False}  # to rows with gaps cuBLAS doesn't add a bias as it multiplies
    copies: dict[FunctionType, FunctionType] = {}
    for layer in layers:
        plain = type(layer).forward
        if plain not in copies:
            copies[plain] = copy = FunctionType(plain.__code__.replace(), plain.__globals__, closure=plain.__closure__)
            copy.__defaults__, copy.__kwdefaults__ = plain.__defaults__, plain.__kwdefaults__
        layer.forward = torch.compile(MethodType(copies[plain], layer), dynamic=False, options=options)


def _part(batch: Batch, index: int, count: int) -> Batch:
    """Every `count`-th sample of a batch, so that all devices have a share in every part."""
    if isinstance(batch, Mapping):
        return {key: _part(value, index, count) for key, value in batch.items()}
    return batch[index::count] if batch.ndim else batch


def _total(part: Tensor) -> Tensor:
    """The sum over all devices."""
    if devices.count() > 1:
        dist.all_reduce(part)
    return part
