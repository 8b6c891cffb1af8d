"""What all kinds of data sets share: frames of chosen episodes by number, as raw samples under the data's own names.

A kind (lerobot.py, rlds.py, aloha_hdf5.py) reads states and actions into memory when it is opened (some hundred bytes a
frame) and says how one image is read; here are the chunks of actions, the resizing and the frame cache.

N frames of all chosen episodes, A actions of a chunk, J state or action dims, H W pixels.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from openpi_port.check_sample import split_keys
from openpi_port.data.frame_cache import Entry, FrameCache
from openpi_port.errors import UserError
from openpi_port.images import resize_with_pad

PATIENCE = 2.0  # seconds until a progress bar appears


class Episode(Protocol):
    """What is known of an episode before it is read: its number in the data set, and how many frames it has."""

    @property
    def index(self) -> int: ...
    @property
    def length(self) -> int: ...


class Frames(abc.ABC):
    """Some episodes of a data set. A kind's constructor calls this one, then fills `_columns`.

    Args:
      root: of the data set, for messages.
      episodes: the chosen ones.
      cameras: {model camera: image key}; the keys say what is decoded, each once however often it is named.
      horizon: A.
      state, action: columns; several, separated by commas, where a robot's are recorded apart.
      image_size: frames are resized and padded to this square; None leaves them as recorded.
      cache: where decoded frames are kept; needs the same image_size.

    Attributes:
      episodes, horizon, image_size: as given.
      camera_keys: the image keys in use.

    Raises:
      UserError: the episodes have no frames, or a column is state and action at once.
    """

    def __init__(
        self,
        root: Path,
        episodes: tuple[Episode, ...],
        *,
        cameras: Mapping[str, str],
        horizon: int,
        state: str,
        action: str,
        image_size: int | None,
        cache: FrameCache | None,
    ):
        self.root, self.episodes, self.horizon, self.image_size = root, episodes, horizon, image_size
        self.camera_keys = tuple(dict.fromkeys(cameras.values()))
        self._state_keys, self._action_keys = split_keys(state), split_keys(action)
        if both := set(self._state_keys) & set(self._action_keys):
            raise UserError(f"{root}: {min(both)} can't be state and action at once; see config.data")
        lengths = [episode.length for episode in episodes]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if not self._starts[-1]:
            raise UserError(f"{root}: no frames in the chosen episodes")
        self._row_episode = np.repeat(np.arange(len(episodes)), lengths)
        self._columns: dict[str, np.ndarray] = {}  # f32 [N,J] of every state and action key
        if cache is not None and cache.image_size != image_size:
            raise ValueError(f"the cache holds images of {cache.image_size}, not of {image_size}")
        self._cache = cache

    @property
    def features(self) -> Mapping[str, Mapping[str, Any]]:
        """What is known of columns beside their numbers, such as the "names" of their dimensions."""
        return {}

    @property
    def fps(self) -> float | None:
        """Frames, and actions, per second; None where the data set doesn't say."""
        return None

    @property
    def padding(self) -> float:
        """Share of all chunks' actions that lie beyond their episode's end."""
        ahead = self._starts[self._row_episode + 1] - np.arange(len(self))
        return 1.0 - float(np.minimum(ahead, self.horizon).mean()) / self.horizon

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A raw sample.

        Returns:
          {image key: uint8 [H,W,3] for every camera, state column: f32 [J], action column: f32 [A,J],
          "action_is_pad": bool [A], "task": str, "episode_index": int, "frame_index": int}, and what else the kind
          knows. Action i is the one i frames later; after the episode's end the last one is repeated and marked as
          padding, as LeRobot does with delta_timestamps.

        Raises:
          UserError: an image is damaged.
        """
        index = range(len(self))[index]  # negative numbers count from the end; others raise IndexError
        return {key: self.image(key, index) for key in self.camera_keys} | self.numbers(index)

    def numbers(self, index: int) -> dict[str, Any]:
        """A raw sample without its images; nothing is decoded."""
        number = self._row_episode[index]
        rows = index + np.arange(self.horizon)
        last = self._starts[number + 1] - 1
        chunk = np.minimum(rows, last)
        return {
            **{key: self._columns[key][index] for key in self._state_keys},
            **{key: self._columns[key][chunk] for key in self._action_keys},
            "action_is_pad": rows > last,
            "episode_index": self.episodes[number].index,
            "frame_index": int(index - self._starts[number]),
            **self._about(index),
        }

    def iterate_numbers(self) -> Iterator[list[dict[str, Any]]]:
        """Episode by episode, the samples without images: what norm statistics are made from."""
        for number in range(len(self.episodes)):
            yield [self.numbers(index) for index in self.rows(number)]

    def rows(self, number: int) -> range:
        """Which samples are of the `number`-th chosen episode, in their order."""
        return range(int(self._starts[number]), int(self._starts[number + 1]))

    def image(self, key: str, index: int) -> np.ndarray:
        """One image of a sample, uint8 [H,W,3].

        Raises:
          UserError: it is damaged.
        """
        number = self._row_episode[index]
        return self._image(key, number, int(index - self._starts[number]))

    @abc.abstractmethod
    def _about(self, index: int) -> dict[str, Any]:
        """What else a sample says: its "task", where the data set has one."""

    @abc.abstractmethod
    def _image(self, key: str, number: int, frame: int) -> np.ndarray:
        """An image of the `number`-th chosen episode, resized."""

    def _cached(
        self, path: Path, part: str, row: int, rows: Callable[[], int], read: Callable[[], np.ndarray]
    ) -> np.ndarray:
        """An image that can be read on its own, resized, from the cache or read.

        Args:
          path, part: the file that holds it, and which of the file's series of images it belongs to.
          row: its place in the series.
          rows: how many the series has; asked once.
          read: uint8 [H,W,3].
        """
        cache, entry = self._cache, None
        if cache is not None:
            # Only videos need the times of their frames.
            entry = cache.entry(path, part) or cache.create(path, np.arange(rows(), dtype=np.float64), part)
            image = cache.get(entry, row)
            if image is not None:
                return image
        return self._keep(entry, row, read())

    def _keep(self, entry: Entry | None, frame: int, image: np.ndarray) -> np.ndarray:
        """Resizes a decoded frame and stores it."""
        if self.image_size is not None:
            image = resize_with_pad(image, self.image_size)
        if entry is not None:
            self._cache.put(entry, frame, image)
        return image


def choose(root: Path, known: Sequence[int], wanted: Sequence[int] | None) -> tuple[int, ...]:
    """Numbers of episodes, in the order wanted; all for None.

    Raises:
      UserError: there is no episode of such a number.
    """
    there = set(known)
    if unknown := [number for number in wanted or () if number not in there]:
        raise UserError(
            f"{root}: no episode {unknown[0]}; there are {len(known)}, {min(known, default=0)} to "
            f"{max(known, default=0)}"
        )
    return tuple(known if wanted is None else wanted)


def finite(values: np.ndarray, key: str, path: Path, episode: int) -> np.ndarray:
    """The values [rows, J], if all of them are numbers.

    Raises:
      UserError: naming the first that is not.
    """
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        frame, dim = bad[0]
        raise UserError(
            f"{path}: {key} is {values[frame, dim]} in dimension {dim} at episode {episode}, frame {frame}; repair it, "
            "or leave the episode out (config.data.skip)"
        )
    return values
