"""What a measurement leaves behind: a table, a JSON file, a plot, and the comparison of two such files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openpi_port import whole
from openpi_port.errors import UserError

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
      name: part and what of it, "inference/vision".
      value: the median, where there were several.
      unit: "ms", "s", "GiB", "samples/s", ...
      p90: the 90th percentile.
      floor: the least that the shapes allow on this device, in the same unit.
      better: "lower" or "higher".
    """

    name: str
    value: float
    unit: str
    p90: float | None = None
    floor: float | None = None
    better: str = "lower"

    @property
    def ratio(self) -> float | None:
        """How many times the floor."""
        return None if not self.floor else self.value / self.floor


def times(name: str, seconds: Sequence[float], floor: float | None = None) -> Figure:
    """A figure in milliseconds of several calls' seconds, and the floor's seconds."""
    median, p90 = 1e3 * np.quantile(seconds, (0.5, 0.9))
    return Figure(name, float(median), "ms", float(p90), None if floor is None else 1e3 * floor)


def difference(
    name: str, longer: Sequence[float], shorter: Sequence[float], count: int, floor: float | None = None
) -> Figure | None:
    """A figure in milliseconds of what `longer` calls do `count` times more often than `shorter` ones.

    Args:
      name: of the figure.
      longer, shorter: seconds of each call.
      count: at least 1.
      floor: seconds.

    Returns:
      None where noise hides it: where nine tenths of the longer calls don't take longer than nine tenths of the shorter
      ones.
    """
    if np.quantile(longer, 0.1) <= np.quantile(shorter, 0.9):
        return None
    each = float(np.median(longer) - np.median(shorter)) / count
    return Figure(name, 1e3 * each, "ms", floor=None if floor is None else 1e3 * floor)


def table(figures: Sequence[Figure]) -> str:
    """For the terminal."""
    rows = [("", "median", "p90", "floor", "x floor", "unit")]
    rows += [(f.name, _short(f.value), _short(f.p90), _short(f.floor), _short(f.ratio), f.unit) for f in figures]
    return _aligned(rows)


def write(path: str | Path, about: Mapping[str, Any], figures: Sequence[Figure]) -> None:
    """Writes all as JSON, whole or not at all."""
    content = {"format": FORMAT, "about": dict(about), "figures": [dataclasses.asdict(f) for f in figures]}
    whole.write_text(Path(path), json.dumps(content, indent=1) + "\n")


def read(path: str | Path) -> tuple[dict[str, Any], list[Figure]]:
    """What `write` wrote.

    Raises:
      UserError: no such file, or not such a file.
    """
    try:
        content = json.loads(Path(path).read_text())
        if content["format"] != FORMAT:
            raise UserError(f"{path}: format {content['format']}, this program reads {FORMAT}")
        return content["about"], [Figure(**f) for f in content["figures"]]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not written by experiments.bench --json") from None


def compare(one: str | Path, other: str | Path) -> str:
    """A table of two runs: what they measured alike, and how many times better the second is."""
    (about_a, a), (about_b, b) = read(one), read(other)
    lines = []
    for key in sorted(about_a.keys() | about_b.keys()):
        values = [about.get(key, "-") for about in (about_a, about_b)]
        if values[0] != values[1]:
            lines.append(f"{key}: {values[0]} -> {values[1]}")
    second = {f.name: f for f in b}
    rows = [("", Path(one).stem, Path(other).stem, "better", "unit")]
    for first in a:
        if (then := second.pop(first.name, None)) is None:
            rows.append((first.name, _short(first.value), "-", "", first.unit))
            continue
        worse, better = (first.value, then.value) if first.better == "lower" else (then.value, first.value)
        gain = f"{worse / better:.3g}x" if worse > 0 and better > 0 else ""  # an error or a wait may be 0
        rows.append((first.name, _short(first.value), _short(then.value), gain, first.unit))
    rows += [(f.name, "-", _short(f.value), "", f.unit) for f in second.values()]
    return "\n".join([*lines, _aligned(rows)])


def plot(path: str | Path, about: Mapping[str, Any], figures: Sequence[Figure]) -> None:
    """Bars of all times on a logarithmic axis, each with its 90th percentile and its floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [f for f in figures if f.unit == "ms"]
    if not shown:
        raise UserError("--plot: no times were measured, so there is nothing to draw")
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.4 * len(shown)), layout="constrained")
    places = np.arange(len(shown))[::-1]
    axes.barh(places, [f.value for f in shown], color="#4c78a8", label="median")
    for place, f in zip(places, shown, strict=True):
        if f.p90 is not None:
            axes.plot([f.value, f.p90], [place, place], color="black", linewidth=1)
        if f.floor:
            axes.plot([f.floor] * 2, [place - 0.4, place + 0.4], color="#e45756", linewidth=2)
            axes.text(max(f.value, f.p90 or 0) * 1.05, place, f"{f.ratio:.1f} x floor", va="center", fontsize=8)
    axes.plot([], [], color="#e45756", linewidth=2, label="floor, from shapes and measured rates")
    axes.set(xscale="log", xlabel="milliseconds", yticks=places, yticklabels=[f.name for f in shown])
    axes.set_title(f"{about['config']}, {about['backend']} on {about['device']}", fontsize=10)
    axes.margins(x=0.2)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in (0, len(row) - 1) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
