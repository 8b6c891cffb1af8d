"""What crosses from the host to the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from openpi_port.config import Pi0, Pi0Fast
from openpi_port.errors import UserError

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
    """The named fields of a batch, so that nothing else is copied to the device.

    Raises:
      UserError: one is not there.
    """
    if missing := [key for key in keys if key not in batch]:
        raise UserError(f"batch: no {', '.join(missing)}; this reads {', '.join(keys)}")
    return {key: dict(batch[key]) if isinstance(batch[key], Mapping) else batch[key] for key in keys}


def leave_out(batch: Batch, cameras: Collection[str]) -> dict[str, Any]:
    """A batch in numpy without the other cameras, whose images are masked: a masked image changes nothing but the work.

    Args:
      batch: of training.
      cameras: that some data set has (`Train.cameras`). If another one is seen nevertheless, nothing is left out.
    """
    image, mask = batch["image"], batch["image_mask"]
    if any(np.any(mask[name]) for name in mask if name not in cameras):
        return dict(batch)
    kept = [name for name in image if name in cameras]
    return {**batch, "image": {name: image[name] for name in kept}, "image_mask": {name: mask[name] for name in kept}}


def prompt_lengths(model: Pi0 | Pi0Fast) -> list[int]:
    """The lengths that `trim` cuts prompts to: about a third, two thirds, and the whole."""
    step = -(-model.max_token_len // 48) * 16
    return sorted({min(step * i, model.max_token_len) for i in (1, 2, 3)})


def trim(batch: Batch, model: Pi0 | Pi0Fast) -> dict[str, Any]:
    """An observation without what no sample has: absent cameras, and the padding behind the longest prompt.

    The prompt keeps one of `prompt_lengths`, so that few shapes are ever compiled. What is left out is masked and takes
    no position, so the model computes the same.

    Args:
      batch: observation in numpy; of a training batch the prompt alone counts.
      model: whose cameras and prompt these are.

    Returns:
      The batch; `image` and `image_mask` in the model's order.
    """
    seen = np.asarray(batch["tokenized_prompt_mask"], bool)
    if "token_ar_mask" in batch:
        seen = seen & (np.asarray(batch["token_ar_mask"]) == 0)
    used = seen.any(0).nonzero()[0].max(initial=0) + 1
    length = next(n for n in prompt_lengths(model) if n >= used)
    cameras = [c for c in model.cameras if np.any(batch["image_mask"][c])]
    return {
        **batch,
        "image": {c: batch["image"][c] for c in cameras},
        "image_mask": {c: batch["image_mask"][c] for c in cameras},
        "tokenized_prompt": batch["tokenized_prompt"][:, :length],
        "tokenized_prompt_mask": seen[:, :length],
    }
