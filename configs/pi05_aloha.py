"""pi0.5 on ALOHA: the state is written into the prompt, the flow time modulates the expert's norms (AdaRMS).

Data and sizes as in `pi0_aloha`; statistics are quantiles, prompts are long enough for fourteen state bins.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from configs import pi0_aloha
from configs.edge import to_edge
from openpi_port.config import Train
from openpi_port.fields import build


def get_config(size: str = "base") -> ConfigDict:
    """The run at a named size."""
    config = build(Train, pi0_aloha.get_config(size))
    model = dataclasses.replace(
        config.model, state_in="prompt", time_in="adarms", max_token_len=200 if size == "base" else 64
    )
    init = "gs://openpi-assets/checkpoints/pi05_base" if size == "base" else None
    data = dataclasses.replace(config.data, norm="quantile")
    name = config.name.replace("pi0_", "pi05_", 1)
    return to_edge(dataclasses.replace(config, name=name, model=model, data=data, init=init))
