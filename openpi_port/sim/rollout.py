"""Closed loop: a policy drives simulated robots, several at once, each in a process of its own.

    worker: observation -> main: one batch of all robots -> chunks -> worker: plays `replan` actions -> observation ...

Robots move in lock step, chunk by chunk, so that batches, and with them every number, depend on the seeds alone.
Axis letters: T control steps, K actions of a chunk that are played, J and D dimensions of state and action, N kept
frames, H W pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from openpi_port.errors import UserError
from openpi_port.rng import draw_noise
from openpi_port.sim import latency, simulation

Act = Callable[[Sequence[Mapping[str, Any]]], Sequence[Mapping[str, Any]]]
Seen = tuple[dict[str, Any], np.ndarray]  # what a policy gets, and the action that keeps the robot where it is


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is played, and how.

    Attributes:
      task: a key of aloha.TASKS, or LIBERO's suite and number, such as libero_spatial_0.
      max_steps: control steps until an episode counts as failed.
      after: control steps played on after the first success, to see whether it lasts; None plays to max_steps in any
        case.
      replan: actions played per chunk.
      chunks: how one chunk follows the other, see latency.py.
      latency: control steps from an observation to its chunk.
      prompt: instead of the task's own instruction.
      films: of how many of the first seeds pictures are kept, for a video.
      frames_every: keep every n-th picture of those.
      frame_size: of those pictures, pixels.
      render: False leaves pictures out of the observation, for drivers that need none.
    """

    task: str
    max_steps: int = 400
    after: int | None = 50
    replan: int = 25
    chunks: latency.Style = "open_loop"
    latency: int = 0
    prompt: str | None = None
    films: int = 0
    frames_every: int = 2
    frame_size: int = 112
    render: bool = True

    def __post_init__(self) -> None:
        if self.chunks != "open_loop" and self.latency >= self.replan:
            raise UserError(
                f"--chunks={self.chunks} asks every {self.replan} steps (--replan), which must be more than the "
                f"{self.latency} steps of --latency"
            )


@dataclasses.dataclass(frozen=True)
class Episode:
    """What happened, up to `after` steps past the first success, or max_steps.

    Attributes:
      success: the environment's own word (its reward), at any step.
      end: the task, this one or another of the scene, that was fulfilled in most of the last ten steps (a contact may
        flicker); None where none was.
      diverged: the commands were so wild that the physics gave up, which ends the episode.
      borders: control steps where another chunk, or a wait for it, began.
    """

    seed: int
    success: bool
    end: str | None
    diverged: bool
    states: np.ndarray  # f32 [T, J], before each action
    actions: np.ndarray  # f32 [T, D], as executed
    rewards: np.ndarray  # int [T]
    frames: np.ndarray | None  # uint8 [N, H, W, 3]
    sim_seconds: float
    borders: tuple[int, ...] = ()


def rollout(
    setting: Setting, seeds: Sequence[int], act: Act | None, *, workers: int, noise_shape: tuple[int, int] | None = None
) -> Iterator[Episode]:
    """Plays one episode per seed.

    Args:
      setting: what to play.
      seeds: of the scene (the cube's position as in gym-aloha, LIBERO's initial states) and of the policy's noise.
      act: observations to results with "actions" [A, D], as `Policy.infer_batch`; None lets the scripted expert act.
      workers: robots, and processes.
      noise_shape: (A, J) of the policy; each call then gets noise keyed by seed and call, whatever the batch.

    Yields:
      Episodes, in the order of the seeds within each group of `workers`.

    Raises:
      UserError: no OpenGL, no such task, chunks too short for `replan` and `latency`, or a process died.
    """
    filmed = frozenset(seeds[: setting.films])
    with contextlib.ExitStack() as stack:
        robots = [stack.enter_context(_Robot(setting)) for _ in range(min(workers, len(seeds)))]
        for start in range(0, len(seeds), len(robots)):
            playing = dict(zip(seeds[start : start + len(robots)], robots, strict=False))
            for seed, robot in playing.items():
                robot.send("reset", seed, seed in filmed)
            yield from _group(setting, playing, act, noise_shape)


def _group(
    setting: Setting, playing: Mapping[int, _Robot], act: Act | None, noise_shape: tuple[int, int] | None
) -> Iterator[Episode]:
    """One episode on each robot, which has been told to reset."""
    players = {seed: latency.Player(setting.chunks, setting.replan, setting.latency) for seed in playing}
    if act is None:
        for robot in playing.values():
            robot.receive()
            robot.send("expert")
        for robot in playing.values():
            robot.receive()
    else:
        seen = {seed: robot.receive() for seed, robot in playing.items()}
        call = 0
        while seen:
            observations = [{**observation, **players[s].question()} for s, (observation, _) in seen.items()]
            if noise_shape is not None:
                keys = zip(seen, observations, strict=True)
                observations = [{**o, "noise": draw_noise(seed, call, noise_shape)} for seed, o in keys]
            for (seed, (_, hold)), result in zip(seen.items(), act(observations), strict=True):
                playing[seed].send("play", players[seed].answer(np.asarray(result["actions"]), hold))
            answers = {seed: playing[seed].receive() for seed in seen}
            seen = {seed: answer for seed, answer in answers.items() if answer is not None}
            call += 1
    for seed, robot in playing.items():
        robot.send("episode")
        yield dataclasses.replace(robot.receive(), borders=tuple(players[seed].borders))


class _Robot:
    """A simulation in another process; requests are answered one by one."""

    def __init__(self, setting: Setting) -> None:
        context = get_context("spawn")  # a forked OpenGL does not work
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, setting), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, *request: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # `receive` tells
            self._connection.send(request)

    def receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise UserError("a simulation's process died: too little memory? try fewer --workers") from error
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def __enter__(self) -> _Robot:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()  # which the process takes for the end
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()


def _work(connection: Connection, setting: Setting) -> None:
    """The loop of a robot's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; only the main process answers
    logging.set_verbosity(logging.ERROR)  # a simulation that diverges is in the results
    try:
        with contextlib.closing(simulation.open_(setting.task, setting.render)) as sim:
            stage = _Stage(sim, setting)
            while True:
                name, *arguments = connection.recv()
                connection.send(getattr(stage, name)(*arguments))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the main process is gone
    except Exception as error:
        with contextlib.suppress(BrokenPipeError):
            connection.send(error)


class _Stage:
    """One simulation and the record of its present episode."""

    def __init__(self, sim: simulation.Simulation, setting: Setting) -> None:
        self._sim, self._setting = sim, setting
        self._success = simulation.about(setting.task).success

    def reset(self, seed: int, film: bool) -> Seen:
        self._film = film and self._setting.render
        self._seed, self._seconds, self._diverged = seed, 0.0, False
        self._states: list[np.ndarray] = []
        self._actions: list[np.ndarray] = []
        self._rewards: list[int] = []
        self._fulfilled: list[str | None] = []
        self._frames: list[np.ndarray] = []
        self._observation: dict[str, Any] | None = None  # of now, where the policy got one
        self._sim.reset(seed)
        return self._for_policy()

    def play(self, actions: Iterable[np.ndarray]) -> Seen | None:
        """What is seen after a chunk; None when the episode has ended."""
        begin = time.perf_counter()
        for action in actions:
            self._keep_frame()
            self._states.append(self._sim.state)
            self._actions.append(np.asarray(action, np.float32))
            self._observation = None
            try:
                reward = self._sim.step(action)
            except simulation.Diverged:
                self._diverged, reward = True, 0
            self._rewards.append(reward)
            self._fulfilled.append(None if self._diverged else self._sim.fulfilled)
            if self._ended():
                break
        self._seconds += time.perf_counter() - begin
        return None if self._ended() else self._for_policy()

    def expert(self) -> None:
        """Plays the scripted expert to its end."""
        self.play(self._sim.expert())

    def episode(self) -> Episode:
        self._keep_frame(last=True)
        end = max(self._fulfilled[-10:], key=self._fulfilled[-10:].count)
        return Episode(
            self._seed,
            self._success in self._rewards,
            None if self._diverged or self._fulfilled[-10:].count(end) <= 5 else end,
            self._diverged,
            np.stack(self._states),
            np.stack(self._actions),
            np.array(self._rewards),
            np.stack(self._frames) if self._frames else None,
            self._seconds,
        )

    def _ended(self) -> bool:
        if self._diverged:
            return True
        if self._success in self._rewards and self._setting.after is not None:
            return len(self._rewards) > self._rewards.index(self._success) + self._setting.after
        return len(self._rewards) >= self._setting.max_steps

    def _for_policy(self) -> Seen:
        self._observation = self._sim.observe()
        observation = {**self._observation, "prompt": self._setting.prompt or self._sim.instruction}
        return observation, self._sim.hold

    def _keep_frame(self, last: bool = False) -> None:
        every, size = self._setting.frames_every, self._setting.frame_size
        due = len(self._rewards) % every == 0 if not last else not self._diverged  # nothing to see after that
        if self._film and due:
            image = Image.fromarray(self._sim.picture(self._observation))
            self._frames.append(np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)))
