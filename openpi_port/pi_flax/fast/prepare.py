"""Prepares a loaded model for fast inference on the device where it lies.

    fast = optimize(openpi_port.load_model(path, backend="flax", dtype="bfloat16"))
    actions = fast.sample_actions(batch, noise)

It computes what the plain model computes (see `flow`). A camera that a whole batch lacks is left out, and the prompt is
cut to the shortest bucket that holds it; each such shape compiles once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from openpi_port import batch as batches
from openpi_port import config as configs
from openpi_port.batch import Batch
from openpi_port.pi_flax import device as devices
from openpi_port.pi_flax.fast import flow, options
from openpi_port.pi_flax.infer import Model
from openpi_port.pi_flax.pi0 import Pi0


def optimize(model: Model) -> Prepared:
    """Prepares a loaded model; the given one is kept for what is not in a hurry (`loss`).

    Raises:
      UserError: its weights have unmerged LoRA adapters.
    """
    return Prepared(model)


class Prepared:
    """A prepared pi0 or pi0.5, behind the methods of `infer.Model`.

    Attributes:
      config: the architecture.
      module: the plain nnx module.
    """

    def __init__(self, model: Model, how: flow.Options | None = None, compiler: dict[str, Any] | None = None) -> None:
        self.config: configs.Pi0 = model.config
        self.module: Pi0 = model.module
        self._plain = model
        (self._device,) = model.module.gemma.embedding[...].devices()
        self._dtype = self.module.compute.dtype
        how = options.flow(self.module.compute) if how is None else how
        compiler = options.compiler(self._device) if compiler is None else compiler
        with devices.precision(self.module.compute):
            self._weights = flow.weights(self.module)
        config, dtype = self.config, self._dtype
        self._times: dict[int, flow.Times] = {}
        jit = partial(jax.jit, compiler_options=compiler)
        self._sample = jit(lambda w, times, inputs: flow.sample(w, config, dtype, times, inputs, how))
        self._see = jit(lambda w, images: flow.see(w.vision, config.vision, images, dtype, how))
        self._read = jit(lambda w, tokens, inputs: flow.read(w, config, tokens, inputs, how))
        self._step = jit(lambda w, time, cache, inputs: flow.step(w, config, dtype, inputs, inputs.noise, cache, time))

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
                self._sample(self._weights, self._times_of(num_steps), _inputs(batch, noise, self.config))
            )

    def stages(self, batch: Batch, noise: np.ndarray, num_steps: int = 10) -> dict[str, Callable[[], None]]:
        """Each part of a chunk alone, on inputs that lie on the device: calls that wait for its end.

        Returns:
          "vision", "prefix", and "step": one Euler step.
        """
        w, inputs = self._weights, devices.put(_inputs(batch, noise, self.config), self._device)
        with devices.precision(self.module.compute):
            one = jax.tree.map(lambda x: x[-1], self._times_of(num_steps))
            tokens = self._see(w, inputs.images)
            cache = self._read(w, tokens, inputs)

        def timed(call: Callable[..., Any], *args: Any) -> Callable[[], None]:
            def run() -> None:
                with devices.precision(self.module.compute):
                    jax.block_until_ready(call(*args))

            return run

        return {
            "vision": timed(self._see, w, inputs.images),
            "prefix": timed(self._read, w, tokens, inputs),
            "step": timed(self._step, w, one, cache, inputs),
        }

    def _times_of(self, num_steps: int) -> flow.Times:
        if num_steps not in self._times:
            self._times[num_steps] = jax.jit(lambda: flow.times(self.module, num_steps))()
        return self._times[num_steps]


def _inputs(batch: Batch, noise: np.ndarray, config: configs.Pi0) -> flow.Inputs:
    """The trimmed observation in few pieces, still on the host."""
    batch = batches.trim(batches.select(batch, batches.OBSERVATION), config)
    size, pixels = len(noise), config.vision.image_size
    images = [np.asarray(image) for image in batch["image"].values()]
    seen = [np.repeat(np.asarray(m, bool)[:, None], config.vision.num_tokens, 1) for m in batch["image_mask"].values()]
    valid = np.concatenate([*seen, batch["tokenized_prompt_mask"]], 1)
    in_order = (valid[:, :-1] >= valid[:, 1:]).all()
    return flow.Inputs(
        images=np.stack(images, 1) if images else np.zeros((size, 0, pixels, pixels, 3), np.uint8),
        prompt=batch["tokenized_prompt"],
        order=None if in_order else np.argsort(~valid, axis=1, kind="stable").astype(np.int32),
        length=valid.sum(1, dtype=np.int32),
        state=np.asarray(batch["state"], np.float32),
        noise=np.asarray(noise, np.float32),
    )
