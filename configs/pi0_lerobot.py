"""pi0 on any LeRobot data set: name it, and say which of its images is which of the model's cameras.

    python -m experiments.train --config=pi0_lerobot --config.data.repo_id=user/name \\
        --config.data.cameras.base_0_rgb=observation.images.front \\
        --config.data.cameras.right_wrist_0_rgb=observation.images.wrist

Cameras that are not named are black and masked. State and actions are `observation.state` and `action` unless
`--config.data.state=` and `--config.data.actions=` say otherwise; `--config.data.delta="(True, ...)"` makes action
dimensions relative to the state. The instruction is each episode's task.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from configs import pi0_aloha
from configs.edge import to_edge
from openpi_port.config import Data, Train
from openpi_port.fields import build

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


def get_config(size: str = "base") -> ConfigDict:
    """The run at a named size."""
    return for_any_robot(build(Train, pi0_aloha.get_config(size)), f"pi0_lerobot_{size}", 48)


def for_any_robot(run: Train, name: str, tokens: int) -> ConfigDict:
    """A run whose cameras, state and actions flags name.

    Args:
      run: what it is but for its data.
      name: of the new one.
      tokens: that a prompt may have.
    """
    model = dataclasses.replace(run.model, cameras=CAMERAS, action_dim=32, max_token_len=tokens)
    data = Data(repo_id="", robot="lerobot", cameras={}, norm=run.data.norm)
    config = to_edge(dataclasses.replace(run, name=name, model=model, data=data))
    with config.unlocked():
        config.data.cameras = dict.fromkeys(CAMERAS, "")
    return config
