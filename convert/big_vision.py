"""PaliGemma as big_vision publishes it: an `.npz` with openpi's names under "params/" and without an expert."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert import infer
from convert.source import Source
from openpi_port.errors import UserError


class Arrays(Mapping[str, Any]):
    """The arrays of an `.npz`: memory maps where they are stored uncompressed (as numpy does), else read when asked.

    Raises:
      UserError: no zip file, cut off, or pickled objects in it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive, path.open("rb") as file:
                self._arrays = {
                    info.filename.removesuffix(".npy"): self._open(archive, file, info) for info in archive.infolist()
                }
        except (OSError, ValueError, zipfile.BadZipFile) as e:
            raise UserError(f"{path}: no .npz, cut off, or with pickles in it, which are never opened ({e})") from None

    def _open(self, archive: zipfile.ZipFile, file: Any, info: zipfile.ZipInfo) -> np.ndarray:
        if info.compress_type != zipfile.ZIP_STORED:
            with archive.open(info) as member:
                return _bfloat16(np.lib.format.read_array(member, allow_pickle=False))
        # The name and extra field in front of the data may be longer than the directory says.
        file.seek(info.header_offset + 26)
        name, extra = np.frombuffer(file.read(4), "<u2")
        file.seek(info.header_offset + 30 + int(name) + int(extra))
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = read_header[version](file)
        if dtype.hasobject:
            raise ValueError(f"{info.filename} is pickled")
        order = "F" if fortran else "C"
        return _bfloat16(np.memmap(self._path, dtype, "r", file.tell(), shape, order) if shape else np.empty(()))

    def __getitem__(self, name: str) -> Any:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _bfloat16(array: np.ndarray) -> np.ndarray:
    """numpy has no name for bfloat16 and stores it as two nameless bytes."""
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def open_(path: str | Path, **overrides: Any) -> Source:
    """Opens a PaliGemma `.npz`; see `formats.open_checkpoint`."""
    path = Path(path)
    arrays = Arrays(path)
    theirs = {f"PaliGemma/{name.removeprefix('params/')}": arrays[name] for name in arrays}
    model = infer.config({n: tuple(a.shape) for n, a in theirs.items()}, "openpi", {}, overrides)
    return Source("big_vision", path, "openpi", theirs, model)
