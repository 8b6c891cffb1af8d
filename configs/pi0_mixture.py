"""pi0 for one robot, learned together with another's data: ALOHA in simulation, and BridgeData (RLDS).

    python -m experiments.train --config=pi0_mixture --config.mixture.bridge.repo_id=path/to/bridge_dataset/1.0.0

Of every ten samples seven are ALOHA's and three BridgeData's. Each data set has its own robot, cameras and statistics;
both are padded to the model's dimensions. The policy is `data`'s; `--asset=bridge`, where it is opened or converted,
makes it BridgeData's.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from configs import pi0_aloha
from configs.edge import to_edge
from openpi_port.config import Data, Train
from openpi_port.fields import build


def get_config(size: str = "base") -> ConfigDict:
    """The run at a named size."""
    aloha = build(Train, pi0_aloha.get_config(size))
    bridge = Data(
        repo_id="",
        robot="lerobot",
        cameras={"base_0_rgb": "observation/image_0"},
        state="observation/state",
        actions="action",
        weight=0.3,
    )
    config = dataclasses.replace(
        aloha,
        name=aloha.name.replace("aloha", "mixture"),
        model=dataclasses.replace(aloha.model, max_token_len=48),
        data=dataclasses.replace(aloha.data, weight=0.7),
        mixture={"bridge": bridge},
    )
    return to_edge(config)
