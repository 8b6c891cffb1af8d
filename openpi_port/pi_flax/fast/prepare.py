"""Prepares a loaded model for fast inference on the device where it lies.

    fast = optimize(openpi_port.load_model(path, backend="flax", dtype="bfloat16"))
    actions = fast.sample_actions(batch, noise)

It computes what the plain model computes (see `flow`). A camera that a whole batch lacks is left out, and the prompt is
cut to the shortest bucket that holds it; each such shape compiles once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from openpi_port import batch as batches
from openpi_port import config as configs
from openpi_port import grammar as grammars
from openpi_port.batch import Batch
from openpi_port.errors import UserError
from openpi_port.grammar import Grammar
from openpi_port.pi_flax import device as devices
from openpi_port.pi_flax.fast import decode, flow, options, split, transfer
from openpi_port.pi_flax.infer import FastModel, Model
from openpi_port.pi_flax.pi0 import Pi0
from openpi_port.pi_flax.pi0_fast import Pi0Fast

EVEN = 8  # the prefix's length is a multiple: cuDNN takes no odd ones, and rows start aligned


def optimize(model: Model | FastModel, *, float8: bool = False) -> Prepared | PreparedFast:
    """Prepares a loaded model; the given one is kept for what is not in a hurry (`loss`).

    Args:
      model: as loaded.
      float8: not in Flax.

    Raises:
      UserError: its weights have unmerged LoRA adapters, or float8 is asked for.
    """
    if float8:
        raise UserError("float8: only torch prepares models for it (backend torch)")
    (device,) = model.module.gemma.embedding[...].devices()
    options.keep_programs(device)
    return PreparedFast(model) if isinstance(model, FastModel) else Prepared(model)


class Prepared:
    """A prepared pi0 or pi0.5, behind the methods of `infer.Model`.

    Attributes:
      config: the architecture.
      module: the plain nnx module.
    """

    def __init__(self, model: Model, how: flow.Options | None = None) -> None:
        self.config: configs.Pi0 = model.config
        self.module: Pi0 = model.module
        self._plain = model
        (self._device,) = model.module.gemma.embedding[...].devices()
        self._dtype = self.module.compute.dtype
        how = options.flow(self.module.compute, self._device) if how is None else how
        with devices.precision(self.module.compute):
            self._weights = flow.weights(self.module)
        self._how = how = how._replace(mesh=split.mesh(self._device, self._weights))
        self._weights = split.everywhere(self._weights, how.mesh)
        config, dtype = self.config, self._dtype
        self._times: dict[int, flow.Times] = {}
        self._sample = jax.jit(
            lambda w, times, flat, layout: flow.sample(
                w, config, dtype, times, split.whole(transfer.unpack(flat, layout), how.mesh), how
            ),
            static_argnums=3,
        )
        self._see = jax.jit(lambda w, images: flow.see(w.vision, config.vision, images, dtype, how))
        self._read = jax.jit(lambda w, tokens, inputs: flow.read(w, config, tokens, inputs, how))

    def loss(self, batch: Batch, noise: np.ndarray, time: np.ndarray) -> np.ndarray:
        """The plain model's; float32 [B, A]."""
        return self._plain.loss(batch, noise, time)

    def sample_actions(self, batch: Batch, noise: np.ndarray, num_steps: int = 10, **others: Any) -> np.ndarray:
        """See `Pi0.sample_actions`; float32 [B, A, J].

        Args:
          batch: observation.
          noise: [B, A, J].
          num_steps: Euler steps.
          **others: what else the plain model takes; where any is given, it answers.
        """
        if any(value is not None for value in others.values()):
            return self._plain.sample_actions(batch, noise, num_steps, **others)
        with devices.precision(self.module.compute):
            return np.asarray(
                self._sample(self._weights, self._times_of(num_steps), *transfer.pack(self._inputs(batch, noise)))
            )

    def stages(self, batch: Batch, noise: np.ndarray) -> dict[str, Callable[[], None]]:
        """Parts of a chunk alone, on inputs that lie on the device: calls that wait for its end.

        Returns:
          "vision" and "prefix"; what is left are the steps.
        """
        inputs = split.everywhere(devices.put(self._inputs(batch, noise), self._device), self._how.mesh)
        w = self._weights
        with devices.precision(self.module.compute):
            tokens = self._see(w, inputs.images)
        return {
            "vision": _timed(self.module, self._see, w, inputs.images),
            "prefix": _timed(self.module, self._read, w, tokens, inputs),
        }

    def _inputs(self, batch: Batch, noise: np.ndarray) -> flow.Inputs:
        batch = batches.trim(batches.select(batch, batches.OBSERVATION), self.config)
        flows = {"state": np.asarray(batch["state"], np.float32), "noise": np.asarray(noise, np.float32)}
        return _observe(batch, self.config, self._how)._replace(**flows)

    def _times_of(self, num_steps: int) -> flow.Times:
        if num_steps not in self._times:
            graph, state = nnx.split(self.module)
            times = jax.jit(lambda state: flow.times(nnx.merge(graph, state), num_steps))(state)
            self._times[num_steps] = split.everywhere(times, self._how.mesh)
        return self._times[num_steps]


class PreparedFast:
    """A prepared pi0-FAST, behind the methods of `infer.FastModel`.

    Attributes:
      config: the architecture.
      module: the plain nnx module.
    """

    def __init__(self, model: FastModel) -> None:
        self.config: configs.Pi0Fast = model.config
        self.module: Pi0Fast = model.module
        self._plain = model
        (self._device,) = model.module.gemma.embedding[...].devices()
        self._how = how = options.flow(self.module.compute, self._device)
        config, dtype = self.config, self.module.compute.dtype
        with devices.precision(self.module.compute):
            self._weights = decode.weights(self.module)

        def decoder(w: decode.Weights) -> decode.Decoder:
            return decode.Decoder(w, config, dtype, how)

        self._decode = jax.jit(lambda w, *args: decoder(w).decode(*args), static_argnums=2)
        self._see = jax.jit(lambda w, images: flow.see(w.vision, config.vision, images, dtype, how))
        self._read = jax.jit(lambda w, *args: decoder(w).read(*args), static_argnums=4)

    def loss(self, batch: Batch) -> np.ndarray:
        """The plain model's; float32 [B]."""
        return self._plain.loss(batch)

    def decode(
        self,
        batch: Batch,
        max_steps: int = 256,
        temperature: float = 0.0,
        rng: int | np.random.Generator = 0,
        grammar: Grammar | None = None,
    ) -> np.ndarray:
        """See `FastModel.decode`; int32 [B, G], 0 after the end of sequence."""
        inputs = self._inputs(batch)
        uniforms = grammars.check(grammar, max_steps, temperature, rng, len(inputs.prompt))
        with devices.precision(self.module.compute):
            rules = (np.float32(temperature or 1), uniforms, _on(self._device, grammar))
            return np.asarray(self._decode(self._weights, inputs, max_steps, *rules))

    def stages(
        self, batch: Batch, max_steps: int = 256, grammar: Grammar | None = None
    ) -> dict[str, Callable[[], None]]:
        """See `Prepared.stages`: "vision" and "prefix"; what is left are the tokens."""
        w, inputs = self._weights, devices.put(self._inputs(batch), self._device)
        lead = jnp.zeros(0, jnp.int32) if grammar is None else devices.put(grammar.lead, self._device)
        with devices.precision(self.module.compute):
            tokens = self._see(w, inputs.images)
        return {
            "vision": _timed(self.module, self._see, w, inputs.images),
            "prefix": _timed(self.module, self._read, w, tokens, inputs, lead, max_steps),
        }

    def _inputs(self, batch: Batch) -> flow.Inputs:
        return _observe(batches.trim(batches.select(batch, batches.prompt(batch)), self.config), self.config, self._how)


def _on(device: jax.Device, grammar: Grammar | None) -> Grammar | None:
    """The grammar's tables, on the device."""
    return None if grammar is None else Grammar(*devices.put(tuple(grammar), device))


def _timed(module: Pi0 | Pi0Fast, call: Callable[..., Any], *args: Any) -> Callable[[], None]:
    """A call that waits for its end."""

    def run() -> None:
        with devices.precision(module.compute):
            jax.block_until_ready(call(*args))

    return run


def _observe(batch: Batch, config: configs.Pi0 | configs.Pi0Fast, how: flow.Options) -> flow.Inputs:
    """A trimmed observation in few pieces, still on the host."""
    prompt, pixels = np.asarray(batch["tokenized_prompt"]), config.vision.image_size
    images = [np.asarray(image) for image in batch["image"].values()]
    seen = [np.repeat(np.asarray(m, bool)[:, None], config.vision.num_tokens, 1) for m in batch["image_mask"].values()]
    valid = np.concatenate([*seen, batch["tokenized_prompt_mask"]], 1)
    # As long as another length would take, so that fewer shapes are compiled: products go by tiles of tokens.
    most = valid.shape[1] - prompt.shape[1] + config.max_token_len
    length = min(flow.round_up(valid.shape[1], how), most)
    more = ((0, 0), (0, -(-length // EVEN) * EVEN - valid.shape[1]))
    prompt, valid = np.pad(prompt, more), np.pad(valid, more)
    in_order = (valid[:, :-1] >= valid[:, 1:]).all()
    return flow.Inputs(
        images=np.stack(images, 1) if images else np.zeros((len(prompt), 0, pixels, pixels, 3), np.uint8),
        prompt=prompt,
        order=None if in_order else np.argsort(~valid, axis=1, kind="stable").astype(np.int32),
        length=valid.sum(1, dtype=np.int32),
    )
