"""pi0.5 on LIBERO, as openpi fine-tunes it: 10 actions a chunk, two cameras, quantile statistics, no state.

The data set comes from the Hugging Face hub; `--config.data.repo_id=` takes a local copy.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from configs import pi05_aloha
from configs.edge import to_edge
from openpi_port.config import Data, Optimizer, Train
from openpi_port.fields import build


def get_config(size: str = "base") -> ConfigDict:
    """The run at a named size."""
    config = build(Train, pi05_aloha.get_config(size))
    cameras = {"base_0_rgb": "image", "left_wrist_0_rgb": "wrist_image"}
    data = Data(
        repo_id="physical-intelligence/libero", robot="libero", cameras=cameras, state="state", actions="actions",
        norm="quantile",
    )  # fmt: skip
    model = dataclasses.replace(config.model, action_horizon=10, state_in="none")
    if size == "base":
        optimizer = Optimizer(peak_lr=5e-5, end_lr=5e-5, warmup_steps=10_000, decay_steps=1_000_000, ema=0.999)
        config = dataclasses.replace(config, optimizer=optimizer, batch_size=256)
    else:
        model = dataclasses.replace(model, action_dim=8, cameras=tuple(cameras))
    name = "pi05_libero" if size == "base" else f"pi05_libero_{size}"
    return to_edge(dataclasses.replace(config, name=name, model=model, data=data))
