"""A loaded model behind numpy: takes the batches of the host, compiles once per shape, returns numpy."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from openpi_port import batch as batches
from openpi_port import config as configs
from openpi_port import grammar as grammars
from openpi_port.batch import Batch
from openpi_port.config import Compute
from openpi_port.grammar import Grammar
from openpi_port.pi_flax import attention, realtime
from openpi_port.pi_flax import device as devices
from openpi_port.pi_flax import weights as weights_io
from openpi_port.pi_flax.fast import options
from openpi_port.pi_flax.pi0 import Pi0
from openpi_port.pi_flax.pi0_fast import Pi0Fast
from openpi_port.realtime import MAX_GUIDANCE, check


class Model:
    """The public methods of `Pi0` on numpy batches.

    Attributes:
      config: the architecture.
      module: the nnx module, for whoever wants to go inside.
    """

    def __init__(self, module: Pi0, device: str | None = None) -> None:
        self.config: configs.Pi0 = module.config
        self._device = devices.find(device)
        graph, state = nnx.split(module)
        self._state = devices.put(state, self._device)
        self.module = nnx.merge(graph, self._state)

        @jax.jit
        def loss(state: nnx.State, batch: Batch, noise: jax.Array, time: jax.Array) -> jax.Array:
            return nnx.merge(graph, state).loss(batch, noise, time)

        @partial(jax.jit, static_argnames="num_steps")
        def sample_actions(
            state: nnx.State,
            batch: Batch,
            noise: jax.Array,
            previous: jax.Array | None,
            weights: jax.Array | None,
            delay: jax.Array | None,
            limit: jax.Array,
            num_steps: int,
        ) -> jax.Array:
            module = nnx.merge(graph, state)
            if weights is not None:
                return realtime.sample_guided(module, batch, noise, previous, weights, num_steps, limit)
            if delay is not None:
                return realtime.sample_conditioned(module, batch, noise, previous, delay, num_steps)
            return module.sample_actions(batch, noise, num_steps)

        self._loss, self._sample_actions = loss, sample_actions

    def loss(self, batch: Batch, noise: np.ndarray, time: np.ndarray) -> np.ndarray:
        """See `Pi0.loss`; float32 [B, A]."""
        batch = batches.select(batch, (*batches.OBSERVATION, "actions"))
        with devices.precision(self.module.compute):
            return np.asarray(self._loss(self._state, *devices.put((batch, noise, time), self._device)))

    def sample_actions(
        self,
        batch: Batch,
        noise: np.ndarray,
        num_steps: int = 10,
        *,
        previous: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        delay: np.ndarray | None = None,
        limit: float = MAX_GUIDANCE,
    ) -> np.ndarray:
        """See `Pi0.sample_actions`, `realtime.sample_guided` and `realtime.sample_conditioned`.

        Args:
          batch: observation.
          noise: [B, A, J], the starting point.
          num_steps: number of Euler steps.
          previous: [B, A, J], the chunk that is being played, from the observation's action on, for real-time chunking:
            with `weights` it guides, with `delay` its first actions are given.
          weights: [B, A, J] or 1 for J.
          delay: int [B].
          limit: of the guidance.

        Returns:
          float32 [B, A, J].
        """
        check(previous, weights, delay)
        batch = batches.select(batch, batches.OBSERVATION)
        with devices.precision(self.module.compute):
            inputs = devices.put((batch, noise, previous, weights, delay), self._device)
            return np.asarray(self._sample_actions(self._state, *inputs, np.float32(limit), num_steps=num_steps))


class FastModel:
    """The public methods of `Pi0Fast` on numpy batches.

    Attributes:
      config: the architecture.
      module: the nnx module, for whoever wants to go inside.
    """

    def __init__(self, module: Pi0Fast, device: str | None = None) -> None:
        self.config: configs.Pi0Fast = module.config
        self._device = devices.find(device)
        graph, state = nnx.split(module)
        self._state = devices.put(state, self._device)
        self.module = nnx.merge(graph, self._state)
        self._loss = jax.jit(lambda state, batch: nnx.merge(graph, state).loss(batch))

        @partial(jax.jit, static_argnames="max_steps")
        def decode(state: nnx.State, batch: Batch, max_steps: int, *options: Any) -> jax.Array:
            return nnx.merge(graph, state).decode(batch, max_steps, *options)

        self._decode = decode

    def loss(self, batch: Batch) -> np.ndarray:
        """See `Pi0Fast.loss`; float32 [B]."""
        batch = batches.select(batch, batches.FAST_TRAINING)
        with devices.precision(self.module.compute):
            return np.asarray(self._loss(self._state, devices.put(batch, self._device)))

    def decode(
        self,
        batch: Batch,
        max_steps: int = 256,
        temperature: float = 0.0,
        rng: int | np.random.Generator = 0,
        grammar: Grammar | None = None,
    ) -> np.ndarray:
        """Generates tokens; see `Pi0Fast.decode`.

        Args:
          batch: observation; of a training batch the prompt alone is taken.
          max_steps: G, how many tokens at most.
          temperature: 0 takes the likeliest token at every step; above, tokens are drawn.
          rng: of the draws; both frameworks draw the same.
          grammar: from `grammar.build`, keeps to whole chunks of actions; None allows every token, as openpi does.

        Returns:
          int32 [B, G], 0 after the end of sequence.
        """
        batch = batches.select(batch, batches.prompt(batch))
        uniforms = grammars.check(grammar, max_steps, temperature, rng, len(batch["tokenized_prompt"]))
        with devices.precision(self.module.compute):
            inputs = devices.put((np.float32(temperature or 1), uniforms, grammar), self._device)
            batch = devices.put(batch, self._device)
            return np.asarray(self._decode(self._state, batch, max_steps, *inputs))


def build(config: configs.Pi0 | configs.Pi0Fast, compute: Compute) -> Pi0 | Pi0Fast:
    """A model without memory: shapes only, to be filled by `weights.load`."""
    module = Pi0Fast if isinstance(config, configs.Pi0Fast) else Pi0
    return nnx.eval_shape(lambda: module(config, compute))


def load(
    config: configs.Pi0 | configs.Pi0Fast,
    weights: Mapping[str, np.ndarray],
    compute: Compute,
    device: str | None = None,
) -> Model | FastModel:
    """Builds a model and fills it, strictly.

    Args:
      config: the architecture.
      weights: by Flax path; rounded to bfloat16 where that is the dtype of `compute`.
      compute: dtype, attention and rematerialisation.
      device: a platform ("cpu", "gpu", "tpu"); None takes the default device.

    Returns:
      The model.

    Raises:
      UserError: weights are missing, left over or misshapen, or the device can't honour `compute`.
    """
    place = devices.find(device)
    options.keep_programs(place)
    compute = attention.resolve(compute, place)
    dtype = "bfloat16" if compute.dtype == "bfloat16" else None
    module = weights_io.load(build(config, compute), weights, place, dtype)
    return FastModel(module, device) if isinstance(config, configs.Pi0Fast) else Model(module, device)
