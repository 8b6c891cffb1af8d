"""How many samples per second and core the data pipeline delivers: `python -m openpi_port.data.benchmark`.

The setting is the main job's: three cameras at 224 px per sample (the shipped data set's one camera, three times),
50 actions, augmentation on. Decoding, resizing, augmenting, transforming and stacking are all inside.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from openpi_port.config import Data
from openpi_port.data.datasets import find
from openpi_port.data.frame_cache import FrameCache
from openpi_port.data.loader import Part, train_batches
from openpi_port.errors import guarded
from openpi_port.transforms import FillCameras, PadDims, Repack, Resize

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
SIZE, HORIZON, ACTION_DIM = 224, 50, 32


@dataclasses.dataclass(frozen=True)
class Speed:
    """Samples per second and core.

    Attributes:
      cold: the first time that frames are needed; videos are decoded.
      warm: frames come from the cache.
      uncached: without a frame cache, every frame decoded every time.
    """

    cold: float
    warm: float
    uncached: float


@dataclasses.dataclass(frozen=True)
class _NoPrompt:
    """Stands in for the tokenizer, whose time is the model's size's affair."""

    def forward(self, sample: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in sample.items() if key != "prompt"}


def measure(data: Data, samples: int = 480) -> Speed:
    """Runs the loader in this process on one core, with a frame cache of its own that is removed afterwards.

    Args:
      data: the data set; its first camera plays all three.
      samples: per measurement.

    Raises:
      UserError: anything wrong with the data set.
    """
    with _one_core() as cores, tempfile.TemporaryDirectory() as directory:
        cache = FrameCache(SIZE, 8.0, directory)
        cold = _rate(data, cache, samples)
        warm = _rate(data, cache, samples)
        uncached = _rate(data, None, samples // 4)
    return Speed(cold / cores, warm / cores, uncached / cores)


def _rate(data: Data, cache: FrameCache | None, samples: int, batch_size: int = 16) -> float:
    """Samples per second of one pass over the same samples."""
    metadata, open_ = find(data)
    key = next(iter(data.cameras.values()), metadata.cameras[0])
    cameras = dict.fromkeys(CAMERAS, key)
    dataset = open_(
        cameras=cameras, horizon=HORIZON, state=data.state, action=data.actions, image_size=SIZE, cache=cache
    )
    steps = (
        Repack(cameras, data.state, data.actions, data.prompt),
        Resize(SIZE),
        FillCameras(CAMERAS),
        PadDims(ACTION_DIM, ACTION_DIM, ACTION_DIM),
        _NoPrompt(),
    )
    batches = train_batches(
        [Part(dataset, steps)], batch_size=batch_size, seed=0, action_dim=ACTION_DIM, action_horizon=HORIZON
    )
    count = samples // batch_size
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    # The loader has read ahead meanwhile, which only makes the number lower.
    rate = count * batch_size / (time.perf_counter() - start)
    batches.close()
    return rate


@contextlib.contextmanager
def _one_core() -> Iterator[int]:
    """Ties this process to one core for a while, where the system can; says how many cores it may use then."""
    if not hasattr(os, "sched_setaffinity"):
        yield os.cpu_count() or 1
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield 1
    finally:
        os.sched_setaffinity(0, allowed)


def main() -> None:
    """Measures what the command line names and prints one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo_id", default="aloha_sim_transfer_cube")
    parser.add_argument("--camera", default="", help="key of an image; the first by default")
    parser.add_argument("--state", default="observation.state")
    parser.add_argument("--actions", default="action")
    parser.add_argument("--samples", type=int, default=480)
    arguments = parser.parse_args()
    data = Data(
        repo_id=arguments.repo_id, robot="lerobot", cameras={"": arguments.camera}, state=arguments.state,
        actions=arguments.actions, prompt="",
    )  # fmt: skip
    speed = measure(data, arguments.samples)
    print(
        f"{arguments.repo_id}: {speed.warm:.0f} samples/s per core with warm frame cache, {speed.cold:.0f} cold, "
        f"{speed.uncached:.0f} without cache (3 cameras, {SIZE} px, augmentation on)"
    )


if __name__ == "__main__":
    sys.exit(guarded(main))
