"""From `config.Data` to the data sets for training and validation."""

from __future__ import annotations

from openpi_port.config import Data
from openpi_port.data.frame_cache import FrameCache
from openpi_port.data.lerobot import LeRobotDataset, load_metadata, resolve
from openpi_port.data.split import split_episodes
from openpi_port.errors import UserError


def open_datasets(
    data: Data, *, horizon: int, image_size: int | None = None, seed: int = 0
) -> tuple[LeRobotDataset, LeRobotDataset | None]:
    """Opens a data set twice, with the episodes for training and those for validation.

    Args:
      data: which one, and how it is split.
      horizon: actions per chunk.
      image_size: of the model, pixels; None opens the data set without its images, for norm statistics.
      seed: of the split; not the run's, so that runs with different seeds validate on the same episodes.

    Returns:
      (training, validation); validation is None where `data.validation` is 0 or there is only one episode.

    Raises:
      UserError: see `LeRobotDataset`.
    """
    metadata = load_metadata(resolve(data.repo_id, data.root))
    numbers = [episode.index for episode in metadata.episodes]
    if unknown := sorted(set(data.episodes) - set(numbers)):
        raise UserError(f"config.data.episodes: {metadata.root} has no episode {unknown[0]}; it has {len(numbers)}")
    numbers = [number for number in numbers if not data.episodes or number in data.episodes]
    training, validation = split_episodes(len(numbers), data.validation, seed)
    cache = None
    if image_size is not None and data.cache_gb:
        cache = FrameCache(image_size, data.cache_gb)

    def choose(part: tuple[int, ...]) -> LeRobotDataset:
        return LeRobotDataset(
            metadata,
            cameras={} if image_size is None else data.cameras,
            horizon=horizon,
            state=data.state,
            action=data.actions,
            image_size=image_size,
            cache=cache,
            episodes=[numbers[i] for i in part],
        )

    return choose(training), choose(validation) if validation else None
