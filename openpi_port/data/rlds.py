"""Random access to the steps of an RLDS data set (Open X-Embodiment, DROID, LIBERO), without TensorFlow.

Features are named by their path below `steps`: "observation/image_0", "action_dict/joint_velocity". A picture is found
by its place in the file and decoded alone, so that a random step costs no more than its own pictures.

N frames of all chosen episodes, J state or action dims, H W pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from openpi_port import images
from openpi_port.check_sample import split_keys
from openpi_port.data import rlds_index as names
from openpi_port.data.frame_cache import FrameCache
from openpi_port.data.frames import PATIENCE, Frames, choose, finite
from openpi_port.data.rlds_meta import RldsMetadata, find, load_metadata
from openpi_port.errors import UserError

__all__ = ["RldsDataset", "RldsMetadata", "find", "load_metadata"]

INSTRUCTION = "language_instruction"


@dataclasses.dataclass(frozen=True)
class Episode:
    """One demonstration: `first` is its first step among those of its file, which have `rows` together."""

    index: int
    length: int
    path: Path
    first: int
    rows: int


class RldsDataset(Frames):
    """An RLDS data set in tfrecord files, or some of its episodes.

    Args:
      source: a directory that `find` finds, or the metadata if they were read already.
      cameras, horizon, state, action, image_size, cache: see `Frames`.
      task: text features with the instruction, separated by commas; the first that is not empty at a step counts.
      episodes: which ones, by number; None takes all. Files of others may be absent.

    Raises:
      UserError: anything wrong with the data: an unknown key, a missing, truncated or damaged file, values that are
        not finite.
    """

    def __init__(
        self,
        source: str | Path | RldsMetadata,
        *,
        cameras: Mapping[str, str],
        horizon: int,
        state: str = "observation/state",
        action: str = "action",
        task: str = INSTRUCTION,
        image_size: int | None = None,
        cache: FrameCache | None = None,
        episodes: Sequence[int] | None = None,
    ):
        if not isinstance(source, RldsMetadata):
            root = find(Path(source))
            if root is None:
                raise UserError(f"{source}: no RLDS data set; give the directory that holds features.json")
            source = load_metadata(root)
        self.metadata = source
        wanted = {"camera": tuple(cameras.values()), "state column": split_keys(state)}
        wanted |= {"action column": split_keys(action), "instruction": split_keys(task) if task else ()}
        for what, keys in wanted.items():
            for key in keys:
                source.check(key, what)
        numbers = [names.number(key) for key in (*wanted["state column"], *wanted["action column"])]
        texts = [name(key) for key in wanted["instruction"] for name in (names.text, names.words)]
        places = [names.spans(key) for key in wanted["camera"]]
        chosen, indexes = self._choose(episodes, [names.LENGTHS, *numbers, *texts, *places])
        super().__init__(
            source.root, chosen, cameras=cameras, horizon=horizon, state=state, action=action, image_size=image_size,
            cache=cache,
        )  # fmt: skip
        gather = functools.partial(self._gather, indexes)
        for key in (*self._state_keys, *self._action_keys):
            self._columns[key] = gather(names.number(key))
            for i, e in enumerate(chosen):
                finite(self._columns[key][self._starts[i] : self._starts[i + 1]], key, e.path, e.index)
        self._spans = {key: gather(names.spans(key)) for key in self.camera_keys}  # i64 [N,2]
        self._tasks, self._task_index = self._instructions(indexes, wanted["instruction"])
        if cache is not None:
            cache.plan({(e.path, key): e.rows for e in chosen for key in self.camera_keys})

    def _choose(
        self, numbers: Sequence[int] | None, arrays: Sequence[str]
    ) -> tuple[tuple[Episode, ...], dict[Path, names.Index]]:
        """The chosen episodes in their order, and these arrays of their files."""
        numbers = choose(self.metadata.root, self.metadata.numbers, numbers)
        ends = np.cumsum([shard.episodes for shard in self.metadata.shards])
        which = np.searchsorted(ends, numbers, side="right")
        found, indexes = {}, {}
        shards = [(i, self.metadata.shards[i]) for i in sorted(set(which.tolist()))]
        total = sum(shard.episodes for _, shard in shards)
        with tqdm(total=total, desc="reading RLDS files", unit=" episodes", delay=PATIENCE) as bar:
            for i, shard in shards:
                indexes[shard.path] = index = names.load(self.metadata, shard, arrays, bar.update)
                ends_here = np.cumsum(index[names.LENGTHS])
                for j, (length, end) in enumerate(zip(index[names.LENGTHS].tolist(), ends_here.tolist(), strict=True)):
                    number = int(ends[i]) - shard.episodes + j
                    found[number] = Episode(number, length, shard.path, end - length, int(ends_here[-1]))
        return tuple(found[n] for n in numbers), indexes

    def _gather(self, indexes: Mapping[Path, names.Index], name: str) -> np.ndarray:
        """An array of all files, of the chosen episodes: [N, ...]."""
        whole = {path: index[name] for path, index in indexes.items()}
        return np.concatenate([whole[e.path][e.first : e.first + e.length] for e in self.episodes])

    def _instructions(self, indexes: Mapping[Path, names.Index], keys: Sequence[str]) -> tuple[list[str], np.ndarray]:
        """All different instructions, and the number of each step's."""
        known: dict[str, int] = {"": 0}
        of_step = np.zeros(len(self), np.int32)
        for key in keys:
            here = {}  # i32 [T] of every file
            for path, index in indexes.items():
                numbers = [known.setdefault(str(word), len(known)) for word in index[names.words(key)]]
                here[path] = np.array(numbers, np.int32)[index[names.text(key)]]
            of_key = np.concatenate([here[e.path][e.first : e.first + e.length] for e in self.episodes])
            of_step = np.where(of_step == 0, of_key, of_step)
        return list(known), of_step

    def _about(self, index: int) -> dict[str, Any]:
        return {"task": self._tasks[self._task_index[index]]}

    def _image(self, key: str, number: int, frame: int) -> np.ndarray:
        episode = self.episodes[number]
        start, end = self._spans[key][self._starts[number] + frame]
        return self._cached(
            episode.path, key, episode.first + frame, lambda: episode.rows,
            lambda: _decode(episode, key, frame, int(start), int(end)),
        )  # fmt: skip


def _decode(episode: Episode, key: str, frame: int, start: int, end: int) -> np.ndarray:
    """uint8 [H,W,3] of the JPEG or PNG at a place of a file."""
    try:
        with episode.path.open("rb") as file:
            file.seek(start)
            content = file.read(end - start)
        return images.decode(content)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{episode.path}: {key} of episode {episode.index}, frame {frame} is no readable image ({error}); download "
            "the data set again"
        ) from error
