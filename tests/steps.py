"""A small run's configuration and batches, for tests of optimizer steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from configs import pi0_aloha
from openpi_port.config import Optimizer, Train
from openpi_port.fields import build


def run_config(**changes: Any) -> Train:
    """In few steps all that an optimizer does: warm-up, decay, clipping, weight decay, an average."""
    config = build(Train, pi0_aloha.get_config("debug"))
    optimizer = Optimizer(
        peak_lr=3e-4, end_lr=3e-5, warmup_steps=2, decay_steps=6, weight_decay=1e-2, clip_norm=0.5, ema=0.5
    )
    return dataclasses.replace(config, optimizer=optimizer, batch_size=3, **changes)


def batches(config: Train, count: int) -> list[dict[str, Any]]:
    """Random batches; some samples end with padding."""
    rng = np.random.default_rng(0)
    model, b = config.model, config.batch_size
    shape = (b, model.action_horizon, model.action_dim)
    size = model.vision.image_size
    return [
        {
            "image": {c: rng.integers(0, 256, (b, size, size, 3), np.uint8) for c in model.cameras},
            "image_mask": {c: np.ones(b, bool) for c in model.cameras},
            "state": rng.standard_normal(shape[::2], np.float32),
            "tokenized_prompt": rng.integers(0, model.vocab_size, (b, model.max_token_len)).astype(np.int32),
            "tokenized_prompt_mask": np.arange(model.max_token_len) < rng.integers(3, 11, (b, 1)),
            "actions": rng.standard_normal(shape, np.float32),
            "action_is_pad": np.arange(shape[1]) >= rng.integers(10, shape[1] + 1, (b, 1)),
            "noise": rng.standard_normal(shape, np.float32),
            "time": rng.uniform(0.1, 1, b).astype(np.float32),
        }
        for _ in range(count)
    ]
