"""A loaded model behind numpy: takes the batches of the host, compiles once per shape, returns numpy."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import numpy as np
from flax import nnx

from openpi_port import batch as batches
from openpi_port.batch import Batch
from openpi_port.config import Compute
from openpi_port.config import Pi0 as Config
from openpi_port.pi_flax import device as devices
from openpi_port.pi_flax import weights as weights_io
from openpi_port.pi_flax.pi0 import Pi0


class Model:
    """The public methods of `Pi0` on numpy batches.

    Attributes:
      config: the architecture.
      module: the nnx module, for whoever wants to go inside.
    """

    def __init__(self, module: Pi0, device: str | None = None) -> None:
        self.config: Config = module.config
        self._device = devices.find(device)
        graph, state = nnx.split(module)
        self._state = devices.put(state, self._device)
        self.module = nnx.merge(graph, self._state)

        @jax.jit
        def loss(state: nnx.State, batch: Batch, noise: jax.Array, time: jax.Array) -> jax.Array:
            return nnx.merge(graph, state).loss(batch, noise, time)

        @partial(jax.jit, static_argnames="num_steps")
        def sample_actions(state: nnx.State, batch: Batch, noise: jax.Array, num_steps: int) -> jax.Array:
            return nnx.merge(graph, state).sample_actions(batch, noise, num_steps)

        self._loss, self._sample_actions = loss, sample_actions

    def loss(self, batch: Batch, noise: np.ndarray, time: np.ndarray) -> np.ndarray:
        """See `Pi0.loss`; float32 [B, A]."""
        batch = batches.select(batch, (*batches.OBSERVATION, "actions"))
        with devices.precision(self.module.compute):
            return np.asarray(self._loss(self._state, *devices.put((batch, noise, time), self._device)))

    def sample_actions(self, batch: Batch, noise: np.ndarray, num_steps: int = 10) -> np.ndarray:
        """See `Pi0.sample_actions`; float32 [B, A, J]."""
        batch = batches.select(batch, batches.OBSERVATION)
        with devices.precision(self.module.compute):
            batch, noise = devices.put((batch, noise), self._device)
            return np.asarray(self._sample_actions(self._state, batch, noise, num_steps))


def build(config: Config, compute: Compute) -> Pi0:
    """A model without memory: shapes only, to be filled by `weights.load`."""
    return nnx.eval_shape(lambda: Pi0(config, compute))


def load(config: Config, weights: Mapping[str, np.ndarray], compute: Compute, device: str | None = None) -> Model:
    """Builds a model and fills it, strictly.

    Args:
      config: the architecture.
      weights: by Flax path; rounded to bfloat16 where that is the dtype of `compute`.
      compute: dtype and rematerialisation.
      device: a platform ("cpu", "gpu", "tpu"); None takes the default device.

    Returns:
      The model.

    Raises:
      UserError: weights are missing, left over or misshapen.
    """
    module = weights_io.load(build(config, compute), weights)
    if compute.dtype == "bfloat16":
        graph, state = nnx.split(module)
        module = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), state))
    return Model(module, device)
