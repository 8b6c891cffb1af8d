"""What is kept of an RLDS file so that it is scanned once: its numbers and texts, and where its pictures lie.

One .npz a file in the user's cache directory, found by the file's path, size and time and by features.json; so a scan
that was interrupted goes on with the next file, and a file that changed is scanned again.

E episodes of a file, T steps of all of them, J values.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from openpi_port import host, whole
from openpi_port.data import tfrecord
from openpi_port.data.rlds_meta import STEPS, RldsMetadata, Shard
from openpi_port.data.tfrecord import Broken, Span
from openpi_port.errors import UserError

_VERSION = 1
LENGTHS = "lengths"  # i64 [E], steps of each episode; the other arrays are named by the functions below
Index = Mapping[str, np.ndarray]
Progress = Callable[[int], object]


def number(key: str) -> str:
    """Name of a column, f32 [T,J]."""
    return f"number/{key}"


def spans(key: str) -> str:
    """Name of where the pictures of a camera lie in the file: i64 [T,2], start and end."""
    return f"spans/{key}"


def text(key: str) -> str:
    """Name of a text's number at every step, i32 [T]."""
    return f"text/{key}"


def words(key: str) -> str:
    """Name of the different texts of a file, unicode [any]."""
    return f"words/{key}"


def load(metadata: RldsMetadata, shard: Shard, arrays: Collection[str], progress: Progress) -> Index:
    """Arrays of a file's index, from the cache or by a scan of the file.

    Args:
      metadata: of the data set.
      shard: the file.
      arrays: which ones; the others are not read.
      progress: told of episodes as they are done.

    Raises:
      UserError: the file is missing or damaged, or the cache can't be written.
    """
    directory = host.cache() / "openpi_port" / "rlds"
    try:
        stat = shard.path.stat()
    except OSError as error:
        raise UserError(f"{shard.path}: can't be read ({error.strerror}); download the data set again") from error
    identity = [_VERSION, str(shard.path.resolve()), stat.st_size, stat.st_mtime_ns, metadata.fingerprint]
    name = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    path = directory / f"{name}.npz"
    try:
        with np.load(path) as file:
            index = {array: file[array] for array in arrays}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # not there yet, or spoilt
        index = scan(metadata, shard, progress)
        _write(path, index, shard.path.name)
        return {array: index[array] for array in arrays}
    progress(shard.episodes)
    return index


def _write(path: Path, index: Index, what: str) -> None:
    """Writes an index."""
    try:
        with whole.file(path) as part, part.open("wb") as file:
            np.savez(file, **index)
    except OSError as error:
        raise UserError(
            f"{path.parent}: the index of {what} can't be written ({error.strerror}); make room, or set "
            "XDG_CACHE_HOME to another place"
        ) from error


def scan(metadata: RldsMetadata, shard: Shard, progress: Progress) -> dict[str, np.ndarray]:
    """Reads a whole file.

    Raises:
      UserError: it is cut off or damaged, or its episodes are not what features.json and dataset_info.json say.
    """
    content = tfrecord.open_mapped(shard.path)
    episodes = []
    for i, record in enumerate(tfrecord.records(content, shard.path)):
        episodes.append(_episode(metadata, content, record, f"{shard.path}: episode {i} of the file"))
        progress(1)
    if len(episodes) != shard.episodes:
        raise UserError(
            f"{shard.path}: has {len(episodes)} episodes, dataset_info.json says {shard.episodes}; download the data "
            "set again"
        )
    index = {LENGTHS: np.array([len(next(iter(e.values()))) for e in episodes], np.int64)}
    for key in metadata.cameras:
        index[spans(key)] = np.concatenate([e[key] for e in episodes])
    for key in metadata.columns:
        index[number(key)] = np.concatenate([e[key] for e in episodes])
    for key in metadata.texts:
        index[words(key)], index[text(key)] = np.unique(np.concatenate([e[key] for e in episodes]), return_inverse=True)
    return index


def _episode(metadata: RldsMetadata, content: memoryview, record: Span, where: str) -> dict[str, np.ndarray]:
    """Every feature of an episode with as many rows as it has steps."""
    try:
        found = tfrecord.features(content, record)
    except Broken as error:
        raise UserError(f"{where} is damaged ({error}); download the data set again") from error
    episode = dict(_features(metadata, content, found, where))
    if not episode:
        raise UserError(f"{metadata.root}: features.json has no pictures, numbers or texts among the steps' features")
    lengths = {key: len(values) for key, values in episode.items()}
    most, least = max(lengths, key=lengths.get), min(lengths, key=lengths.get)
    if lengths[most] != lengths[least]:
        raise UserError(
            f"{where} has {lengths[most]} steps of {most} and {lengths[least]} of {least}; download the data set again"
        )
    return episode


def _features(
    metadata: RldsMetadata, content: memoryview, found: Mapping[str, Span], where: str
) -> Iterator[tuple[str, np.ndarray]]:
    for key in (*metadata.cameras, *metadata.texts, *metadata.columns):
        feature = found.get(f"{STEPS}/{key}")
        if feature is None:
            raise UserError(
                f"{where} has no feature {STEPS}/{key}, which features.json names; they don't belong together"
            )
        try:
            if key in metadata.columns:
                yield key, _numbers(content, feature, metadata.columns[key])
                continue
            strings = tfrecord.byte_strings(content, feature)
            if key in metadata.cameras:
                yield key, np.array(strings, np.int64).reshape(-1, 2)
            else:
                yield key, np.array([str(content[a:b], "utf-8", "replace") for a, b in strings], np.str_)
        except Broken as error:
            raise UserError(f"{where}: {STEPS}/{key} is damaged ({error}); download the data set again") from error


def _numbers(content: memoryview, feature: Span, dim: int) -> np.ndarray:
    """f32 [steps, dim] of a feature of floats or integers."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_feature_pb2

    start, end = feature
    try:
        message = tf_feature_pb2.Feature.FromString(bytes(content[start:end]))
    except DecodeError as error:
        raise Broken(str(error)) from error
    kind = message.WhichOneof("kind")
    if kind == "bytes_list":
        raise Broken("byte strings where numbers are expected; an encoding such as zlib is not read")
    values = np.array(getattr(message, kind).value if kind else [], np.float32)
    if dim == 0 or len(values) % dim:
        raise Broken(f"{len(values)} numbers, no multiple of {dim}")
    return values.reshape(-1, dim)
