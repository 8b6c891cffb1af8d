"""Decoded, resized frames on disk, shared by all processes, so that a video is decoded once and not once per epoch.

One sparse file per video: a header, the times of the video's frames, then a record of fixed size per frame: a checksum
and the pixels. A record whose checksum does not match is absent, which makes everything else simple: processes read and
write without locks (two writers of a frame write the same bytes), and a kill, a power cut or a full disk can only lose
frames, never invent them. Reads and writes go through the page cache (pread, pwrite), which all processes share; a
memory map would do the same but answers a full disk with SIGBUS.

S side of a frame, pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from openpi_port import host
from openpi_port.errors import UserError

HEADER = 4096  # bytes; JSON, filled with spaces
SUFFIX = ".frames"
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """The frames of one video: its cache file, the times of all its frames [frames] (s), and how many are admitted."""

    path: Path
    times: np.ndarray
    admitted: int
    records: int  # offset of the first record, bytes


class FrameCache:
    """A directory of frames, bounded in bytes.

    The bound is kept by static admission: from the data set's length follows which share of every file may be stored
    (`plan`), the same in all processes; nothing is ever evicted while training. Files of other data sets go, least
    recently opened first, when the bound needs their room.

    Args:
      image_size: S.
      gigabytes: the bound on the directory.
      directory: where; None takes openpi_port/frames in the user's cache directory (XDG_CACHE_HOME).

    Raises:
      UserError: the directory can't be written.
    """

    def __init__(self, image_size: int, gigabytes: float, directory: str | os.PathLike[str] | None = None):
        self.image_size = image_size
        self.capacity = int(gigabytes * 1e9)
        self.directory = Path(directory or host.cache() / "openpi_port" / "frames")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                pass
        except OSError as error:
            raise UserError(
                f"{self.directory}: the frame cache can't be written ({error.strerror}); "
                "set XDG_CACHE_HOME to another place, or --config.data.cache_gb=0"
            ) from error
        self.share = 1.0
        self._planned: dict[tuple[Path, str], int] = {}
        self._entries: dict[tuple[str, str], Entry] = {}
        self._writable = True

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_entries": {}, "_planned": {}}

    @property
    def _record(self) -> int:
        return 4 + self.image_size**2 * 3

    def plan(self, sources: Mapping[tuple[Path, str], int]) -> None:
        """Decides which share of every file is stored, and makes room; adds to what was planned before.

        Args:
          sources: {(file, part): how many frames it has} of a data set.
        """
        self._planned |= sources
        wanted = max(1, sum(self._planned.values())) * self._record
        held = self._tidy({self._path(source, part) for source, part in self._planned}, wanted)
        free = shutil.disk_usage(self.directory).free + held
        # A tenth of the free space is left to others: the user's checkpoints go to the same disk.
        self.share = min(1.0, self.capacity / wanted, 0.9 * free / wanted)

    def _tidy(self, keep: set[Path], wanted: int) -> int:
        """Removes files whose video changed or went, and the oldest of others beyond the bound; returns bytes kept."""
        own = others = 0
        candidates = []
        for path in self.directory.glob("*" + SUFFIX):
            try:
                stat = path.stat()
                header = _read_header(path)
                stale = header is None or header["fingerprint"] != _fingerprint(Path(header["source"]))
                if stale:
                    path.unlink(missing_ok=True)
                elif path in keep:
                    own += stat.st_blocks * 512
                else:
                    others += stat.st_blocks * 512
                    candidates.append((stat.st_mtime, stat.st_blocks * 512, path))
            except OSError:
                continue  # another process removed it meanwhile
        for _, size, path in sorted(candidates):
            if others + min(wanted, self.capacity) <= self.capacity:
                break
            path.unlink(missing_ok=True)  # a process that still reads it keeps its content until it closes it
            others -= size
        return own

    def _path(self, source: Path, part: str) -> Path:
        identity = json.dumps([_VERSION, self.image_size, _fingerprint(source), part])
        return self.directory / (hashlib.blake2b(identity.encode(), digest_size=16).hexdigest() + SUFFIX)

    def entry(self, source: Path, part: str = "") -> Entry | None:
        """What is known of a video; None if there was no `create` for it.

        Args:
          source: the video, or a parquet file with images in it.
          part: which column of the parquet file.
        """
        key = (str(source), part)
        if key not in self._entries:
            path = self._path(source, part)
            header = _read_header(path)
            if header is None:
                return None
            os.utime(path)  # marks it as used
            self._entries[key] = self._open(path, header["frames"])
        return self._entries[key]

    def create(self, source: Path, times: np.ndarray, part: str = "") -> Entry:
        """Makes the (empty) cache file of a video, whole or not at all; keeps one that another process made.

        Args:
          source, part: see `entry`.
          times: f64 [frames], seconds.
        """
        path = self._path(source, part)
        header = {"source": _real(source), "fingerprint": _fingerprint(source), "frames": len(times)}
        content = json.dumps(header).encode().ljust(HEADER) + np.asarray(times, "<f8").tobytes()
        descriptor, temporary = tempfile.mkstemp(dir=self.directory)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.truncate(len(content) + len(times) * self._record)
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError as error:
            raise UserError(
                f"{path}: the frame cache can't be written ({error.strerror}); make room, or --config.data.cache_gb=0"
            ) from error
        finally:
            os.unlink(temporary)
        self._entries[str(source), part] = entry = self._open(path, len(times))
        return entry

    def _open(self, path: Path, frames: int) -> Entry:
        times = np.fromfile(path, "<f8", frames, offset=HEADER)
        return Entry(path, times, int(frames * self.share), HEADER + 8 * frames)

    def get(self, entry: Entry, frame: int) -> np.ndarray | None:
        """A frame, uint8 [S,S,3], or None if it is not stored."""
        if frame >= entry.admitted:
            return None
        checksum = bytearray(4)
        image = np.empty((self.image_size, self.image_size, 3), np.uint8)
        try:
            descriptor = os.open(entry.path, os.O_RDONLY)
        except OSError:
            return None  # removed by another run that needed the room
        try:
            size = os.preadv(descriptor, [checksum, image], entry.records + frame * self._record)
        finally:
            os.close(descriptor)
        stored = int.from_bytes(checksum, "little")
        if size != self._record or stored == 0 or stored != _checksum(image):
            return None
        return image

    def wants(self, entry: Entry, frame: int) -> bool:
        """Whether a frame is admitted and not stored yet (its pixels are not checked)."""
        if frame >= entry.admitted or not self._writable:
            return False
        try:
            descriptor = os.open(entry.path, os.O_RDONLY)
        except OSError:
            return False
        try:
            return not any(os.pread(descriptor, 4, entry.records + frame * self._record))
        finally:
            os.close(descriptor)

    def put(self, entry: Entry, frame: int, image: np.ndarray) -> None:
        """Stores a frame, uint8 [S,S,3], if it is admitted. A disk that is full ends storing, with one warning."""
        if frame >= entry.admitted or not self._writable:
            return
        image = np.ascontiguousarray(image)
        try:
            descriptor = os.open(entry.path, os.O_WRONLY)
        except OSError:
            return
        try:
            checksum = _checksum(image).to_bytes(4, "little")
            os.pwritev(descriptor, [checksum, image], entry.records + frame * self._record)
        except OSError as error:
            self._writable = False
            logging.warning("%s: %s; frames are no longer cached", entry.path, error.strerror)
        finally:
            os.close(descriptor)


def _checksum(image: np.ndarray) -> int:
    """CRC-32, never 0: holes of a sparse file read as zeros."""
    return zlib.crc32(image) or 1


@functools.lru_cache(maxsize=4096)
def _real_directory(directory: str) -> str:
    return os.path.realpath(directory)


def _real(source: Path) -> str:
    """The path without links; those of directories are followed once for the thousands of files that they hold."""
    path = os.path.join(_real_directory(str(source.parent)), source.name)
    return os.path.realpath(path) if os.path.islink(path) else path


def _fingerprint(source: Path) -> list[object]:
    """Changes when the file does; differs between files."""
    try:
        stat = source.stat()
    except OSError:
        return [_real(source), 0, 0]
    return [_real(source), stat.st_size, stat.st_mtime_ns]


def _read_header(path: Path) -> dict[str, object] | None:
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(HEADER))
    except (OSError, ValueError):
        return None
    return header if isinstance(header, dict) and {"source", "fingerprint", "frames"} <= header.keys() else None
