"""A whole policy: the robot's observation in, a chunk of actions in the robot's own units out.

    policy = Policy.from_pretrained("checkpoints/pi0_aloha_mini/300", backend="torch")
    policy.warmup()
    actions = policy.infer({"images": {"top": image}, "state": state, "prompt": "Transfer cube"})["actions"]

    observation -> observation.rename -> transforms.forward -> pi_*/infer.py -> transforms.inverse -> actions

Axis letters: B batch, A actions (horizon), J the model's action dimensions, D the robot's.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from openpi_port import backends, grammar, loading, normalize, observation, robots, transforms
from openpi_port import batch as batches
from openpi_port.check_sample import as_array
from openpi_port.config import Data, Dtype, Pi0Fast
from openpi_port.errors import UserError
from openpi_port.realtime import MAX_GUIDANCE, Continuation
from openpi_port.rng import draw_noise
from openpi_port.tokenizers import fast, paligemma
from openpi_port.tokenizers.fast_sequence import FastSequence

if TYPE_CHECKING:
    from openpi_port.pi_flax.infer import FastModel, Model

Observation = Mapping[str, Any]
Result = dict[str, Any]

FAST_TOKENS = 256  # openpi's limit for one chunk of pi0-FAST


class Policy:
    """A model between the transforms that it was trained with. Threads may share one: the model runs a call at a time.

    Args:
      model: from `load_model`.
      data: names, robot and normalisation.
      stats: of state and actions.
      tokenizer: of the prompt; for pi0-FAST of prompt and actions.
      num_steps: Euler steps per chunk; pi0-FAST has none.
      seed: of the noise; call number n of a policy draws the same noise for the same seed.
      max_guidance: limit of the pull towards the previous chunk, where an observation brings one (real-time chunking).
      max_delay: of `config.Train`; such a model is given the previous chunk's actions and needs no pull.
      metadata: what a server tells its clients, beside what the policy knows of itself.
      constrained: pi0-FAST writes only what is a whole chunk. False lets it write anything, as openpi does; what is no
        chunk is then an error, and counted.

    Attributes:
      model, data, stats: as given.
      horizon: A.
      noise_shape: (A, J); None for pi0-FAST, which takes the likeliest tokens and needs no noise.
      decoded, malformed: chunks that pi0-FAST has written, and how many of them were none.
      metadata: names and sizes, ready for JSON or msgpack.
    """

    def __init__(
        self,
        model: Model | FastModel,
        data: Data,
        stats: normalize.NormStats,
        tokenizer: paligemma.PromptTokenizer | FastSequence,
        *,
        num_steps: int = 10,
        seed: int = 0,
        max_guidance: float = MAX_GUIDANCE,
        max_delay: int = 0,
        metadata: Mapping[str, Any] | None = None,
        constrained: bool = True,
    ) -> None:
        if not isinstance(num_steps, int) or num_steps < 1:
            raise UserError(f"num_steps={num_steps}: a whole number of steps is needed, at least one")
        self.model, self.data, self.stats = model, data, stats
        config = model.config
        self.horizon = config.action_horizon
        missing_visible = isinstance(config, Pi0Fast) and config.missing_cameras == "visible"
        self._steps = transforms.pipeline(data, config, stats, tokenizer, missing_visible=missing_visible)
        self._num_steps, self._seed = num_steps, seed
        self._prompt_lengths = [1]
        self._calls = 0
        self._lock = threading.Lock()
        robot = robots.load(data.robot)
        action_dim = robot.ACTION_DIM or len(stats["actions"].mean)
        self.noise_shape = None if isinstance(config, Pi0Fast) else (self.horizon, config.action_dim)
        self._continuation: Continuation | None = None
        if self.noise_shape is not None:
            self._continuation = Continuation(*self.noise_shape, action_dim, max_delay, max_guidance)
        self.decoded = self.malformed = 0
        grammatical = self.noise_shape is None and constrained
        self._grammar = grammar.build(tokenizer, self.horizon, action_dim) if grammatical else None
        self.metadata = {
            "robot": data.robot,
            "cameras": dict(data.cameras),
            "state": data.state,
            "state_dim": robot.STATE_DIM or len(stats["state"].mean),
            "action_dim": action_dim,
            "action_horizon": self.horizon,
            "noise_dim": self.noise_shape and self.noise_shape[1],
            "realtime": self._continuation and self._continuation.way,
            "max_delay": max_delay,
            "default_prompt": data.prompt,
            "size": config.size,
            **(metadata or {}),
        }

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        backend: Literal["flax", "torch"] = "flax",
        *,
        device: str | None = None,
        dtype: Dtype = "float32",
        default_prompt: str | None = None,
        robot: str | None = None,
        data: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        num_steps: int = 10,
        seed: int = 0,
        max_guidance: float = MAX_GUIDANCE,
        constrained: bool = True,
        **overrides: Any,
    ) -> Policy:
        """Opens a checkpoint with all that belongs to it.

        Args:
          path: a checkpoint of ours, of openpi or of LeRobot; local, `gs://...` or `hf://user/name`.
          backend: the framework that computes; any checkpoint opens in either.
          device: see `load_model`.
          dtype: of weights and matrix products.
          default_prompt: the instruction for observations that bring none.
          robot: a module of `openpi_port.robots`, whose names of cameras and state are taken; needed for openpi's
            checkpoints, which don't say what robot they are for.
          data: fields of `config.Data` that are to differ from the checkpoint's (`{"cameras": {...}}`).
          tokenizer: "paligemma", "small" or a SentencePiece model's path, for checkpoints that bring none; None takes
            the one that the checkpoint names.
          num_steps: Euler steps per chunk.
          seed: of the noise.
          max_guidance: see the class.
          constrained: see the class.
          **overrides: see `load_model`; `asset="trossen"` chooses among openpi's statistics.

        Raises:
          UserError: no checkpoint there, one that doesn't fit, or statistics, tokenizer or robot are not known.
        """
        loading.check_backend(backend)
        source, settings, pieces = loading.open_parts(path, default_prompt, robot, data, tokenizer, **overrides)
        model = loading.fill(source, backend, dtype, device)
        about = {"checkpoint": str(path), "backend": backend, "dtype": dtype, "step": source.settings.get("step")}
        return cls(
            model, settings, source.norm_stats, pieces, num_steps=num_steps, seed=seed, max_guidance=max_guidance,
            max_delay=source.settings.get("train", {}).get("max_delay", 0), metadata=about, constrained=constrained,
        )  # fmt: skip

    def infer(
        self,
        observation: Observation,
        noise: np.ndarray | None = None,
        *,
        previous: np.ndarray | None = None,
        delay: int | None = None,
    ) -> Result:
        """One observation to one chunk.

        Args:
          observation: cameras, state and prompt under any of the names in `openpi_port/observation.py`; RGB images
            uint8 or float in [0, 1], [H, W, 3] or [3, H, W], of any size. "noise" may lie in it too.
          noise: f32 [A, J], where the flow begins; None draws it.
          previous: [N, D], in the robot's units, the actions of the chunk that is being played, from the one that
            follows the observation; the new chunk goes on from it (real-time chunking, docs/real_time.md). May lie in
            the observation as "previous_actions".
          delay: how many of them will have been played when the answer comes; or "delay" in the observation.

        Returns:
          {"actions": f32 [A, D] in the robot's units, "policy_timing": {"infer_ms": time in the model}}.

        Raises:
          UserError: something is missing, misshapen or not finite, the actions included; the message names it.
        """
        held = {k: v for k, v in (("previous_actions", previous), ("delay", delay)) if v is not None}
        observation = {**observation, **held} if held else observation
        return self.infer_batch([observation], None if noise is None else np.asarray(noise)[None])[0]

    def infer_batch(self, observations: Sequence[Observation], noise: np.ndarray | None = None) -> list[Result]:
        """Several robots' observations in one pass of the model.

        The batch is filled up to a power of two, so that few shapes are ever compiled.

        Args:
          observations: B of them; prompts may differ.
          noise: f32 [B, A, J] or None; see `infer`.

        Returns:
          B results in order; see `infer`.
        """
        samples = [self.prepare(o) for o in observations]
        if noise is not None:
            noise = as_array(noise, "noise")
            if len(noise) != len(samples):
                raise UserError(f"noise for {len(noise)} observations, there are {len(samples)}")
            samples = [{**s, "noise": self._checked(n)} for s, n in zip(samples, noise, strict=True)]
        return self.infer_prepared(samples)

    def prepare(self, observation_: Observation) -> transforms.Sample:
        """The first half of `infer`, for servers: all that can be wrong with an observation shows here."""
        repack, *steps = self._steps
        sample = repack.forward(observation.rename(observation_, self.data))
        if self._continuation is None and observation_.get("previous_actions") is not None:
            raise UserError("previous_actions: pi0-FAST has no flow that could go on from them")
        held = None if self._continuation is None else self._continuation.read(observation_)
        if held is None:
            sample = transforms.forward(steps, sample)
        else:  # as in training, actions become what the model knows, relative to the state of this observation
            sample = transforms.forward(steps, {**sample, "actions": held[0]})
            sample |= self._continuation.hold(sample.pop("actions"), held[1])
        if observation_.get("noise") is not None:
            sample["noise"] = self._checked(as_array(observation_["noise"], "noise"))
        return sample

    def infer_prepared(self, samples: Sequence[transforms.Sample]) -> list[Result]:
        """The second half of `infer`, on what `prepare` returned."""
        if not samples:
            return []
        with self._lock:
            if self.noise_shape is not None:
                samples = [s if "noise" in s else {**s, "noise": self._draw()} for s in samples]
            if any("previous" in s for s in samples):  # who continues nothing is computed along with those who do
                samples = [{**self._continuation.hold_nothing(), **s} for s in samples]
            size = 1 << (len(samples) - 1).bit_length()
            filled = [*samples, *[samples[0]] * (size - len(samples))]
            batch = {key: _stack([s[key] for s in filled]) for key in samples[0]}
            start = time.perf_counter()
            if self.noise_shape is not None:
                noise = batch.pop("noise")
                held = {key: batch.pop(key) for key in ("previous", "weights", "delay") if key in batch}
                if "weights" in held:
                    held["limit"] = self._continuation.limit
                kind, answers = "actions", self.model.sample_actions(batch, noise, num_steps=self._num_steps, **held)
            else:
                kind, answers = "tokens", self.model.decode(batch, FAST_TOKENS, grammar=self._grammar)
            timing = {"infer_ms": (time.perf_counter() - start) * 1e3}
        results = []
        for sample, answer in zip(samples, answers, strict=False):
            back = self._back({kind: np.asarray(answer), "state": sample["state"]})
            actions = np.asarray(back["actions"], np.float32)
            if not np.isfinite(actions).all():  # no robot is to get them
                raise UserError("the model's actions are not finite: is the state far beyond what it was trained on?")
            results.append({"actions": actions, "policy_timing": dict(timing)})
        return results

    def _back(self, answer: transforms.Sample) -> transforms.Sample:
        """The model's answer in the robot's units."""
        if "tokens" not in answer:
            return transforms.inverse(self._steps, answer)
        self.decoded += 1
        try:
            tokens = np.array(grammar.until_end(answer["tokens"]))
            return transforms.inverse(self._steps, {**answer, "tokens": tokens})
        except fast.MalformedTokens as error:
            self.malformed += 1
            rate = f"{self.malformed} of {self.decoded} chunks malformed ({self.malformed / self.decoded:.1%})"
            logging.getLogger(__name__).warning("pi0-FAST, unconstrained: %s", rate)
            raise UserError(f"pi0-FAST wrote what is no chunk of actions ({error}); {rate}") from error

    def reset(self) -> None:
        """Nothing: a policy keeps no episode. Here because openpi's policies have it, and its chunk broker asks."""

    def optimize(self, *, float8: bool = False) -> Policy:
        """Prepares the model for fast inference (`pi_*/fast/prepare.py`): the same answers, computed another way.

        Args:
          float8: part of it in float8, which is faster and less exact; see docs/performance.md.

        Returns:
          This policy; call `warmup` before the first robot asks.

        Raises:
          UserError: the model has LoRA's adapters beside its weights, or its backend or device has no float8.
        """
        self.model = backends.of(self.model).fast.optimize(self.model, float8=float8)
        self._prompt_lengths = batches.prompt_lengths(self.model.config)
        self.metadata["fast"] = True
        return self

    def warmup(self, batch_sizes: Sequence[int] = (1,), *, realtime: bool = False) -> None:
        """Compiles for these numbers of observations, so that no robot waits for it.

        Args:
          batch_sizes: each is taken up to the next power of two.
          realtime: also for observations that bring the previous chunk.
        """
        config = self.model.config
        size, length = config.vision.image_size, config.max_token_len
        sample = {
            "image": {c: np.zeros((size, size, 3), np.uint8) for c in config.cameras},
            "image_mask": {c: np.bool_(c in self.data.cameras) for c in config.cameras},
            # pi0-FAST's transforms write the state into the prompt and don't pad it.
            "state": np.zeros(config.action_dim if self.noise_shape else self.metadata["state_dim"], np.float32),
            "tokenized_prompt": np.zeros(length, np.int32),
        }
        if self.noise_shape is not None:
            sample["noise"] = np.zeros(self.noise_shape, np.float32)  # leaves the count of calls alone
        else:
            sample |= {"token_ar_mask": np.zeros(length, np.int32), "token_loss_mask": np.zeros(length, bool)}
        sizes = sorted({1 << (n - 1).bit_length() for n in batch_sizes})
        for batch_size in tqdm(sizes, "warming up", leave=False, delay=2):
            for prompt in self._prompt_lengths:
                seen = {"tokenized_prompt_mask": np.arange(length) < prompt}
                self.infer_prepared([{**sample, **seen}] * batch_size)
            if realtime and self._continuation is not None:
                self.infer_prepared([{**sample, **seen, **self._continuation.hold_nothing()}] * batch_size)

    def _draw(self) -> np.ndarray:
        """f32 [A, J] for the next call."""
        self._calls += 1
        return draw_noise(self._seed, self._calls - 1, self.noise_shape)

    def _checked(self, noise: np.ndarray) -> np.ndarray:
        shape = self.noise_shape
        if shape is None:
            raise UserError("noise: pi0-FAST takes none")
        if noise.shape != shape or noise.dtype.kind != "f" or not np.isfinite(noise).all():
            raise UserError(f"noise is finite floats of shape {list(shape)}, got {noise.dtype} {list(noise.shape)}")
        return noise.astype(np.float32)


def _stack(values: Sequence[Any]) -> Any:
    """Stacks arrays, or dictionaries of them, on a new axis 0."""
    if isinstance(values[0], Mapping):
        return {key: np.stack([v[key] for v in values]) for key in values[0]}
    return np.stack(values)
