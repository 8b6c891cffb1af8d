"""What a run trains on: data sets split by episode, their statistics, tokenizer, and the steps between them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping

import numpy as np

from openpi_port import normalize, transforms
from openpi_port.config import Data, Pi0Fast, Train
from openpi_port.data import loader, stats
from openpi_port.data.datasets import find, open_datasets
from openpi_port.data.frame_cache import FrameCache
from openpi_port.data.frames import Frames
from openpi_port.errors import UserError
from openpi_port.normalize import NormStats
from openpi_port.tokenizers import fast, paligemma
from openpi_port.tokenizers.fast_sequence import FastSequence
from openpi_port.tokenizers.paligemma import PromptTokenizer
from openpi_port.tokenizers.steps import TokenizeActions


@dataclasses.dataclass(frozen=True)
class Sample:
    """Where a training sample begins: a frame of an episode of a data set."""

    repo_id: str
    episode: int
    frame: int

    def __str__(self) -> str:
        return f"{self.repo_id} episode {self.episode} frame {self.frame}"


@dataclasses.dataclass(frozen=True)
class Member:
    """One data set of a run.

    Attributes:
      data: its settings.
      train, validation: frames of the training and of the validation episodes; no validation if its share is 0.
      steps: raw sample to the model's, and back.
      norm_stats: of the training episodes, or those that were given.
    """

    data: Data
    train: Frames
    validation: Frames | None
    steps: tuple[transforms.Transform, ...]
    norm_stats: NormStats

    def describe(self) -> str:
        """One line."""
        return f"{len(self.train.episodes)} training episodes, {len(self.train)} frames of {self.data.repo_id}"


@dataclasses.dataclass(frozen=True)
class Material:
    """Everything between the files and the batches.

    Attributes:
      members: by name; `config.data` comes first and is called "", then `config.mixture`.
      tokenizer: of the prompt.
      sequence: of prompt and actions, for pi0-FAST and for knowledge insulation.
    """

    config: Train
    members: Mapping[str, Member]
    tokenizer: PromptTokenizer
    sequence: FastSequence | None = None

    @property
    def deployed(self) -> Member:
        """The data set of the robot that the policy is for."""
        return self.members[""]

    @property
    def has_validation(self) -> bool:
        """Whether any data set keeps episodes for validation."""
        return any(member.validation is not None for member in self.members.values())

    def describe(self) -> str:
        """A line for each data set."""
        if len(self.members) == 1:
            return self.deployed.describe()
        total = sum(member.data.weight for member in self.members.values())
        return "\n".join(f"{m.data.weight / total:.1%} of samples: {m.describe()}" for m in self.members.values())

    def batches(self, start_step: int, process: tuple[int, int] = (0, 1)) -> loader.Batches:
        """Training batches from that step on; of several processes (this one's number, how many) each gets its part."""
        options = {"start_step": start_step, "num_workers": self.config.data.num_workers}
        return loader.train_batches(self._parts(), **self._shape(), **options, **_process(process))

    def validation_batches(self, name: str = "", process: tuple[int, int] = (0, 1)) -> loader.Batches:
        """The same few validation batches of a data set at every call."""
        member, count = self.members[name], self.config.eval_batches
        part = loader.Part(member.validation, member.steps)
        return loader.eval_batches(part, **self._shape(), num_batches=count, **_process(process))

    def validate(
        self, evaluate: Callable[[loader.Batch], float], process: tuple[int, int] = (0, 1)
    ) -> dict[str, float]:
        """Validation losses by the names that they are logged under.

        Returns:
          "validation_loss"; of a mixture also "validation_loss/data", "validation_loss/bridge", ..., whose mean by
          weight it is.
        """
        losses, weights = {}, []
        for name, member in self.members.items():
            if member.validation is not None:
                batches = self.validation_batches(name, process)
                losses[f"validation_loss/{name or 'data'}"] = float(np.mean([evaluate(batch) for batch in batches]))
                weights.append(member.data.weight)
        mean = float(np.average(list(losses.values()), weights=weights))
        return {"validation_loss": mean, **(losses if len(self.members) > 1 else {})}

    def samples(self, step: int) -> list[Sample]:
        """What the batch that leads to that step (from 1) is made of."""
        members, size = list(self.members.values()), self.config.batch_size
        places, found = loader.places(self._parts(), self.config.seed), []
        for number, row in (places[i] for i in range((step - 1) * size, step * size)):
            numbers = members[number].train.numbers(int(row))
            episode, frame = int(numbers["episode_index"]), int(numbers["frame_index"])
            found.append(Sample(members[number].data.repo_id, episode, frame))
        return found

    def _parts(self) -> list[loader.Part]:
        parts = []
        for member in self.members.values():
            data, state_noise = member.data, None
            if data.state_noise:  # on what the robot has; the padding up to the model's dims stays zero
                state_noise = np.zeros(self.config.model.action_dim, np.float32)
                state_noise[: len(member.norm_stats["state"].mean)] = data.state_noise
            parts.append(loader.Part(member.train, member.steps, data.weight, data.augment, state_noise))
        return parts

    def _shape(self) -> dict[str, int]:
        model = self.config.model
        return {
            "batch_size": self.config.batch_size, "seed": self.config.seed, "draws": self.config.draws,
            "max_delay": self.config.max_delay,
            "action_dim": model.action_dim, "action_horizon": model.action_horizon,
        }  # fmt: skip


def _process(process: tuple[int, int]) -> dict[str, int]:
    return {"process_index": process[0], "process_count": process[1]}


def load(config: Train, norm_stats: Mapping[str, NormStats] | None = None, *, refuse: bool = True) -> Material:
    """Opens the data of a run.

    Args:
      config: the run.
      norm_stats: those of the run that is continued, by name of the data set ("" for `config.data`); None takes those
        that `norm_stats` of a data set's settings names, else computes them.
      refuse: statistics with which training can't work; False opens the data anyway, for looking at them.

    Raises:
      UserError: anything wrong with data set, tokenizer or statistics.
    """
    model = config.model
    for name, data in config.datasets.items():
        if not data.repo_id:
            field = f"mixture.{name}" if name else "data"
            raise UserError(
                f"--config.{field}.repo_id= names no data set: give a directory, user/name or hf://user/name"
            )
    tokenizer = paligemma.load(config.tokenizer)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"--config.tokenizer={config.tokenizer} has {tokenizer.vocab_size} tokens, "
            f"config.model.vocab_size is {model.vocab_size}"
        )
    sequence = None
    if isinstance(model, Pi0Fast) or config.insulate:
        action_tokens = fast.load(config.fast_tokenizer)
        sequence = FastSequence(
            tokenizer, action_tokens, model.vocab_size, allow_truncation=config.allow_truncation, out_of_range="clip"
        )
    cache = FrameCache(model.vision.image_size, config.data.cache_gb) if config.data.cache_gb else None
    members = {}
    for name, data in config.datasets.items():
        size, continued = model.vision.image_size, None if norm_stats is None else norm_stats[name]
        try:
            if refuse and not data.cameras:
                raise UserError(_no_camera(data))
            train, validation = open_datasets(data, horizon=model.action_horizon, image_size=size, cache=cache)
            found, source = _statistics(data, train, continued)
            given = data.norm_stats is not None and continued is None
            if refuse and (warning := normalize.before_training(found, data.norm, source, given=given)):
                print(f"warning: {warning}", file=sys.stderr)
            members[name] = Member(data, train, validation, _steps(config, data, found, tokenizer, sequence), found)
        except UserError as error:  # which says "config.data", not knowing the data set's name
            if not name:
                raise
            raise UserError(str(error).replace("config.data.", f"config.mixture.{name}.")) from error
    return Material(config, members, tokenizer, sequence)


def _no_camera(data: Data) -> str:
    metadata, _ = find(data)
    there = f"{metadata.root} has {', '.join(metadata.cameras) or 'none'}"
    return f"config.data.cameras names no camera: --config.data.cameras.base_0_rgb= says which is the first; {there}"


def _statistics(data: Data, train: Frames, continued: NormStats | None) -> tuple[NormStats, str]:
    """Statistics, and where they are from."""
    if continued is not None:
        return continued, "the run that is continued"
    steps = transforms.before_normalize(data, images=False)
    if data.norm_stats is not None:
        from convert.remote import fetch  # it imports this package

        given = normalize.load_norm_stats(fetch(data.norm_stats))
        return stats.fitted(given, train, steps), f"{data.norm_stats}, on {data.repo_id}"
    return stats.compute(train, steps), data.repo_id


def _steps(
    config: Train, data: Data, found: NormStats, tokenizer: PromptTokenizer, sequence: FastSequence | None
) -> tuple[transforms.Transform, ...]:
    model = config.model
    if isinstance(model, Pi0Fast):
        visible = model.missing_cameras == "visible"
        steps = transforms.pipeline(data, model, found, sequence, missing_visible=visible)
        if not config.mixture:
            return steps
        # The model reads tokens, but a batch of several robots has to be stacked.
        dims = [len(found[key].mean) for key in ("state", "actions")]
        return (*steps, transforms.PadDims(model.action_dim, *dims))
    action_tokens = TokenizeActions(sequence, config.max_action_tokens) if config.insulate else None
    return transforms.pipeline(data, model, found, tokenizer, action_tokens=action_tokens)
