"""Makes scripted demonstrations in the ALOHA simulation and writes them as a LeRobot v3.0 data set.

    python -m experiments.collect --task=transfer_cube --episodes=200 --out=data/transfer_cube --seed=1000

Half of the episodes are disturbed (Ornstein-Uhlenbeck noise on the executed targets, clean labels). Episodes
in which the expert fails are dropped and counted. Ctrl-C keeps the episodes that are finished; a killed run
leaves nothing of that name. The data do not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from absl import flags
from tqdm import tqdm

from experiments.flags import run
from openpi_port.data import lerobot_writer
from openpi_port.errors import UserError
from openpi_port.sim import aloha, aloha_tasks, demonstrate, gl
from openpi_port.whole import refuse_existing

TASK = flags.DEFINE_list("task", "transfer_cube", f"tasks, taken in turn: {', '.join(aloha.TASKS)}")
EPISODES = flags.DEFINE_integer("episodes", 200, "successful demonstrations to write", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "directory of the data set; must not exist yet")
SEED = flags.DEFINE_integer("seed", 1000, "of the first cube position; evaluation uses seeds from 0", lower_bound=0)
WORKERS = flags.DEFINE_integer("workers", None, "processes that render; default: one a core, 8 at most", lower_bound=1)

IMAGE_SIZE = 224
CAMERA = f"observation.images.{aloha.CAMERA}"


def attempts(tasks: Sequence[str], seed: int) -> Iterator[demonstrate.Attempt]:
    """Endless: tasks in turn, every attempt with the next seed, every second one of a task disturbed."""
    for i in itertools.count():
        turn, which = divmod(i, len(tasks))
        yield demonstrate.Attempt(tasks[which], seed + i, disturbed=turn % 2 == 1)


def collect(
    tasks: Sequence[str], episodes: int, out: Path, seed: int, workers: int, stop: Callable[[], bool]
) -> tuple[int, int, int]:
    """Writes the data set.

    Args:
      tasks: keys of aloha.TASKS, taken in turn.
      episodes: how many to write.
      out: the data set's directory.
      seed: of the first attempt.
      workers: processes that render.
      stop: asked after every attempt whether to finish early.

    Returns:
      How many episodes and frames were written and how many attempts failed.

    Raises:
      UserError: unknown task, out exists or can't be written, stopped before the first episode, or the expert
        fails too often. Nothing is left at out then.
    """
    about = lerobot_writer.Description(
        robot="aloha",
        fps=aloha_tasks.FPS,
        cameras={CAMERA: (IMAGE_SIZE, IMAGE_SIZE)},
        state_names=aloha_tasks.JOINTS,
        action_names=aloha_tasks.JOINTS,
    )
    failed = 0
    with (
        lerobot_writer.create(out, about) as writer,
        tqdm(total=episodes, desc="demonstrations", unit="episode", smoothing=0.1) as bar,
        contextlib.closing(demonstrate.record_all(attempts(tasks, seed), IMAGE_SIZE, workers)) as recorded,
    ):
        for episode in recorded:
            if episode is None:
                failed += 1
                if failed > 10 + episodes:
                    raise UserError(f"the expert failed {failed} times, {writer.episodes} went well: gave up")
            else:
                images = {CAMERA: episode.images}
                writer.add_episode(images, episode.state, episode.actions, episode.instruction)
                bar.update()
                bar.set_postfix(frames=writer.frames, failed=failed)
            if writer.episodes == episodes or stop():
                break
        if not writer.episodes:
            raise UserError("stopped before the first episode was finished: nothing was written")
    return writer.episodes, writer.frames, failed


class Interrupt:
    """Turns the first Ctrl-C (or SIGTERM) into a question that the work asks; a second one interrupts it."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write("stopping; the finished episodes are kept (once more: nothing is)", file=sys.stderr)

    def __call__(self) -> bool:
        return self.asked


def main() -> int:
    """Checks what can be wrong before any work, then collects."""
    if OUT.value is None:
        raise UserError("--out= names no directory for the data set")
    out = Path(OUT.value)
    refuse_existing(out)
    for task in TASK.value:
        aloha.find_task(task)
    workers = WORKERS.value or min(os.cpu_count() or 1, 8)
    print(f"rendering with MUJOCO_GL={gl.require()} in {workers} processes")
    start = time.monotonic()
    try:
        written, frames, failed = collect(TASK.value, EPISODES.value, out, SEED.value, workers, Interrupt())
    except OSError as error:  # a full disk, as a rule
        raise UserError(f"{out} could not be written, and nothing is left of it: {error}") from error
    except KeyboardInterrupt:
        print("interrupted twice: nothing was written", file=sys.stderr)
        return 130
    seconds = time.monotonic() - start
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 2**20
    print(
        f"{out}: {written} episodes, {frames} frames, {size:.1f} MiB, {failed} failed attempts dropped, "
        f"{seconds / written:.1f} s an episode"
    )
    return 0


if __name__ == "__main__":
    run(main)
