"""Writes small RLDS data sets for tests: tfrecord files with protobuf's own messages, and tfds' own features.json."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from openpi_port.data.tfrecord import _masked_crc

Episode = Mapping[str, Sequence[Any]]  # feature of a step -> its values, pictures as arrays


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def example(episode: Episode) -> bytes:
    """As tfds serialises an episode: every feature one flat list over all its steps."""
    message = tf_example_pb2.Example()
    message.features.feature["episode_metadata/file_path"].bytes_list.value.append(b"there")
    for key, values in episode.items():
        feature = message.features.feature[f"steps/{key}"]
        first = values[0] if len(values) else 0.0
        if isinstance(first, str | bytes):
            feature.bytes_list.value.extend(v.encode() if isinstance(v, str) else v for v in values)
        elif np.ndim(first) == 3:
            feature.bytes_list.value.extend(map(png, values))
        elif np.asarray(first).dtype.kind in "bi":
            feature.int64_list.value.extend(np.ravel(values).astype(int).tolist())
        else:
            feature.float_list.value.extend(np.ravel(values).astype(float).tolist())
    return message.SerializeToString()


def frame(data: bytes) -> bytes:
    """A record; the checksum of the data is not looked at."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", _masked_crc(memoryview(length))) + data + b"\0\0\0\0"


def write(root: Path, steps: Any, shards: Sequence[Sequence[Episode]], split: str = "train") -> Path:
    """A data set of one split.

    Args:
      root: its version directory.
      steps: nested dictionary of tfds features.
      shards: the episodes of each file.
    """
    root.mkdir(parents=True)
    metadata = {"file_path": tfds.features.Text()}
    tfds.features.FeaturesDict(
        {"steps": tfds.features.Dataset(steps), "episode_metadata": metadata}
    ).save_config(str(root))  # fmt: skip
    info = {
        "name": "toy", "version": "1.0.0", "fileFormat": "tfrecord",
        "splits": [{
            "name": split, "numBytes": "1", "shardLengths": [str(len(s)) for s in shards],
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }],
    }  # fmt: skip
    (root / "dataset_info.json").write_text(json.dumps(info))
    for i, episodes in enumerate(shards):
        name = f"toy-{split}.tfrecord-{i:05d}-of-{len(shards):05d}"
        (root / name).write_bytes(b"".join(frame(example(e)) for e in episodes))
    return root
