"""Writes a LeRobot v3.0 data set, episode by episode, and makes it appear whole or not at all.

The layout is

    meta/info.json  meta/stats.json  meta/tasks.parquet  meta/episodes/chunk-000/file-000.parquet
    data/chunk-000/file-000.parquet                      rows of all episodes, one row group each
    videos/<camera>/chunk-000/file-000.mp4               pictures of many episodes in one file, in their order

T frames of an episode, J dimensions of state and action, H W pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openpi_port import whole
from openpi_port.errors import UserError

VERSION = "v3.0"
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
_DATA_MB, _VIDEO_MB, _CHUNK = 100, 200, 1000
_STAT_FRAMES, _STAT_SIDE = 50, 224  # pictures of an episode, and about how many of their pixels, make colour statistics
_INDEX_COLUMNS = ("frame_index", "episode_index", "index", "task_index")
_DATA_SCHEMA = pa.schema(
    [
        ("observation.state", pa.list_(pa.float32())),
        ("action", pa.list_(pa.float32())),
        ("timestamp", pa.float32()),
        *((name, pa.int64()) for name in _INDEX_COLUMNS),
    ]
)


@dataclasses.dataclass(frozen=True)
class Description:
    """What all episodes of a data set have in common."""

    robot: str
    fps: int
    cameras: Mapping[str, tuple[int, int]]  # key such as "observation.images.top" -> (H, W), both even
    state_names: Sequence[str]
    action_names: Sequence[str]
    crf: int = 25  # quality of H.264: lower is better and larger
    keyframe_every: int = 10  # frames; the most that a random access decodes


def file_name(kind: str, index: int, extension: str) -> str:
    """Where the index-th file of a kind lies, relative to the data set: "data/chunk-000/file-000.parquet"."""
    return f"{kind}/chunk-{index // _CHUNK:03d}/file-{index % _CHUNK:03d}.{extension}"


class _Video:
    """One camera's mp4 files; an episode is never split over two."""

    def __init__(self, root: Path, key: str, description: Description):
        self._root, self._key, self._about = root, key, description
        self.file, self._container = -1, None
        self._open()

    def _open(self) -> None:
        self.file += 1
        self.frames = self._bytes = 0
        path = self._root / file_name(f"videos/{self._key}", self.file, "mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(path), "w")
        options = {
            "crf": str(self._about.crf),
            "g": str(self._about.keyframe_every),
            "bf": "0",  # no reordering: a frame's time is its place, in every decoder
            "forced-idr": "1",
            "preset": "slow",
        }
        self._stream = self._container.add_stream("libx264", rate=self._about.fps, options=options)
        self._stream.height, self._stream.width = self._about.cameras[self._key]
        self._stream.pix_fmt = "yuv420p"

    def add(self, images: Iterable[np.ndarray]) -> tuple[int, float, float]:
        """Encodes one episode, a picture at a time; returns its file, and when it starts and ends in it (s)."""
        if self._bytes > _VIDEO_MB * 2**20:
            self.close()
            self._open()
        start = self.frames
        for image in images:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = self.frames, Fraction(1, self._about.fps)
            if self.frames == start:
                frame.pict_type = av.video.frame.PictureType.I  # an episode decodes without the one before it
            packets = self._stream.encode(frame)
            self._container.mux(packets)
            self._bytes += sum(packet.size for packet in packets)
            self.frames += 1
        return self.file, start / self._about.fps, self.frames / self._about.fps

    def close(self) -> None:
        """Flushes the encoder and completes the file."""
        if self._container is not None:
            self._container.mux(self._stream.encode())
            self._container.close()
            self._container = None

    def abandon(self) -> None:
        """Closes without completing."""
        if self._container is not None:
            with contextlib.suppress(OSError):
                self._container.close()
            self._container = None


@contextlib.contextmanager
def create(root: str | os.PathLike[str], description: Description) -> Iterator[LeRobotWriter]:
    """A data set in the making. It takes its name when the block ends well, and vanishes when it doesn't.

    Args:
      root: the data set's directory, which may not exist yet.
      description: what all its episodes have in common.

    Raises:
      UserError: root exists, before the block or at its end, or no episode was added.
    """
    root = Path(root)
    whole.refuse_existing(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with whole.directory(root) as part:
        writer = LeRobotWriter(part, description)
        try:
            yield writer
            if not writer.episodes:
                raise UserError(f"no episode to write into {root}")
            writer.complete()
        finally:
            writer.close()


class LeRobotWriter:
    """The files of a data set in the making; see `create`.

    Args:
      directory: an empty one.
      description: what all episodes have in common.
    """

    def __init__(self, directory: Path, description: Description):
        self._directory, self._about = directory, description
        self._videos = {key: _Video(directory, key, description) for key in description.cameras}
        path = directory / file_name("data", 0, "parquet")
        path.parent.mkdir(parents=True)
        self._data = pq.ParquetWriter(path, _DATA_SCHEMA)
        self._episodes: list[dict[str, Any]] = []
        self._tasks: dict[str, int] = {}
        self._frames = 0

    @property
    def episodes(self) -> int:
        """How many episodes have been added."""
        return len(self._episodes)

    @property
    def frames(self) -> int:
        """How many frames have been added."""
        return self._frames

    def add_episode(
        self,
        images: Mapping[str, Sequence[np.ndarray]],
        state: np.ndarray,
        action: np.ndarray,
        task: str | Sequence[str],
    ) -> None:
        """Appends one episode.

        Args:
          images: {camera key: T pictures, uint8 [H,W,3]}, a key for every camera of the description. They are taken
            one by one, so that they need not be in memory together.
          state: f32 [T,J].
          action: f32 [T,J], the targets given at each frame.
          task: the instruction, or the T instructions.

        Raises:
          UserError: shapes, cameras or values that don't fit the description; nothing was written, unless it is a later
            picture that doesn't fit the first: then the data set can't be finished.
        """
        self._check(images, state, action)
        length, first = len(state), self._frames
        tasks = [task] * length if isinstance(task, str) else list(task)
        task_index = [self._tasks.setdefault(words, len(self._tasks)) for words in tasks]
        row: dict[str, Any] = {
            "episode_index": len(self._episodes),
            "tasks": list(dict.fromkeys(tasks)),
            "length": length,
            "data/chunk_index": 0,
            "data/file_index": 0,
            "dataset_from_index": first,
            "dataset_to_index": first + length,
        }
        stats: dict[str, dict[str, list]] = {}
        for key, video in self._videos.items():
            kept: list[np.ndarray] = []
            file, start, end = video.add(self._pictures(key, images[key], kept))
            stats[key] = _image_stats(np.stack(kept))
            row[f"videos/{key}/chunk_index"], row[f"videos/{key}/file_index"] = divmod(file, _CHUNK)
            row[f"videos/{key}/from_timestamp"], row[f"videos/{key}/to_timestamp"] = start, end
        columns = {
            "observation.state": np.asarray(state, np.float32),
            "action": np.asarray(action, np.float32),
            "timestamp": (np.arange(length) / self._about.fps).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, len(self._episodes)),
            "index": np.arange(first, first + length),
            "task_index": np.array(task_index),
        }
        rows = {key: value if value.ndim == 1 else list(value) for key, value in columns.items()}
        self._data.write_table(pa.table(rows, _DATA_SCHEMA))
        stats |= {key: _stats(value) for key, value in columns.items()}
        row |= {f"stats/{key}/{name}": value for key, stat in stats.items() for name, value in stat.items()}
        self._episodes.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        self._frames += length

    def _pictures(self, key: str, images: Sequence[np.ndarray], kept: list[np.ndarray]) -> Iterator[np.ndarray]:
        """The pictures of an episode, checked; evenly spaced ones are also kept, thinned out, for statistics."""
        stride = max(1, max(self._about.cameras[key]) // _STAT_SIDE)
        chosen = set(np.linspace(0, len(images) - 1, _STAT_FRAMES).astype(int).tolist())
        for i, image in enumerate(images):
            self._check_picture(key, image)
            if i in chosen:
                kept.append(np.ascontiguousarray(image[::stride, ::stride]))
            yield image

    def _check_picture(self, key: str, image: np.ndarray) -> None:
        expected = (*self._about.cameras[key], 3)
        if image.shape != expected or image.dtype != np.uint8:
            raise UserError(f"{key} has a picture {image.dtype} {image.shape}, expected uint8 {expected}")

    def _check(self, images: Mapping[str, Sequence[np.ndarray]], state: np.ndarray, action: np.ndarray) -> None:
        about = self._about
        if set(images) != set(about.cameras):
            raise UserError(f"an episode has cameras {sorted(images)}, the data set {sorted(about.cameras)}")
        length = len(state)
        for name, value, names in (
            ("state", state, about.state_names),
            ("action", action, about.action_names),
        ):
            if value.shape != (length, len(names)) or not length:
                expected = (length, len(names))
                raise UserError(f"an episode's {name} is {value.shape}, expected {expected} and no fewer than 1")
            if not np.isfinite(value).all():
                raise UserError(f"an episode's {name} has NaN or infinite values")
        for key in about.cameras:
            if len(images[key]) != length:
                raise UserError(f"an episode has {len(images[key])} pictures of {key}, expected {length}")
            self._check_picture(key, images[key][0])

    def complete(self) -> None:
        """Ends the videos and the table, and writes what describes them."""
        for video in self._videos.values():
            video.close()
        self._data.close()
        meta = self._directory / "meta"
        path = self._directory / file_name("meta/episodes", 0, "parquet")
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._episodes), path)
        pq.write_table(_tasks_table(list(self._tasks)), meta / "tasks.parquet")
        (meta / "stats.json").write_text(json.dumps(self._all_stats(), indent=4) + "\n")
        (meta / "info.json").write_text(json.dumps(self._info(), indent=4) + "\n")

    def close(self) -> None:
        """Closes what is still open, whatever the disk says to it. Does nothing after `complete`."""
        for video in self._videos.values():
            video.abandon()
        with contextlib.suppress(OSError):
            self._data.close()

    def _info(self) -> dict[str, Any]:
        about = self._about
        features: dict[str, Any] = {}
        for key, (height, width) in about.cameras.items():
            video = {"height": height, "width": width, "codec": "h264", "pix_fmt": "yuv420p",
                     "is_depth_map": False, "fps": about.fps, "channels": 3}  # fmt: skip
            features[key] = {
                "dtype": "video",
                "shape": [height, width, 3],
                "names": ["height", "width", "channels"],
                "info": {f"video.{name}": value for name, value in video.items()} | {"has_audio": False},
            }
        for key, names in (("observation.state", about.state_names), ("action", about.action_names)):
            features[key] = {"dtype": "float32", "shape": [len(names)], "names": list(names)}
        features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
        features |= {key: {"dtype": "int64", "shape": [1], "names": None} for key in _INDEX_COLUMNS}
        return {
            "codebase_version": VERSION,
            "robot_type": about.robot,
            "total_episodes": len(self._episodes),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": _CHUNK,
            "data_files_size_in_mb": _DATA_MB,
            "video_files_size_in_mb": _VIDEO_MB,
            "fps": about.fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
            "features": features,
        }

    def _all_stats(self) -> dict[str, Any]:
        """Statistics of the whole data set: exact for numbers, merged over episodes for pictures."""
        table = pq.read_table(self._directory / file_name("data", 0, "parquet"))
        stats = {key: _merge_image_stats([{name: row[f"stats/{key}/{name}"] for name in
                 ("min", "max", "mean", "std", "count")} for row in self._episodes])
                 for key in self._videos}  # fmt: skip
        for key in table.column_names:
            column = table[key].combine_chunks()
            width = len(column[0]) if pa.types.is_list(column.type) else 1
            flat = column.flatten() if pa.types.is_list(column.type) else column
            values = flat.to_numpy().reshape(-1, width)
            stats[key] = _stats(values)
            stats[key] |= {name: np.quantile(values, q, axis=0).tolist() for name, q in QUANTILES.items()}
        return stats


def _stats(values: np.ndarray) -> dict[str, list]:
    """Statistics of [T] or [T, J] numbers, per dimension, as LeRobot names them."""
    values = values.reshape(len(values), -1)
    exact = values.astype(np.float64)
    return {
        "min": values.min(0).tolist(),
        "max": values.max(0).tolist(),
        "mean": exact.mean(0).tolist(),
        "std": exact.std(0).tolist(),
        "count": [len(values)],
    }


def _image_stats(images: np.ndarray) -> dict[str, list]:
    """Statistics of uint8 [N,H,W,3] per colour in [0,1], as LeRobot's [3][1][1]."""
    found = _stats(images.reshape(-1, 3))
    shaped = {name: [[[v / 255]] for v in found[name]] for name in ("min", "max", "mean", "std")}
    return shaped | {"count": [len(images)]}


def _merge_image_stats(stats: list[dict[str, Any]]) -> dict[str, list]:
    """Statistics of the union of samples whose statistics are given (law of total variance)."""
    weight = np.array([s["count"][0] for s in stats], np.float64)
    mean = np.array([s["mean"] for s in stats])
    square = np.array([s["std"] for s in stats]) ** 2 + mean**2
    total = np.average(mean, axis=0, weights=weight)
    variance = np.average(square, axis=0, weights=weight) - total**2
    return {
        "min": np.min([s["min"] for s in stats], axis=0).tolist(),
        "max": np.max([s["max"] for s in stats], axis=0).tolist(),
        "mean": total.tolist(),
        "std": np.sqrt(np.maximum(variance, 0)).tolist(),
        "count": [int(weight.sum())],
    }


def _tasks_table(tasks: list[str]) -> pa.Table:
    """meta/tasks.parquet: a pandas frame with the text as its index, which is how LeRobot looks tasks up."""
    index = "__index_level_0__"
    numbers = pa.array(range(len(tasks)), pa.int64())
    table = pa.table({"task_index": numbers, index: pa.array(tasks, pa.string())})
    columns = [
        {"name": name, "field_name": field, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for name, field, kind, numpy in (("task_index", "task_index", "int64", "int64"),
                                         (None, index, "unicode", "object"))
    ]  # fmt: skip
    pandas = {"index_columns": [index], "column_indexes": [], "columns": columns, "pandas_version": "2.2.3"}
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})
