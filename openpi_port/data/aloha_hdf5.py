"""Random access to the frames of HDF5 episodes as ALOHA and ACT record them: one file an episode, `episode_0.hdf5`, ...

    /observations/qpos [T,14]   /observations/qvel, effort [T,14]   /action [T,14]
    /observations/images/<camera>   uint8 [T,H,W,3], or JPEG: uint8 [T,bytes], each row padded with zeros to the longest

Columns are named by their paths: "observations/qpos", "observations/images/cam_high". `compress_len`, where there is
one, is not needed: a JPEG says itself where it ends. Its colours are taken as JPEG defines them, red first, as openpi's
converter does; raw pictures are taken as they are.

T frames of an episode, N of all chosen episodes, J state or action dims, H W pixels.
"""

from __future__ import annotations

import dataclasses
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from openpi_port import images
from openpi_port.check_sample import split_keys
from openpi_port.data.frame_cache import FrameCache
from openpi_port.data.frames import PATIENCE, Frames, choose, finite
from openpi_port.errors import UserError, near

MAX_OPEN = 32  # files per process
IMAGES = "observations/images"


@dataclasses.dataclass(frozen=True)
class Hdf5Metadata:
    """A data set without its frames.

    Attributes:
      root: its directory.
      files: one an episode, in the natural order of their names; episodes are numbered by their place.
      cameras: paths of the images, from the first file.
    """

    root: Path
    files: tuple[Path, ...]
    cameras: tuple[str, ...]

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of all episodes."""
        return tuple(range(len(self.files)))


@dataclasses.dataclass(frozen=True)
class Episode:
    """One demonstration."""

    index: int
    length: int
    path: Path


def episode_files(root: Path) -> tuple[Path, ...]:
    """The HDF5 files of a directory, `episode_2` before `episode_10`."""

    def natural(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]

    return tuple(sorted((p for p in root.iterdir() if p.suffix in (".hdf5", ".h5")), key=natural))


def load_metadata(root: str | Path) -> Hdf5Metadata:
    """Lists the episodes of a directory.

    Raises:
      UserError: it holds none, or the first can't be read.
    """
    root = Path(root)
    files = episode_files(root)
    if not files:
        raise UserError(f"{root}: no HDF5 episode (*.hdf5) here")
    with _open(files[0]) as file:
        cameras = tuple(f"{IMAGES}/{name}" for name in file.get(IMAGES, ()))
    return Hdf5Metadata(root, files, cameras)


class AlohaHdf5Dataset(Frames):
    """HDF5 episodes, or some of them.

    Args:
      source: the directory, or the metadata if they were read already.
      cameras, horizon, state, action, image_size, cache: see `Frames`.
      episodes: which ones, by number; None takes all.

    Raises:
      UserError: anything wrong with the data: a damaged file, a path that it lacks, columns of different lengths or
        with values that are not finite.
    """

    def __init__(
        self,
        source: str | Path | Hdf5Metadata,
        *,
        cameras: Mapping[str, str],
        horizon: int,
        state: str = "observations/qpos",
        action: str = "action",
        image_size: int | None = None,
        cache: FrameCache | None = None,
        episodes: Sequence[int] | None = None,
    ):
        self.metadata = source if isinstance(source, Hdf5Metadata) else load_metadata(source)
        root, files = self.metadata.root, self.metadata.files
        numbers = choose(root, self.metadata.numbers, episodes)
        keys = split_keys(state) + split_keys(action)
        progress = tqdm(numbers, "reading HDF5 files", unit=" files", delay=PATIENCE)
        parts = [_read(files[number], number, keys, cameras.values()) for number in progress]
        chosen = tuple(Episode(n, len(part[keys[0]]), files[n]) for n, part in zip(numbers, parts, strict=True))
        super().__init__(
            root, chosen, cameras=cameras, horizon=horizon, state=state, action=action, image_size=image_size,
            cache=cache,
        )  # fmt: skip
        for key in keys:
            if len(dims := {part[key].shape[1] for part in parts}) > 1:
                sizes = " or ".join(map(str, sorted(dims)))
                raise UserError(f"{root}: {key} has {sizes} dimensions, depending on the file")
            self._columns[key] = np.concatenate([part[key] for part in parts])
        self._files = _Files()
        if cache is not None:
            cache.plan({(e.path, key): e.length for e in chosen for key in self.camera_keys})

    def _about(self, index: int) -> dict[str, Any]:
        """Nothing: the format holds no instruction, so config.data.prompt has to say it."""
        return {}

    def _image(self, key: str, number: int, frame: int) -> np.ndarray:
        episode = self.episodes[number]
        return self._cached(episode.path, key, frame, lambda: episode.length, lambda: self._decode(episode, key, frame))

    def _decode(self, episode: Episode, key: str, frame: int) -> np.ndarray:
        """uint8 [H,W,3]."""
        try:
            value = self._files.read(episode.path, key, frame)
            if value.ndim == 3:
                return value
            return images.decode(value.tobytes())
        except (OSError, ValueError) as error:  # the former is h5py's
            raise UserError(
                f"{episode.path}: {key}, frame {frame} is no readable image ({error}); repair it, or leave the episode "
                "out (config.data.skip)"
            ) from error


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: HDF5 file can't be opened ({reason}); repair it, or take it away") from error


def _read(path: Path, number: int, columns: Sequence[str], cameras: Collection[str]) -> dict[str, np.ndarray]:
    """The columns of an episode, f32 [T,J]; its images are looked for, not read.

    Raises:
      UserError: see `AlohaHdf5Dataset`.
    """
    with _open(path) as file:
        known = [key for key, length in _datasets(file).items() if length]
        for key in (*columns, *cameras):
            if key not in known:
                raise UserError(f"{path}: no {key!r}; {near(key, known)}")
        for key in cameras:
            picture = h5py.check_vlen_dtype(file[key].dtype) or file[key].dtype  # JPEGs may be of any length
            shape = file[key].shape
            if picture != np.uint8 or len(shape) not in (1, 2, 4) or (len(shape) == 4 and shape[3] != 3):
                raise UserError(
                    f"{path}: {key} is {file[key].dtype} of shape {shape}; expected uint8 [T,H,W,3], or "
                    "[T,n] with a JPEG in each row"
                )
        try:
            read = {key: np.asarray(file[key][()], np.float32) for key in columns}
        except (OSError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{path}: {', '.join(columns)} can't be read ({reason}); leave it out (config.data.skip)"
            ) from error
        lengths = {key: len(file[key]) for key in (*columns, *cameras)}
    most, least = max(lengths, key=lengths.get), min(lengths, key=lengths.get)
    if lengths[most] != lengths[least]:
        raise UserError(
            f"{path}: {lengths[most]} frames of {most}, {lengths[least]} of {least}; leave the episode out "
            "(config.data.skip)"
        )
    return {key: finite(values.reshape(len(values), -1), key, path, number) for key, values in read.items()}


def _datasets(file: h5py.File) -> dict[str, int]:
    """Paths of all arrays of a file, with their lengths (0 for scalars)."""
    found: dict[str, int] = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = len(item) if item.shape else 0

    file.visititems(visit)
    return found


class _Files:
    """The most recently used files of this process, open. May be shared by threads; a new process starts with none."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, h5py.File] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset()

    def read(self, path: Path, key: str, frame: int) -> np.ndarray:
        """A row of an array. HDF5 itself serves one thread at a time, so the lock costs nothing."""
        if self._pid != os.getpid():
            self._reset()
        with self._lock:
            file = self._open.get(path) or _open(path)
            self._open[path] = file
            self._open.move_to_end(path)
            while len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)[1].close()
            return file[key][frame]
