"""A loaded model behind numpy: takes the batches of the host, compiles once per shape, returns numpy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpi_port import batch as batches
from openpi_port import config as configs
from openpi_port import grammar as grammars
from openpi_port.batch import Batch
from openpi_port.config import Compute
from openpi_port.grammar import Grammar
from openpi_port.pi_torch import attention, realtime
from openpi_port.pi_torch import device as devices
from openpi_port.pi_torch import weights as weights_io
from openpi_port.pi_torch.fast.graph import Recordings
from openpi_port.pi_torch.pi0 import Pi0
from openpi_port.pi_torch.pi0_fast import Pi0Fast, make_rules
from openpi_port.realtime import MAX_GUIDANCE, check


class Model:
    """The public methods of `Pi0` on numpy batches.

    Attributes:
      config: the architecture.
      module: the torch module, for whoever wants to go inside; whoever moves its weights clears the recordings.
      recordings: sampling as CUDA graphs.
    """

    def __init__(self, module: Pi0, device: str | None = None) -> None:
        self.config: configs.Pi0 = module.config
        self._device = devices.find(device)
        self.module = module.to(self._device).eval()
        self.recordings = Recordings(self._device)

    @torch.inference_mode()
    def loss(self, batch: Batch, noise: np.ndarray, time: np.ndarray) -> np.ndarray:
        """See `Pi0.loss`; float32 [B, A]."""
        batch = batches.select(batch, (*batches.OBSERVATION, "actions"))
        with devices.precision(self.module.compute):
            return self.module.loss(*devices.put((batch, noise, time), self._device)).cpu().numpy()

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
        module, inference = self.module, weights is None  # guidance needs gradients, which inference mode rules out

        def sample(batch: Batch, noise: Tensor, previous: Tensor, weights: Tensor, delay: Tensor) -> Tensor:
            if weights is not None:
                return realtime.sample_guided(module, batch, noise, previous, weights, num_steps, limit)
            if delay is not None:
                return realtime.sample_conditioned(module, batch, noise, previous, delay, num_steps)
            return module.sample_actions(batch, noise, num_steps)

        inputs = [batches.select(batch, batches.OBSERVATION), noise, previous, weights, delay]
        with devices.precision(module.compute), torch.inference_mode(inference), torch.no_grad():
            arrays = _leaves(inputs)
            call = lambda *tensors: sample(*_like(inputs, iter(tensors)))  # noqa: E731
            options = num_steps, limit, *sorted(batch["image"]), *(x is None for x in inputs)
            return self.recordings.run(options, call, arrays)


class FastModel:
    """The public methods of `Pi0Fast` on numpy batches.

    Attributes:
      config: the architecture.
      module: the torch module, for whoever wants to go inside; whoever moves its weights clears the recordings.
      recordings: decoding as CUDA graphs.
    """

    def __init__(self, module: Pi0Fast, device: str | None = None) -> None:
        self.config: configs.Pi0Fast = module.config
        self._device = devices.find(device)
        self.module = module.to(self._device).eval()
        self.recordings = Recordings(self._device)

    @torch.inference_mode()
    def loss(self, batch: Batch) -> np.ndarray:
        """See `Pi0Fast.loss`; float32 [B]."""
        batch = batches.select(batch, batches.FAST_TRAINING)
        with devices.precision(self.module.compute):
            return self.module.loss(devices.put(batch, self._device)).cpu().numpy()

    @torch.inference_mode()
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
        inputs = [batch, uniforms]
        with devices.precision(self.module.compute):
            writer = lambda: _Writer(self.module, inputs, max_steps, temperature, grammar)  # noqa: E731
            options = id(grammar), max_steps, temperature, *sorted(batch["image"])
            return self.recordings.decode(options, writer, _leaves(inputs))


class _Writer:
    """Decoding by the plain model, see `graph.Writer`.

    Args:
      module: the model.
      like: a batch, and draws or None.
      max_steps, temperature, grammar: see `FastModel.decode`.
    """

    def __init__(
        self, module: Pi0Fast, like: list[Any], max_steps: int, temperature: float, grammar: Grammar | None
    ) -> None:
        self._module, self._like, self._max_steps, self._temperature = module, like, max_steps, temperature or 1.0
        self._given = grammar  # kept, so that its id stays its own
        device = module.gemma.embedding.device
        self._grammar = None if grammar is None else Grammar(*devices.put(grammar, device))
        self.advances = max_steps - 1 - (0 if grammar is None else len(grammar.lead))

    def begin(self, *tensors: Tensor) -> Tensor:
        batch, draws = _like(self._like, iter(tensors))
        self._rules = make_rules(self._module.gemma, self._temperature, draws, self._grammar)
        self._decoding = self._module.begin(batch, self._max_steps, self._rules)
        return self._decoding.done.all()[None]

    def advance(self) -> Tensor:
        return self._module.step(self._decoding, self._rules).done.all()[None]

    @property
    def tokens(self) -> Tensor:
        return self._decoding.tokens


def _leaves(tree: Any) -> list[np.ndarray]:
    """The arrays in nested lists and mappings, which may hold None."""
    if isinstance(tree, Mapping):
        return [leaf for key in sorted(tree) for leaf in _leaves(tree[key])]
    if isinstance(tree, list):
        return [leaf for part in tree for leaf in _leaves(part)]
    return [] if tree is None else [np.asarray(tree)]


def _like(tree: Any, leaves: Iterator[Tensor]) -> Any:
    """The tree that `_leaves` gave leaves of, with others in their places."""
    if isinstance(tree, Mapping):
        return {key: _like(tree[key], leaves) for key in sorted(tree)}
    if isinstance(tree, list):
        return [_like(part, leaves) for part in tree]
    return None if tree is None else next(leaves)


def build(config: configs.Pi0 | configs.Pi0Fast, compute: Compute) -> Pi0 | Pi0Fast:
    """A model without memory: shapes only, to be filled by `weights.load`."""
    module = Pi0Fast if isinstance(config, configs.Pi0Fast) else Pi0
    with torch.device("meta"):
        return module(config, compute)


def load(
    config: configs.Pi0 | configs.Pi0Fast,
    weights: Mapping[str, np.ndarray],
    compute: Compute,
    device: str | None = None,
) -> Model | FastModel:
    """Builds a model and fills it, strictly.

    Args:
      config: the architecture.
      weights: by torch name; rounded to bfloat16 where that is the dtype of `compute`.
      compute: dtype, attention and rematerialisation.
      device: a torch device ("cpu", "cuda:1"); None takes the first GPU, else the CPU.

    Returns:
      The model.

    Raises:
      UserError: weights are missing, left over or misshapen, or the device can't honour `compute`.
    """
    compute = attention.resolve(compute, devices.find(device))
    dtype = "bfloat16" if compute.dtype == "bfloat16" else None
    module = weights_io.load(build(config, compute), weights, devices.find(device), dtype)
    return FastModel(module, device) if isinstance(config, configs.Pi0Fast) else Model(module, device)
