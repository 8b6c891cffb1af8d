"""Writes any data set that is read here (RLDS, ALOHA's HDF5, LeRobot of any version) as a LeRobot v3.0 data set.

    python -m experiments.to_lerobot --repo_id=bridge_dataset/1.0.0 --out=data/bridge --fps=5 \\
        --state=observation/state --actions=action [--cameras=observation/image_0] [--robot_type=widowx]

State and action keep their bits; pictures become H.264 video (`--crf`). One picture is in memory at a time. The data
set appears when it is complete: an error, Ctrl-C or a full disk leaves nothing of that name.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.flags import run
from openpi_port.check_sample import split_keys
from openpi_port.config import Data
from openpi_port.data.datasets import Metadata, find
from openpi_port.data.frames import Frames
from openpi_port.data.lerobot_writer import Description, LeRobotWriter, refuse_existing
from openpi_port.errors import UserError

REPO = flags.DEFINE_string("repo_id", None, "the data set: a directory, or a LeRobot one on the hub")
OUT = flags.DEFINE_string("out", None, "directory of the new data set; must not exist yet")
FPS = flags.DEFINE_integer("fps", None, "frames per second, where the data set does not say (RLDS, HDF5)")
CAMERAS = flags.DEFINE_list("cameras", [], "images to take; all by default")
STATE = flags.DEFINE_string("state", "observation.state", "columns that make up the state, with commas between them")
ACTIONS = flags.DEFINE_string("actions", "action", "columns that make up the action, likewise")
PROMPT = flags.DEFINE_string("prompt", None, "the instruction; by default what the data set says")
TASK = flags.DEFINE_string("task", "", "of RLDS, the features with the instruction; language_instruction by default")
SPLIT = flags.DEFINE_string("split", "", "of RLDS; train by default")
SKIP = flags.DEFINE_list("skip", [], "numbers of episodes to leave out, such as damaged ones")
ROBOT = flags.DEFINE_string("robot_type", "", "name of the robot, for info.json")
SIZE = flags.DEFINE_integer("image_size", None, "resize and pad pictures to this square; as they are by default")
CRF = flags.DEFINE_integer("crf", 20, "quality of the video: lower is better and larger", lower_bound=0, upper_bound=51)


def main() -> int:
    """Converts what the command line says."""
    for flag in (REPO, OUT):
        if not flag.value:
            raise UserError(f"--{flag.name}= is missing")
    data = Data(
        repo_id=REPO.value, robot="lerobot", cameras={key: key for key in CAMERAS.value}, state=STATE.value,
        actions=ACTIONS.value, prompt=PROMPT.value, task=TASK.value, split=SPLIT.value,
    )  # fmt: skip
    if bad := [number for number in SKIP.value if not number.isdecimal()]:
        raise UserError(f"--skip={bad[0]}: expected numbers of episodes with commas between them")
    skip = {int(number) for number in SKIP.value}
    out = Path(OUT.value)
    try:
        frames = convert(data, out, fps=FPS.value, skip=skip, robot=ROBOT.value, image_size=SIZE.value, crf=CRF.value)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 2**20
    print(f"{out}: {len(frames.episodes)} episodes, {len(frames)} frames, {size:.1f} MB")
    return 0


def convert(
    data: Data,
    out: Path,
    *,
    fps: int | None = None,
    skip: set[int] = frozenset(),
    robot: str = "",
    image_size: int | None = None,
    crf: int = 20,
) -> Frames:
    """Writes a data set as LeRobot v3.0.

    Args:
      data: which one; `cameras` names those to take, none all.
      out: the new one's directory.
      fps: frames per second; None takes what the data set says.
      skip: episodes to leave out.
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
        episodes=[number for number in metadata.numbers if number not in skip],
    )  # fmt: skip
    names = camera_names(keys)
    sizes = {names[key]: frames.image(key, 0).shape[:2] for key in keys}
    if odd := [key for key in keys if any(side % 2 for side in sizes[names[key]])]:
        raise UserError(
            f"{odd[0]}: pictures are {sizes[names[odd[0]]]}, but video needs even sides; give --image_size="
        )
    first = frames.numbers(0)
    about = Description(
        robot=robot or getattr(metadata, "robot", ""), fps=int(fps), cameras=sizes, crf=crf,
        state_names=[name for key in split_keys(data.state) for name in dimension_names(metadata, key, first)],
        action_names=[name for key in split_keys(data.actions) for name in dimension_names(metadata, key, first)],
    )  # fmt: skip
    if data.prompt is None and "task" not in first:
        raise UserError(f"{metadata.root}: the data set has no instructions; give one with --prompt=")
    try:
        with LeRobotWriter(out, about) as writer, tqdm(total=len(frames), unit=" frames", smoothing=0.1) as bar:
            for number in range(len(frames.episodes)):
                add_episode(writer, frames, number, data, names, bar.update)
            writer.finish()
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


def dimension_names(metadata: Metadata, key: str, sample: Mapping[str, Any]) -> list[str]:
    """Names of a column's dimensions: the data set's own, or "joint_position_0", ..."""
    size = sample[key].shape[-1]
    names = getattr(metadata, "features", {}).get(key, {}).get("names")
    if isinstance(names, list) and len(names) == size:
        return names
    return [f"{key.rpartition('/')[2]}_{i}" for i in range(size)]


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


if __name__ == "__main__":
    run(main)
