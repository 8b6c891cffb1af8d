"""Functions of the step and of the flow time, the same numbers for both frameworks."""

from __future__ import annotations

import math

import numpy as np

from openpi_port.config import Optimizer


def learning_rate(step: int, config: Optimizer) -> float:
    """Linear warm-up from peak / (warmup + 1), then cosine decay to `end_lr` (openpi's `CosineDecaySchedule`).

    Args:
      step: 0-based number of the optimizer step.
      config: the schedule.

    Returns:
      The learning rate of that step.
    """
    warmup, peak, end = config.warmup_steps, config.peak_lr, config.end_lr
    if step < warmup:
        start = peak / (warmup + 1)
        return start + (peak - start) * step / warmup
    progress = min((step - warmup) / max(config.decay_steps - warmup, 1), 1.0)
    return end + (peak - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def euler_times(num_steps: int) -> tuple[np.ndarray, np.float32]:
    """The flow times at which the velocity is evaluated, from 1 (noise) towards 0 (data).

    The reference accumulates `time += dt` in float32 while `time >= -dt / 2`; so do these, to the bit.

    Args:
      num_steps: number of Euler steps, at least 1.

    Returns:
      float32 [num_steps] times, and the (negative) step.
    """
    dt = np.float32(-1.0 / num_steps)
    times, time = [], np.float32(1.0)
    while time >= -dt / 2:
        times.append(time)
        time = np.float32(time + dt)
    return np.array(times, np.float32), dt
