"""What robots send, under the names that the policy's data set has.

A policy knows its cameras and its state by the keys of the data set that it was trained on
(`observation.images.cam_high`). Robots and openpi's clients use those, or shorter ones; all of these are the same:

    {"observation.images.cam_high": ..., "observation.state": ...}     a LeRobot sample
    {"observation/images/cam_high": ..., "observation/state": ...}     openpi's DROID and LIBERO clients
    {"observation": {"images": {"cam_high": ...}, "state": ...}}       nested
    {"images": {"cam_high": ...}, "state": ...}                        openpi's ALOHA client, openpi_port.sim

Axis letters: J state dimensions, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from openpi_port.check_sample import split_keys
from openpi_port.config import Data
from openpi_port.errors import UserError

DEPTH = 4  # of nesting; real observations have two


def rename(observation: Mapping[str, Any], data: Data) -> dict[str, Any]:
    """An observation under the data set's keys; what the policy doesn't know is left out.

    Args:
      observation: images uint8 or float in [0, 1], [H, W, 3] or [3, H, W]; state [J]; "prompt" is optional.
      data: names of cameras and state.

    Returns:
      {key of each camera: image, key(s) of the state: array, "prompt": str, "task": str}, as far as they were there:
      the first transform says what is missing.

    Raises:
      UserError: not a mapping of names to arrays, two values under one name, or a prompt that is no text.
    """
    if not isinstance(observation, Mapping):
        raise UserError(f"an observation is a dictionary, got {type(observation).__name__}")
    found: dict[str, Any] = {}
    for name, value in _flatten(observation, ""):
        if name in found:
            raise UserError(f"observation: two values under {name!r}")
        found[name] = value
    out = {}
    for key in data.cameras.values():
        _copy(found, key, (_path(key), f"images/{_path(key).rpartition('/')[2]}"), out)
    states = split_keys(data.state)
    for key in states:
        _copy(found, key, (_path(key), "state") if len(states) == 1 else (_path(key),), out)
    for key in ("prompt", "task"):  # the second is LeRobot's word; Repack prefers the policy's own default to it
        if key in found:
            out[key] = _text(found[key], key)
    return out


def _path(key: str) -> str:
    return key.replace(".", "/")


def _flatten(tree: Mapping[str, Any], prefix: str, depth: int = 1) -> Iterator[tuple[str, Any]]:
    """(name with slashes, leaf) of nested mappings; a None counts as absent."""
    if depth > DEPTH:
        raise UserError(f"observation: nested deeper than {DEPTH} levels at {prefix!r}")
    for key, value in tree.items():
        if not isinstance(key, str):
            raise UserError(f"observation: names are text, got {key!r:.60}")
        name = prefix + _path(key)
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}/", depth + 1)
        elif value is not None:
            yield name, value


def _copy(found: Mapping[str, Any], key: str, names: tuple[str, ...], out: dict[str, Any]) -> None:
    for name in names:
        if name in found:
            out[key] = found[name]
            return


def _text(prompt: Any, key: str) -> str:
    """A prompt as clients send it: str, or numpy's text."""
    if isinstance(prompt, np.ndarray) and prompt.ndim == 0:
        prompt = prompt.item()
    if not isinstance(prompt, str):
        raise UserError(f"observation: {key} is text, got {type(prompt).__name__}")
    return str(prompt)
