"""pi0 on ALOHA with LoRA, as openpi trains it: adapters of rank 16 in the language model and 32 in the action expert.

Trained are the adapters, the vision tower and the projections of state, time and actions; the language stack's own
weights are frozen, and no average is kept. `--config.frozen="('all-but-lora',)"` trains the adapters alone. Checkpoints
hold what is trained, and find the rest where `--config.init` says; adapters that are lacking there start fresh. The
sizes are those of `pi0_aloha`. Any other config gets LoRA by `--config.model.language.lora.rank=16`.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict, config_dict

from configs import pi0_aloha
from configs.edge import to_edge
from openpi_port.config import LORA_ONLY, Lora, Pi0, Train
from openpi_port.fields import build

RANKS = {"base": (16, 32), "mini": (4, 8), "debug": (2, 4)}


def get_config(size: str = "base") -> ConfigDict:
    """The run at a named size."""
    full = build(Train, pi0_aloha.get_config(size))
    language, expert = (Lora(rank=rank, alpha=float(rank)) for rank in RANKS[size])
    model: Pi0 = dataclasses.replace(
        full.model,
        language=dataclasses.replace(full.model.language, lora=language),
        expert=dataclasses.replace(full.model.expert, lora=expert),
    )
    name, optimizer = full.name.replace("pi0_aloha", "pi0_aloha_lora"), dataclasses.replace(full.optimizer, ema=0.0)
    run = dataclasses.replace(full, name=name, model=model, optimizer=optimizer, frozen=LORA_ONLY, save="trained")
    edge = to_edge(run)
    for part in (edge.model.language, edge.model.expert):  # an override of the rank is one of alpha too
        part.lora.alpha = config_dict.placeholder(float)
    return edge
