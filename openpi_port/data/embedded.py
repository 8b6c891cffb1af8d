"""Images that a parquet file holds as PNG or JPEG bytes in its rows (LeRobot features of dtype "image").

A parquet file can only be read by row group, so the bytes of the last used row groups are kept: random access then
costs one decoding.
H W pixels.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openpi_port.errors import UserError
from openpi_port.images import decode

KEPT_BYTES = 512 * 2**20  # of compressed images, per process


class EmbeddedImages:
    """Reads images out of parquet files. May be shared by threads; a new process starts with nothing kept."""

    def __init__(self, kept_bytes: int = KEPT_BYTES):
        self._kept_bytes = kept_bytes
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._starts: dict[Path, np.ndarray] = {}  # first row of each row group, and the end
        self._groups: OrderedDict[tuple[Path, str, int], pa.StructArray] = OrderedDict()

    def __getstate__(self) -> dict[str, int]:
        return {"_kept_bytes": self._kept_bytes}

    def __setstate__(self, state: dict[str, int]) -> None:
        self._kept_bytes = state["_kept_bytes"]
        self._reset()

    def rows(self, path: Path) -> int:
        """How many rows a file has."""
        return int(self._row_groups(path)[-1])

    def read(self, path: Path, column: str, row: int) -> np.ndarray:
        """One image.

        Args:
          path: the parquet file.
          column: of structs {"bytes", "path"}, as Hugging Face datasets stores images.
          row: in the file.

        Returns:
          uint8 [H,W,3], RGB.

        Raises:
          UserError: the image is absent or can't be decoded.
        """
        starts = self._row_groups(path)
        group = int(np.searchsorted(starts, row, side="right")) - 1
        value = self._group(path, column, group)[row - int(starts[group])].as_py()
        try:
            return decode(value.get("bytes") if isinstance(value, dict) else value)
        except ValueError as error:
            raise UserError(
                f"{path}: {column} of row {row} holds no readable image ({error}); download the data set again, or "
                "take another camera"
            ) from error

    def _row_groups(self, path: Path) -> np.ndarray:
        if path not in self._starts:
            metadata = pq.read_metadata(path)
            lengths = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            self._starts[path] = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return self._starts[path]

    def _group(self, path: Path, column: str, group: int) -> pa.StructArray:
        if self._pid != os.getpid():
            self._reset()
        key = (path, column, group)
        with self._lock:
            if key not in self._groups:
                table = pq.ParquetFile(path).read_row_group(group, [column])
                self._groups[key] = table[column].combine_chunks()
                # The newest always stays, however large.
                while len(self._groups) > 1 and sum(g.nbytes for g in self._groups.values()) > self._kept_bytes:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            return self._groups[key]
