"""From `config.Data` to the data sets for training and validation. What kind a data set is, its files show."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from openpi_port.config import Data
from openpi_port.data import aloha_hdf5, lerobot, rlds
from openpi_port.data.frame_cache import FrameCache
from openpi_port.data.frames import Frames
from openpi_port.data.split import split_episodes
from openpi_port.errors import UserError

Open = Callable[..., Frames]  # with the arguments that all kinds share


class Metadata(Protocol):
    """What a data set says about itself: directory, episode numbers, keys of images."""

    @property
    def root(self) -> Path: ...
    @property
    def numbers(self) -> tuple[int, ...]: ...
    @property
    def cameras(self) -> tuple[str, ...]: ...


def open_datasets(
    data: Data, *, horizon: int, image_size: int | None = None, seed: int = 0, cache: FrameCache | None = None
) -> tuple[Frames, Frames | None]:
    """Opens a data set twice, with the episodes for training and those for validation.

    Args:
      data: which one, and how it is split.
      horizon: actions per chunk.
      image_size: of the model, pixels; None opens the data set without its images, for norm statistics.
      seed: of the split; not the run's, so that runs with different seeds validate on the same episodes.
      cache: of decoded frames.

    Returns:
      (training, validation); validation is None where `data.validation` is 0 or there is only one episode.

    Raises:
      UserError: see the kinds: `LeRobotDataset`, `RldsDataset`, `AlohaHdf5Dataset`.
    """
    metadata, open_ = find(data)
    numbers = chosen(data, metadata)
    training, validation = split_episodes(len(numbers), data.validation, seed)

    def choose(part: tuple[int, ...]) -> Frames:
        return open_(
            cameras={} if image_size is None else data.cameras,
            horizon=horizon,
            state=data.state,
            action=data.actions,
            image_size=image_size,
            cache=cache,
            episodes=[numbers[i] for i in part],
        )

    return choose(training), choose(validation) if validation else None


def chosen(data: Data, metadata: Metadata) -> list[int]:
    """Numbers of the episodes that are to be used, in their order.

    Raises:
      UserError: there is no episode of a number that was given, or none is left.
    """
    known = set(metadata.numbers)
    for field in ("episodes", "skip"):
        if unknown := sorted(set(getattr(data, field)) - known):
            raise UserError(
                f"config.data.{field}: {metadata.root} has no episode {unknown[0]}; it has {len(known)}, "
                f"{min(known, default=0)} to {max(known, default=0)}"
            )
    wanted = (set(data.episodes) or known) - set(data.skip)
    if not wanted:
        raise UserError(f"{metadata.root}: config.data.skip leaves no episode")
    return [number for number in metadata.numbers if number in wanted]


def find(data: Data) -> tuple[Metadata, Open]:
    """A data set's description, and how to open some of its episodes.

    Raises:
      UserError: there is none, its description is damaged, or `data` has fields that its kind can't honour.
    """
    root = lerobot.resolve(data.repo_id, data.root)
    if version := rlds.find(root):
        described = rlds.load_metadata(version, data.split)
        task = data.task or rlds.INSTRUCTION if data.prompt is None else ""
        return described, partial(rlds.RldsDataset, described, task=task)
    for field in ("split", "task"):
        if getattr(data, field):
            raise UserError(f"config.data.{field}={getattr(data, field)!r} is for RLDS, which {root} is not")
    if aloha_hdf5.episode_files(root):
        described = aloha_hdf5.load_metadata(root)
        return described, partial(aloha_hdf5.AlohaHdf5Dataset, described)
    if not (root / "meta").is_dir():
        near = [path.parent.parent for pattern in ("..", "*", "*/*") for path in root.glob(f"{pattern}/meta/info.json")]
        meant = f"; did you mean {', '.join(str(path.resolve()) for path in sorted(near)[:3])}?" if near else ""
        raise UserError(
            f"{root}: no data set that is known: LeRobot has meta/info.json, RLDS features.json and dataset_info.json, "
            f"ALOHA *.hdf5 files{meant}"
        )
    described = lerobot.load_metadata(root)
    return described, partial(lerobot.LeRobotDataset, described)
