"""A loaded model made ready for fast inference: the same methods, the same numbers, another way of computing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from openpi_port import batch as batches
from openpi_port import config as configs
from openpi_port import grammar as grammars
from openpi_port.batch import Batch
from openpi_port.errors import UserError
from openpi_port.grammar import Grammar
from openpi_port.pi_torch import device as devices
from openpi_port.pi_torch.fast import compiled, pack
from openpi_port.pi_torch.fast.compiled import Compiled
from openpi_port.pi_torch.fast.decode import Decoder
from openpi_port.pi_torch.fast.decode import Inputs as DecodeInputs
from openpi_port.pi_torch.fast.flow import Flow, Inputs, Language
from openpi_port.pi_torch.fast.graph import Recordings, recorded
from openpi_port.pi_torch.infer import FastModel, Model
from openpi_port.pi_torch.pi0 import Pi0
from openpi_port.pi_torch.pi0_fast import Pi0Fast


def optimize(model: Model | FastModel, *, float8: bool = False) -> Prepared | PreparedFast:
    """Prepares a model: merges and reorders its weights, computes what depends on the flow time alone.

    On a GPU every shape (batch size, cameras that are there, length of the prompt, number of steps) is recorded when it
    first occurs: pi0 and pi0.5 as one CUDA graph, pi0-FAST as one up to its first token and one for every token after.

    Args:
      model: as loaded; pi0, pi0.5 or pi0-FAST. It answers as before, from weights that are views of the prepared ones
        wherever these hold the same values.
      float8: images and prompt go through the language model's MLPs in float8 (`float8.py`): faster and less exact.

    Returns:
      A model with the same methods, which computes the same, or nearly so in float8.

    Raises:
      UserError: the model has adapters that are not merged, or several heads of keys and values; or a GPU without
        float8 is asked for it; or there are no kernels for a GPU, because it is too old or Triton is not installed.
    """
    device = model.module.gemma.embedding.device
    if float8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(f"float8: {torch.cuda.get_device_name(device)} has no such products; leave it out")
    if device.type == "cuda" and model.module.compute.dtype == "bfloat16":
        if importlib.util.find_spec("triton") is None:
            raise UserError("--fast on a GPU in bfloat16 needs Triton, which is not installed: pip install triton")
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise UserError(f"--fast in bfloat16: {torch.cuda.get_device_name(device)} has none; take float32")
    kind = PreparedFast if isinstance(model, FastModel) else Prepared
    return kind(model, float8=float8)


class Prepared:
    """A prepared pi0 or pi0.5.

    Attributes:
      config: the architecture.
      module: the plain torch module, whose weights are views of the prepared ones where these hold the same values.
      recordings: CUDA graphs.
    """

    def __init__(self, model: Model, *, float8: bool = False) -> None:
        self._plain = model
        self.config: configs.Pi0 = model.config
        self.module: Pi0 = model.module
        self._device = model.module.gemma.embedding.device
        self.recordings = Recordings(self._device)
        model.recordings.clear()
        with torch.no_grad(), devices.precision(self.module.compute):
            compiles = not float8 and compiled.pays(self.module)
            self._flow = Flow(self.module, eight=float8, traced=compiles)
            self._one = Compiled(self._flow) if compiles else self._flow  # for one sample

    def loss(self, batch: Batch, noise: np.ndarray, time: np.ndarray) -> np.ndarray:
        """The plain model's."""
        return self._plain.loss(batch, noise, time)

    @torch.inference_mode()
    def sample_actions(self, batch: Batch, noise: np.ndarray, num_steps: int = 10, **others: Any) -> np.ndarray:
        """See `Pi0.sample_actions`; float32 [B, A, J].

        Args:
          batch: observation in numpy. Cameras that no sample has are left out, and so is padding of the prompt.
          noise: [B, A, J].
          num_steps: number of Euler steps.
          **others: what else the plain model takes; with any that is not None it answers.
        """
        if any(value is not None for value in others.values()):
            return self._plain.sample_actions(batch, noise, num_steps, **others)
        batch = batches.trim(batches.select(batch, batches.OBSERVATION), self.config)
        with devices.precision(self.module.compute):
            arrays = [*_observe(batch, self.config), *(np.asarray(a, np.float32) for a in (batch["state"], noise))]
            flow = self._one if len(noise) == 1 else self._flow
            return self.recordings.run(num_steps, lambda *of: flow.sample_actions(Inputs(*of), num_steps), arrays)

    @torch.inference_mode()
    def stages(self, batch: Batch, noise: np.ndarray) -> dict[str, Callable[[], None]]:
        """Calls that run "vision" or "prefix" alone on the device and wait for its end; the rest are steps."""
        batch = batches.trim(batches.select(batch, batches.OBSERVATION), self.config)
        arrays = [*_observe(batch, self.config), *(np.asarray(a, np.float32) for a in (batch["state"], noise))]
        flow, inputs = self._one if len(noise) == 1 else self._flow, Inputs(*devices.put(tuple(arrays), self._device))
        with devices.precision(self.module.compute):
            tokens = flow.prefix(inputs)
            calls = {
                "vision": lambda: flow.prefix(inputs),
                "prefix": lambda: flow.prefill(tokens.clone(), inputs.length, inputs.state),
            }
            return _stages(calls, self._device)


class PreparedFast:
    """A prepared pi0-FAST.

    Attributes:
      config: the architecture.
      module: the plain torch module, whose weights are views of the prepared ones where these hold the same values.
      recordings: CUDA graphs.
    """

    def __init__(self, model: FastModel, *, float8: bool = False) -> None:
        self._plain = model
        self.config: configs.Pi0Fast = model.config
        self.module: Pi0Fast = model.module
        self._device = model.module.gemma.embedding.device
        self.recordings = Recordings(self._device)
        model.recordings.clear()
        with torch.no_grad(), devices.precision(self.module.compute):
            turns = pack.turns(self.config.prefix_len, self.config.language.head_dim, self._device)
            self._language = Language(self.module, turns, eight=float8)

    def loss(self, batch: Batch) -> np.ndarray:
        """The plain model's."""
        return self._plain.loss(batch)

    @torch.inference_mode()
    def decode(
        self,
        batch: Batch,
        max_steps: int = 256,
        temperature: float = 0.0,
        rng: int | np.random.Generator = 0,
        grammar: Grammar | None = None,
    ) -> np.ndarray:
        """See `FastModel.decode`; int32 [B, G], 0 after the end of sequence."""
        with devices.precision(self.module.compute):
            arrays = self._arrays(batch, max_steps, temperature, rng, grammar)
            make = partial(self._decoder, arrays, temperature, grammar)
            return self.recordings.decode((id(grammar), temperature), make, arrays)

    @torch.inference_mode()
    def stages(
        self, batch: Batch, max_steps: int = 256, grammar: Grammar | None = None
    ) -> dict[str, Callable[[], None]]:
        """See `Prepared.stages`: "vision" and "prefix"; the rest are tokens."""
        with devices.precision(self.module.compute):
            arrays = self._arrays(batch, max_steps, 0.0, 0, grammar)
            decoder, inputs = self._decoder(arrays, 0.0, grammar), DecodeInputs(*devices.put(arrays, self._device))
            decoder.begin(*inputs)
            tokens = decoder.embed(inputs)
            calls = {
                "vision": lambda: decoder.embed(inputs),
                "prefix": lambda: decoder.prefill(tokens.clone(), inputs),
            }
            return _stages(calls, self._device)

    def _arrays(
        self, batch: Batch, max_steps: int, temperature: float, rng: int | np.random.Generator, grammar: Grammar | None
    ) -> list[np.ndarray]:
        """What a decoder reads of a batch; see `DecodeInputs`."""
        batch = batches.trim(batches.select(batch, batches.prompt(batch)), self.config)
        size = len(batch["tokenized_prompt"])
        uniforms = grammars.check(grammar, max_steps, temperature, rng, size)
        return [
            *_observe(batch, self.config),
            np.zeros((size, max_steps), np.float32) if uniforms is None else uniforms,
        ]

    def _decoder(self, arrays: list[np.ndarray], temperature: float, grammar: Grammar | None) -> Decoder:
        """A decoder for arrays of these shapes."""
        size, max_steps = arrays[-1].shape
        return Decoder(self.module, self._language, size, len(arrays[2]) // size, max_steps, temperature, grammar)


def _observe(batch: Batch, config: configs.Pi0 | configs.Pi0Fast) -> list[np.ndarray]:
    """Images, tokens, the order of both in which valid ones are first, and their number, of a trimmed batch."""
    pictures, tokens = list(batch["image"].values()), np.asarray(batch["tokenized_prompt"], np.int32)
    size, pixels, per_image = len(tokens), config.vision.image_size, config.vision.num_tokens
    images = np.stack(pictures, 1) if pictures else np.zeros((size, 0, pixels, pixels, 3), np.uint8)
    seen = np.stack([*batch["image_mask"].values()], 1) if pictures else np.zeros((size, 0), bool)
    valid = np.concatenate([seen.repeat(per_image, 1), batch["tokenized_prompt_mask"]], 1)
    order = np.argsort(~valid, axis=1, kind="stable") + np.arange(size)[:, None] * valid.shape[1]
    return [images, tokens, order.astype(np.int32).ravel(), valid.sum(1, dtype=np.int32)]


def _stages(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, Callable[[], None]]:
    """Recorded calls on a GPU, the calls themselves on a CPU."""
    if device.type == "cuda":
        return {name: recorded(call, device) for name, call in calls.items()}
    return {name: torch.inference_mode()(call) for name, call in calls.items()}
