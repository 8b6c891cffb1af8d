"""safetensors files in numpy, without a framework: read through a memory map, written one tensor at a time.

The format: the header's length (uint64, little-endian), a JSON header with dtype, shape and byte range of each
tensor, then the bytes. The official numpy reader has no bfloat16, and the official writer wants all in memory.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from openpi_port.errors import UserError

DTYPES = {  # in the order in which the official writer lays them out
    "I64": np.dtype("int64"),
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "I32": np.dtype("int32"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("float16"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = ".index.json"  # after the name of the file that is in parts
MAX_HEADER = 100_000_000  # the official reader's limit


class Stored:
    """A tensor on disk: `shape`, `dtype` and numpy indexing through a map that lives as long as its result.

    So what was read does not stay in the process's memory, unlike with one map for the whole file.
    """

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> None:
        self._path, self._offset = path, offset
        self.shape, self.dtype = shape, dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        if not math.prod(self.shape):
            return np.empty(self.shape, self.dtype)[index]
        return np.memmap(self._path, self.dtype, "r", self._offset, self.shape)[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[()], dtype)


class Arrays(Mapping[str, np.ndarray]):
    """The tensors of a file, as read-only memory maps.

    Attributes:
      metadata: the header's strings.
      stored: name -> tensor that is mapped only while it is indexed.

    Args:
      path: the file.

    Raises:
      UserError: the file is no safetensors file, or is cut off.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                size = self.path.stat().st_size
                start = file.read(8)
                length = struct.unpack("<Q", start)[0] if size >= 8 else 0
                whole = 2 <= length <= min(MAX_HEADER, size - 8)
                header = file.read(length) if whole else b""
        except OSError as e:
            raise UserError(f"{self.path}: {e.strerror}") from None
        if not whole:
            if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"):
                raise UserError(f"{self.path}: a pickle, not safetensors; pickles can run code and are never opened")
            raise UserError(f"{self.path}: no safetensors file, or cut off (its {size} bytes hold no whole header)")
        try:
            tree = json.loads(header)
            self.metadata: dict[str, str] = tree.pop("__metadata__", None) or {}
            self.stored = {name: self._slot(name, 8 + length, size, **spec) for name, spec in tree.items()}
        except (ValueError, TypeError, AttributeError) as e:
            raise UserError(f"{self.path}: its safetensors header is damaged ({e})") from None

    def _slot(self, name: str, start: int, size: int, *, dtype: str, shape: list, data_offsets: list) -> Stored:
        if dtype not in DTYPES:
            raise UserError(f"{self.path}: {name} has dtype {dtype}; known: {', '.join(DTYPES)}")
        first, last = data_offsets
        if last - first != math.prod(shape) * DTYPES[dtype].itemsize:
            raise UserError(f"{self.path}: {name} holds {last - first} bytes, which don't fit {dtype} {shape}")
        if start + last > size:
            missing = start + last - size
            raise UserError(f"{self.path}: cut off; {name} ends {missing} bytes after the end: fetch it again")
        return Stored(self.path, DTYPES[dtype], tuple(shape), start + first)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.stored[name][...]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def tensors(path: str | Path) -> dict[str, Stored]:
    """The tensors of a file, or of the several that the index beside its place lists.

    Raises:
      UserError: neither is there, or one of them is damaged.
    """
    path = Path(path)
    index = path.with_name(path.name + INDEX)
    if path.exists() or not index.exists():
        return Arrays(path).stored
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{index}: no weight_map in it ({type(e).__name__})") from None
    opened = {file: Arrays(path.with_name(file)) for file in sorted(set(places.values()))}
    lost = [name for name, file in places.items() if name not in opened[file]]
    if lost:
        raise UserError(f"{index}: says that {lost[0]} is in {places[lost[0]]}, but it is not")
    return {name: opened[file].stored[name] for name, file in places.items()}


def part_of(path: str | Path, index: int, count: int) -> Path:
    """The file of part `index` (from 0) of `count`, as Hugging Face names them."""
    path = Path(path)
    return path.with_name(f"{path.stem}-{index + 1:05d}-of-{count:05d}{path.suffix}")


def seal(path: str | Path, count: int) -> None:
    """Writes the index of `count` parts, which makes them one."""
    path = Path(path)
    parts = [Arrays(part_of(path, index, count)) for index in range(count)]
    places = {name: part.path.name for part in parts for name in part}
    size = sum(math.prod(t.shape) * t.dtype.itemsize for part in parts for t in part.stored.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    path.with_name(path.name + INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def write(
    path: str | Path,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Writes a safetensors file, asking for each tensor once and in the mapping's order.

    The bytes lie as the official writer puts them (widest dtype first, then by name): equal tensors, equal files.

    Args:
      path: of a file that doesn't exist yet.
      tensors: name -> array. Of a mapping with `shapes` and `dtypes` (name -> ...) no array is asked for beforehand.
      metadata: strings for the header.
      progress: called with the number of bytes of each tensor written.

    Raises:
      OSError: among others where the disk has too little room, before anything is written.
    """
    shapes = getattr(tensors, "shapes", None) or {name: array.shape for name, array in tensors.items()}
    dtypes = getattr(tensors, "dtypes", None) or {name: array.dtype for name, array in tensors.items()}
    dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    order = list(DTYPES.values())
    for name in sorted(shapes, key=lambda name: (order.index(dtypes[name]), name)):
        start, end = end, end + math.prod(shapes[name]) * dtypes[name].itemsize
        header[name] = {"dtype": NAMES[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)  # keeps the tensors aligned
    data = 8 + len(encoded)
    with Path(path).open("xb") as file:
        if hasattr(os, "posix_fallocate"):  # not on a Mac, which tells of a full disk when it is full
            os.posix_fallocate(file.fileno(), 0, data + end)
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in tensors:
            array = np.ascontiguousarray(tensors[name])
            file.seek(data + header[name]["data_offsets"][0])
            file.write(array.reshape(-1).view(np.uint8).data)
            progress(array.nbytes)
            del array  # before the next one is made
