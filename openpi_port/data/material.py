"""What a run trains on: data sets split by episode, statistics, tokenizer, and the steps between them."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np

from openpi_port import normalize, transforms
from openpi_port.config import Pi0Fast, Train
from openpi_port.data import loader, stats
from openpi_port.data.datasets import open_datasets
from openpi_port.data.frames import Frames
from openpi_port.errors import UserError
from openpi_port.normalize import NormStats
from openpi_port.tokenizers import fast, paligemma
from openpi_port.tokenizers.fast_sequence import FastSequence
from openpi_port.tokenizers.paligemma import PromptTokenizer


@dataclasses.dataclass(frozen=True)
class Material:
    """Everything between the files and the batches.

    Attributes:
      train, validation: frames of the training and of the validation episodes; no validation if its share is 0.
      steps: raw sample to the model's, and back.
      norm_stats: of the training episodes, or those that were given.
      tokenizer: of the prompt.
      sequence: of prompt and actions, for pi0-FAST and for knowledge insulation.
    """

    config: Train
    train: Frames
    validation: Frames | None
    steps: tuple[transforms.Transform, ...]
    norm_stats: NormStats
    tokenizer: PromptTokenizer
    sequence: FastSequence | None = None

    def batches(self, start_step: int) -> loader.Batches:
        """Training batches from that step on."""
        data, state_noise = self.config.data, None
        if data.state_noise:  # on what the robot has; the padding up to the model's dims stays zero
            state_noise = np.zeros(self.config.model.action_dim, np.float32)
            state_noise[: len(self.norm_stats["state"].mean)] = data.state_noise
        return loader.train_batches(
            self.train, self.steps, **self._shape(), augment=data.augment, state_noise=state_noise,
            start_step=start_step, num_workers=data.num_workers,
        )  # fmt: skip

    def validation_batches(self) -> loader.Batches:
        """The same few validation batches at every call."""
        return loader.eval_batches(self.validation, self.steps, **self._shape(), num_batches=self.config.eval_batches)

    def _shape(self) -> dict[str, int]:
        model = self.config.model
        return {
            "batch_size": self.config.batch_size, "seed": self.config.seed, "draws": self.config.draws,
            "action_dim": model.action_dim, "action_horizon": model.action_horizon,
        }  # fmt: skip


def load(config: Train, norm_stats: NormStats | None = None, *, refuse: bool = True) -> Material:
    """Opens the data of a run.

    Args:
      config: the run.
      norm_stats: those of the run that is continued; None takes `config.data.norm_stats`, else computes them.
      refuse: statistics with which training can't work; False opens the data anyway, for looking at them.

    Raises:
      UserError: anything wrong with data set, tokenizer or statistics.
    """
    data, model = config.data, config.model
    if not data.repo_id:
        raise UserError("--config.data.repo_id= names no data set: give a directory, user/name or hf://user/name")
    tokenizer = paligemma.load(config.tokenizer)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"--config.tokenizer={config.tokenizer} has {tokenizer.vocab_size} tokens, "
            f"config.model.vocab_size is {model.vocab_size}"
        )
    train, validation = open_datasets(data, horizon=model.action_horizon, image_size=model.vision.image_size)

    source = "the run that is continued"
    if norm_stats is None and data.norm_stats is not None:
        norm_stats, source = normalize.load_norm_stats(data.norm_stats), data.norm_stats
    if norm_stats is None:
        norm_stats, source = stats.compute(train, transforms.before_normalize(data, images=False)), data.repo_id
    if refuse and (warning := normalize.before_training(norm_stats, data.norm, source)):
        print(f"warning: {warning}", file=sys.stderr)
    if not isinstance(model, Pi0Fast) and not config.insulate:
        steps = transforms.pipeline(data, model, norm_stats, tokenizer)
        return Material(config, train, validation, steps, norm_stats, tokenizer)
    sequence = FastSequence(tokenizer, fast.load(config.fast_tokenizer), model.vocab_size, out_of_range="clip")
    if config.insulate:
        action_tokens = transforms.TokenizeActions(sequence, config.max_action_tokens)
        steps = transforms.pipeline(data, model, norm_stats, tokenizer, action_tokens=action_tokens)
        return Material(config, train, validation, steps, norm_stats, tokenizer, sequence)
    steps = transforms.pipeline(data, model, norm_stats, sequence, missing_visible=model.missing_cameras == "visible")
    return Material(config, train, validation, steps, norm_stats, tokenizer, sequence)
