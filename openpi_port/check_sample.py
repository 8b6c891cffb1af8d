"""What a data set or a robot sends, checked and brought to one form; messages say where it came from.

Axis letters: A actions, J dimensions, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from openpi_port.errors import UserError


def as_uint8_image(image: Any, name: str) -> np.ndarray:
    """uint8 [H, W, 3] of what robots send: uint8 or float in [0, 1], channels last or first.

    Args:
      image: [H, W, 3] or [3, H, W].
      name: for the message.

    Raises:
      UserError: another shape, or float values outside [0, 1].
    """
    image = as_array(image, name)
    if image.ndim != 3 or 3 not in (image.shape[0], image.shape[-1]) or not image.size:
        raise UserError(f"{name}: shape {list(image.shape)} is no image; expected [H, W, 3] or [3, H, W]")
    if np.issubdtype(image.dtype, np.floating):
        if not (image.min() >= 0 and image.max() <= 1):  # also catches NaN
            raise UserError(f"{name}: float images must be within [0, 1]; got {image.min():.3g} to {image.max():.3g}")
        image = (image * 255).astype(np.uint8)  # truncates, as openpi does
    elif image.dtype != np.uint8:
        raise UserError(f"{name}: images are uint8 or float, got {image.dtype}")
    return image if image.shape[-1] == 3 else np.ascontiguousarray(image.transpose(1, 2, 0))


def split_keys(names: str) -> list[str]:
    """The keys in "a, b"."""
    return [name.strip() for name in names.split(",")]


def read_numbers(sample: Mapping[str, Any], names: str, where: str) -> np.ndarray:
    """The values under one or several keys, concatenated, as finite floats (float64 stays so)."""
    parts = []
    for key in split_keys(names):
        if key not in sample:
            have = ", ".join(sorted(k for k, v in sample.items() if np.ndim(v) in (1, 2)))
            raise UserError(f"{where}: no {key!r}; there is {have or 'nothing like it'}")
        x = as_array(sample[key], f"{where}: {key}")
        if x.dtype.kind not in "fiub" or x.ndim not in (0, 1, 2):
            raise UserError(f"{where}: {key} is {x.dtype} of shape {list(x.shape)}, expected numbers [J] or [A, J]")
        x = x.astype(np.float64 if x.dtype == np.float64 else np.float32)
        if not (finite := np.isfinite(x)).all():
            index = [int(i) for i in np.argwhere(~finite)[0]]
            raise UserError(f"{where}: {key}{index} is not a finite number")
        parts.append(np.atleast_1d(x))
        if parts[-1].shape[:-1] != parts[0].shape[:-1]:
            shapes = f"{list(parts[0].shape)} and {list(parts[-1].shape)}"
            raise UserError(f"{where}: {names} are of shapes {shapes}, which can't be joined")
    return np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def as_array(value: Any, name: str) -> np.ndarray:
    """`np.asarray`, whose refusal is a UserError that says of what."""
    try:
        return np.asarray(value)
    except ValueError as error:  # lists of different lengths
        raise UserError(f"{name} is no array ({str(error).partition('.')[0]})") from None


def where_from(sample: Mapping[str, Any]) -> str:
    """Names a sample in messages."""
    if "episode_index" in sample:
        return f"episode {int(sample['episode_index'])}, frame {int(sample.get('frame_index', 0))}"
    return "observation"
