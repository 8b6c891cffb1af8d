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

from openpi_port.data.tfrecord import masked_crc

LENGTHS = ((3, 5), (4,))  # of the episodes of DROID's two files here

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
    return length + struct.pack("<I", masked_crc(memoryview(length))) + data + b"\0\0\0\0"


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


def droid_steps() -> dict[str, Any]:
    """The features that matter of DROID's, under its own names."""
    features, f64 = tfds.features, np.float64
    return {
        "is_first": features.Scalar(np.bool_),
        "language_instruction": features.Text(),
        "language_instruction_2": features.Text(),
        "language_instruction_3": features.Text(),
        "observation": {
            "exterior_image_1_left": features.Image(shape=(18, 32, 3)),
            "wrist_image_left": features.Image(shape=(18, 32, 3)),
            "joint_position": features.Tensor(shape=(7,), dtype=f64),
            "gripper_position": features.Tensor(shape=(1,), dtype=f64),
        },
        "action_dict": {
            "joint_position": features.Tensor(shape=(7,), dtype=f64),
            "joint_velocity": features.Tensor(shape=(7,), dtype=f64),
            "gripper_position": features.Tensor(shape=(1,), dtype=f64),
        },
        "embedding": features.Tensor(shape=(512,), dtype=np.float32),
    }


def droid_episode(number: int, length: int) -> dict[str, Any]:
    """Random numbers and pictures; the second has no instruction of its own."""
    rng = np.random.default_rng(number)
    pictures = rng.integers(0, 256, (2, length, 18, 32, 3), np.uint8)
    return {
        "is_first": np.arange(length) == 0,
        "language_instruction": ["" if number == 1 else f"task {number}"] * length,
        "language_instruction_2": ["in other words"] * length,
        "language_instruction_3": [""] * length,
        "observation/exterior_image_1_left": pictures[0],
        "observation/wrist_image_left": pictures[1],
        "observation/joint_position": rng.normal(size=(length, 7)),
        "observation/gripper_position": rng.uniform(size=(length, 1)),
        "action_dict/joint_position": rng.normal(size=(length, 7)),
        "action_dict/joint_velocity": rng.normal(size=(length, 7)),
        "action_dict/gripper_position": rng.uniform(size=(length, 1)),
        "embedding": rng.normal(size=(length, 512)),
    }


EPISODES = [[droid_episode(3 * i + j, length) for j, length in enumerate(part)] for i, part in enumerate(LENGTHS)]


def write_droid(root: Path, shards: Sequence[Sequence[Episode]] = EPISODES) -> Path:
    """Three short episodes in two files, under `root`."""
    return write(root / "toy" / "1.0.0", droid_steps(), shards)
