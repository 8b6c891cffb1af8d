"""What crosses from the host to the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Batch = Mapping[str, Any]

OBSERVATION = ("image", "image_mask", "state", "tokenized_prompt", "tokenized_prompt_mask")
TRAINING = (*OBSERVATION, "actions", "action_is_pad", "noise", "time")


def select(batch: Batch, keys: tuple[str, ...]) -> dict[str, Any]:
    """The named fields of a batch, so that nothing else is copied to the device."""
    return {key: dict(batch[key]) if isinstance(batch[key], Mapping) else batch[key] for key in keys}
