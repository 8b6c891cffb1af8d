"""The pictures of `experiments.inspect`: the attention mask, positions, and chunks of actions.

S tokens of the sequence, A actions in a chunk, J dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib import colors
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.inspect_subject import Sample
from openpi_port import sequence
from openpi_port.webpage import Html, escape

COLOURS: dict[sequence.Kind, str] = {
    "image": "#4c78a8", "prompt": "#54a24b", "padding": "#b9b9c3", "state": "#9467bd", "tokens": "#d1495b",
    "actions": "#e8871e",
}  # fmt: skip
GREY = "#b9b9c3"
SAMPLES = ("#4c78a8", "#e8871e", "#54a24b", "#d1495b", "#9467bd", "#8c6d46", "#d67fb0", "#6f6f7a")
RESOLUTION = 4  # pixels per unit of a block's drawn width


def width(block: sequence.Block) -> float:
    """How wide a block is drawn: a block of one token can be seen, one of 256 does not drown the others."""
    return round((4.0 + 5.0 * math.log2(1 + block.stop - block.start)) * RESOLUTION) / RESOLUTION


def colour(block: sequence.Block, tokens: sequence.Sequence) -> str:
    """Of a block: grey where it is masked."""
    return COLOURS[block.kind] if tokens.valid[block.place].any() else GREY


def mask(tokens: sequence.Sequence) -> Figure:
    """Who (down) sees whom (across), blocks in their own scale; empty rows are hatched."""
    edges, at = _layout(tokens.blocks)
    paint = np.ones((len(tokens.valid), 3))  # white, then each query's colour where it sees
    for block in tokens.blocks:
        paint[block.place] = colors.to_rgb(COLOURS[block.kind])
    seen = tokens.mask[np.ix_(at, at)]
    picture = np.where(seen[..., None], paint[at][:, None], 1.0)
    total = edges[-1]
    figure = Figure(figsize=(8.6, 8.6), layout="constrained")
    axis = figure.subplots()
    axis.imshow(picture, extent=(0, total, total, 0), interpolation="nearest")
    band = total * 0.035
    for block, low, high in zip(tokens.blocks, edges, edges[1:], strict=False):
        size, shade = high - low, colour(block, tokens)
        axis.add_patch(Rectangle((low, -band), size, band * 0.8, color=shade, lw=0, clip_on=False))
        axis.add_patch(Rectangle((-band, low), band * 0.8, size, color=shade, lw=0, clip_on=False))
        name = label(block, tokens)
        axis.text((low + high) / 2, -1.35 * band, name, rotation=45, ha="left", va="bottom", fontsize=8)
        axis.text(-1.35 * band, (low + high) / 2, name, ha="right", va="center", fontsize=8)
        axis.plot([0, total], [high, high], color="#55555f", lw=0.5)
        axis.plot([high, high], [0, total], color="#55555f", lw=0.5)
        if not tokens.mask[block.place].any():
            axis.add_patch(Rectangle((0, low), total, size, fill=False, hatch="////", ec="#d9d9e0", lw=0))
    axis.set(xlim=(-band, total), ylim=(total, -band), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    return figure


def positions(tokens: sequence.Sequence) -> Figure:
    """Every token's position, over the same scale as the mask's."""
    edges, at = _layout(tokens.blocks)
    figure = Figure(figsize=(11, 2.4), layout="constrained")
    axis = figure.subplots()
    for block, low, high in zip(tokens.blocks, edges, edges[1:], strict=False):
        axis.axvspan(low, high, color=colour(block, tokens), alpha=0.14, lw=0)
        x = low + (np.arange(block.stop - block.start) + 0.5) * (high - low) / (block.stop - block.start)
        axis.plot(x, tokens.positions[block.place], ".-", ms=2.5, lw=1, color=colour(block, tokens))
        axis.text((low + high) / 2, 1.02, block.name, transform=axis.get_xaxis_transform(), ha="center", fontsize=7)
    axis.set(xlim=(0, edges[-1]), xticks=[], ylabel="position")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def label(block: sequence.Block, tokens: sequence.Sequence) -> str:
    """A block's name and size."""
    size = block.stop - block.start
    masked = "" if tokens.valid[block.place].any() or block.kind == "padding" else ", masked"
    return f"{block.name} ({size}{masked})"


def chunks(samples: Sequence[Sample], names: Sequence[str], what: Literal["robot", "model"]) -> Html:
    """The samples' chunks, a small panel of SVG per dimension, which is drawn at once where matplotlib takes seconds.

    Args:
      samples: with actions.
      names: of the dimensions.
      what: "robot" draws robot units, every panel in its own range, with the state before the chunk as a dot; "model"
        what is trained on, all panels in the same range, with the band [-1, 1].
    """
    actions = [s.actions if what == "robot" else s.normalised["actions"] for s in samples]
    real = [len(a) if s.is_pad is None else int((~s.is_pad).sum()) for a, s in zip(actions, samples, strict=True)]
    panels = []
    for dim, name in enumerate(names):
        curves = [a[:, dim].astype(float) for a in actions]
        dots = [float(s.state[dim]) for s in samples if dim < len(s.state)] if what == "robot" else []
        inside = actions if what == "model" else [*curves, dots]
        low, high = (f([f(x) for x in inside if len(x)]) for f in (np.min, np.max))
        panels.append(_panel(name, curves, real, dots, float(low), float(high), band=what == "model"))
    return Html(f"<div class='panels'>{''.join(panels)}</div>")


def _panel(
    name: str,
    curves: Sequence[np.ndarray],
    real: Sequence[int],
    dots: Sequence[float],
    low: float,
    high: float,
    *,
    band: bool,
) -> str:
    """One dimension; what lies past an episode's end (from `real` on) is dotted."""
    width_, height, left, top = 152, 92, 38, 6
    low, high = (low, high) if high - low > 1e-9 else (low - 0.5, high + 0.5)
    x = lambda step: left + (width_ - left - 4) * (step + 1) / len(curves[0])  # noqa: E731  (the state is step -1)
    y = lambda value: top + (height - top - 6) * (high - value) / (high - low)  # noqa: E731
    parts = []
    if band:
        upper, lower = y(min(high, 1.0)), y(max(low, -1.0))
        parts.append(f"<rect x='{left}' width='{width_ - left}' y='{upper:.1f}' height='{max(lower - upper, 0):.1f}' "
                     "fill='#ececf2'/>")  # fmt: skip
    parts.append(f"<path d='M{left} {top}V{height - 4}H{width_}' fill='none' stroke='#8a8a95'/>")
    parts += [f"<text x='{left - 4}' y='{y(v) + 3:.1f}' text-anchor='end'>{v:.3g}</text>" for v in (low, high)]
    for i, (curve, until) in enumerate(zip(curves, real, strict=True)):
        shade = SAMPLES[i % len(SAMPLES)]
        for start, stop, dash in ((0, until, ""), (max(until - 1, 0), len(curve), " stroke-dasharray='1.5 2.5'")):
            points = " ".join(f"{x(t):.1f},{y(curve[t]):.1f}" for t in range(start, stop))
            if stop - start > 1:
                parts.append(f"<polyline points='{points}' fill='none' stroke='{shade}' stroke-width='1.4'{dash}/>")
        if dots:
            parts.append(f"<circle cx='{x(-1):.1f}' cy='{y(dots[i]):.1f}' r='2.4' fill='{shade}'/>")
    title = f"<div title='{escape(name)}'>{escape(name)}</div>"
    return f"<div>{title}<svg width='{width_}' height='{height}'>{''.join(parts)}</svg></div>"


def _layout(blocks: Sequence[sequence.Block]) -> tuple[np.ndarray, np.ndarray]:
    """Edges of the blocks as drawn, and the token under each pixel."""
    edges = np.concatenate([[0.0], np.cumsum([width(block) for block in blocks])])
    at = []
    for block in blocks:
        pixels = round(width(block) * RESOLUTION)
        at.append(block.start + (np.arange(pixels) * (block.stop - block.start)) // pixels)
    return edges, np.concatenate(at)
