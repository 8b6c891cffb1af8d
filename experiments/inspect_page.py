"""The page of `experiments.inspect`: what a run reads, from the camera to the attention mask."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np

from convert import layout, tables
from experiments import inspect_pictures as pictures
from experiments.inspect_subject import Finding, Part, Sample, Subject
from experiments.inspect_tokens import Piece, action_pieces, prompt_pieces
from openpi_port import memory, normalize, webpage
from openpi_port.config import Pi0Fast
from openpi_port.fields import to_dict
from openpi_port.running_stats import Stats
from openpi_port.sequence import Block
from openpi_port.webpage import Html, escape

STYLE = """
h2 { border-bottom: 2px solid #e4e4ea; padding-bottom: .2rem; margin-top: 2.6rem }
h3 { font-size: 1rem; margin-bottom: .3rem }
nav a { margin-right: 1rem; color: #4c78a8; text-decoration: none }
p.about { color: #55555f; max-width: 60rem }
.verdict { padding: .6rem 1rem; border-radius: .4rem; background: #e3f4e6; margin: .4rem 0 }
.verdict.bad { background: #fde7e5 } .verdict.note { background: #f1f1f5 }
.photos { display: grid; gap: .3rem; align-items: end; justify-content: start; margin: .4rem 0 }
.photos img { width: 150px; display: block; border-radius: .2rem }
.photos .head { font-size: 12px; color: #55555f; overflow-wrap: anywhere }
.photos .masked { position: relative; opacity: .35 } .photos .masked::after { content: "masked"; position: absolute;
  inset: 0; display: grid; place-items: center; color: white; font-weight: 600; background:
  repeating-linear-gradient(45deg, #0000 0 8px, #ffffff55 8px 10px) }
.strip { display: flex; height: 2.1rem; border-radius: .3rem; overflow: hidden; margin: .6rem 0 }
.strip div { color: white; font-size: 12px; display: grid; place-items: center; overflow: hidden; white-space: nowrap;
  border-right: 1px solid white }
.chips { display: flex; flex-wrap: wrap; gap: 3px; margin: .4rem 0 }
.chip { border-radius: .25rem; padding: 0 .3rem; color: white; font: 12px/1.6 ui-monospace, monospace;
  white-space: pre }
.dot { display: inline-block; width: .75em; height: .75em; border-radius: 50%; margin-right: .4em }
tr.bad { background: #fde7e5 } td svg { vertical-align: middle } .frozen { color: #8a8a95 }
.panels { display: grid; grid-template-columns: repeat(auto-fill, 152px); gap: .6rem .35rem }
.panels div div { font: 10.5px ui-monospace, monospace; padding-left: 14px;
  white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
.panels text { font-size: 9px; fill: #55555f }
pre { font-size: 12px; background: #f6f6f9; padding: .8rem; overflow: auto }
"""


def page(subject: Subject, samples: Sequence[Sample], findings: Sequence[Finding]) -> str:
    """The whole page.

    Args:
      subject: what is inspected.
      samples: of `inspect_subject.look`; may be empty where none could be made.
      findings: likewise.

    Returns:
      HTML that needs no other file and no network.
    """
    sections = [
        ("Cameras", _cameras(subject, samples) if samples else []),
        ("Tokens", _tokens(subject, samples[0], samples) if samples else []),
        ("Attention", _attention(subject, samples) if samples else []),
        ("Actions", [line for part in subject.parts for line in _actions(subject, part, samples)]),
        ("Statistics", [line for part in subject.parts for line in _statistics(subject, part)]),
        ("Parameters", _parameters(subject)),
        ("Configuration", [f"<details><summary>all fields</summary><pre>{_json(subject)}</pre></details>"]),
    ]
    sections = [(name, content) for name, content in sections if content]
    links = "".join(f"<a href='#{name}'>{name}</a>" for name, _ in sections)
    body = [f"<h1>{escape(subject.title)}</h1>", _summary(subject), f"<nav>{links}</nav>", *_verdict(findings)]
    for name, content in sections:
        body += [f"<h2 id='{name}'>{name}</h2>", *content]
    return webpage.page(f"{subject.title}: inspected", body, STYLE)


def _summary(subject: Subject) -> str:
    model = subject.config.model
    kind = "pi0-FAST" if isinstance(model, Pi0Fast) else "pi0" if model.state_in == "suffix" else "pi0.5"
    if subject.config.insulate:
        kind += " with knowledge insulation"
    total, _ = memory.count_params(model)
    lines = [
        f"{kind}, size {model.size}, {total / 1e6:,.1f} M parameters, chunks of {model.action_horizon} actions.",
        *(f"Data: {_about(part, model.action_horizon)}." for part in subject.parts),
    ]
    return f"<p class='about'>{'<br>'.join(escape(line) for line in lines)}</p>"


def _about(part: Part, horizon: int) -> str:
    data = part.data
    size = "" if part.frames is None else f", {len(part.frames.episodes)} episodes, {len(part.frames)} frames"
    if part.frames is not None and part.frames.fps:
        size += f" at {part.frames.fps:g} a second (a chunk is {horizon / part.frames.fps:.2g} s)"
    how = f"robot {data.robot}, normalised by {data.norm}, augmentation {data.augment}"
    return f"{data.repo_id or 'none named'}{size}, {how}"


def _json(subject: Subject) -> str:
    return escape(json.dumps(to_dict(subject.config), indent=1))


def _verdict(findings: Sequence[Finding]) -> list[str]:
    """Mistakes first; where there are none, that is said."""
    texts = {level: [f.text for f in findings if f.level == level] for level in ("bad", "note")}
    good = [] if texts["bad"] else ["<p class='verdict'>Nothing suspicious was found.</p>"]
    return good + [
        f"<div class='verdict {level}'>{''.join(f'<div>{escape(text)}</div>' for text in lines)}</div>"
        for level, lines in texts.items()
        if lines
    ]


def _cameras(subject: Subject, samples: Sequence[Sample]) -> list[str]:
    about = (
        "Each camera as the model gets it, then as training does after augmentation. A masked camera takes its place "
        "in the sequence, but no token sees it."
    )
    cells, heads, draws = [], [], {}
    for camera in subject.config.model.cameras:
        source = " / ".join(dict.fromkeys(p.data.cameras.get(camera, "the robot has none") for p in subject.parts))
        draws[camera] = max(len(sample.augmented.get(camera, ())) for sample in samples)
        heads += [f"<b>{escape(camera)}</b><br>{escape(source)}", *[f"augmented {i + 1}" for i in range(draws[camera])]]
    cells += [f"<div class='head'>{head}</div>" for head in ("", *heads)]
    for sample in samples:
        cells.append(f"<div class='head'>{escape(sample.where)}<br>“{escape(sample.prompt)}”</div>")
        for camera in subject.config.model.cameras:
            augmented = sample.augmented.get(camera, [sample.images[camera]] * draws[camera])
            photos = [sample.images[camera], *augmented]
            kind = "" if sample.seen[camera] else " class='masked'"
            cells += [f"<div{kind}>{webpage.photo(photo, camera)}</div>" for photo in photos]
    columns = f"grid-template-columns: 9rem repeat({len(heads)}, 150px)"
    return [f"<p class='about'>{about}</p>", f"<div class='photos' style='{columns}'>{''.join(cells)}</div>"]


def _tokens(subject: Subject, first: Sample, samples: Sequence[Sample]) -> list[str]:
    tokens, parts = first.sequence, []
    for block in tokens.blocks:
        size, label = pictures.width(block), pictures.label(block, tokens)
        style = f"flex: {size:.1f} 0 0; background: {pictures.colour(block, tokens)}"
        parts.append(f"<div style='{style}' title='{escape(label)}'>{escape(block.name)}</div>")
    rows = [
        (
            Html(f"{_dot(pictures.colour(block, tokens))}{escape(block.name)}"),
            _range(np.arange(block.start, block.stop)),
            str(block.stop - block.start),
            str(int(tokens.valid[block.place].sum())),
            _range(tokens.positions[block.place][tokens.valid[block.place]]),
            _seen_by(block, first),
        )
        for block in tokens.blocks
    ]
    out = [
        f"<p class='about'>The sequence of {escape(first.where)}: {len(tokens.valid)} tokens, not to scale.</p>",
        f"<div class='strip'>{''.join(parts)}</div>",
        webpage.table(("block", "tokens", "count", "valid", "positions", "sees"), rows),
    ]
    for sample in samples:
        pieces = prompt_pieces(subject, sample)
        out += [f"<h3>{escape(sample.where)}: text, {len(pieces)} tokens</h3>", _chips(pieces)]
        if extra := action_pieces(subject, sample):
            out += [f"<details open><summary>action tokens, {len(extra)}</summary>{_chips(extra)}</details>"]
    return out


def _chips(pieces: Sequence[Piece]) -> str:
    chips = (
        f"<span class='chip' style='background: {pictures.COLOURS[p.kind]}' title='id {p.id}{escape(p.about)}'>"
        f"{escape(p.text)}</span>"
        for p in pieces
    )
    return f"<div class='chips'>{''.join(chips)}</div>"


def _dot(colour: str) -> str:
    return f"<span class='dot' style='background: {colour}'></span>"


def _range(numbers: np.ndarray) -> str:
    ends = dict.fromkeys(str(end) for end in (numbers.min(), numbers.max())) if len(numbers) else ["none"]
    return "–".join(ends)


def _seen_by(block: Block, sample: Sample) -> str:
    """Names of the blocks that a block's tokens see: whole, or in part (causal)."""
    tokens = sample.sequence
    rows = tokens.mask[block.place][tokens.valid[block.place]]
    names = []
    for other in tokens.blocks:
        part = rows[:, other.place][:, tokens.valid[other.place]]
        if part.size and part.all():
            names.append(other.name)
        elif part.any():
            names.append(f"{other.name} (causal)")
    return ", ".join(names) or "nothing"


def _attention(subject: Subject, samples: Sequence[Sample]) -> list[str]:
    about = (
        "Who (down) sees whom (across); white is hidden. Every block has its own scale, so that one state token shows "
        "beside 256 of an image. Hatched rows see nothing: padding, or cameras that the robot lacks."
    )
    first = samples[0].sequence
    other = next((s for s in samples[1:] if not np.array_equal(s.sequence.mask, first.mask)), None)
    same = (
        "The masks of all samples shown are the same."
        if other is None
        else f"The masks of the samples differ, by the length of their text; this is that of {samples[0].where}."
    )
    return [
        f"<p class='about'>{about} {escape(same)}</p>",
        webpage.picture(pictures.mask(first), "attention mask"),
        "<h3>Positions</h3><p class='about'>The number by which the rotary embedding turns each token.</p>",
        webpage.picture(pictures.positions(first), "positions"),
    ]


def _actions(subject: Subject, part: Part, samples: Sequence[Sample]) -> list[str]:
    samples = [s for s in samples if s.part is part and s.actions is not None]
    if not samples:
        return []
    delta = [i for i, is_delta in enumerate(part.data.delta) if is_delta]
    relative = f" Dimensions {', '.join(map(str, delta))} become differences to the state first." if delta else ""
    names = part.names("actions")
    return [
        f"<h3>{_of(subject, part)}In the robot's units</h3><p class='about'>A colour per sample; the dot is the state "
        "before the chunk, dotted what is repeated after the episode's end.</p>",
        pictures.chunks(samples, names, "robot"),
        f"<h3>As the model is trained on them</h3><p class='about'>Normalised by {part.data.norm}.{relative} "
        "The band is [-1, 1]; all panels have the same axis.</p>",
        pictures.chunks(samples, names, "model"),
    ]


def _of(subject: Subject, part: Part) -> str:
    """Which data set a heading is about, where there are several."""
    return escape(f"{part.data.repo_id}: ") if len(subject.parts) > 1 else ""


def _statistics(subject: Subject, part: Part) -> list[str]:
    tiny = {(t.key, t.dim): str(t) for t in normalize.tiny_ranges(part.stats, part.data.norm)}
    origin = part.stats_from[0].upper() + part.stats_from[1:]
    out = [
        f"<p class='about'>{_of(subject, part)}{escape(origin)}. The bar is q01 to q99 within the dimension's "
        f"own minimum and maximum, with the mean and its standard deviation below.</p>"
    ]
    for key, stats in part.stats.items():
        fields = [f for f in ("mean", "std", "q01", "q99", "min", "max") if getattr(stats, f) is not None]
        names = part.names(key) if key in ("state", "actions") else [str(i) for i in range(len(stats.mean))]
        rows, kinds = [], []
        for dim, name in enumerate(names):
            numbers = [f"{getattr(stats, field)[dim]:.4g}" for field in fields]
            rows.append((name, *numbers, _bar(stats, dim), tiny.get((key, dim), "")))
            kinds.append("bad" if (key, dim) in tiny else "")
        out += [f"<h3>{escape(key)}</h3>", webpage.table(("dimension", *fields, "", ""), rows, kinds)]
    return out


def _bar(stats: Stats, dim: int) -> Html:
    """One dimension's spread as a small picture."""
    mean, std = float(stats.mean[dim]), float(stats.std[dim])
    known = [s[dim] for s in (stats.min, stats.max, stats.q01, stats.q99) if s is not None]
    low, high = min([*known, mean - std]), max([*known, mean + std])
    if not high > low:
        return Html("")
    x = lambda value: 2 + 196 * (float(value) - low) / (high - low)  # noqa: E731
    parts = []
    if stats.min is not None and stats.max is not None:
        parts.append(
            f"<line x1='{x(stats.min[dim]):.1f}' x2='{x(stats.max[dim]):.1f}' y1='5' y2='5' stroke='#b9b9c3'/>"
        )
    if stats.q01 is not None and stats.q99 is not None:
        left, right = x(stats.q01[dim]), x(stats.q99[dim])
        parts.append(
            f"<rect x='{left:.1f}' width='{max(right - left, 1):.1f}' y='2' height='6' rx='2' fill='#4c78a8'/>"
        )
    left, right = x(mean - std), x(mean + std)
    parts.append(f"<line x1='{left:.1f}' x2='{right:.1f}' y1='12' y2='12' stroke='#e8871e' stroke-width='2'/>")
    parts.append(f"<circle cx='{x(mean):.1f}' cy='12' r='3' fill='#e8871e'/>")
    return Html(f"<svg width='200' height='16'>{''.join(parts)}</svg>")


def _parameters(subject: Subject) -> list[str]:
    config = subject.config
    shapes = layout.side_shapes(tables.entries(config.model), layout.OURS)
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    total = sum(sizes.values())
    groups: dict[str, list[str]] = {}
    for name in sizes:
        groups.setdefault(_part(name), []).append(name)
    frozen = [name for name in sizes if any(re.search(pattern, name) for pattern in config.frozen)]
    rows = [
        (
            part,
            str(len(names)),
            f"{sum(sizes[n] for n in names):,}",
            f"{sum(sizes[n] for n in names) / total:.1%}",
            Html(f"<svg width='200' height='10'><rect width='{200 * sum(sizes[n] for n in names) / total:.1f}' "
                 "height='10' rx='2' fill='#4c78a8'/></svg>"),
            f"{sum(sizes[n] for n in names if n not in frozen):,}",
        )
        for part, names in groups.items()
    ]  # fmt: skip
    rows.append(("all", str(len(sizes)), f"{total:,}", "100%", "", f"{total - sum(sizes[n] for n in frozen):,}"))
    each = [(name, "×".join(map(str, shapes[name])), f"{size:,}") for name, size in sizes.items()]
    kinds = ["frozen" if name in frozen else "" for name in sizes]
    return [
        webpage.table(("part", "tensors", "parameters", "share", "", "trained"), rows),
        "<details><summary>every tensor (Flax names and shapes; frozen ones are grey)</summary>",
        webpage.table(("tensor", "shape", "parameters"), each, kinds),
        "</details>",
    ]


def _part(name: str) -> str:
    """Which part of the model a parameter belongs to."""
    if name.startswith("vision/"):
        return "vision tower"
    if name == "gemma/embedding":
        return "embedding of the vocabulary"
    if re.search(r"/(experts|norms)/0/", name):
        return "language model"
    return "action expert" if re.search(r"/(experts|norms)/1/", name) else "projections of state, time and actions"
