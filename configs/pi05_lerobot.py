"""pi0.5 on any LeRobot data set, named as in `pi0_lerobot`: statistics are quantiles, the state is written as text.

    python -m experiments.train --config=pi05_lerobot --config.data.repo_id=user/name \\
        --config.data.cameras.base_0_rgb=observation.images.front
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import pi0_lerobot, pi05_aloha
from openpi_port.config import Train
from openpi_port.fields import build

TOKENS = 200  # of the prompt: an instruction, and 32 numbers of a state


def get_config(size: str = "base") -> ConfigDict:
    """The run at a named size."""
    aloha = build(Train, pi05_aloha.get_config(size))
    return pi0_lerobot.for_any_robot(aloha, f"pi05_lerobot_{size}", TOKENS)
