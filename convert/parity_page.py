"""The parity report as one HTML file with the pictures inside: errors by layer, masks, trajectories or scores."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from convert.parity import Report, conclusion
from convert.parity_rows import STAGES, Row
from openpi_port import webpage

STYLE = """
tr.beyond { color: #b3261e } tr.first { font-weight: bold; background: #fde7e5 }
.verdict { padding: .6rem 1rem; border-radius: .4rem; background: #e3f4e6 } .verdict.bad { background: #fde7e5 }
"""


def page(report: Report) -> str:
    """The whole page.

    Args:
      report: of `convert.parity.run`.

    Returns:
      HTML that needs no other file and no network.
    """
    first = report.first
    title = "Parity: the same" if first is None else f"Parity: diverges at {first.name}"
    figures = [("Error by layer", errors(report), ERRORS), ("Attention mask", masks(report), MASKS)]
    figures += [("Actions", actions(report), ACTIONS), ("Way from noise to actions", paths(report), PATHS)]
    figures += [("Scores of the tokens", scores(report), SCORES)]
    body = [
        f"<h1>{webpage.escape(title)}</h1>",
        f"<p>A: {webpage.escape(report.a)}<br>B: {webpage.escape(report.b)}<br>{report.dtype}, batch {report.batch}, "
        f"tolerance {report.tolerance:.0e} of each tensor's largest value</p>",
        f"<p class='verdict{'' if first is None else ' bad'}'>{webpage.escape(conclusion(report))}</p>",
        *(webpage.figure(name, drawn, caption) for name, drawn, caption in figures if drawn is not None),
        *(_stage(stage, [row for row in report.rows if row.stage == stage], first) for stage in STAGES),
    ]
    return webpage.page(title, body, STYLE)


ERRORS = (
    "Largest difference of every tensor in units of its largest value, in the order of the computation. The dashed "
    "line is the tolerance; what lies at the bottom differs by nothing. Ticks mark where a stage or a layer begins."
)
MASKS = (
    "Who (down) may see whom (across), by sample; white may, what differs is red. Neighbours that see and are seen "
    "alike are drawn as one; the ticks are their numbers: cameras, prompt, state, actions."
)
ACTIONS = "The sampled chunk, first sample: A in blue, B in orange and dashed. One panel per action dimension."
SCORES = (
    "pi0-FAST's largest difference of a place's scores between A and B, by sample: left where the text's next token is "
    "scored, right at every step of decoding when the same tokens are fed to both."
)
PATHS = "The first action of the chunk, first sample, after every Euler step. Colours as above."


def errors(report: Report) -> Figure:
    """A point per tensor on a logarithmic axis, coloured by stage."""
    rows = report.rows
    floor, tolerance = 1e-9, report.tolerance
    fig = Figure(figsize=(13, 4.6), layout="constrained")
    ax = fig.subplots()
    ticks: dict[str, int] = {}
    for i, row in enumerate(rows):
        parts = row.name.split("/")
        ticks.setdefault("/".join(parts[:2]) if len(parts) > 2 and parts[1].isdigit() else parts[0], i)
    for number, stage in enumerate(STAGES):
        at = [i for i, row in enumerate(rows) if row.stage == stage]
        values = [min(max(measure(rows[i], tolerance), floor), 1e3) for i in at]
        if at:
            ax.plot(at, values, ".-", color=f"C{number}", label=stage, lw=0.25, ms=6)
    ax.axhline(tolerance, color="black", ls="--", lw=1)
    if report.first is not None:
        i = rows.index(report.first)
        ax.plot(i, min(max(measure(report.first, tolerance), floor), 1e3), "o", mfc="none", mec="#b3261e", ms=13, mew=2)
        side = "right" if i > len(rows) * 0.6 else "left"
        ax.annotate(
            report.first.name, (i, 30), color="#b3261e", ha=side, xytext=(8 if side == "left" else -8, 0),
            textcoords="offset points",
        )  # fmt: skip
        ax.axvline(i, color="#b3261e", lw=0.8)
    ax.set_yscale("log")
    ax.set_ylim(floor / 2, 1e-2 if report.first is None and report.dtype == "float32" else 1e3)
    ax.set_ylabel("relative error")
    shown: dict[int, str] = {}
    for name, i in ticks.items():  # where the label before leaves room
        if not shown or i - max(shown) >= len(rows) / 90:
            shown[i] = name
    ax.set_xticks(list(shown), list(shown.values()), rotation=90, fontsize=7)
    ax.margins(x=0.01)
    ax.grid(axis="y", lw=0.3)
    ax.legend(ncols=len(STAGES), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.12), frameon=False)
    return fig


def measure(row: Row, tolerance: float) -> float:
    """The error in units of what the tolerance is a share of; of masks, the share of elements that differ."""
    return row.relative if row.allowed == 0 else row.error / row.allowed * tolerance


def masks(report: Report) -> Figure | None:
    """The attention masks of every sample, A's and B's and what differs."""
    if "masks/attention" not in report.pictures:
        return None
    a, b = report.pictures["masks/attention"]
    count = min(len(a), 4)
    fig = Figure(figsize=(13, 4.2 * count), layout="constrained")
    axes = fig.subplots(count, 3, squeeze=False)
    for i in range(count):
        starts = runs(a[i], b[i])
        ends = [*starts[1:], len(a[i])]
        names = [f"{s}" if e == s + 1 else f"{s}-{e - 1}" for s, e in zip(starts, ends, strict=True)]
        for ax, picture, name in zip(axes[i], (a[i], b[i], a[i] != b[i]), ("A", "B", "A≠B"), strict=True):
            colors = "Reds" if name == "A≠B" else "gray"
            ax.imshow(picture[np.ix_(starts, starts)], cmap=colors, vmin=0, vmax=1, interpolation="nearest")
            changed = f": {int(picture.sum())} of {picture.size}" if name == "A≠B" else ""
            ax.set_title(f"sample {i}, {name}{changed}", fontsize=9)
            ax.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
            ax.set_yticks(range(len(names)), names, fontsize=6)
            ax.set_xticks(np.arange(len(names)) - 0.5, minor=True)
            ax.set_yticks(np.arange(len(names)) - 0.5, minor=True)
            ax.grid(which="minor", color="#9a9aa5", lw=0.4)
            ax.tick_params(which="minor", length=0)
    return fig


def runs(a: np.ndarray, b: np.ndarray) -> list[int]:
    """Where runs of tokens begin that see and are seen alike, in both of two masks [S, S]."""
    both = np.concatenate([a, a.T, b, b.T], axis=1)
    return [0, *(np.flatnonzero((both[1:] != both[:-1]).any(axis=1)) + 1).tolist()]


def actions(report: Report) -> Figure | None:
    """Chunks over time, a panel per action dimension."""
    if "trajectory/actions" not in report.pictures:
        return None
    a, b = (chunk[0] for chunk in report.pictures["trajectory/actions"])
    return _panels(a, b, "step of the chunk")


def paths(report: Report) -> Figure | None:
    """The first action on its way from noise, a panel per action dimension."""
    names = [name for name in report.pictures if name.endswith("/x_t")]
    if not names:
        return None
    a, b = (np.stack([report.pictures[name][side][0, 0] for name in names]) for side in (0, 1))
    return _panels(a, b, "Euler step (0 is the first)")


def scores(report: Report) -> Figure | None:
    """The error of the logits over the places of the text, and over the steps of decoding."""
    worst: dict[str, np.ndarray] = {}  # "output" -> [B, T - 1], "decode/03" -> [B]
    for name, (a, b) in report.pictures.items():
        where, _, kind = name.rpartition("/")
        if kind in ("logits", "target_logits", "logsumexp"):
            error = np.abs(a - b)
            worst[where] = np.maximum(worst.get(where, 0), error.max(-1) if kind == "logits" else error)
    steps = [error for where, error in worst.items() if where != "output"]
    curves = {"place in the text": worst["output"]} if "output" in worst else {}
    curves |= {"step of decoding": np.stack(steps, axis=1)} if steps else {}
    if not curves:
        return None
    fig = Figure(figsize=(13, 3.2), layout="constrained")
    axes = fig.subplots(1, len(curves), squeeze=False, sharey=True)
    for ax, (label, curve) in zip(axes[0], curves.items(), strict=True):
        for i, line in enumerate(curve[:4]):
            ax.plot(np.where(line > 0, line, np.nan), ".-", lw=0.8, label=f"sample {i}")
        ax.set_yscale("log")
        ax.set_xlabel(label, fontsize=9)
        ax.grid(axis="y", lw=0.3)
    axes[0, 0].set_ylabel("largest |A - B|")
    axes[0, 0].legend(fontsize=8)
    return fig


def _panels(a: np.ndarray, b: np.ndarray, label: str) -> Figure:
    """[steps, J] of both sides."""
    columns = min(8, a.shape[1])
    rows = -(-a.shape[1] // columns)
    fig = Figure(figsize=(13, 1.9 * rows + 0.4), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False)
    for j, ax in enumerate(axes.flat):
        if j >= a.shape[1]:
            ax.axis("off")
            continue
        ax.plot(a[:, j], color="C0", lw=2.4)
        ax.plot(b[:, j], color="C1", lw=1.4, ls="--")
        ax.set_title(f"dim {j}", fontsize=8)
        ax.tick_params(labelsize=7)
    fig.supxlabel(label, fontsize=9)
    return fig


def _stage(stage: str, rows: list[Row], first: Row | None) -> str:
    if not rows:
        return ""
    beyond = sum(not row.ok for row in rows)
    verdict = f"{beyond} of {len(rows)} beyond tolerance" if beyond else f"{len(rows)} tensors agree"
    head = ("tensor", "shape", "max |A|", "max error", "relative", "allowed", "norm A", "norm B")
    lines, kinds = [], []
    for row in rows:
        numbers = (row.magnitude, row.error, row.relative, row.allowed, *row.norms)
        lines.append((row.name, "×".join(map(str, row.shape)), *(f"{number:.3g}" for number in numbers)))
        kinds.append(" ".join(["first"] * (row is first) + ["beyond"] * (not row.ok)))
    is_open = " open" if beyond else ""
    table = webpage.table(head, lines, kinds)
    return f"<details{is_open}><summary><b>{stage}</b>: {verdict}</summary>{table}</details>"
