"""Random access to the frames of a LeRobot data set (see frames.py for what all kinds of data sets share).

N frames of all chosen episodes, J state or action dims, H W pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from openpi_port.data.embedded import EmbeddedImages
from openpi_port.data.frame_cache import FrameCache
from openpi_port.data.frames import PATIENCE, Frames, choose, finite
from openpi_port.data.lerobot_meta import Episode, Metadata, load_metadata, read_parquet, resolve
from openpi_port.data.video import Videos, nearest_frame, to_rgb
from openpi_port.errors import UserError

__all__ = ["Episode", "LeRobotDataset", "Metadata", "load_metadata", "resolve"]

# A recorded time may be off its grid by this share of a frame: the nearest frame is then beyond doubt.
TOLERANCE = 0.25
SHOWN = 100  # numbers of episodes in a message


class LeRobotDataset(Frames):
    """A LeRobot data set, v2.0, v2.1 or v3.0, or some of its episodes.

    Args:
      source: what `resolve` takes, or the metadata if they were read already.
      cameras, horizon, state, action, image_size, cache: see `Frames`.
      episodes: which ones, by number; None takes all. Files of others may be absent.
      root: where data sets from the hub are kept.

    Raises:
      UserError: anything wrong with the data: an unknown key, a missing or damaged file, values that are not finite
        or of another size than info.json says, times that are off the grid of fps.
    """

    def __init__(
        self,
        source: str | Path | Metadata,
        *,
        cameras: Mapping[str, str],
        horizon: int,
        state: str = "observation.state",
        action: str = "action",
        image_size: int | None = None,
        cache: FrameCache | None = None,
        episodes: Sequence[int] | None = None,
        root: str | None = None,
    ):
        self.metadata = source if isinstance(source, Metadata) else load_metadata(resolve(str(source), root))
        by_index = {episode.index: episode for episode in self.metadata.episodes}
        chosen = tuple(by_index[n] for n in choose(self.metadata.root, self.metadata.numbers, episodes))
        super().__init__(
            self.metadata.root, chosen, cameras=cameras, horizon=horizon, state=state, action=action,
            image_size=image_size, cache=cache,
        )  # fmt: skip
        for key in self.camera_keys:
            self.metadata.feature(key, "camera")
        self._read_columns()
        self._check_times()
        self._check_files()
        self._videos = Videos()
        self._embedded = EmbeddedImages()
        if cache is not None:
            # Of all episodes, so that training and validation agree on what is admitted.
            frames: Counter[tuple[Path, str]] = Counter()
            for episode in self.metadata.episodes:
                frames.update({self._source(episode, key): episode.length for key in self.camera_keys})
            cache.plan(frames)

    @property
    def fps(self) -> float:
        """Frames per second."""
        return self.metadata.fps

    @property
    def features(self) -> Mapping[str, Mapping[str, Any]]:
        """Names, shapes and types of all columns, as in info.json."""
        return self.metadata.features

    def _read_columns(self) -> None:
        """Fills the arrays of all chosen episodes, in their order: states and actions f32 [N,J], the rest [N]."""
        meta = self.metadata
        wanted = [(key, "state column") for key in self._state_keys]
        wanted += [(key, "action column") for key in self._action_keys]
        dims = {key: _size(meta.feature(key, what), meta.root, key) for key, what in wanted}
        total = len(self)
        self._columns = {key: np.empty((total, dim), np.float32) for key, dim in dims.items()}
        self._timestamp = np.empty(total, np.float64)
        self._task_index = np.empty(total, np.int64)
        self._first_row = np.empty(len(self.episodes), np.int64)  # of each episode in its file

        files: dict[Path, list[int]] = {}
        for number, episode in enumerate(self.episodes):
            files.setdefault(episode.data, []).append(number)
        scalars = ["timestamp", "episode_index", "task_index"]
        for path, numbers in tqdm(files.items(), "reading parquet files", unit=" files", delay=PATIENCE):
            table = read_parquet(path, [*dims, *scalars])
            timestamp, owner, task = (_matrix(table[key], 1, path, key)[:, 0] for key in scalars)
            columns = {key: _matrix(table[key], dim, path, key) for key, dim in dims.items()}
            places = _places(owner)
            for number in numbers:
                episode = self.episodes[number]
                first, last, count = places.get(episode.index, (0, -1, 0))
                if count != episode.length or last - first != count - 1:
                    raise UserError(
                        f"{path}: episode {episode.index} has {count} frames in rows {first} to {last}, meta/ says "
                        f"{episode.length} in one piece; download the data set again"
                    )
                place = slice(self._starts[number], self._starts[number + 1])
                self._first_row[number] = first
                self._timestamp[place], self._task_index[place] = timestamp[first : last + 1], task[first : last + 1]
                with np.errstate(over="ignore"):  # becomes infinite, and is told below
                    for key, column in columns.items():
                        self._columns[key][place] = column[first : last + 1]
        self._check_finite()

    def _check_finite(self) -> None:
        """Names the first value that is no number, and all episodes that have some."""
        bad = [np.flatnonzero(~np.isfinite(values).all(axis=1)) for values in self._columns.values()]
        numbers = np.unique(self._row_episode[np.concatenate(bad)])
        if not len(numbers):
            return
        first, rows = self.episodes[numbers[0]], self.rows(numbers[0])
        try:
            for key, values in self._columns.items():
                finite(values[rows.start : rows.stop], key, first.data, first.index)
        except UserError as error:
            raise UserError(f"{error}{_all_of([self.episodes[n].index for n in numbers])}") from None

    def _check_times(self) -> None:
        """Frame k of an episode must be at k / fps, or chunks of actions would not be what they say."""
        frame = np.arange(len(self)) - self._starts[self._row_episode]
        off = ~(np.abs(self._timestamp * self.fps - frame) <= TOLERANCE)  # also where the time is no number
        if off.any():
            first = int(np.argmax(off))
            episode = self.episodes[self._row_episode[first]]
            raise UserError(
                f"{episode.data}: episode {episode.index}, frame {frame[first]} has timestamp "
                f"{self._timestamp[first]:.4f} s, expected {frame[first] / self.fps:.4f} s at {self.fps:g} fps; frames "
                "were dropped, or fps in meta/info.json is wrong"
            )
        unknown = set(np.unique(self._task_index).tolist()) - set(self.metadata.tasks)
        if unknown:
            raise UserError(f"{self.metadata.root}: meta/ has no task of index {min(unknown)}")

    def _check_files(self) -> None:
        """A missing video should be known before training, not when a sample happens to fall on it."""
        there: dict[Path, bool] = {}
        lacking: dict[int, Path] = {}
        for episode in self.episodes:
            for path in (episode.videos[key][0] for key in self.camera_keys if key in episode.videos):
                if path not in there:
                    there[path] = path.is_file()
                if not there[path]:
                    lacking.setdefault(episode.index, path)
        if lacking:
            raise UserError(
                f"{lacking[min(lacking)]}: video file is missing; download the data set again, or leave the episode "
                f"out (config.data.skip){_all_of(sorted(lacking))}"
            )

    def _about(self, index: int) -> dict[str, Any]:
        """The task, and the time since the episode's start, which `_check_times` has shown to be frame / fps."""
        task = self.metadata.tasks[int(self._task_index[index])]
        return {"task": task, "timestamp": float(self._timestamp[index])}

    def _source(self, episode: Episode, key: str) -> tuple[Path, str]:
        """The file that holds an episode's images, and the column in it ("" for a video)."""
        return (episode.videos[key][0], "") if key in episode.videos else (episode.data, key)

    def _image(self, key: str, number: int, frame: int) -> np.ndarray:
        episode = self.episodes[number]
        if key in episode.videos:
            path, start = episode.videos[key]
            try:
                return self._from_video(path, start + self._timestamp[self._starts[number] + frame])
            except UserError as error:
                where = f"it is asked for episode {episode.index}, frame {frame}"
                raise UserError(f"{error} ({where}; config.data.skip leaves episodes out)") from error
        path, row = episode.data, int(self._first_row[number] + frame)
        images = self._embedded
        return self._cached(path, key, row, lambda: images.rows(path), lambda: images.read(path, key, row))

    def _from_video(self, path: Path, seconds: float) -> np.ndarray:
        """The frame at a time of a video file, from the cache or decoded."""
        cache, tolerance = self._cache, TOLERANCE / self.fps
        entry = None if cache is None else cache.entry(path)
        if entry is not None:
            image = cache.get(entry, nearest_frame(entry.times, seconds, tolerance, path))
            if image is not None:
                return image
        with self._videos.use(path) as video:
            if cache is not None and entry is None:
                entry = cache.create(path, video.index.times)

            def passed(number: int, picture: av.VideoFrame) -> None:
                # Somebody will ask for it soon, and decoding it again would cost more than keeping it.
                if cache.wants(entry, number):
                    self._keep(entry, number, to_rgb(picture))

            frame = nearest_frame(video.index.times, seconds, tolerance, path)
            image = video.read(frame, None if cache is None else passed)
        return self._keep(entry, frame, image)


def _all_of(indexes: Sequence[int]) -> str:
    """Words that go behind the first of several episodes with the same trouble."""
    if len(indexes) == 1:
        return ""
    shown = ",".join(map(str, indexes[:SHOWN])) + ",..." * (len(indexes) > SHOWN)
    return f"; it is so with {len(indexes)} episodes: ({shown})"


def _size(feature: Mapping[str, Any], root: Path, key: str) -> int:
    """Length of a vector feature."""
    shape = feature.get("shape")
    if not isinstance(shape, list) or len(shape) != 1 or not isinstance(shape[0], int):
        raise UserError(f"{root}: {key} has shape {shape} in meta/info.json; a state or action is a vector")
    return shape[0]


def _places(owner: np.ndarray) -> dict[int, tuple[int, int, int]]:
    """{episode: (first row, last row, how many)} of the rows of a file."""
    episodes, first, count = np.unique(owner, return_index=True, return_counts=True)
    last = len(owner) - 1 - np.unique(owner[::-1], return_index=True)[1]
    return dict(zip(episodes.tolist(), zip(first.tolist(), last.tolist(), count.tolist(), strict=True), strict=True))


def _matrix(column: pa.ChunkedArray, dim: int, path: Path, key: str) -> np.ndarray:
    """A column of lists (or, for one dimension, of numbers) as [rows, dim]."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # what pyarrow returns for a column without rows
        array = pa.concat_arrays(array.chunks)
    nested = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
    nested = nested or pa.types.is_fixed_size_list(array.type)
    if len(array) and array.null_count:
        raise UserError(f"{path}: {key} has no value in {array.null_count} of {len(array)} rows; repair the file")
    flat = array.flatten() if nested else array
    kind = flat.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise UserError(f"{path}: {key} holds {kind}, expected numbers")
    lengths = array.value_lengths().to_numpy(zero_copy_only=False) if nested and len(array) else None
    wrong = dim != 1 if lengths is None else (lengths != dim).any()
    if len(array) and wrong:
        found = 1 if lengths is None else int(lengths[np.argmax(lengths != dim)])
        raise UserError(
            f"{path}: {key} has {found} number{'s' * (found != 1)} in a row, meta/info.json says {dim}; they don't "
            "belong together"
        )
    return flat.to_numpy(zero_copy_only=False).reshape(len(array), dim)
