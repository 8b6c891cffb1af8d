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
from PIL import Image, ImageDraw, ImageFont

from openpi_port.sim.rollout import Episode
from openpi_port.sim.simulation import About

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BORDER, TITLE, LABEL = 3, 22, 10  # pixels
FRAMES_EVERY = 2  # control steps per video frame
GOOD, BAD, RUNNING = (40, 180, 70), (210, 50, 50), (90, 90, 90)
GIF_FPS = 10


def rows(episodes: Sequence[Episode]) -> list[list[Episode]]:
    """Episodes in rows of a grid that is wider than high and has few empty places."""
    least = math.ceil(math.sqrt(len(episodes)))
    columns = min(range(least, 2 * least), key=lambda c: (-len(episodes) % c, c), default=1)
    return [list(episodes[i : i + columns]) for i in range(0, len(episodes), columns)]


def grid(shown: Sequence[Sequence[Episode]], titles: Sequence[str] = ()) -> Iterator[np.ndarray]:
    """Frames of all episodes side by side with their seeds; the border says how each ends once it has.

    Args:
      shown: rows of episodes with frames.
      titles: of the rows, written above them; or none.

    Yields:
      uint8 [H, W, 3] as long as the longest episode, and half a second more of its end (both even, for H.264).
    """
    size = shown[0][0].frames.shape[1] + 2 * BORDER
    title = TITLE if titles else 0
    height, width = len(shown) * (size + title), max(map(len, shown)) * size
    background = Image.new("RGB", (width + width % 2, height + height % 2), RUNNING)
    for y, text in enumerate(titles):
        ImageDraw.Draw(background).text((BORDER + 2, y * (size + title) + 3), text, font=ImageFont.load_default(13))
    tiles = [
        (y * (size + title) + title, x * size, e, _label(str(e.seed)))
        for y, row in enumerate(shown)
        for x, e in enumerate(row)
    ]
    for n in range(max(len(e.frames) for _, _, e, _ in tiles) + 12):
        picture = np.array(background)
        for top, left, episode, label in tiles:
            done = n >= len(episode.frames) - 1
            picture[top : top + size, left : left + size] = RUNNING if not done else GOOD if episode.success else BAD
            inside = picture[top + BORDER : top + size - BORDER, left + BORDER : left + size - BORDER]
            inside[:] = episode.frames[min(n, len(episode.frames) - 1)]
            inside[: len(label), : label.shape[1]] = label
        yield picture


def _label(text: str) -> np.ndarray:
    """uint8 [H, W, 3], light on dark."""
    font = ImageFont.load_default(LABEL)
    picture = Image.new("RGB", (math.ceil(font.getlength(text)) + 4, LABEL + 3), RUNNING)
    ImageDraw.Draw(picture).text((2, 0), text, font=font)
    return np.array(picture)


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


def plot_episode(path: Path, episode: Episode, about: About) -> None:
    """Commands (lines) against what was measured (dashed), and the reward; a thin line where another chunk began.

    Args:
      path: of the picture.
      episode: what to plot.
      about: its task.
    """
    count = len(about.panels)
    ratios = [*(1 + 0.35 * max(len(p.actions), len(p.states)) for p in about.panels), 1.2]
    figure, axes = plt.subplots(count + 1, 1, figsize=(10, 0.7 + sum(ratios)), sharex=True, height_ratios=ratios)
    time = np.arange(len(episode.rewards)) / about.fps
    for axis, panel in zip(axes, about.panels, strict=False):
        for i, name in enumerate(dict.fromkeys([*panel.actions, *panel.states])):
            if name in panel.actions:
                axis.plot(time, episode.actions[:, panel.actions[name]], color=f"C{i}", lw=1.3, label=name)
            if name in panel.states:
                label = None if name in panel.actions else name
                style = {"ls": (0, (2, 1.5)), "alpha": 0.55 if name in panel.actions else 1.0}
                axis.plot(time, episode.states[:, panel.states[name]], color=f"C{i}", lw=1.3, label=label, **style)
        axis.set_ylabel(panel.label)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes[-1].fill_between(time, episode.rewards, step="post", color="0.75", lw=0)
    axes[-1].step(time, episode.rewards, where="post", color="0.2", lw=1)
    top = about.success
    axes[-1].set(ylabel="reward", xlabel="time (s)", ylim=(-0.05 * top, 1.1 * top), yticks=range(top + 1))
    if episode.success:
        first = time[int(np.argmax(episode.rewards == about.success))]
        axes[-1].axvline(first, color=np.array(GOOD) / 255, lw=2)
    for axis in axes:
        for step in {step for step in episode.borders if step < len(time)}:
            axis.axvline(step / about.fps, color="0.88", lw=0.6, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0)
    word = "success" if episode.success else "diverged" if episode.diverged else "failure"
    chunks = ", grey: a new chunk" if episode.borders else ""
    title = f"seed {episode.seed}: {word}   (lines: commands, dashed: measured{chunks})"
    axes[0].set_title(title, fontsize=10)
    _save(figure, path)


def plot_chunk(path: Path, predicted: np.ndarray, true: np.ndarray, title: str, names: Sequence[str]) -> None:
    """A predicted chunk against the recorded one, a panel per dimension.

    Args:
      path: of the picture.
      predicted, true: [A, D], robot units; NaN where nothing was recorded.
      title: says which.
      names: of the dimensions.
    """
    dims = true.shape[1]
    columns = min(4, dims)
    rows = math.ceil(dims / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 1.8 * rows), sharex=True, squeeze=False)
    for dim, axis in enumerate(axes.flat):
        if dim >= dims:
            axis.axis("off")
            continue
        if dim + columns >= dims:  # nothing below it
            axis.set_xlabel("step of the chunk", fontsize=7)
            axis.xaxis.set_tick_params(labelbottom=True)
        axis.plot(true[:, dim], color="k", lw=1, label="recorded")
        axis.plot(predicted[:, dim], color="C1", lw=1, label="predicted")
        axis.set_title(names[dim], fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(title)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
