"""How one tensor of ours lies in somebody else's checkpoint, and the way there and back.

A `Row` (see `tables.py`) is data. Bound to a model's sizes it becomes an `Entry`, which knows shapes and moves
arrays. The unit that moves is a *piece*: one layer of a stacked tensor, or a whole unstacked one. So anything
converts without holding more than one of the target's tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from openpi_port.errors import UserError


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies on one side.

    Attributes:
      name: with `{l}` where every layer has its own tensor; without it the layers are stacked on axis 0.
      axes: of one layer, in einops letters.
      slot: (index, count) on an extra leading axis, where one tensor of theirs holds several of ours.
    """

    name: str
    axes: str
    slot: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of the model on every side that has a place for it; `sides[OURS]` is the canonical one."""

    sides: Mapping[str, Place]
    layered: bool = False


class Spot(NamedTuple):
    """Where one piece lies: the tensor's name and the index in it."""

    name: str
    index: tuple[int, ...]


OURS = "flax"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row with the sizes of a particular model."""

    row: Row
    sizes: Mapping[str, int]  # axis letter -> size; "L" is the number of layers
    words: Mapping[str, str]  # what the names' placeholders stand for, except {l}

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.row.sides[OURS].name.format_map(self.words)

    @property
    def layers(self) -> Sequence[int | None]:
        """The pieces: layer numbers, or [None]."""
        return range(self.sizes["L"]) if self.row.layered else [None]

    def place(self, side: str) -> Place:
        """Where it lies on a side.

        Raises:
          UserError: nowhere.
        """
        if side not in self.row.sides:
            raise UserError(
                f"{self.name}: openpi-PyTorch and LeRobot have no place for LoRA; add it to the weights: --merge-lora"
            )
        return self.row.sides[side]

    def spot(self, side: str, layer: int | None) -> Spot:
        """Where a piece lies on a side."""
        place = self.place(side)
        stacked = layer is not None and "{l}" not in place.name
        index = ((layer,) if stacked else ()) + (() if place.slot is None else (place.slot[0],))
        return Spot(place.name.format_map({**self.words, "l": layer}), index)

    def shape(self, side: str) -> tuple[int, ...]:
        """Shape of the whole tensor that holds this entry (or one layer of it) on a side."""
        place = self.place(side)
        stacked = self.row.layered and "{l}" not in place.name
        lead = ((self.sizes["L"],) if stacked else ()) + (() if place.slot is None else (place.slot[1],))
        return (*lead, *self.piece_shape(side))

    def piece_shape(self, side: str) -> tuple[int, ...]:
        """Shape of one piece on a side."""
        shape, product = [], None
        for token in self.place(side).axes.replace("(", " ( ").replace(")", " ) ").split():
            if token == "(":
                product = 1
            elif token == ")":
                shape.append(product)
                product = None
            else:
                size = int(token) if token.isdigit() else self.sizes[token]
                if product is None:
                    shape.append(size)
                else:
                    product *= size
        return tuple(shape)

    def move(self, piece: np.ndarray, source: str, target: str) -> np.ndarray:
        """Rearranges a piece from one side's layout to another's."""
        pattern = f"{self.row.sides[source].axes} -> {self.row.sides[target].axes}"
        return rearrange(piece, pattern, **{k: v for k, v in self.sizes.items() if k in _letters(pattern)})


def _letters(pattern: str) -> set[str]:
    return set(pattern.replace("(", " ").replace(")", " ").split())


class Translated(Mapping[str, np.ndarray]):
    """One side's tensors seen as another side's, made when asked for.

    Attributes:
      shapes: name -> shape of every tensor on the target side.
      dtypes: name -> dtype.
      parts: name -> what it is made of: (entry, layer) for each piece, in the table's order.
    """

    def __init__(self, entries: Sequence[Entry], tensors: Mapping[str, Any], source: str, target: str) -> None:
        self._tensors, self._source, self._target = tensors, source, target
        self._last: tuple[str, Any] = "", None  # of `tensors`, which may make each one when asked
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.parts: dict[str, list[tuple[Entry, int | None]]] = {}
        for entry in entries:
            for layer in entry.layers:
                name = entry.spot(target, layer).name
                self.shapes[name] = entry.shape(target)
                self.parts.setdefault(name, []).append((entry, layer))
        made = getattr(tensors, "dtypes", None)
        dtypes = {name: np.dtype(tensors[name].dtype) for name in tensors} if made is None else made
        self.dtypes = {name: self._dtype(name, dtypes) for name in self.shapes}

    def sources(self, name: str) -> list[str]:
        """Names of the source's tensors that a target's tensor is made of."""
        return list(dict.fromkeys(entry.spot(self._source, layer).name for entry, layer in self.parts[name]))

    def __getitem__(self, name: str) -> np.ndarray:
        parts = self.parts[name]
        if len(parts) == 1 and not parts[0][0].spot(self._target, parts[0][1]).index:
            return np.ascontiguousarray(self._piece(*parts[0]))
        out = np.empty(self.shapes[name], self.dtypes[name])
        for entry, layer in parts:
            out[entry.spot(self._target, layer).index] = self._piece(entry, layer)
        return out

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # Mapping's own would make the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _piece(self, entry: Entry, layer: int | None) -> np.ndarray:
        name, index = entry.spot(self._source, layer)
        if name != self._last[0]:
            self._last = "", None  # freed before the next one is made
            self._last = name, self._tensors[name]
        return entry.move(np.asarray(self._last[1][index]), self._source, self._target)

    def _dtype(self, name: str, known: Mapping[str, np.dtype]) -> np.dtype:
        dtypes = {source: np.dtype(known[source]) for source in self.sources(name)}
        if len(set(dtypes.values())) > 1:
            raise UserError(f"{name} would be made of tensors of different dtypes: {_pairs(dtypes)}")
        return next(iter(dtypes.values()))


class Completed(Mapping[str, np.ndarray]):
    """Tensors, and where names are absent among them another mapping's; made when asked for, in that one's order.

    Args:
      found, rest: with `shapes` and `dtypes`, as `Translated` has.

    Attributes:
      shapes, dtypes: by name.
    """

    def __init__(self, found: Translated, rest: Any) -> None:
        self._of = {name: found if name in found else rest for name in (*rest, *found)}
        self.shapes = {name: of.shapes[name] for name, of in self._of.items()}
        self.dtypes = {name: of.dtypes[name] for name, of in self._of.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._of[name][name]

    def __contains__(self, name: object) -> bool:
        return name in self._of  # Mapping's own would make the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape, without making tensors that are made when asked for."""
    made = getattr(tensors, "shapes", None)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()} if made is None else dict(made)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items())


def side_shapes(entries: Sequence[Entry], side: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a model has on a side."""
    return {e.spot(side, layer).name: e.shape(side) for e in entries for layer in e.layers}


def num_elements(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Parameters in all."""
    return sum(math.prod(shape) for shape in shapes.values())
