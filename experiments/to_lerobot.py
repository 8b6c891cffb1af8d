"""Writes any data set that is read here (RLDS, ALOHA's HDF5, LeRobot of any version) as a LeRobot v3.0 data set.

    python -m experiments.to_lerobot --repo_id=bridge_dataset/1.0.0 --out=data/bridge --fps=5 \\
        --state=observation/state --actions=action [--cameras=observation/image_0] [--robot_type=widowx]

State and action keep their bits; pictures become H.264 video (`--crf`). One picture is in memory at a time. The data
set appears when it is complete: an error, Ctrl-C or a full disk leaves nothing of that name.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from experiments.flags import run
from openpi_port.config import Data
from openpi_port.data.to_lerobot import convert
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
EPISODES = flags.DEFINE_list("episodes", [], "numbers of episodes to take; all by default")
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
        actions=ACTIONS.value, prompt=PROMPT.value, task=TASK.value, split=SPLIT.value, episodes=numbers(EPISODES),
        skip=numbers(SKIP),
    )  # fmt: skip
    out = Path(OUT.value)
    try:
        frames = convert(data, out, fps=FPS.value, robot=ROBOT.value, image_size=SIZE.value, crf=CRF.value)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 2**20
    print(f"{out}: {len(frames.episodes)} episodes, {len(frames)} frames, {size:.1f} MiB")
    return 0


def numbers(flag: flags.FlagHolder[list[str]]) -> tuple[int, ...]:
    """The numbers of episodes that a flag lists."""
    if bad := [number for number in flag.value if not number.isdecimal()]:
        raise UserError(f"--{flag.name}={bad[0]}: expected numbers of episodes with commas between them")
    return tuple(map(int, flag.value))


if __name__ == "__main__":
    run(main)
