"""A loaded model made ready for fast inference: the same methods, the same numbers, another way of computing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from openpi_port import batch as batches
from openpi_port import config as configs
from openpi_port.batch import Batch
from openpi_port.pi_torch import device as devices
from openpi_port.pi_torch.fast.flow import Flow, Inputs
from openpi_port.pi_torch.fast.graph import Recorded, recorded
from openpi_port.pi_torch.infer import Model
from openpi_port.pi_torch.pi0 import Pi0


def optimize(model: Model) -> Prepared:
    """Prepares a model: merges and reorders its weights, computes what depends on the flow time alone.

    On a GPU every shape (batch size, cameras that are there, length of the prompt, number of steps) is recorded as one
    CUDA graph when it first occurs.

    Args:
      model: as loaded. It answers `loss` as before; so its weights stay.

    Returns:
      A model with the same methods, which computes the same.

    Raises:
      UserError: the model has adapters that are not merged, or several heads of keys and values.
    """
    return Prepared(model)


class Prepared:
    """A prepared pi0 or pi0.5.

    Attributes:
      config: the architecture.
      module: the plain torch module, which keeps its weights beside the prepared ones.
    """

    def __init__(self, model: Model) -> None:
        self._plain = model
        self.config: configs.Pi0 = model.config
        self.module: Pi0 = model.module
        self._device = model.module.gemma.embedding.device
        self._graphs: dict[Any, Recorded] = {}
        with torch.inference_mode(), devices.precision(self.module.compute):
            self._flow = Flow(self.module)

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
            if self._device.type == "cpu":
                arrays = [np.empty(shape, dtype) for shape, dtype in self._layout(batch, noise)]
                self._fill(arrays, batch, noise)
                return self._flow.sample_actions(Inputs(*map(torch.from_numpy, arrays)), num_steps).numpy()
            graph = self._recorded(batch, noise, num_steps)
            self._fill(graph.host, batch, noise)
            return graph.run()

    @torch.inference_mode()
    def stages(self, batch: Batch, noise: np.ndarray, num_steps: int = 10) -> dict[str, Callable[[], None]]:
        """Calls that run one part each on the device and wait for its end: "vision", "prefix", "step" (one of them)."""
        batch = batches.trim(batches.select(batch, batches.OBSERVATION), self.config)
        arrays = [np.empty(shape, dtype) for shape, dtype in self._layout(batch, noise)]
        self._fill(arrays, batch, noise)
        flow, inputs = self._flow, Inputs(*devices.put(tuple(arrays), self._device))
        with devices.precision(self.module.compute):
            tokens = flow.prefix(inputs)
            past = flow.prefill(tokens.clone(), inputs.valid, inputs.state)
            first = flow.steps(num_steps)[0]
            calls = {
                "vision": lambda: flow.prefix(inputs),
                "prefix": lambda: flow.prefill(tokens.clone(), inputs.valid, inputs.state),
                "step": lambda: flow.step(first, past, inputs.noise),
            }
            if self._device.type == "cuda":
                return {name: recorded(call, self._device) for name, call in calls.items()}
        return {name: torch.inference_mode()(call) for name, call in calls.items()}

    def _recorded(self, batch: Batch, noise: np.ndarray, num_steps: int) -> Recorded:
        """The graph for a batch of this shape."""
        layout = self._layout(batch, noise)
        key = (num_steps, *layout)
        if key not in self._graphs:
            arrays = tuple(np.zeros(shape, dtype) for shape, dtype in layout)
            self._fill(list(arrays), batch, noise)
            pool = next(iter(self._graphs.values())).pool if self._graphs else None
            call = lambda *inputs: self._flow.sample_actions(Inputs(*inputs), num_steps)  # noqa: E731
            self._graphs[key] = Recorded(call, arrays, self._device, pool)
        return self._graphs[key]

    def _layout(self, batch: Batch, noise: np.ndarray) -> tuple[tuple[tuple[int, ...], np.dtype], ...]:
        """Shapes and dtypes of `Inputs` for a trimmed batch."""
        pictures, (size, length) = list(batch["image"].values()), batch["tokenized_prompt"].shape
        pixels, tokens = self.config.vision.image_size, self.config.vision.num_tokens
        return (
            ((size, len(pictures), pixels, pixels, 3), np.result_type(*pictures) if pictures else np.dtype(np.uint8)),
            ((size, length), np.dtype(np.int32)),
            ((size, len(pictures) * tokens + length), np.dtype(bool)),
            ((size, self.config.action_dim), np.dtype(np.float32)),
            (noise.shape, np.dtype(np.float32)),
        )

    def _fill(self, arrays: list[np.ndarray], batch: Batch, noise: np.ndarray) -> None:
        """Writes a trimmed batch into arrays of that layout."""
        images, tokens, valid, state, start = arrays
        per_image = self.config.vision.num_tokens
        for i, (camera, image) in enumerate(batch["image"].items()):
            images[:, i] = image
            valid[:, i * per_image : (i + 1) * per_image] = np.asarray(batch["image_mask"][camera])[:, None]
        tokens[...] = batch["tokenized_prompt"]
        valid[:, valid.shape[1] - tokens.shape[1] :] = batch["tokenized_prompt_mask"]
        state[...], start[...] = batch["state"], noise
