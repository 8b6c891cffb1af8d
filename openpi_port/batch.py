"""What crosses from the host to the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openpi_port.config import Pi0, Pi0Fast

Batch = Mapping[str, Any]

OBSERVATION = ("image", "image_mask", "state", "tokenized_prompt", "tokenized_prompt_mask")
TRAINING = (*OBSERVATION, "actions", "action_is_pad", "noise", "time")
INSULATED = (*TRAINING, "action_tokens", "action_tokens_mask")
FAST = ("image", "image_mask", "tokenized_prompt", "tokenized_prompt_mask")
FAST_TRAINING = (*FAST, "token_ar_mask", "token_loss_mask")


def training(model: Pi0 | Pi0Fast, *, insulate: bool = False) -> tuple[str, ...]:
    """What a model's loss reads; that of knowledge insulation reads action tokens too."""
    if isinstance(model, Pi0Fast):
        return FAST_TRAINING
    return INSULATED if insulate else TRAINING


def prompt(batch: Batch) -> tuple[str, ...]:
    """What decoding reads; a training batch says which of its tokens are the prompt."""
    return (*FAST, "token_ar_mask") if "token_ar_mask" in batch else FAST


def select(batch: Batch, keys: tuple[str, ...]) -> dict[str, Any]:
    """The named fields of a batch, so that nothing else is copied to the device."""
    return {key: dict(batch[key]) if isinstance(batch[key], Mapping) else batch[key] for key in keys}
