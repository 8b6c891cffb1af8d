"""How chunks follow one another on a robot whose policy takes its time: latency, injected, in control steps.

    open_loop   observation | waits | chunk[:replan]                  | observation | waits ...
    ahead       observation | old chunk goes on | chunk[latency:replan] | observation | this chunk goes on ...
    realtime    the same, and the policy is told what goes on, and for how long

So a policy is asked every `replan` steps, and by open_loop less often. These are the executors of serving/chunks.py
without their threads: what happens depends on the numbers alone. A actions in a chunk, D action dims.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from openpi_port.errors import UserError

Style = Literal["open_loop", "ahead", "realtime"]
STYLES: tuple[Style, ...] = ("open_loop", "ahead", "realtime")
ARMS = (*range(6), *range(7, 13))  # of ALOHA: the joints without the grippers


@dataclasses.dataclass
class Player:
    """One robot's chunks.

    Attributes:
      style: see above.
      replan: actions from one question to the next.
      latency: control steps from a question to its answer.
      borders: control steps at which another chunk, or a wait for it, began; not where the robot began to move.
    """

    style: Style
    replan: int
    latency: int
    borders: list[int] = dataclasses.field(default_factory=list)
    _step: int = 0
    _last: np.ndarray | None = None
    _left: np.ndarray | None = None  # of the present chunk, at the time of a question

    def question(self) -> dict[str, Any]:
        """What goes to the policy beside the observation."""
        if self.style != "realtime" or self._left is None:
            return {}
        return {"previous_actions": self._left, "delay": self.latency}

    def answer(self, chunk: np.ndarray, hold: np.ndarray) -> np.ndarray:
        """What is played from this question to the next.

        Args:
          chunk: [A, D].
          hold: [D], the action that lets the robot wait if it has not moved yet.

        Raises:
          UserError: chunks are too short, or of another robot.
        """
        if chunk.shape[1:] != hold.shape:
            raise UserError(f"the simulation takes {len(hold)} finite joint targets, got {list(chunk.shape)}")
        needed = self.replan + (0 if self.style == "open_loop" else self.latency)
        if len(chunk) < needed:
            late = "" if self.style == "open_loop" else f" and --latency of {self.latency} steps"
            raise UserError(f"--replan={self.replan}{late}, but the policy's chunks have {len(chunk)} actions")
        if self._left is None:
            waits = np.repeat((hold if self._last is None else self._last)[None], self.latency, 0)
            played = np.concatenate([waits, chunk[: self.replan]])
            if self._last is not None:
                self.borders += [self._step, self._step + self.latency]
        else:
            played = np.concatenate([self._left[: self.latency], chunk[self.latency : self.replan]])
            self.borders.append(self._step + self.latency)
        self._step += len(played)
        self._last = played[-1]
        self._left = None if self.style == "open_loop" else chunk[self.replan :]
        return played


def kinks(actions: np.ndarray, borders: list[int], arms: Sequence[int] = ARMS) -> tuple[np.ndarray, np.ndarray]:
    """How smooth a trajectory is where chunks meet, and elsewhere.

    Args:
      actions: [T, D] joint targets.
      borders: control steps where something else begins.
      arms: dimensions that should be smooth.

    Returns:
      The change of the targets' step (rad), the largest over the arms' joints: at the borders, and at all other steps.
    """
    change = np.abs(np.diff(actions[:, list(arms)], 2, axis=0)).max(1)  # of step t + 2
    steps = np.arange(len(change)) + 2
    at = np.isin(steps, borders)
    return change[at], change[~at]
