"""What an RLDS data set says about itself (dataset_info.json, features.json), read by tensorflow-datasets.

TensorFlow is not needed: tensorflow-datasets is asked for names, shapes and files only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from openpi_port.errors import UserError, near

INFO, FEATURES = "dataset_info.json", "features.json"
STEPS = "steps"  # the feature that is the episode, by the definition of RLDS
MOST_VALUES = 256  # of a column; more is an embedding or a raw picture, and would fill the memory


@dataclasses.dataclass(frozen=True)
class Shard:
    """One tfrecord file of a data set.

    Attributes:
      path: the file.
      episodes: how many records it has.
    """

    path: Path
    episodes: int


@dataclasses.dataclass(frozen=True)
class RldsMetadata:
    """A data set without its episodes; the names of features are those below `steps`, as in "observation/state".

    Attributes:
      root: the directory of one version.
      shards: files of the chosen splits, in order.
      cameras: features that are colour pictures.
      columns: features that are a few numbers a step, with how many.
      texts: features that are strings.
      fingerprint: of features.json.
    """

    root: Path
    shards: tuple[Shard, ...]
    cameras: tuple[str, ...]
    columns: Mapping[str, int]
    texts: tuple[str, ...]
    fingerprint: str

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of all episodes: their places in the chosen splits."""
        return tuple(range(sum(shard.episodes for shard in self.shards)))

    def check(self, key: str, what: str) -> None:
        """Raises UserError where there is no such "camera", "state column", "action column" or "instruction"."""
        known = {"camera": self.cameras, "instruction": self.texts}.get(what, tuple(self.columns))
        if key not in known:
            raise UserError(f"{self.root / FEATURES}: no {what} {key!r} among the steps' features; {near(key, known)}")


def find(root: Path) -> Path | None:
    """The version directory of an RLDS data set, given it or one above, as in `bridge_dataset/1.0.0`; else None.

    Raises:
      UserError: there are several.
    """
    for pattern in (FEATURES, f"*/{FEATURES}", f"*/*/{FEATURES}"):
        found = sorted(path.parent for path in root.glob(pattern) if (path.parent / INFO).is_file())
        if len(found) > 1:
            raise UserError(f"{root}: holds {len(found)} RLDS data sets; give one of {', '.join(map(str, found))}")
        if found:
            return found[0]
    return None


def load_metadata(root: Path, split: str = "") -> RldsMetadata:
    """Reads the description of a data set.

    Args:
      root: the directory of one version.
      split: "train", "val", ..., or several as in "train+val"; "" for "train".

    Raises:
      UserError: the description can't be read, or there is no such split.
    """
    # Takes a second, which other kinds of data sets need not wait for.
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(str(root))
        info, features = builder.info, builder.info.features
        splits = dict(info.splits)
    except Exception as error:  # whatever protobuf, JSON and tensorflow-datasets raise on a damaged file
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{root}: {INFO} or {FEATURES} can't be read ({reason}); download the data set again"
        ) from error
    file_format = getattr(info.file_format, "value", "tfrecord")  # which the oldest don't say
    if file_format != "tfrecord":
        raise UserError(
            f"{root / INFO}: files are {file_format}; only tfrecord is read: write the data set again with "
            "tensorflow-datasets' file_format='tfrecord'"
        )
    steps = features[STEPS] if isinstance(features, tfds.features.FeaturesDict) and STEPS in features else None
    if not isinstance(steps, tfds.features.Dataset):
        raise UserError(f"{root / FEATURES}: no feature {STEPS!r} that is a data set of its own, so this is not RLDS")
    shards = []
    for name in (split or "train").split("+"):
        if name not in splits:
            raise UserError(f"{root / INFO}: no split {name!r} (config.data.split); {near(name, splits)}")
        files = [Path(path) for path in splits[name].filepaths]
        shards += map(Shard, files, splits[name].shard_lengths)

    leaves = dict(_leaves(steps.feature, tfds.features.FeaturesDict))
    cameras = [k for k, f in leaves.items() if isinstance(f, tfds.features.Image) and f.shape[-1] == 3]
    tensors = {k: f for k, f in leaves.items() if isinstance(f, tfds.features.Tensor)}  # texts and scalars too
    return RldsMetadata(
        root=root,
        shards=tuple(shards),
        cameras=tuple(cameras),
        columns={k: math.prod(f.shape) for k, f in tensors.items() if _is_column(f)},
        texts=tuple(k for k, f in tensors.items() if f.shape == () and f.np_dtype.kind not in "biuf"),
        fingerprint=hashlib.blake2b((root / FEATURES).read_bytes(), digest_size=16).hexdigest(),
    )


def _is_column(feature: Any) -> bool:
    """A few numbers of known shape."""
    return feature.np_dtype.kind in "biuf" and None not in feature.shape and math.prod(feature.shape) <= MOST_VALUES


def _leaves(feature: Any, dictionary: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Features that are no dictionaries, with their path."""
    if isinstance(feature, dictionary):
        for name, part in feature.items():
            yield from _leaves(part, dictionary, f"{prefix}{name}/")
    else:
        yield prefix.rstrip("/"), feature
