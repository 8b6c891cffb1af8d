"""Short runs of the main job: what `experiments.train` does once it has read its command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments import train
from openpi_port import starting
from openpi_port.config import Train
from openpi_port.fields import build


def debug(configs: ModuleType, out: Path, *, peak_lr: float = 3e-4, **changes: Any) -> Train:
    """A file's debug size with two samples a step, every loss logged, and few checkpoints and validations.

    With higher rates Adam scales up what is rounding, and frameworks part.
    """
    config = build(Train, configs.get_config("debug"))
    optimizer = dataclasses.replace(config.optimizer, peak_lr=peak_lr)
    every = {"log_every": 1, "save_every": 100, "eval_every": 100, "eval_batches": 1}
    return dataclasses.replace(config, out=str(out), batch_size=2, **{"optimizer": optimizer, **every, **changes})


def with_data(config: Train, **changes: Any) -> Train:
    """The run on other data."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def run(config: Train, *, resume: bool = False) -> Path:
    """Trains; returns the run's directory."""
    path = Path(config.out) / config.name
    train.train(config, path, starting.point(path, config, resume=resume))
    return path


def logged(path: Path, key: str = "loss") -> list[float]:
    """A number of every step, from a run's directory."""
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]
