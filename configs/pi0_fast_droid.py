"""pi0-FAST on DROID: fine-tunes openpi's base checkpoint on a LeRobot data set with DROID's columns.

    python -m experiments.train --config=pi0_fast_droid --config.data.repo_id=user/name

Actions are chunks of ten, as in openpi; the model's third camera, which the robot lacks, is black and seen. Cameras,
state and actions have the names of openpi's clients; `--config.data.cameras.base_0_rgb=` and the like give others.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from configs import pi0_fast_aloha
from configs.edge import to_edge
from openpi_port.config import Data, Train
from openpi_port.fields import build
from openpi_port.robots import droid

CAMERAS = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")


def get_config(size: str = "base") -> ConfigDict:
    """The run at a named size."""
    aloha = build(Train, pi0_fast_aloha.get_config(size))
    data = Data(
        repo_id="",
        robot="droid",
        cameras=droid.FAST_CAMERAS,
        state=droid.STATE,
        actions=droid.ACTIONS,
        norm="quantile",
    )
    model = dataclasses.replace(aloha.model, cameras=CAMERAS, action_dim=8, action_horizon=10, max_token_len=180)
    init = "gs://openpi-assets/checkpoints/pi0_fast_base" if size == "base" else None
    if size != "base":  # the published tokenizer has 2048 tokens
        model = dataclasses.replace(model, vocab_size=3008, max_token_len=250)
    config = dataclasses.replace(
        aloha, name=f"pi0_fast_droid_{size}", model=model, data=data, init=init,
        fast_tokenizer="physical-intelligence/fast",
    )  # fmt: skip
    return to_edge(config)
