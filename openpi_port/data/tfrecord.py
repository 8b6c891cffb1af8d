"""TFRecord files and the tf.train.Example messages in them, located without being copied or decoded.

A record is its length (u64), a checksum of the length (u32), the bytes, and a checksum of them (u32). An Example is a
map from names to features; a feature is a list of byte strings, floats or integers. Only the few rules of protobuf's
wire format that this needs are here; numbers are left to protobuf itself. So the pictures of a long episode can be
found again by offset, each on its own.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from openpi_port.errors import UserError

Span = tuple[int, int]  # where something starts and ends, bytes from the file's start
_BYTES_LIST = 1  # field number in a Feature
_LENGTH_DELIMITED = 2  # wire type


class Broken(Exception):
    """Bytes that are no such message."""


def open_mapped(path: Path) -> memoryview:
    """A file's bytes, read when they are touched.

    Raises:
      UserError: it is missing or can't be read.
    """
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        raise UserError(f"{path}: file is missing; download the data set again") from None
    except (OSError, ValueError) as error:  # an empty file can't be mapped
        raise UserError(f"{path}: file can't be read ({error}); download the data set again") from error


def records(content: memoryview, path: Path) -> Iterator[Span]:
    """Where the records of a file lie.

    Raises:
      UserError: the file ends within a record, or a length is damaged.
    """
    position, count = 0, 0
    while position < len(content):
        if position + 12 <= len(content):
            length, checksum = struct.unpack_from("<QI", content, position)
            if checksum != masked_crc(content[position : position + 8]):
                raise UserError(
                    f"{path}: tfrecord file is damaged at byte {position}, after {count} records (checksum of a length "
                    "is wrong); download the data set again"
                )
        start = position + 12
        if start > len(content) or start + length + 4 > len(content):
            raise UserError(
                f"{path}: tfrecord file is cut off after {count} records, at {len(content)} bytes; download the data "
                "set again"
            )
        yield start, start + length
        position, count = start + length + 4, count + 1


def features(content: memoryview, example: Span) -> dict[str, Span]:
    """Where the features of an Example lie, by name.

    Raises:
      Broken: the bytes are no Example.
    """
    found = {}
    for _, map_ in _fields(content, example):
        for _, entry in _fields(content, map_):
            parts = dict(_fields(content, entry))
            if parts.keys() != {1, 2}:
                raise Broken("a feature without name or value")
            start, end = parts[1]
            found[str(content[start:end], "utf-8", "replace")] = parts[2]
    return found


def byte_strings(content: memoryview, feature: Span) -> list[Span]:
    """Where the byte strings of a feature lie, in order.

    Raises:
      Broken: the bytes are no feature, or one of numbers.
    """
    lists = list(_fields(content, feature))
    if any(number != _BYTES_LIST for number, _ in lists):
        raise Broken("numbers where byte strings are expected")
    return [value for _, list_ in lists for _, value in _fields(content, list_)]


def _fields(content: memoryview, message: Span) -> Iterator[tuple[int, Span]]:
    """(field number, where its value lies) of a message whose fields are all messages, strings or packed."""
    position, end = message
    while position < end:
        tag, position = _varint(content, position, end)
        if tag & 7 != _LENGTH_DELIMITED:
            raise Broken(f"wire type {tag & 7} at byte {position}")
        length, position = _varint(content, position, end)
        if position + length > end:
            raise Broken(f"a value beyond its message at byte {position}")
        yield tag >> 3, (position, position + length)
        position += length


def _varint(content: memoryview, position: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte, least significant first, and where it ends."""
    value = shift = 0
    while position < end and shift < 64:
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise Broken(f"an unfinished number at byte {position}")


def _crc_table() -> tuple[int, ...]:
    """CRC-32C (Castagnoli), reflected polynomial 0x82F63B78, of every byte."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC = _crc_table()


def masked_crc(content: memoryview) -> int:
    """The checksum as the format stores it: CRC-32C, rotated and offset."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _CRC[(crc ^ byte) & 255] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
