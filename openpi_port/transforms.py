"""The steps between a data set's sample and the model's: each is frozen and has a forward and an inverse.

Forward turns a raw sample (keys of the data set, units of the robot) into what the loader batches. Inverse
goes through the same list backwards and takes a chunk of actions, with the state that it is relative to, from
the model's space to the robot's. No step changes its input.

Axis letters: A actions (horizon), J dimensions of state or action, T prompt tokens, H W pixels, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from openpi_port import normalize
from openpi_port.check_sample import as_uint8_image, read_numbers, split_keys, where_from
from openpi_port.errors import UserError
from openpi_port.images import resize_with_pad
from openpi_port.tokenizers.fast_sequence import FastSequence
from openpi_port.tokenizers.steps import TokenizeActions, TokenizeFast, TokenizePrompt

if TYPE_CHECKING:
    from openpi_port.config import Data, Pi0
    from openpi_port.tokenizers.paligemma import PromptTokenizer

Sample = dict[str, Any]


class Transform(Protocol):
    """One step."""

    def forward(self, sample: Sample) -> Sample:
        """Towards the model."""

    def inverse(self, sample: Sample) -> Sample:
        """Towards the robot; concerns "actions" and "state" only."""


def forward(steps: Iterable[Transform], sample: Sample) -> Sample:
    """All steps in order, from the data set's sample to the model's."""
    for step in steps:
        sample = step.forward(sample)
    return sample


def inverse(steps: Iterable[Transform], sample: Sample) -> Sample:
    """All steps backwards.

    Args:
      steps: the list that `forward` took.
      sample: "actions" [A, J] of the model, and the "state" [J] that `forward` produced.

    Returns:
      "actions" and "state" in the robot's units.
    """
    for step in reversed(tuple(steps)):
        sample = step.inverse(sample)
    return sample


def pipeline(
    data: Data,
    model: Pi0,
    stats: normalize.NormStats,
    tokenizer: PromptTokenizer | FastSequence,
    *,
    missing_visible: bool = False,
    action_tokens: TokenizeActions | None = None,
) -> tuple[Transform, ...]:
    """The whole list for one data set and one model.

    Args:
      data: names, robot, which actions are deltas, which normalisation.
      model: `action_dim`, `max_token_len`, `cameras`, `state_in`, `vision.image_size`.
      stats: of "state" and "actions" after the robot's steps and Delta (see `before_normalize`).
      tokenizer: of the prompt; a FastSequence makes tokens of the actions too, and then nothing is padded.
      missing_visible: leaves cameras that the robot lacks unmasked, as openpi's FAST adaptors do.
      action_tokens: writes the actions as tokens too, for training with knowledge insulation.

    Raises:
      UserError: unknown robot or camera, or statistics that do not fit.
    """
    from openpi_port import robots

    if unknown := sorted(set(data.cameras) - set(model.cameras)):
        raise UserError(
            f"config.data.cameras: the model has no camera {', '.join(unknown)}; it has {', '.join(model.cameras)}"
        )
    robot = robots.load(data.robot)
    state_dim = robot.STATE_DIM or len(stats["state"].mean)
    action_dim = robot.ACTION_DIM or len(stats["actions"].mean)
    if max(state_dim, action_dim) > model.action_dim:
        raise UserError(
            f"config.model.action_dim={model.action_dim} is less than the robot's {state_dim} state and "
            f"{action_dim} action dimensions: a model from fresh weights may have more, openpi's weights have 32; a "
            "robot's file can leave dimensions out (docs/adding_a_robot.md)"
        )
    common = (
        *before_normalize(data),
        Normalize(stats, data.norm),
        Resize(model.vision.image_size),
        FillCameras(tuple(model.cameras), missing_visible),
    )
    if isinstance(tokenizer, FastSequence):
        padded = model.action_dim if data.prompt_style != "openpi" else 0
        return (*common, TokenizeFast(tokenizer, model.max_token_len, model.action_horizon, action_dim, padded))
    return (
        *common,
        TokenizePrompt(tokenizer, model.max_token_len, model.state_in, data.prompt_style, model.action_dim),
        *(() if action_tokens is None else (action_tokens,)),
        PadDims(model.action_dim, state_dim, action_dim),
    )


def before_normalize(data: Data, *, images: bool = True) -> tuple[Transform, ...]:
    """The steps whose output the normalisation statistics describe: Repack, the robot's, Delta.

    Args:
      data: as for `pipeline`.
      images: without them the steps take samples that have none, so that statistics need no video.
    """
    from openpi_port import robots

    steps = (
        Repack(data.cameras if images else {}, data.state, data.actions, data.prompt),
        *robots.load(data.robot).steps(data),
    )
    return (*steps, Delta(tuple(data.delta))) if any(data.delta) else steps


@dataclasses.dataclass(frozen=True)
class Repack:
    """Renames a data set's keys, and checks what no later step could repair.

    Attributes:
      cameras: model camera -> key of the data set.
      state, actions: keys; several, separated by commas, are concatenated (DROID keeps the gripper apart).
      prompt: the instruction where the sample brings none of its own under "prompt"; None takes its "task".
    """

    cameras: Mapping[str, str]
    state: str
    actions: str
    prompt: str | None = None

    def forward(self, sample: Sample) -> Sample:
        """Raw sample to {"image", "state", "prompt"} and, where there are any, {"actions", "action_is_pad"}.

        Raises:
          UserError: a camera, the state or the prompt is missing, or a number is not finite.
        """
        where = where_from(sample)
        out: Sample = {"image": {}}
        for camera, key in self.cameras.items():
            if key not in sample:
                have = ", ".join(sorted(k for k, v in sample.items() if np.ndim(v) == 3)) or "no image"
                raise UserError(f"{where}: no camera {key!r} (config.data.cameras.{camera}); there is {have}")
            out["image"][camera] = as_uint8_image(sample[key], f"{where}: {key}")
        out["state"] = read_numbers(sample, self.state, where)
        if out["state"].ndim != 1:
            raise UserError(f"{where}: {self.state} has shape {list(out['state'].shape)}, expected one state, [J]")
        if all(key in sample for key in split_keys(self.actions)):
            out["actions"] = read_numbers(sample, self.actions, where)
        if "action_is_pad" in sample:
            out["action_is_pad"] = np.asarray(sample["action_is_pad"], bool)
        prompt = next((p for p in (sample.get("prompt"), self.prompt, sample.get("task")) if p is not None), None)
        if prompt is None:
            raise UserError(
                f"{where}: no prompt: give one with the observation, or a default one (data.prompt, --prompt=)"
            )
        out["prompt"] = str(prompt)
        return out

    def inverse(self, sample: Sample) -> Sample:
        """Names stay: a policy answers "actions"."""
        return sample


@dataclasses.dataclass(frozen=True)
class Dims:
    """Checks that state and actions are the robot's; a robot's `steps` begin with it.

    Attributes:
      state, actions: how many dimensions each has.
    """

    state: int
    actions: int

    def forward(self, sample: Sample) -> Sample:
        """Unchanged.

        Raises:
          UserError: another number of dimensions.
        """
        for key, dim in (("state", self.state), ("actions", self.actions)):
            if key in sample and sample[key].shape[-1] != dim:
                raise UserError(
                    f"{key} has {sample[key].shape[-1]} dimensions, this robot has {dim}: wrong robot "
                    f"(config.data.robot), or wrong columns (config.data.{key})?"
                )
        return sample

    def inverse(self, sample: Sample) -> Sample:
        """Cuts dimensions that a wider model added."""
        return {**sample, "actions": sample["actions"][..., : self.actions]}


@dataclasses.dataclass(frozen=True)
class Delta:
    """Actions become differences to the state at the chunk's start (openpi's DeltaActions).

    Attributes:
      mask: which leading dimensions; the rest stay absolute.
    """

    mask: tuple[bool, ...]

    def forward(self, sample: Sample) -> Sample:
        """actions - state, where masked."""
        if "actions" not in sample:
            return sample
        return {**sample, "actions": sample["actions"] - self._offset(sample)}

    def inverse(self, sample: Sample) -> Sample:
        """actions + state, where masked."""
        return {**sample, "actions": sample["actions"] + self._offset(sample)}

    def _offset(self, sample: Sample) -> np.ndarray:
        """[J], of the actions' dtype."""
        state, actions = sample["state"], sample["actions"]
        if len(self.mask) > min(state.shape[-1], actions.shape[-1]):
            raise UserError(
                f"config.data.delta has {len(self.mask)} entries, the state {state.shape[-1]} and the "
                f"actions {actions.shape[-1]} dimensions"
            )
        offset = np.zeros(actions.shape[-1], actions.dtype)
        offset[: len(self.mask)] = np.where(self.mask, state[: len(self.mask)], 0)
        return offset


@dataclasses.dataclass(frozen=True)
class Normalize:
    """State and actions to about [-1, 1] (formulas in normalize.py).

    Attributes:
      stats: under "state" and "actions".
      mode: z-score, or quantiles.
    """

    stats: normalize.NormStats
    mode: Literal["zscore", "quantile"]

    def forward(self, sample: Sample) -> Sample:
        """The robot's units to dimensionless."""
        return self._apply(sample, normalize.normalize)

    def inverse(self, sample: Sample) -> Sample:
        """Dimensionless to the robot's units."""
        return self._apply(sample, normalize.unnormalize)

    def _apply(self, sample: Sample, map_: Any) -> Sample:
        return {
            **sample,
            **{k: map_(sample[k], self.stats[k], self.mode) for k in ("state", "actions") if k in sample},
        }


@dataclasses.dataclass(frozen=True)
class Resize:
    """Every image to [size, size, 3], keeping its proportions."""

    size: int

    def forward(self, sample: Sample) -> Sample:
        """uint8 [H, W, 3] to uint8 [size, size, 3]."""
        return {**sample, "image": {c: resize_with_pad(i, self.size) for c, i in sample["image"].items()}}

    def inverse(self, sample: Sample) -> Sample:
        """Nothing: actions carry no image."""
        return sample


@dataclasses.dataclass(frozen=True)
class FillCameras:
    """Every model camera gets an image, in the model's order, and a mask that says whether it is real.

    Attributes:
      cameras: all that the model has.
      missing_visible: the mask of those that the sample lacks.
    """

    cameras: tuple[str, ...]
    missing_visible: bool = False

    def forward(self, sample: Sample) -> Sample:
        """Adds black images and "image_mask".

        Raises:
          UserError: there is no image at all to take the size from.
        """
        images = sample["image"]
        if not images:
            raise UserError("config.data.cameras names no camera: the model needs at least one image")
        black = np.zeros_like(next(iter(images.values())))
        return {
            **sample,
            "image": {c: images.get(c, black) for c in self.cameras},
            "image_mask": {c: np.bool_(c in images or self.missing_visible) for c in self.cameras},
        }

    def inverse(self, sample: Sample) -> Sample:
        """Nothing: actions carry no image."""
        return sample


@dataclasses.dataclass(frozen=True)
class PadDims:
    """Zeros up to the model's dimensions.

    Attributes:
      dim: the model's, for state and actions alike.
      state, actions: the robot's, which the inverse cuts back to.
    """

    dim: int
    state: int
    actions: int

    def forward(self, sample: Sample) -> Sample:
        """[..., J] to [..., dim].

        Raises:
          UserError: the robot has more dimensions than the model.
        """
        out = dict(sample)
        for key in ("state", "actions"):
            if key not in sample:
                continue
            x = sample[key]
            if x.shape[-1] > self.dim:
                raise UserError(f"{key} has {x.shape[-1]} dimensions, config.model.action_dim only {self.dim}")
            out[key] = np.zeros((*x.shape[:-1], self.dim), x.dtype)  # np.pad takes ten times as long
            out[key][..., : x.shape[-1]] = x
        return out

    def inverse(self, sample: Sample) -> Sample:
        """[..., dim] to [..., J]."""
        out = {**sample, "actions": sample["actions"][..., : self.actions]}
        if "state" in sample:
            out["state"] = sample["state"][..., : self.state]
        return out
