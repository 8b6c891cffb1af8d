"""Makes scripted demonstrations in the ALOHA simulation and writes them as a LeRobot v3.0 data set.

    python -m experiments.collect --task=transfer_cube --episodes=200 --out=data/transfer_cube --seed=1000

Half of the episodes are disturbed (Ornstein-Uhlenbeck noise on the executed targets, clean labels). Episodes in which
the expert fails are dropped and counted. Ctrl-C keeps the episodes that are finished; a killed run leaves nothing.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from absl import app, flags
from tqdm import tqdm

from openpi_port.data import lerobot_writer
from openpi_port.errors import UserError
from openpi_port.sim import aloha, demonstrate, expert, gl

FLAGS = flags.FLAGS
flags.DEFINE_list("task", "transfer_cube", f"tasks, taken in turn: {', '.join(aloha.TASKS)}")
flags.DEFINE_integer("episodes", 200, "successful demonstrations to write", lower_bound=1)
flags.DEFINE_string("out", None, "directory of the data set; must not exist yet", required=True)
flags.DEFINE_integer("seed", 1000, "of the first cube position; evaluation uses seeds from 0", lower_bound=0)

IMAGE_SIZE = 224
CAMERA = f"observation.images.{aloha.CAMERA}"


class Interrupt:
    """Turns the first Ctrl-C (or SIGTERM) into a question that the work asks; a second one interrupts as usual."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.asked = True
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.default_int_handler)
        tqdm.write("stopping: the finished episodes are kept", file=sys.stderr)

    def __call__(self) -> bool:
        return self.asked


def collect(tasks: list[str], episodes: int, out: Path, seed: int, stop: Interrupt) -> tuple[int, int, int]:
    """Writes the data set.

    Args:
      tasks: keys of aloha.TASKS, taken in turn.
      episodes: how many to write.
      out: the data set's directory.
      seed: of the first attempt; every attempt takes the next one.
      stop: asked at every step whether to finish early.

    Returns:
      How many episodes and frames were written and how many attempts failed.

    Raises:
      UserError: unknown task, out exists, no OpenGL, nothing was recorded, or the expert fails too often.
    """
    about = lerobot_writer.Description(
        robot="aloha",
        fps=aloha.FPS,
        cameras={CAMERA: (IMAGE_SIZE, IMAGE_SIZE)},
        state_names=aloha.JOINTS,
        action_names=aloha.JOINTS,
    )
    plans = [expert.Expert(task) for task in tasks]
    failed = attempt = 0
    with contextlib.ExitStack() as stack:
        sims = [stack.enter_context(aloha.AlohaSim(task, IMAGE_SIZE)) for task in tasks]
        writer = stack.enter_context(lerobot_writer.LeRobotWriter(out, about))
        bar = stack.enter_context(tqdm(total=episodes, desc="demonstrations", unit="episode", smoothing=0.1))
        while writer.episodes < episodes and not stop():
            turn, which = divmod(attempt, len(tasks))
            episode = demonstrate.record(sims[which], plans[which], seed + attempt, disturbed=turn % 2 == 1, stop=stop)
            attempt += 1
            if episode is None:
                if stop():
                    break
                failed += 1
                if failed > 10 + episodes:
                    raise UserError(f"the expert failed {failed} of {attempt} times, so nothing was written")
                continue
            writer.add_episode({CAMERA: episode.images}, episode.state, episode.actions, episode.instruction)
            bar.update()
            bar.set_postfix(frames=writer.frames, failed=failed)
        if not writer.episodes:
            raise UserError("stopped before the first episode was finished: nothing was written")
        writer.finish()
        return writer.episodes, writer.frames, failed


def main(argv: list[str]) -> None:
    """Checks what can be wrong before any work, then collects."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; all settings are --name=value")
    out = Path(FLAGS.out)
    lerobot_writer.refuse_existing(out)
    for task in FLAGS.task:
        aloha.find_task(task)
    print(f"rendering with MUJOCO_GL={gl.require()}")
    start = time.monotonic()
    written, frames, failed = collect(FLAGS.task, FLAGS.episodes, out, FLAGS.seed, Interrupt())
    seconds = time.monotonic() - start
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 2**20
    print(
        f"{out}: {written} episodes, {frames} frames, {size:.1f} MB, {failed} failed attempts dropped, "
        f"{seconds / written:.1f} s an episode"
    )


def run() -> None:
    """Entry point: a user's mistake is one line, not a traceback."""

    def guarded(argv: list[str]) -> None:
        try:
            main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted twice: nothing was written", file=sys.stderr)
            sys.exit(130)

    app.run(guarded)


if __name__ == "__main__":
    run()
