"""A loaded model behind numpy: takes the batches of the host, compiles once per shape, returns numpy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from openpi_port import batch as batches
from openpi_port.batch import Batch
from openpi_port.config import Compute
from openpi_port.config import Pi0 as Config
from openpi_port.pi_torch import device as devices
from openpi_port.pi_torch import weights as weights_io
from openpi_port.pi_torch.pi0 import Pi0


class Model:
    """The public methods of `Pi0` on numpy batches.

    Attributes:
      config: the architecture.
      module: the torch module, for whoever wants to go inside.
    """

    def __init__(self, module: Pi0, device: str | None = None) -> None:
        self.config: Config = module.config
        self._device = devices.find(device)
        self.module = module.to(self._device).eval()

    @torch.inference_mode()
    def loss(self, batch: Batch, noise: np.ndarray, time: np.ndarray) -> np.ndarray:
        """See `Pi0.loss`; float32 [B, A]."""
        batch = batches.select(batch, (*batches.OBSERVATION, "actions"))
        with devices.precision(self.module.compute):
            return self.module.loss(*devices.put((batch, noise, time), self._device)).cpu().numpy()

    @torch.inference_mode()
    def sample_actions(self, batch: Batch, noise: np.ndarray, num_steps: int = 10) -> np.ndarray:
        """See `Pi0.sample_actions`; float32 [B, A, J]."""
        batch = batches.select(batch, batches.OBSERVATION)
        with devices.precision(self.module.compute):
            batch, noise = devices.put((batch, noise), self._device)
            return self.module.sample_actions(batch, noise, num_steps).cpu().numpy()


def build(config: Config, compute: Compute) -> Pi0:
    """A model without memory: shapes only, to be filled by `weights.load`."""
    with torch.device("meta"):
        return Pi0(config, compute)


def load(config: Config, weights: Mapping[str, np.ndarray], compute: Compute, device: str | None = None) -> Model:
    """Builds a model and fills it, strictly.

    Args:
      config: the architecture.
      weights: by torch name; rounded to bfloat16 where that is the dtype of `compute`.
      compute: dtype and rematerialisation.
      device: a torch device ("cpu", "cuda:1"); None takes the first GPU, else the CPU.

    Returns:
      The model.

    Raises:
      UserError: weights are missing, left over or misshapen.
    """
    module = weights_io.load(build(config, compute), weights)
    if compute.dtype == "bfloat16":
        module = module.to(torch.bfloat16)
    return Model(module, device)
