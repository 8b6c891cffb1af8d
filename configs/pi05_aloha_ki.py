"""pi0.5 on ALOHA, trained with knowledge insulation: the language model learns FAST tokens, the expert the flow.

Data, sizes and prompts as in `pi05_aloha`; the checkpoints are pi0.5's. `base` writes actions with the published
universal tokenizer, `mini` and `debug` with `fast_aloha`, which ships; `--config.fast_tokenizer=` takes another.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from configs import pi05_aloha
from configs.edge import to_edge
from openpi_port.config import Train
from openpi_port.fields import build


def get_config(size: str = "base") -> ConfigDict:
    """The run at a named size."""
    config = build(Train, pi05_aloha.get_config(size))
    config = dataclasses.replace(config, name=config.name.replace("aloha", "aloha_ki", 1), insulate=True)
    if size != "base":
        model = dataclasses.replace(config.model, vocab_size=1152)  # room for the actions' 512 beside the text's
        config = dataclasses.replace(config, model=model, fast_tokenizer="fast_aloha", max_action_tokens=160)
    return to_edge(config)
