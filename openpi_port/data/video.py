"""Frames of a video file by number, without decoding from its start: seek to the keyframe, decode forward to the frame.

A file's packets are read once per process (not decoded) for the times of all frames and the keyframes among them;
`Videos` remembers that, and keeps a few files open. H.264 and AV1, with or without reordered frames.
H W pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np

from openpi_port.errors import UserError

MAX_OPEN = 8  # files per process; each holds a decoder's buffers (some MB)

OnFrame = Callable[[int, av.VideoFrame], None]


@dataclasses.dataclass(frozen=True)
class VideoIndex:
    """Where the frames of a file are, in order of presentation.

    Attributes:
      pts: i64 [frames], presentation times in the stream's time base.
      times: f64 [frames], the same in seconds.
      keyframes: i64 [keyframes], which frames can be decoded on their own.
    """

    pts: np.ndarray
    times: np.ndarray
    keyframes: np.ndarray


def nearest_frame(times: np.ndarray, seconds: float, tolerance: float, path: str | os.PathLike[str]) -> int:
    """Number of the frame shown closest to a time.

    Args:
      times: f64 [frames], ascending.
      seconds: the time.
      tolerance: how far the frame's own time may be off, seconds.
      path: for the message.

    Raises:
      UserError: no frame is that close.
    """
    after = min(int(np.searchsorted(times, seconds)), len(times) - 1)
    frame = after - 1 if after and seconds - times[after - 1] < times[after] - seconds else after
    if abs(times[frame] - seconds) > tolerance:
        raise UserError(
            f"{path}: video file has no frame at {seconds:.4f} s, the nearest is at {times[frame]:.4f} s "
            f"({len(times)} frames up to {times[-1]:.4f} s); it and the table of its episode don't belong together"
        )
    return frame


class Video:
    """One open file. Not for two threads at once: hold `lock`.

    Args:
      path: an mp4 (or anything else that PyAV opens and can seek in).
      index: from an earlier opening; None reads it.

    Raises:
      UserError: the file is missing, truncated, or holds no video.
    """

    def __init__(self, path: str | os.PathLike[str], index: VideoIndex | None = None):
        self.path = Path(path)
        self.lock = threading.Lock()
        if not self.path.is_file():
            raise UserError(f"{self.path}: video file is missing; download the data set again")
        try:
            self._container = av.open(str(self.path))
        except (av.error.FFmpegError, OSError) as error:
            raise self._broken(f"can't be opened ({_reason(error)})") from error
        if not self._container.streams.video:
            raise self._broken("holds no video stream")
        self._stream = self._container.streams.video[0]
        # Workers are processes, one per core: threads inside the decoder only get in their way, and with frame
        # threads every seek has to fill the pipeline anew.
        self._stream.codec_context.thread_count = 1
        self.index = index or self._read_index()
        self._decoder: Iterator[av.VideoFrame] | None = None
        self._next = -1  # the frame that the decoder yields next

    def _read_index(self) -> VideoIndex:
        packets = []
        try:
            for packet in self._container.demux(self._stream):
                if packet.pts is None:
                    continue  # the flush packet at the end
                if packet.is_corrupt:
                    raise self._broken(f"is cut off after {len(packets)} frames")
                packets.append((packet.pts, packet.is_keyframe))
        except av.error.FFmpegError as error:
            raise self._broken(f"is damaged after {len(packets)} frames ({_reason(error)})") from error
        announced = self._stream.frames
        if not packets or announced > len(packets):
            raise self._broken(f"is cut off: it has {len(packets)} of {announced} frames")
        table = np.array(sorted(packets), np.int64)
        keyframes = np.flatnonzero(table[:, 1])
        if not len(keyframes):
            raise self._broken("has no keyframe")
        times = table[:, 0] * float(self._stream.time_base)
        return VideoIndex(pts=table[:, 0], times=times, keyframes=keyframes)

    def read(self, frame: int, on_frame: OnFrame | None = None) -> np.ndarray:
        """Decodes one frame.

        Args:
          frame: its number in order of presentation.
          on_frame: is given (number, picture) of every frame that was decoded on the way, the wanted one excluded.

        Returns:
          uint8 [H,W,3], RGB.

        Raises:
          UserError: the file can't be decoded there.
        """
        keyframe = max(int(np.searchsorted(self.index.keyframes, frame, side="right")) - 1, 0)
        try:
            # A decoder that stands between the keyframe and the frame goes on from where it is.
            if self._decoder is not None and self.index.keyframes[keyframe] <= self._next <= frame:
                image = self._forward_to(frame, on_frame)
            else:
                image = None
            # With reordered frames some demuxers arrive one keyframe late; the one before it is early enough.
            while image is None and keyframe >= 0:
                self._seek(keyframe)
                image = self._forward_to(frame, on_frame)
                keyframe -= 1
        except av.error.FFmpegError as error:
            self._decoder = None
            raise self._broken(f"can't be decoded at frame {frame} ({_reason(error)})") from error
        if image is None:
            raise self._broken(f"has no picture for frame {frame}")
        return image

    def _seek(self, keyframe: int) -> None:
        """Places a fresh decoder at a keyframe, given by its place among the keyframes."""
        self._next = int(self.index.keyframes[keyframe])
        self._container.seek(int(self.index.pts[self._next]), stream=self._stream, backward=True)
        self._decoder = self._container.decode(self._stream)

    def _forward_to(self, frame: int, on_frame: OnFrame | None) -> np.ndarray | None:
        """Decodes up to a frame; None (and no decoder) if the decoder stands behind it."""
        for picture in self._decoder:
            number = int(np.searchsorted(self.index.pts, picture.pts))
            if number < self._next:
                continue  # shown before the keyframe but stored after it: it may lack what it refers to
            if number > frame:
                break
            self._next = number + 1
            if number == frame:
                return to_rgb(picture)
            if on_frame is not None:
                on_frame(number, picture)
        self._decoder = None
        return None

    def _broken(self, what: str) -> UserError:
        return UserError(f"{self.path}: video file {what}; download or record it again")


def to_rgb(picture: av.VideoFrame) -> np.ndarray:
    """uint8 [H,W,3]."""
    return picture.to_ndarray(format="rgb24")


class Videos:
    """The most recently used files of this process, open, and what is known of all files seen.

    May be shared by threads. A forked or spawned process starts with nothing open: a decoder's state and the
    position in a file must not be shared.
    """

    def __init__(self, max_open: int = MAX_OPEN):
        self._max_open = max_open
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._open: OrderedDict[str, Video] = OrderedDict()
        self._indexes: dict[str, VideoIndex] = {}

    def __getstate__(self) -> dict[str, int]:
        return {"_max_open": self._max_open}

    def __setstate__(self, state: dict[str, int]) -> None:
        self._max_open = state["_max_open"]
        self._reset()

    @contextlib.contextmanager
    def use(self, path: str | os.PathLike[str]) -> Iterator[Video]:
        """The file at a path, for this thread alone while the context lasts.

        Raises:
          UserError: see `Video`.
        """
        if self._pid != os.getpid():
            self._reset()
        key = str(path)
        with self._lock:
            video = self._open.get(key) or Video(path, self._indexes.get(key))
            self._indexes[key] = video.index
            self._open[key] = video
            self._open.move_to_end(key)
            # Whoever still reads the oldest file holds it; PyAV closes it with the last reference.
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        with video.lock:
            yield video


def _reason(error: BaseException) -> str:
    """FFmpeg's words without the number and the path."""
    return str(getattr(error, "strerror", None) or error)
