"""Real-time chunking, the formulas that both frameworks and the host share.

While a chunk is computed, the robot plays on with the one before. The new chunk has to agree with what was played
meanwhile, the first `delay` of its actions, and should not contradict what was planned after them. Two ways:

    guided       any flow policy: at every Euler step the estimate of the clean chunk is pulled towards the previous
                 one, with weights that fade out (Black, Galliker, Levine, "Real-Time Execution of Action Chunking
                 Flow Policies", arXiv 2506.07339)
    conditioned  a policy that was trained so: the first `delay` actions enter clean, with flow time 0 of their own, and
                 no gradient is needed (Black, Ren, Equi, Levine, "Training-Time Action Conditioning for Efficient
                 Real-Time Chunking", arXiv 2512.05964)

The papers' flow time tau runs from 0 (noise) to 1 (data); here t = 1 - tau. A actions in a chunk.
"""

from __future__ import annotations

from typing import Any

import numpy as np

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
