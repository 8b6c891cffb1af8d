"""Real-time chunking, the formulas that both frameworks and the host share.

While a chunk is computed, the robot plays on with the one before. The new chunk has to agree with what was played
meanwhile, the first `delay` of its actions, and should not contradict what was planned after them. Two ways:

    guided       any flow policy: at every Euler step the estimate of the clean chunk is pulled towards the previous
                 one, with weights that fade out (Black, Galliker, Levine, "Real-Time Execution of Action Chunking
                 Flow Policies", arXiv 2506.07339)
    conditioned  a policy that was trained so: the first `delay` actions enter clean, with flow time 0 of their own, and
                 no gradient is needed (Black, Ren, Equi, Levine, "Training-Time Action Conditioning for Efficient
                 Real-Time Chunking", arXiv 2512.05964)

The papers' flow time tau runs from 0 (noise) to 1 (data); here t = 1 - tau.
A actions in a chunk, N of them left to play, J the model's action dims, D the robot's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from openpi_port.check_sample import as_array
from openpi_port.errors import UserError

MAX_GUIDANCE = 5.0  # the first paper's choice of beta


def soft_mask(horizon: int, delay: int, left: int) -> np.ndarray:
    """How firmly each action of a new chunk is held to the previous one (equation 5 of arXiv 2506.07339).

    1 for the actions that will have been played when the chunk is ready, exponentially less for those that were only
    planned, and 0 where nothing was.

    Args:
      horizon: A.
      delay: d, actions that will be played before the chunk is ready.
      left: actions of the previous chunk that were not played when the observation was made, `delay` among them; in
        the paper H - s.

    Returns:
      f32 [A].
    """
    fade = np.clip((left - np.arange(horizon)) / (left - delay + 1), 0.0, 1.0)
    return np.float32(fade * np.expm1(fade) / np.expm1(1.0))


def own_times(time: np.ndarray, delay: int, horizon: int) -> np.ndarray:
    """Flow times of the single actions, of which the first `delay` are given and so have 0, that of data.

    Args:
      time: [...].
      delay: d.
      horizon: A.

    Returns:
      f32 [..., A].
    """
    return np.where(np.arange(horizon) < delay, np.float32(0), np.float32(time)[..., None])


def guidance(time: Any, limit: float) -> Any:
    """The weight of the pull at a flow time (equations 2 and 4 of arXiv 2506.07339).

    min(beta, (1 - tau) / (tau r^2)) with r^2 = (1 - tau)^2 / (tau^2 + (1 - tau)^2); the paper's velocity points the
    other way, so here the pull is subtracted.

    Args:
      time: array of any framework, in (0, 1].
      limit: beta; finite, because at t = 1 nothing else bounds the weight.

    Returns:
      Of the shape of `time`.
    """
    return ((time**2 + (1 - time) ** 2) / (time * (1 - time))).clip(max=limit)


def check(previous: Any, weights: Any, delay: Any) -> None:
    """What may be given together: nothing, or the previous chunk and one of the two ways to hold on to it.

    Raises:
      UserError: another combination.
    """
    ways = [name for name, value in (("weights", weights), ("delay", delay)) if value is not None]
    if len(ways) != (previous is not None):
        given = ", ".join([*(["previous"] if previous is not None else []), *ways])
        raise UserError(
            f"sample_actions takes previous with either weights (guided) or delay (conditioned), got {given}"
        )


@dataclasses.dataclass(frozen=True)
class Continuation:
    """How a policy goes on from the chunk that is being played.

    Attributes:
      horizon, model_dim, action_dim: A, J, D.
      max_delay: up to which delay the model was trained to be conditioned; 0 if it was not, and is guided.
      limit: of the guidance.
    """

    horizon: int
    model_dim: int
    action_dim: int
    max_delay: int = 0
    limit: float = MAX_GUIDANCE

    def __post_init__(self) -> None:
        if not (self.limit > 0 and math.isfinite(self.limit)):
            raise UserError(f"max_guidance={self.limit}: a number above 0; the paper's is {MAX_GUIDANCE:g}")

    @property
    def way(self) -> Literal["guided", "conditioned"]:
        """Which of the two ways it takes."""
        return "conditioned" if self.max_delay else "guided"

    def read(self, observation: Mapping[str, Any]) -> tuple[np.ndarray, int] | None:
        """The previous chunk that an observation brings along.

        Args:
          observation: with "previous_actions" [N, D], in the robot's units, the actions that were not played when the
            observation was made, in order; and "delay", how many of them will be when the answer comes.

        Returns:
          Both, or None where there are none.

        Raises:
          UserError: one without the other, misshapen, not finite, or a delay that can't be.
        """
        previous, delay = observation.get("previous_actions"), observation.get("delay")
        if previous is None and delay is None:
            return None
        if previous is None or delay is None:
            raise UserError("observation: previous_actions and delay come together")
        previous, number = as_array(previous, "previous_actions"), as_array(delay, "delay")
        if previous.dtype.kind not in "fiu" or previous.ndim != 2 or previous.shape[1] != self.action_dim:
            raise UserError(
                f"previous_actions are numbers [N, {self.action_dim}], got {previous.dtype} {list(previous.shape)}"
            )
        if not 0 < len(previous) <= self.horizon:
            raise UserError(f"previous_actions: {len(previous)} of them, a chunk has {self.horizon}")
        if not np.isfinite(previous).all():
            raise UserError("previous_actions: not a finite number among them")
        if number.dtype.kind not in "iu" or number.ndim or not 0 <= number <= len(previous):
            raise UserError(f"delay={delay!r}: an integer from 0 to the {len(previous)} previous_actions")
        if self.max_delay and number > self.max_delay:
            raise UserError(
                f"delay={number}, but this policy was trained for up to {self.max_delay} (config.max_delay): train it "
                f"for more, or make inference faster or the control loop slower"
            )
        return np.asarray(previous, np.result_type(previous, np.float32)), int(number)

    def hold(self, previous: np.ndarray, delay: int) -> dict[str, Any]:
        """What a sample brings to the model.

        Args:
          previous: [N, J], in the model's units, relative to the new observation.
          delay: see `read`.
        """
        rows = np.zeros((self.horizon, self.model_dim), np.float32)
        rows[: len(previous)] = previous
        if self.max_delay:
            return {"previous": rows, "delay": np.int32(delay)}
        real = np.arange(self.model_dim) < self.action_dim  # dims that only fill the model up are nobody's plan
        return {"previous": rows, "weights": soft_mask(self.horizon, delay, len(previous))[:, None] * np.float32(real)}

    def hold_nothing(self) -> dict[str, Any]:
        """The same fields for a sample that continues nothing, beside others that do: plain sampling."""
        return {key: np.zeros_like(value) for key, value in self.hold(np.zeros((1, self.model_dim)), 0).items()}
