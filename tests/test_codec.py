"""What travels between robot and server: openpi-client's format, and hostile bytes."""

from __future__ import annotations

import contextlib
import pickle

import hypothesis.strategies as st
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from small_policy import observation_of

from openpi_port import UserError
from openpi_port.serving import codec

MESSAGES = {
    "observation": observation_of(0),
    "scalars": {"a": np.float32(1.5), "b": np.int64(3), "c": np.bool_(True), "d": [1, 2.5, None, "x", b"y"]},
    "arrays": [np.zeros((0, 3), np.int16), np.arange(6.0).reshape(2, 3).T, np.array("text"), np.array(True)],
    "big_endian": np.arange(3, dtype=">f4"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_same_bytes_as_openpi_client(openpi_client, name):
    theirs = openpi_client.msgpack_numpy
    data = theirs.packb(MESSAGES[name])
    assert codec.pack(MESSAGES[name]) == data
    np.testing.assert_equal(codec.unpack(data), theirs.unpackb(data))


ARRAY = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [2]}


@pytest.mark.parametrize(
    "message",
    [
        {**ARRAY, b"dtype": "|O"},
        {**ARRAY, b"dtype": "<f4,<f4"},
        {**ARRAY, b"dtype": "|V4"},
        {**ARRAY, b"dtype": 4},
        {**ARRAY, b"shape": [3]},
        {**ARRAY, b"shape": [-1]},
        {**ARRAY, b"shape": [2**40, 2**40]},
        {**ARRAY, b"shape": 2},
        {**ARRAY, b"data": "text"},
        {b"__ndarray__": True},
        {b"__npgeneric__": True, b"data": 300, b"dtype": "|i1"},
        msgpack.ExtType(5, b"x"),
        [{}] * 2000,
        [0] * 5000,
    ],
)
def test_hostile_messages_are_refused(message):
    with pytest.raises(UserError, match="malformed"):
        codec.unpack(msgpack.packb(message))


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x91" * 5000, pickle.dumps(print), codec.pack({"a": 1}) + b"\0"])
def test_what_is_no_message_is_refused(data):
    with pytest.raises(UserError, match="malformed"):
        codec.unpack(data)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_no_bytes_break_the_reader(data):
    message = bytearray(codec.pack({"images": {"a": np.zeros((2, 2, 3), np.uint8)}, "state": np.ones(3)}))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    for bytes_ in (bytes(message), data.draw(st.binary(max_size=64))):
        with contextlib.suppress(UserError):
            codec.unpack(bytes_)


@pytest.mark.parametrize("value", [object(), np.array([object()]), np.zeros(2, complex), {"x": {1, 2}}])
def test_what_does_not_travel_is_refused(value):
    with pytest.raises(TypeError, match="travel"):
        codec.pack(value)
