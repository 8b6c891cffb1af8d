"""What there is to inspect: a config or a checkpoint, some of its samples on their way to the model, and what is odd.

A actions in a chunk, J dimensions, H W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from openpi_port import loading, normalize, sequence, transforms
from openpi_port.augment import augment
from openpi_port.check_sample import split_keys
from openpi_port.config import Data, Pi0Fast, Train
from openpi_port.data import dimensions, material
from openpi_port.data.datasets import open_datasets
from openpi_port.data.frames import PATIENCE, Frames
from openpi_port.data.lerobot_meta import find_local
from openpi_port.errors import UserError
from openpi_port.rng import generator
from openpi_port.tokenizers.fast_sequence import FastSequence
from openpi_port.tokenizers.paligemma import PromptTokenizer

LARGE = 10.0  # a normalised value that is worth a look
MUCH_PADDING = 0.3  # share of the actions that lie beyond their episode's end
DRAWS = 2  # augmentations shown of each image


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something odd: "bad" is a mistake in all likelihood, "note" only worth knowing."""

    level: Literal["bad", "note"]
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One data set, and the way from it to the model.

    Attributes:
      data: its settings.
      steps: raw sample to the model's.
      stats, stats_from: the statistics, and where they are from.
      frames: the training episodes; None where they can't be had.
      validation: the others, if there are any.
    """

    data: Data
    steps: tuple[transforms.Transform, ...]
    stats: normalize.NormStats
    stats_from: str
    frames: Frames | None
    validation: Frames | None = None

    def names(self, key: Literal["state", "actions"]) -> list[str]:
        """Of the dimensions: the data set's, else numbers."""
        return dimensions.numbered(self.frames, getattr(self.data, key), len(self.stats[key].mean))


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One sample on its way.

    Attributes:
      part: the data set that it is from, and `where` in it.
      prompt: as the data set has it.
      images: camera -> uint8 [H, W, 3] as the model gets it, without augmentation.
      augmented: camera -> as training sees it, DRAWS times; of cameras that the data set has.
      seen: camera -> its mask.
      state, actions: [J] and [A, J] in the robot's units; no actions where there is no data set.
      is_pad: bool [A], past the episode's end.
      normalised: state and actions as the model gets them, before they are padded to its dimensions.
      model: what the transforms made.
      sequence: its tokens.
    """

    part: Part
    where: str
    prompt: str
    images: Mapping[str, np.ndarray]
    augmented: Mapping[str, Sequence[np.ndarray]]
    seen: Mapping[str, bool]
    state: np.ndarray
    actions: np.ndarray | None
    is_pad: np.ndarray | None
    normalised: Mapping[str, np.ndarray]
    model: Mapping[str, Any]
    sequence: sequence.Sequence


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """What is inspected.

    Attributes:
      title: for people.
      config: the run; of a checkpoint its model and data, the rest is not known.
      parts: its data sets.
      tokenizer: of the prompt.
      tokens: of prompt and actions, where actions become tokens.
      findings: what was odd on the way here.
    """

    title: str
    config: Train
    parts: tuple[Part, ...]
    tokenizer: PromptTokenizer
    tokens: FastSequence | None
    findings: tuple[Finding, ...] = ()


def of_config(config: Train) -> Subject:
    """What a training run of this config reads."""
    read = material.load(config, refuse=False)
    parts = []
    for member in read.members.values():
        stats_from = member.data.norm_stats or f"computed from {len(member.train.episodes)} training episodes"
        frames = member.train, member.validation
        parts.append(Part(member.data, member.steps, member.norm_stats, stats_from, *frames))
    return Subject(config.name, config, tuple(parts), read.tokenizer, read.sequence)


def of_checkpoint(path: str, **options: Any) -> Subject:
    """A checkpoint, and the data that it names if they are on this machine.

    Args:
      path: any that `Policy.from_pretrained` opens.
      **options: of `openpi_port.loading.open_parts`.
    """
    source, data, pieces = loading.open_parts(path, **options)
    model = source.model
    tokens = pieces if isinstance(pieces, FastSequence) else None
    if tokens is not None:
        tokens.out_of_range = "clip"  # as in training
    visible = isinstance(model, Pi0Fast) and model.missing_cameras == "visible"
    steps = transforms.pipeline(data, model, source.norm_stats, pieces, missing_visible=visible)
    frames, findings = (None, None), ()
    if data.repo_id and find_local(data.repo_id, data.root) is not None:
        frames = open_datasets(data, horizon=model.action_horizon, image_size=model.vision.image_size)
    else:
        text = (
            f"the data set {data.repo_id or 'that it was trained on'} is not on this machine: one made-up observation "
            'is shown instead (grey images, the mean state); --data=\'{"repo_id": "DIR"}\' names another'
        )
        findings = (Finding("note", text),)
    step = source.settings.get("step")
    title = f"{path}: {source.format}" + (f", step {step}" if step is not None else "")
    stats_from = "the checkpoint's" + (f", {source.asset_id}" if source.asset_id else "")
    return Subject(
        title,
        Train(name=Path(path).name, model=model, data=data),
        (Part(data, steps, source.norm_stats, stats_from, *frames),),
        tokens.text if tokens else pieces,
        tokens,
        findings,
    )


def look(subject: Subject, count: int) -> tuple[list[Sample], list[Finding]]:
    """Takes samples, spread evenly over the data, through the steps, and collects what is odd.

    Args:
      subject: what to look at.
      count: of samples, of each data set.

    Returns:
      Samples (those that the steps refuse are missing), and findings.
    """
    samples, findings = [], list(subject.findings)
    for part in subject.parts:
        findings += _of_part(subject, part)
        rows = [i * len(part.frames) // count for i in range(count)] if part.frames is not None else [None]
        for index, row in enumerate(rows):
            where = "a made-up observation"
            if row is not None:
                place = part.frames.numbers(row)
                where = f"episode {place['episode_index']}, frame {place['frame_index']}"
                where = f"{part.data.repo_id}, {where}" if len(subject.parts) > 1 else where
            try:
                raw = _made_up(subject, part) if row is None else part.frames[row]
                samples.append(_sample(subject, part, raw, index, where))
            except UserError as error:
                findings.append(Finding("bad", f"{where}: {error}"))
    for sample in samples:
        findings += _of_sample(sample)
    if samples:
        findings += _of_all(subject, samples)
    return samples, findings


def damaged(subject: Subject) -> list[Finding]:
    """Looks at the first and the last picture of every episode: what is missing or cut off is seen there."""
    found = []
    for part in subject.parts:
        bad: dict[str, int] = {}  # what is wrong -> the episode
        for frames in filter(None, (part.frames, part.validation)):
            for number, episode in enumerate(tqdm(frames.episodes, "pictures", unit=" episodes", delay=PATIENCE)):
                rows = frames.rows(number)
                for key in frames.camera_keys:
                    try:
                        _ = [frames.image(key, row) for row in {*rows[:1], *rows[-1:]}]
                    except UserError as error:
                        bad[str(error)] = episode.index
        if bad:
            skip = tuple(sorted({*bad.values(), *part.data.skip}))
            found.append(Finding("bad", f'{part.data.repo_id}: --config.data.skip="{skip}" leaves these out:'))
        found += [Finding("bad", text) for text in bad]
    return found


def _sample(subject: Subject, part: Part, raw: Mapping[str, Any], index: int, where: str) -> Sample:
    sample, before, after = dict(raw), {}, {}
    for step in part.steps:
        if isinstance(step, transforms.Delta | transforms.Normalize) and not before:
            before, prompt = dict(sample), sample["prompt"]
        sample = step.forward(sample)
        if isinstance(step, transforms.Normalize):
            after = {key: sample[key] for key in ("state", "actions") if key in sample}
    real = {c: image for c, image in sample["image"].items() if c in before["image"]}
    seed, kind = subject.config.seed, part.data.augment
    drawn = [augment(real, kind, generator(seed, index + i * 1000, "augment")) for i in range(DRAWS)]
    return Sample(
        part=part,
        where=where,
        prompt=prompt,
        images=sample["image"],
        augmented={c: [draw[c] for draw in drawn] for c in real},
        seen={c: bool(sample["image_mask"][c]) for c in subject.config.model.cameras},
        state=before["state"],
        actions=before.get("actions"),
        is_pad=before.get("action_is_pad"),
        normalised=after,
        model=sample,
        sequence=sequence.build(subject.config, sample),
    )


def _made_up(subject: Subject, part: Part) -> dict[str, Any]:
    """Grey images, the mean state, no actions; keys of the data set."""
    size = subject.config.model.vision.image_size
    grey = {key: np.full((size, size, 3), 128, np.uint8) for key in part.data.cameras.values()}
    columns = split_keys(part.data.state)
    state = np.array_split(part.stats["state"].mean.astype(np.float32), len(columns))
    return {**grey, **dict(zip(columns, state, strict=True)), "prompt": part.data.prompt or "look"}


def _of_part(subject: Subject, part: Part) -> list[Finding]:
    data, model = part.data, subject.config.model
    found = [
        Finding("bad", f"statistics: {tiny}, so that small deviations become huge inputs")
        for tiny in normalize.tiny_ranges(part.stats, data.norm)
    ]
    if data.norm == "zscore" and getattr(model, "state_in", "prompt") == "prompt":
        found.append(Finding("bad", "the state is written into the prompt in 256 bins of [-1, 1], but data.norm=zscore "
                             "does not bring it there: use quantile"))  # fmt: skip
    if part.frames is not None and (share := part.frames.padding) > MUCH_PADDING:
        length = np.median([episode.length for episode in part.frames.episodes])
        text = (
            f"{share:.0%} of the actions lie beyond their episode's end and are not learned: episodes have {length:g} "
            f"frames (median), chunks {part.frames.horizon} (config.model.action_horizon)"
        )
        found.append(Finding("note", text))
    dims = len(part.stats["actions"].mean)
    if any(data.delta) and (rest := dims - len(data.delta)) > 0:
        text = f"config.data.delta has {len(data.delta)} entries: the other {rest} of {dims} dimensions stay absolute"
        found.append(Finding("note", text))
    absent = [c for c in model.cameras if c not in data.cameras]
    if absent and len(absent) < len(model.cameras):
        visible = isinstance(model, Pi0Fast) and model.missing_cameras == "visible"
        how = "seen as black images, as openpi's FAST does" if visible else "black and masked"
        found.append(Finding("note", f"cameras that the robot lacks are {how}: {', '.join(absent)}"))
    return found


def _of_sample(sample: Sample) -> list[Finding]:
    found = []
    flat = [c for c in sample.augmented if sample.part.frames is not None and sample.images[c].std() < 1]
    found += [Finding("bad", f"{sample.where}: {c} is all one colour") for c in flat]
    if not any(sample.seen.values()):
        found.append(Finding("bad", f"{sample.where}: all cameras are masked: the model sees nothing"))
    for key, values in sample.normalised.items():
        values = np.abs(values[~sample.is_pad] if key == "actions" and sample.is_pad is not None else values[None])
        for dim in np.flatnonzero(values.max(axis=0, initial=0) > LARGE):
            found.append(Finding("bad", f"{sample.where}: normalised {key}[{dim}] reaches {values[:, dim].max():.3g}"))
    return found


def _of_all(subject: Subject, samples: Sequence[Sample]) -> list[Finding]:
    found = []
    if cut := subject.tokenizer.truncated:
        length = subject.config.model.max_token_len
        found.append(Finding("bad", f"{cut} of {len(samples)} prompts are cut to max_token_len={length}"))
    blind = [s.where for s in samples if (~s.sequence.mask.any(axis=1) & s.sequence.valid).any()]
    found += [Finding("bad", f"{where}: a valid token sees nothing") for where in blind]
    masked = max(int((~s.sequence.mask.any(axis=1)).sum()) for s in samples)
    if masked:
        found.append(Finding("note", f"up to {masked} of {len(samples[0].sequence.valid)} rows of the mask are empty "
                             "(padding, absent cameras); nothing reads what becomes of them"))  # fmt: skip
    return found
