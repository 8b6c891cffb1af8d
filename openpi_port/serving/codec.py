"""msgpack with numpy arrays, byte for byte what openpi-client 0.1.2 writes and reads. Never pickle.

An array is {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [..]}, a numpy scalar
{b"__npgeneric__": True, b"data": number, b"dtype": ".."}. Data from the network are not trusted: element types are
limited to numbers, booleans and text, and a message can't take much more memory than it has bytes.
"""

from __future__ import annotations

import math
import re
import threading
from typing import Any

import msgpack
import numpy as np

from openpi_port.errors import UserError

MAX_CONTAINERS = 1000  # maps and lists in a message; an observation has about ten
MAX_ITEMS = 4096  # of one list: a state sent as plain numbers
MAX_NDIM = 8

BUFFER = 2**20  # kept between messages: growing one takes 0.6 ms for three images of 224 pixels, packing 0.03 ms
_LOCAL = threading.local()  # a packer is not thread-safe

_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|U\d{1,4}|S\d{1,4})")


def pack(message: Any) -> bytes:
    """Nested dictionaries and lists of numbers, text and arrays as bytes.

    Raises:
      TypeError: anything else in it, object arrays included.
    """
    if not hasattr(_LOCAL, "packer"):
        _LOCAL.packer = msgpack.Packer(default=_encode, buf_size=BUFFER)
    return _LOCAL.packer.pack(message)


def unpack(data: bytes) -> Any:
    """The inverse of `pack`, for bytes from anywhere; arrays are read-only views of them.

    Raises:
      UserError: not such a message, or one that is too large inside.
    """
    hooks = _Hooks()
    try:
        return msgpack.unpackb(
            data, object_hook=hooks.map, list_hook=hooks.list, max_array_len=MAX_ITEMS, max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"malformed message: {' '.join(reason.split())[:120]}") from None


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        if not _DTYPE.fullmatch(value.dtype.str):
            raise TypeError(f"arrays of {value.dtype} don't travel")
        if isinstance(value, np.ndarray):
            return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"a {type(value).__name__} doesn't travel")


class _Hooks:
    """Called by msgpack for every map and list once its content is read."""

    def __init__(self) -> None:
        self._containers = 0

    def map(self, value: dict[Any, Any]) -> Any:
        self._count()
        if b"__ndarray__" in value:
            return _array(value)
        if b"__npgeneric__" in value:
            return _dtype(value).type(value[b"data"])
        return value

    def list(self, value: list[Any]) -> list[Any]:
        self._count()
        return value

    def _count(self) -> None:
        self._containers += 1
        if self._containers > MAX_CONTAINERS:
            raise ValueError(f"more than {MAX_CONTAINERS} maps and lists")


def _array(value: dict[Any, Any]) -> np.ndarray:
    dtype, data, shape = _dtype(value), value[b"data"], value[b"shape"]
    if not isinstance(data, bytes):
        raise ValueError("array data are bytes")
    if not isinstance(shape, list) or len(shape) > MAX_NDIM or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("an array's shape is a short list of sizes")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes for an array of shape {shape}")
    return np.frombuffer(data, dtype).reshape(shape) if data else np.zeros(shape, dtype)


def _dtype(value: dict[Any, Any]) -> np.dtype:
    name = value[b"dtype"]
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise ValueError(f"arrays of {str(name)[:30]!r} are not accepted")
    return np.dtype(name)
