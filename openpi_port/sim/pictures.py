"""What an evaluation shows: a video of many episodes side by side, one plot per episode, chunks against the truth.

Axis letters: T control steps, N frames, H W pixels, A actions in a chunk, D action dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import matplotlib
import numpy as np
from PIL import Image

from openpi_port.sim.rollout import Episode

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (needs the backend first)

BORDER = 3  # pixels
GOOD, BAD, RUNNING = (40, 180, 70), (210, 50, 50), (90, 90, 90)
GIF_FPS = 10


def grid(episodes: Sequence[Episode]) -> Iterator[np.ndarray]:
    """Frames of all episodes side by side; the border says how each ends once it has.

    Args:
      episodes: with frames.

    Yields:
      uint8 [H, W, 3] as long as the longest episode, and half a second more of its end (both even, for H.264).
    """
    columns = math.ceil(math.sqrt(len(episodes)))
    rows = math.ceil(len(episodes) / columns)
    size = episodes[0].frames.shape[1] + 2 * BORDER
    height, width = rows * size + rows * size % 2, columns * size + columns * size % 2
    for n in range(max(len(e.frames) for e in episodes) + 12):
        picture = np.zeros((height, width, 3), np.uint8)
        for i, episode in enumerate(episodes):
            done = n >= len(episode.frames) - 1
            tile = np.empty((size, size, 3), np.uint8)
            tile[:] = RUNNING if not done else GOOD if episode.success else BAD
            tile[BORDER:-BORDER, BORDER:-BORDER] = episode.frames[min(n, len(episode.frames) - 1)]
            top, left = i // columns * size, i % columns * size
            picture[top : top + size, left : left + size] = tile
        yield picture


def write_mp4(path: Path, frames: Iterator[np.ndarray], fps: int) -> None:
    """H.264 that every browser plays."""
    with av.open(str(path), "w") as container:
        stream = None
        for i, picture in enumerate(frames):
            if stream is None:
                stream = container.add_stream("libx264", rate=fps, options={"crf": "23"})
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = "yuv420p"
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_gif(path: Path, frames: Iterator[np.ndarray], fps: int) -> None:
    """A GIF at about GIF_FPS frames a second, in real time, for places that show no video."""
    every = max(1, round(fps / GIF_FPS))
    pictures = [Image.fromarray(f).quantize(64) for i, f in enumerate(frames) if i % every == 0]
    milliseconds = round(1000 * every / fps)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0, optimize=True)


def plot_episode(path: Path, episode: Episode, seconds_per_step: float) -> None:
    """Commands (lines) against measured joints (dashed) of both arms, grippers, and the reward."""
    figure, axes = plt.subplots(4, 1, figsize=(9, 9), sharex=True)
    time = np.arange(len(episode.rewards)) * seconds_per_step
    parts = (("left arm (rad)", range(6)), ("right arm (rad)", range(7, 13)), ("grippers", (6, 13)))
    for axis, (name, dims) in zip(axes, parts, strict=False):
        for i, dim in enumerate(dims):
            axis.plot(time, episode.actions[:, dim], color=f"C{i}", lw=1)
            axis.plot(time, episode.states[:, dim], color=f"C{i}", lw=1, ls="--", alpha=0.6)
        axis.set_ylabel(name)
    axes[3].step(time, episode.rewards, where="post", color="k")
    axes[3].set(ylabel="reward", xlabel="time (s)", ylim=(-0.2, 4.2))
    axes[0].set_title(f"seed {episode.seed}: {'success' if episode.success else 'failure'} (dashed: measured)")
    _save(figure, path)


def plot_chunk(path: Path, predicted: np.ndarray, true: np.ndarray, title: str) -> None:
    """A predicted chunk against the recorded one, a panel per dimension.

    Args:
      path: of the picture.
      predicted, true: [A, D], robot units; NaN where nothing was recorded.
      title: says which.
    """
    dims = true.shape[1]
    columns = min(4, dims)
    rows = math.ceil(dims / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 1.8 * rows), sharex=True, squeeze=False)
    for dim, axis in enumerate(axes.flat):
        if dim >= dims:
            axis.axis("off")
            continue
        axis.plot(true[:, dim], color="k", lw=1, label="recorded")
        axis.plot(predicted[:, dim], color="C1", lw=1, label="predicted")
        axis.set_title(f"dimension {dim}", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(title)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
