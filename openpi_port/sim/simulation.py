"""What evaluation asks of a simulated robot, and which there are: ALOHA's tasks (aloha.py) and LIBERO's (libero.py).

Each module is imported when it is needed, because their packages exclude one another's versions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np


class Diverged(Exception):
    """Commands so wild that the physics gave up."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """One panel of an episode's plot: names of lines and the dimensions of the action and of the state they show."""

    label: str
    actions: Mapping[str, int]
    states: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class About:
    """What is known of a task before it is played.

    Attributes:
      instruction: what a policy is told to do.
      fps: control steps a second.
      success: the reward that means it.
      max_steps, after, replan: usual values of `rollout.Setting`.
      arms: action dimensions that are joint targets (rad), which should be smooth; none where actions are motions.
      panels: what to plot.
    """

    instruction: str
    fps: int
    success: int
    max_steps: int
    after: int
    replan: int
    arms: tuple[int, ...]
    panels: tuple[Panel, ...]


class Simulation(Protocol):
    """One robot in one task; a context manager."""

    @property
    def instruction(self) -> str:
        """What a policy is told to do."""

    @property
    def state(self) -> np.ndarray:
        """f32, as in the observation."""

    @property
    def hold(self) -> np.ndarray:
        """The action that keeps the robot where it is."""

    @property
    def fulfilled(self) -> str | None:
        """The task whose goal is reached now."""

    def reset(self, seed: int) -> None:
        """Starts an episode."""

    def observe(self) -> dict[str, Any]:
        """What a policy gets to see now, rendered for it, but for the instruction."""

    def picture(self, observation: Mapping[str, Any] | None) -> np.ndarray:
        """uint8 [H, W, 3] for people, rendered unless an observation of now is given."""

    def step(self, action: np.ndarray) -> int:
        """Executes an action; returns the reward. Raises UserError or Diverged."""

    def expert(self) -> Iterable[np.ndarray]:
        """A scripted expert's actions from here on, which may depend on what became of those before."""

    def close(self) -> None:
        """Frees what it holds."""


def about(task: str) -> About:
    """What is known of a task.

    Raises:
      UserError: there is no such task, or its packages are not installed.
    """
    if task.startswith("libero"):
        from openpi_port.sim import libero

        return libero.about(task)
    from openpi_port.sim import aloha_tasks

    return aloha_tasks.about(task)


def open_(task: str, render: bool) -> Simulation:
    """A simulation of a task, rendering or not.

    Raises:
      UserError: see `about`; or no OpenGL while pictures are wanted.
    """
    if task.startswith("libero"):
        from openpi_port.sim import libero

        return libero.LiberoSim(task, render=render)
    from openpi_port.sim import aloha

    return aloha.AlohaSim(task, render=render)
