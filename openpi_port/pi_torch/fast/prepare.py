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
from openpi_port.pi_torch.infer import Model
from openpi_port.pi_torch.pi0 import Pi0


def optimize(model: Model) -> Prepared:
    """Prepares a model: merges and reorders its weights, computes what depends on the flow time alone.

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
        with devices.precision(self.module.compute):
            inputs = Inputs(*devices.put(_arrays(batch, noise, self.config), self._device))
            return self._flow.sample_actions(inputs, num_steps).cpu().numpy()

    def stages(self, batch: Batch, noise: np.ndarray, num_steps: int = 10) -> dict[str, Callable[[], None]]:
        """Calls that run one part each on the device and wait for its end: "vision", "prefix", "step" (one of them)."""
        raise NotImplementedError


def _arrays(batch: Batch, noise: np.ndarray, config: configs.Pi0) -> Inputs:
    """The trimmed observation as few arrays."""
    batch = batches.trim(batches.select(batch, batches.OBSERVATION), config)
    size, pixels = len(noise), config.vision.image_size
    images = list(batch["image"].values())
    seen = [np.repeat(np.asarray(m)[:, None], config.vision.num_tokens, 1) for m in batch["image_mask"].values()]
    return Inputs(
        images=np.stack(images, 1) if images else np.zeros((size, 0, pixels, pixels, 3), np.uint8),
        tokens=batch["tokenized_prompt"],
        valid=np.concatenate([*seen, batch["tokenized_prompt_mask"]], 1),
        state=np.asarray(batch["state"], np.float32),
        noise=np.asarray(noise, np.float32),
    )
