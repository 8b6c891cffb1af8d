"""One recorded demonstration: the expert's targets, disturbed or not, executed in the ordinary simulation."""

from __future__ import annotations

import dataclasses
import functools
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, util

import numpy as np

from openpi_port.errors import UserError
from openpi_port.sim import aloha, expert

AFTER_SUCCESS = 50  # steps recorded past success: a chunk of 50 actions that begins there is whole
NOISE = 0.03  # rad, standard deviation of the disturbance of every arm joint
NOISE_DELICATE = 0.008  # rad, the same near a grasp, which tolerates about a centimetre
NOISE_MEMORY = 0.95  # share of the disturbance that is left after one step: it dies out over 0.4 s
_EASE = 11  # steps over which the disturbance shrinks and grows between the two
_ARMS = np.array([1.0] * 6 + [0.0] + [1.0] * 6 + [0.0])  # not the grippers


@dataclasses.dataclass(frozen=True)
class Episode:
    """T control steps; frame t is what was seen before action t."""

    images: np.ndarray | None  # uint8 [T, H, W, 3], None where the simulation does not render
    state: np.ndarray  # f32 [T, 14]
    actions: np.ndarray  # f32 [T, 14] the expert's clean targets, also where others were executed
    rewards: np.ndarray  # int [T]
    instruction: str


def disturbance(delicate: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ornstein-Uhlenbeck noise for joint targets: off the expert's path, so that the data show the way back.

    Args:
      delicate: bool [T] where the noise is kept small.
      rng: source of the noise.

    Returns:
      f64 [T, 14] rad, zero on the grippers.
    """
    shocks = rng.normal(size=(len(delicate), len(_ARMS))) * np.sqrt(1 - NOISE_MEMORY**2)
    noise = np.zeros_like(shocks)
    for t in range(1, len(noise)):  # from 0: the arms start undisturbed
        noise[t] = NOISE_MEMORY * noise[t - 1] + shocks[t]
    scale = np.where(delicate, NOISE_DELICATE, NOISE)
    scale = np.convolve(np.pad(scale, _EASE // 2, mode="edge"), np.full(_EASE, 1 / _EASE), mode="valid")
    return noise * scale[:, None] * _ARMS


def record(sim: aloha.AlohaSim, plan: expert.Expert, seed: int, disturbed: bool) -> Episode | None:
    """Runs one demonstration.

    Args:
      sim: the simulation, rendering or not.
      plan: the expert for the same task.
      seed: of the cube's position and of the disturbance.
      disturbed: whether noise is added to the executed targets.

    Returns:
      The episode up to AFTER_SUCCESS steps past the first success, or None where it failed (no success, or
      the cube was lost again).
    """
    sim.reset(seed)
    demonstration = plan(sim.cube, tail=AFTER_SUCCESS)
    executed = demonstration.actions
    if disturbed:
        executed = executed + disturbance(demonstration.delicate, np.random.default_rng([seed, 1]))
    observations, rewards = [], []
    end = len(executed)
    for t, action in enumerate(executed):
        if t >= end:
            break
        observations.append(sim.observe())
        rewards.append(sim.step(action))
        if rewards[-1] == aloha.SUCCESS and end == len(executed):
            end = t + 1 + AFTER_SUCCESS
    if len(rewards) < end or not _held(rewards):
        return None
    images = [o["images"][aloha.CAMERA] for o in observations if o["images"]]
    return Episode(
        images=np.stack(images) if images else None,
        state=np.stack([o["state"] for o in observations]),
        actions=demonstration.actions[: len(rewards)],
        rewards=np.array(rewards),
        instruction=sim.instruction,
    )


def _held(rewards: list[int]) -> bool:
    """Succeeded and still succeeding at the end; a contact that flickers for a step or two is not a loss."""
    return max(rewards) == aloha.SUCCESS and np.mean(np.array(rewards[-10:]) == aloha.SUCCESS) > 0.5


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What to try."""

    task: str  # a key of aloha.TASKS
    seed: int
    disturbed: bool


def record_all(attempts: Iterable[Attempt], image_size: int, workers: int) -> Iterator[Episode | None]:
    """Runs attempts in processes of their own, since rendering takes nearly all of the time.

    Args:
      attempts: may be endless; only a few are taken ahead.
      image_size: height and width of the pictures, pixels.
      workers: processes; each renders, and keeps its simulations between attempts.

    Yields:
      What `record` gives for each attempt, in their order whatever the number of workers.

    Raises:
      UserError: a process died.
    """
    context = get_context("spawn")  # a forked OpenGL does not work
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupts) as pool:
        waiting: deque[Future[Episode | None]] = deque()
        try:
            for attempt in attempts:
                waiting.append(pool.submit(_record, attempt, image_size))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError("a rendering process died: too little memory? try --workers=1") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C goes to the whole process group; only the main process answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@functools.cache
def _stage(task: str, image_size: int) -> tuple[aloha.AlohaSim, expert.Expert]:
    sim = aloha.AlohaSim(task, image_size)
    util.Finalize(None, sim.close, exitpriority=1)
    return sim, expert.Expert(task)


def _record(attempt: Attempt, image_size: int) -> Episode | None:
    return record(*_stage(attempt.task, image_size), attempt.seed, attempt.disturbed)
