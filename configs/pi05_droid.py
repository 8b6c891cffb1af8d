"""pi0.5 on DROID in RLDS, as openpi fine-tunes it: joint positions relative to the state, chunks of 16.

    python -m experiments.train --config=pi05_droid --config.data.repo_id=path/to/droid/1.0.1

The data set as it is published: `gsutil -m cp -r gs://gresearch/robotics/droid_100 .` fetches 100 episodes (2 GB).
openpi also drops failed episodes and idle frames, and chooses one of two outer cameras and of three instructions at
random; here it is all episodes but those that `--config.data.episodes=` leaves out, the first camera, and the first
instruction that is not empty.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from configs import pi05_aloha
from configs.edge import to_edge
from openpi_port.config import Data, Optimizer, Train
from openpi_port.fields import build
from openpi_port.robots import droid


def get_config(size: str = "base") -> ConfigDict:
    """The run at a named size."""
    config = build(Train, pi05_aloha.get_config(size))
    data = Data(
        repo_id="", robot="droid", cameras=droid.CAMERAS, state=droid.STATE, actions=droid.RLDS_POSITIONS,
        delta=droid.POSITION_DELTA, task=droid.RLDS_TASK, norm="quantile",
    )  # fmt: skip
    model = dataclasses.replace(config.model, action_horizon=16)
    if size == "base":
        optimizer = Optimizer(peak_lr=5e-5, end_lr=5e-5, warmup_steps=1000, decay_steps=1_000_000)
        config = dataclasses.replace(config, optimizer=optimizer, batch_size=256, num_steps=100_000)
    else:
        model = dataclasses.replace(model, action_dim=8, cameras=tuple(droid.CAMERAS), max_token_len=96)
    name = "pi05_droid" if size == "base" else f"pi05_droid_{size}"
    return to_edge(dataclasses.replace(config, name=name, model=model, data=data))
