"""Norm statistics of a data set: states and chunks of actions as they are just before normalisation, without video.

A actions, J dims.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from openpi_port import transforms
from openpi_port.data.frames import PATIENCE, Frames
from openpi_port.normalize import NormStats, RunningStats


def compute(dataset: Frames, steps: Sequence[transforms.Transform]) -> NormStats:
    """Streams over the episodes.

    Every chunk counts with all its actions, as in openpi: for delta actions the later ones of a chunk are the larger
    ones. Unlike openpi's, repetitions of the last action after an episode's end don't count; they are not trained on.

    Args:
      dataset: the training episodes, with the model's horizon.
      steps: `transforms.before_normalize(data, images=False)`.

    Returns:
      {"state": Stats, "actions": Stats} in the robot's units.

    Raises:
      UserError: what the steps raise, such as a state of the wrong size.
    """
    running: dict[str, RunningStats] = {}
    progress = tqdm(dataset.iterate_numbers(), "norm stats", len(dataset.episodes), unit=" episodes", delay=PATIENCE)
    for episode in progress:
        samples = [transforms.forward(steps, sample) for sample in episode]
        if not samples:
            continue
        values = {
            "state": np.stack([sample["state"] for sample in samples]),
            "actions": np.concatenate([sample["actions"][~sample["action_is_pad"]] for sample in samples]),
        }
        for key, value in values.items():
            running.setdefault(key, RunningStats(value.shape[-1])).update(value)
    return {key: stats.finish() for key, stats in running.items()}
