"""Arrays in orbax's checkpoint layout, one at a time and without JAX.

An orbax PyTree checkpoint is a directory: `_METADATA` (JSON, the tree) and one zarr array (version 2 or 3) per leaf,
usually inside an OCDBT key-value store. tensorstore, which orbax itself uses, reads slices of the arrays, so a model
larger than the memory can be converted.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from openpi_port.errors import UserError

MANIFEST = "manifest.ocdbt"
TREE = "_METADATA"
LARGE = 64_000_000  # bytes of an array that is worth a commit of its own
CHUNK_CACHE = 6_000_000_000  # bytes; holds one decoded chunk of the largest array of a 3 B model


class Stored:
    """An array on disk: `shape`, `dtype` and numpy indexing, which reads."""

    def __init__(self, owner: Arrays, path: str) -> None:
        self._owner, self._path = owner, path
        self._array = owner.open(path)
        self.shape, self.dtype = tuple(self._array.shape), np.dtype(self._array.dtype.numpy_dtype)
        # Where several layers are in one chunk, it is to be decoded once for all of them.
        self._chunks_are_shared = self._array.ndim > 1 and self._array.chunk_layout.read_chunk.shape[0] > 1

    def __getitem__(self, index: Any) -> np.ndarray:
        array = self._owner.cached(self._path) if self._chunks_are_shared else self._array
        with self._owner.named(self._path):
            return array[index].read().result()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[()], dtype)


class Arrays(Mapping[str, Stored]):
    """The leaves of an orbax checkpoint under "/"-joined names.

    Args:
      path: the directory that holds `_METADATA`.

    Raises:
      UserError: the directory is no orbax checkpoint, or one of its files can't be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._context = ts.Context()  # shared, so that the store is opened once
        self._ocdbt = (self.path / MANIFEST).exists()
        self._last: tuple[str, ts.TensorStore] | None = None
        try:
            about = json.loads((self.path / TREE).read_text())
            tree, self._driver = about["tree_metadata"], "zarr3" if about.get("use_zarr3") else "zarr"
            paths = [[entry["key"] for entry in leaf["key_metadata"]] for leaf in tree.values()]
        except FileNotFoundError:
            raise UserError(f"{self.path}: no {TREE} here, so this is no orbax checkpoint") from None
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{self.path / TREE}: not readable as orbax metadata ({e})") from None
        self._stored = {"/".join(map(str, p)): Stored(self, ".".join(map(str, p))) for p in paths}

    def open(self, path: str, context: ts.Context | None = None) -> ts.TensorStore:
        """The tensorstore of one leaf; what it reads is forgotten, unless a context keeps it."""
        base = self.path.absolute().as_uri()
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{path}/"} if self._ocdbt else f"{base}/{path}/"
        spec = {"driver": self._driver, "kvstore": kvstore}
        with self.named(path):
            return ts.open(spec, open=True, context=context or self._context).result()

    def cached(self, path: str) -> ts.TensorStore:
        """The same, keeping the chunk that was decoded last; of one leaf at a time, the last that was asked for."""
        if self._last is None or self._last[0] != path:
            self._last = None  # frees the cache before the next one fills
            self._last = (path, self.open(path, ts.Context({"cache_pool": {"total_bytes_limit": CHUNK_CACHE}})))
        return self._last[1]

    @contextlib.contextmanager
    def named(self, path: str) -> Iterator[None]:
        """Says which leaf can't be read, instead of tensorstore's several lines."""
        try:
            yield
        except ValueError as e:
            raise UserError(f"{self.path}: can't read {path}: {str(e).splitlines()[0][:300]}") from None

    def __getitem__(self, name: str) -> Stored:
        return self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def write(path: str | Path, tensors: Mapping[str, Any], progress: Any = None) -> None:
    """Writes arrays as an orbax checkpoint, one at a time; orbax and openpi restore it.

    Args:
      path: a directory that doesn't exist yet.
      tensors: "/"-joined name -> array; each is asked for once.
      progress: called with the number of bytes written, after each array.
    """
    path = Path(path)
    path.mkdir(parents=True)
    base = path.absolute().as_uri()
    shapes = {}
    context = ts.Context()  # shared, so that the store is opened once
    small: ts.Transaction | None = None  # every commit waits for the disk, so small arrays share one
    waiting = 0
    for name in tensors:
        array = np.asarray(tensors[name])
        if array.nbytes < LARGE:
            small = small or ts.Transaction()
            waiting += array.nbytes
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{_key(name)}/"}
        _write_array(kvstore, array, context, small if array.nbytes < LARGE else None)
        if small is not None and waiting >= LARGE:
            _finished(small.commit_async())
            small, waiting = None, 0
        shapes[name] = array.shape
        if progress is not None:
            progress(array.nbytes)
        del array  # before the next one is made
    if small is not None:
        _finished(small.commit_async())
    _describe(path, shapes)


def write_part(path: str | Path, tensors: Mapping[str, Any]) -> None:
    """Writes some of the arrays of a checkpoint, while other processes write the others; then one calls `seal`.

    Every array is a directory of its own, because a key-value store has one writer.

    Args:
      path: a directory, which others may have made.
      tensors: "/"-joined name -> array.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for name in tensors:
        _write_array(f"{path.absolute().as_uri()}/{_key(name)}/", np.asarray(tensors[name]), ts.Context(), None)


def seal(path: str | Path) -> None:
    """Makes a checkpoint of what several `write_part` have written."""
    files = sorted(Path(path).glob("*/.zarray"))
    _describe(Path(path), {f.parent.name.replace(".", "/"): json.loads(f.read_text())["shape"] for f in files})


def _key(name: str) -> str:
    return name.replace("/", ".")


def _describe(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Writes orbax's metadata: the tree of arrays and their shapes."""
    tree = {}
    for name, shape in shapes.items():
        keys = name.split("/")
        tree[repr(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],  # 2: a dict's key
            "value_metadata": {
                "value_type": "np.ndarray",  # restorable without a sharding
                "skip_deserialize": False,
                "write_shape": list(shape),
            },
        }
    metadata = {
        "tree_metadata": tree,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (path / TREE).write_text(json.dumps(metadata))
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    now = time.time_ns()
    (path / "_CHECKPOINT_METADATA").write_text(
        json.dumps(
            {
                "item_handlers": handler,
                "metrics": {},
                "performance_metrics": {},
                "init_timestamp_nsecs": now,
                "commit_timestamp_nsecs": now,
                "custom_metadata": {},
            }
        )
    )


def _write_array(kvstore: Any, array: np.ndarray, context: ts.Context, transaction: ts.Transaction | None) -> None:
    # One chunk per leading index, so that a layer can be read alone.
    chunks = [1, *array.shape[1:]] if array.ndim > 2 else list(array.shape)
    metadata = {
        "shape": list(array.shape),
        "chunks": chunks,
        "dtype": _zarr_dtype(array.dtype),
        "compressor": {"id": "zstd", "level": 1},
    }
    spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata, "store_data_equal_to_fill_value": True}
    store = _finished(ts.open(spec, create=True, context=context, transaction=transaction))
    if transaction is not None or array.ndim < 3:
        _finished(store.write(array))
    else:
        for i, layer in enumerate(array):  # tensorstore copies what it writes
            _finished(store[i].write(layer))


def _finished(future: Any) -> Any:
    """What a future of tensorstore's gives.

    Where the waiting is interrupted, it is waited for nevertheless: what is still being written would make the folder
    again after it has been removed.
    """
    try:
        return future.result()
    except KeyboardInterrupt:
        with contextlib.suppress(Exception):
            future.result()
        raise


def _zarr_dtype(dtype: np.dtype) -> str:
    return "bfloat16" if dtype.name == "bfloat16" else dtype.str
