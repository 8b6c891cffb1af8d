"""Normalisation: statistics of states and actions, the two maps made from them, and openpi's norm_stats.json.

The statistics themselves are gathered by `running_stats.py`, which is re-exported here.
Axis letters: J dimensions of a state or an action.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from openpi_port import whole
from openpi_port.errors import UserError, near
from openpi_port.running_stats import RunningStats, Stats

__all__ = [
    "NormStats",
    "RunningStats",
    "Stats",
    "TinyRange",
    "before_training",
    "load_norm_stats",
    "normalize",
    "save_norm_stats",
    "tiny_ranges",
    "unnormalize",
]

Mode = Literal["zscore", "quantile"]
NormStats = Mapping[str, Stats]

EPS = 1e-6  # openpi adds it to every divisor; released checkpoints were trained with it
TOP_KEY = "norm_stats"
FIELDS = ("mean", "std", "q01", "q99")
OPTIONAL = ("q01", "q99")

UNUSUAL = 10.0  # a normalised training value beyond this is worth a look
FAR = 100.0  # a normalised training value beyond this swamps the loss of all others
TINY_RELATIVE = 1e-3  # of the widest dimension of the same group
TINY_ABSOLUTE = 1e-4  # radians, metres: below what encoders resolve


def normalize(x: np.ndarray, stats: Stats, mode: Mode) -> np.ndarray:
    """`(x - mean) / (std + 1e-6)`, or `(x - q01) / (q99 - q01 + 1e-6) * 2 - 1` (openpi's transforms).

    Args:
      x: [..., J], in the robot's units. Statistics longer than J are cut, as openpi does: published files are
        sometimes padded to the model's 32 dimensions.
      stats: of at least J dimensions.
      mode: "zscore" or "quantile".

    Returns:
      [..., J], dimensionless, of x's dtype; computed in float64.
    """
    shift, scale = _affine(stats, mode, x.shape[-1])
    y = (x - shift) / scale
    return np.asarray(y if mode == "zscore" else y * 2.0 - 1.0, _float(x))


def unnormalize(x: np.ndarray, stats: Stats, mode: Mode) -> np.ndarray:
    """The exact inverse of `normalize`: [..., J], dimensionless, to the robot's units."""
    shift, scale = _affine(stats, mode, x.shape[-1])
    y = x.astype(np.float64) if mode == "zscore" else (x + 1.0) / 2.0
    return np.asarray(y * scale + shift, _float(x))


def _float(x: np.ndarray) -> np.dtype:
    return x.dtype if np.issubdtype(x.dtype, np.floating) else np.dtype(np.float32)


def _affine(stats: Stats, mode: Mode, dim: int) -> tuple[np.ndarray, np.ndarray]:
    if mode == "zscore":
        shift, scale = stats.mean, stats.std + EPS
    elif stats.q01 is None or stats.q99 is None:
        raise UserError(
            "norm=quantile needs q01 and q99, which these statistics lack: compute them again from the data, "
            "or set --config.data.norm=zscore"
        )
    else:
        shift, scale = stats.q01, stats.q99 - stats.q01 + EPS
    if len(shift) < dim:
        raise UserError(f"the statistics have {len(shift)} dimensions, the values {dim}: another robot's file?")
    return shift[:dim], scale[:dim]


def load_norm_stats(path: str | os.PathLike, need: Sequence[str] = ("state", "actions")) -> dict[str, Stats]:
    """Reads openpi's norm_stats.json.

    Args:
      path: the file, or the directory that holds it.
      need: keys that must be there; further keys are read too.

    Returns:
      {"state": Stats, "actions": Stats, ...}; `q01` and `q99` are None where the file has none, `min`, `max`
      and `count` always, because the format does not hold them.

    Raises:
      UserError: naming the file and the key, for anything missing, misshapen or not finite.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "norm_stats.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: no valid JSON ({error})") from error
    if not isinstance(tree, dict) or not isinstance(tree.get(TOP_KEY), dict):
        found = ", ".join(list(tree)[:5]) if isinstance(tree, dict) else type(tree).__name__
        raise UserError(f"{path}: no top key {TOP_KEY!r} (found: {found}); expected openpi's norm_stats.json")
    groups = tree[TOP_KEY]
    for key in need:
        if key not in groups:
            raise UserError(
                f"{path}: no key {TOP_KEY}/{key}; it has {', '.join(groups) or 'none'}. "
                f"Rename the keys, or compute the statistics again from the data"
            )
    return {key: _read_group(group, f"{path}: {TOP_KEY}/{key}") for key, group in groups.items()}


def _read_group(group: Any, where: str) -> Stats:
    """One {"mean": [J], "std": [J], "q01": [J], "q99": [J]}, checked."""
    if not isinstance(group, dict):
        raise UserError(f"{where}: expected an object with {', '.join(FIELDS)}, got {type(group).__name__}")
    arrays: dict[str, np.ndarray | None] = {}
    for field in FIELDS:
        value = group.get(field)
        if value is None:
            if field not in OPTIONAL:
                raise UserError(f"{where}/{field}: missing; {near(field, group)}")
            arrays[field] = None
            continue
        try:
            array = np.asarray(value, np.float64)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}/{field}: expected a list of numbers") from error
        if array.ndim != 1:
            raise UserError(f"{where}/{field}: expected a flat list, got shape {list(array.shape)}")
        if not np.isfinite(array).all():
            raise UserError(f"{where}/{field}[{int(np.argmin(np.isfinite(array)))}]: not a finite number")
        if len(array) != len(arrays.get("mean", array)):
            raise UserError(f"{where}/{field}: {len(array)} numbers, but mean has {len(arrays['mean'])}")
        arrays[field] = array
    if (arrays["q01"] is None) != (arrays["q99"] is None):
        raise UserError(f"{where}: has only one of q01 and q99")
    if (negative := arrays["std"] < 0).any():
        raise UserError(f"{where}/std[{int(np.argmax(negative))}]: negative")
    if arrays["q01"] is not None and (swapped := arrays["q99"] < arrays["q01"]).any():
        raise UserError(f"{where}/q99[{int(np.argmax(swapped))}]: below q01")
    return Stats(**arrays)


def save_norm_stats(path: str | os.PathLike, stats: NormStats) -> None:
    """Writes openpi's norm_stats.json (mean, std, q01, q99 per key) at a file or in a directory, atomically.

    The numbers read back to the bit. `min`, `max` and `count` are not part of the format.
    """
    path = Path(path)
    if path.suffix != ".json":
        path = path / "norm_stats.json"
    tree = {
        key: {f: None if getattr(s, f) is None else np.asarray(getattr(s, f)).tolist() for f in FIELDS}
        for key, s in stats.items()
    }
    whole.write_text(path, json.dumps({TOP_KEY: tree}, indent=2))


@dataclasses.dataclass(frozen=True)
class TinyRange:
    """A dimension whose divisor is so small that normalised values can explode.

    Attributes:
      key: "state" or "actions".
      dim: which dimension.
      spread: its std (z-score) or q99 - q01 (quantile), in the robot's units.
      worst: the largest normalised magnitude in the data; None where minimum and maximum are unknown.
    """

    key: str
    dim: int
    spread: float
    worst: float | None

    @property
    def refused(self) -> bool:
        """Whether training values themselves are beyond `FAR`, so that training cannot work."""
        return self.worst is not None and self.worst > FAR

    def __str__(self) -> str:
        if self.refused:
            return f"{self.key}[{self.dim}] spreads {self.spread:.2g}, and normalised reaches {self.worst:.2g}"
        what = "is constant" if self.spread == 0 else f"spreads only {self.spread:.2g}"
        return f"{self.key}[{self.dim}] {what}"


def tiny_ranges(stats: NormStats, mode: Mode = "zscore") -> list[TinyRange]:
    """Dimensions with a tiny std or q99 - q01, and those whose own data explode when normalised.

    Tiny means below 1e-4 in the robot's units, or below 1e-3 of the widest dimension of the same key;
    exploding means a normalised training value beyond 100 (known only where min and max are).

    Returns:
      One finding per such dimension, in the order of `stats`; empty when all is well.
    """
    found = []
    for key, s in stats.items():
        _, scale = _affine(s, mode, len(s.mean))
        spread = scale - EPS
        floor = max(TINY_ABSOLUTE, TINY_RELATIVE * float(spread.max(initial=0.0)))
        worst = _largest(s, mode)
        for dim in range(len(spread)):
            finding = TinyRange(key, dim, max(float(spread[dim]), 0.0), None if worst is None else float(worst[dim]))
            if spread[dim] < floor or finding.refused:
                found.append(finding)
    return found


def _largest(s: Stats, mode: Mode) -> np.ndarray | None:
    """[J], the largest normalised magnitude in the data; None where their extremes are unknown."""
    if s.min is None or s.max is None:
        return None
    return np.maximum(np.abs(normalize(s.min, s, mode)), np.abs(normalize(s.max, s, mode)))


def _unusual(stats: NormStats, mode: Mode) -> Iterator[str]:
    """Dimensions with normalised values that are worth a look."""
    for key, s in stats.items():
        worst = _largest(s, mode)
        for dim in np.flatnonzero([] if worst is None else worst > UNUSUAL):
            yield f"{key}[{dim}] reaches {worst[dim]:.3g}"


def before_training(stats: NormStats, mode: Mode, source: str, *, given: bool = False) -> str | None:
    """What a training run does with `tiny_ranges`: refuses, warns, or says nothing.

    Args:
      stats: as computed from the data (with min and max), or as read from a file (without).
      mode: how the run normalises.
      source: names the data set or file in the message.
      given: they are not of these data, so that values may be beyond what is usual for another reason.

    Returns:
      One line of warning, or None.

    Raises:
      UserError: training values exceed 100 once normalised; names every such dimension and the remedies.
    """
    found = tiny_ranges(stats, mode)
    if refused := [str(f) for f in found if f.refused]:
        other = "zscore" if mode == "quantile" else "quantile"
        theirs = "give this robot's own statistics, in its units, " if given else ""
        raise UserError(
            f"{source}: {'; '.join(refused)}. Such values swamp the loss: {theirs}drop the dimension from the data, "
            f"correct its outliers, or try --config.data.norm={other}"
        )
    if given and (far := list(_unusual(stats, mode))):
        return f"{source}: normalised, {', '.join(far)}: are these another robot's statistics, or in other units?"
    if found:
        return (
            f"{source}: {'; '.join(map(str, found))}. At run time a small deviation there becomes a huge "
            f"input; harmless only where the robot never moves that dimension"
        )
    return None
