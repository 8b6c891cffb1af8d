"""Norm statistics of a data set: states and chunks of actions as they are just before normalisation, without video.

A actions, J dims.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from openpi_port import transforms
from openpi_port.data.frames import PATIENCE, Frames
from openpi_port.errors import UserError
from openpi_port.normalize import NormStats, RunningStats, Stats

LOOKED_AT = 1000  # frames whose extremes are taken, spread evenly


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


def fitted(given: NormStats, dataset: Frames, steps: Sequence[transforms.Transform]) -> NormStats:
    """Statistics from elsewhere, as those of these data: cut to their dimensions, with extremes as they occur in them.

    openpi's files are padded to the model's dimensions, and hold no extremes, by which another robot's would show.

    Args:
      given: of as many dimensions as the data have, or more.
      dataset, steps: see `compute`; only some frames are looked at.

    Raises:
      UserError: they have fewer dimensions.
    """
    rows = range(0, len(dataset), max(1, len(dataset) // LOOKED_AT))
    samples = [transforms.forward(steps, dataset.numbers(row)) for row in rows]
    actions = np.concatenate([sample["actions"][~sample["action_is_pad"]] for sample in samples])
    found = {}
    for key, values in (("state", np.stack([sample["state"] for sample in samples])), ("actions", actions)):
        stats, dim = given[key], values.shape[-1]
        if len(stats.mean) < dim:
            raise UserError(
                f"the statistics of {key} have {len(stats.mean)} dimensions, the data {dim}: another robot's?"
            )
        cut = [None if array is None else array[:dim] for array in (stats.mean, stats.std, stats.q01, stats.q99)]
        found[key] = Stats(*cut, values.min(axis=0), values.max(axis=0))
    return found
