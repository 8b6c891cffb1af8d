"""The table of what became what."""

from __future__ import annotations

import re

from convert import lerobot
from convert.layout import OURS, Entry, Spot, num_elements, side_shapes
from convert.source import Source
from convert.target import SIDES, num_bytes, size


def table(source: Source, to: str) -> str:
    """One line per tensor of the model: its name here, its name there, shapes and dtype; then what has no place.

    Args:
      source: what is converted.
      to: the target's format.
    """
    weights = source.to(SIDES[to])
    rows = [("from " + source.format, "to " + to, "shape", "dtype")]
    for entry in source.entries:
        here, there = (_place(entry, side) for side in (source.side, SIDES[to]))
        dtype = weights.dtypes[entry.spot(SIDES[to], entry.layers[0]).name]
        shapes = " -> ".join(dict.fromkeys(str(list(entry.shape(side))) for side in (source.side, SIDES[to])))
        rows.append((here, there, shapes, str(dtype)))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    lines += [f"{name}: {rule}" for name, rule in source.rules.items()]
    if source.train_state:
        goes = "goes along" if to in ("flax", "torch") else f"stays behind: {to} has no place for it"
        lines.append(f"train_state/ ({len(source.train_state)} tensors): {goes}")
    count = num_elements(side_shapes(source.entries, OURS))
    if to == "lerobot" and (notes := lerobot.inexpressible(source)):
        lines.append(f"LeRobot has no way to say, so do it around the policy there: {'; '.join(notes)}")
    for field in source.settings.get("assumed", ()):
        value = getattr(source.model, field)
        lines.append(f"{field}={value} is assumed, nothing says so: --model.{field}= states it (docs/checkpoints.md)")
    if not source.is_policy:
        lines.append("no action expert: gemma/*/experts/1, gemma/norms/1 and all action projections start fresh")
    elif source.norm_stats is None:
        choose = f"choose with --asset={'|'.join(source.assets)}" if source.assets else "the policy can't run without"
        lines.append(f"no statistics of states and actions: {choose}")
    carried = [name for name, there in _beside(source).items() if there]
    lines.append(
        f"{len(source.tensors)} tensors became {len(weights)}, {count:,} parameters, {size(num_bytes(weights))}; "
        f"beside them: {', '.join(carried) or 'nothing'}"
    )
    return "\n".join(lines)


def _beside(source: Source) -> dict[str, bool]:
    return {
        "norm_stats": source.norm_stats is not None,
        "data and transform settings": bool(source.settings.get("data")),
        "tokenizer reference": bool(source.settings.get("tokenizer")),
        "unused heads": bool(source.unused),
        **dict.fromkeys(source.files, True),
    }


def _place(entry: Entry, side: str) -> str:
    """A name for all layers: `layers.{0..17}.`, with the slot where a tensor holds several of ours."""
    first, last = (entry.spot(side, layer) for layer in (entry.layers[0], entry.layers[-1]))
    name = first.name
    if first.name != last.name:
        head = re.match(r"(.*?\.)0(\..*)", name)
        name = f"{head[1]}{{0..{entry.layers[-1]}}}{head[2]}"
    return name + _slot(entry, side, first)


def _slot(entry: Entry, side: str, spot: Spot) -> str:
    slot = entry.row.sides[side].slot
    return "" if slot is None else f"[{':, ' * (len(spot.index) - 1)}{slot[0]}]"
