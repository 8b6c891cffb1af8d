"""Any data set that is read here as a LeRobot v3.0 data set: numbers to the bit, pictures as video, one at a time.

T frames of an episode, J state or action dims, H W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from openpi_port.check_sample import split_keys
from openpi_port.config import Data
from openpi_port.data import dimensions
from openpi_port.data.datasets import chosen, find
from openpi_port.data.frames import Frames
from openpi_port.data.lerobot_writer import Description, LeRobotWriter, create
from openpi_port.errors import UserError
from openpi_port.whole import refuse_existing


def convert(
    data: Data,
    out: Path,
    *,
    fps: int | None = None,
    robot: str = "",
    image_size: int | None = None,
    crf: int = 20,
) -> Frames:
    """Writes a data set as LeRobot v3.0.

    Args:
      data: which one, and which of its episodes; `cameras` names those to take, none all.
      out: the new one's directory.
      fps: frames per second; None takes what the data set says.
      robot: for info.json.
      image_size: pictures are resized and padded to this square; None leaves them as they are.
      crf: of the video.

    Returns:
      The data set that was read.

    Raises:
      UserError: anything wrong with the data, or out exists or can't be written. Nothing is left at out then.
    """
    refuse_existing(out)
    metadata, open_ = find(data)
    fps = fps or getattr(metadata, "fps", None)
    if not fps or fps != int(fps):
        raise UserError(
            f"{metadata.root}: frames per second are {fps or 'not recorded'}; give a whole number as --fps="
        )
    keys = tuple(dict.fromkeys(data.cameras.values())) or metadata.cameras
    frames = open_(
        cameras={key: key for key in keys}, horizon=1, state=data.state, action=data.actions, image_size=image_size,
        episodes=chosen(data, metadata),
    )  # fmt: skip
    names = camera_names(keys)
    sizes = {names[key]: frames.image(key, 0).shape[:2] for key in keys}
    if odd := [key for key in keys if any(side % 2 for side in sizes[names[key]])]:
        raise UserError(
            f"{odd[0]}: pictures are {sizes[names[odd[0]]]}, but video needs even sides; give --image_size="
        )
    about = Description(
        robot=robot or getattr(metadata, "robot", ""), fps=int(fps), cameras=sizes, crf=crf,
        state_names=dimensions.names(frames, data.state), action_names=dimensions.names(frames, data.actions),
    )  # fmt: skip
    if data.prompt is None and "task" not in frames.numbers(0):
        raise UserError(f"{metadata.root}: the data set has no instructions; give one with --prompt=")
    try:
        with create(out, about) as writer, tqdm(total=len(frames), unit=" frames", smoothing=0.1) as bar:
            for number in range(len(frames.episodes)):
                add_episode(writer, frames, number, data, names, bar.update)
    except OSError as error:  # a full disk, as a rule
        raise UserError(f"{out} could not be written, and nothing is left of it: {error}") from error
    return frames


def camera_names(keys: Sequence[str]) -> dict[str, str]:
    """LeRobot's names of cameras: "observation/image_0" becomes "observation.images.image_0".

    Raises:
      UserError: two would have the same.
    """
    prefix = "observation.images."
    names = {key: prefix + key.removeprefix(prefix).rpartition("/")[2].replace(".", "_") for key in keys}
    if len(set(names.values())) < len(names):
        raise UserError(f"--cameras={','.join(keys)}: two end alike, and would have one name in LeRobot's data set")
    return names


def add_episode(
    writer: LeRobotWriter,
    frames: Frames,
    number: int,
    data: Data,
    names: dict[str, str],
    progress: Callable[[int], None],
) -> None:
    """Appends the `number`-th episode."""
    rows = frames.rows(number)
    if not rows:
        return
    samples = [frames.numbers(row) for row in rows]
    state = [np.concatenate([sample[key] for key in split_keys(data.state)]) for sample in samples]
    action = [np.concatenate([sample[key][0] for key in split_keys(data.actions)]) for sample in samples]
    task = data.prompt if data.prompt is not None else [sample["task"] for sample in samples]
    images = {name: _Pictures(frames, key, rows) for key, name in names.items()}
    writer.add_episode(images, np.stack(state), np.stack(action), task)
    progress(len(rows))


@dataclasses.dataclass(frozen=True)
class _Pictures(Sequence[np.ndarray]):
    """One camera's pictures of an episode, read when they are asked for."""

    frames: Frames
    key: str
    rows: range

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.frames.image(self.key, self.rows[index])
