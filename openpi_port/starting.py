"""Where a run begins: from nothing, from somebody's checkpoint, or where it stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import layout, tables
from convert.source import Source
from openpi_port import base, checkpoint, init
from openpi_port.backends import Backend
from openpi_port.config import Pi0Fast, Train
from openpi_port.errors import UserError
from openpi_port.fields import to_dict
from openpi_port.normalize import NormStats


@dataclasses.dataclass(frozen=True)
class Point:
    """What a trainer begins with; tensors have the names of the run's backend."""

    step: int
    weights: Mapping[str, np.ndarray]
    train_state: Mapping[str, np.ndarray] | None = None
    norm_stats: Mapping[str, NormStats] | None = None  # by data set
    base: base.Base | None = None  # where the frozen weights are, if checkpoints leave them out


def point(run: Path, config: Train, *, resume: bool) -> Point:
    """Finds the starting point of a run.

    Args:
      run: its directory.
      config: what is to be trained.
      resume: go on from the last checkpoint in `run`, which either framework may have written.

    Raises:
      UserError: nothing to resume, something in the way of a new run, or a checkpoint of another model.
    """
    saved = checkpoint.steps(run)
    if resume:
        if not saved:
            raise UserError(f"{run}: no checkpoint to resume; without --resume a new run starts there")
        return _continued(run / str(saved[-1]), config)
    if saved:
        raise UserError(
            f"{run} holds a run, at step {saved[-1]}: go on with --resume, or start another with --config.name= "
            f"or --config.out="
        )
    begin = weights(config)
    where = base.of(config, begin) if config.save == "trained" else None
    return Point(0, tables.translate(begin, config.model, layout.OURS, config.backend), base=where)


def weights(config: Train) -> Mapping[str, np.ndarray]:
    """Canonical weights that a run begins with: fresh ones, or those of `config.init`.

    A policy must be of the same architecture, and adapters that are absent there start fresh; of PaliGemma come vision
    tower and language model, and all else starts fresh.
    """
    from convert import formats

    fresh = init.Fresh(config.model, config.seed)
    if config.init is None:
        return fresh
    source = formats.open_checkpoint(config.init)
    if source.is_policy:
        _check_model(config, source)
    found = source.canonical() if source.is_policy else source.start_of(config.model)
    return layout.Completed(found, fresh)


def _check_model(config: Train, source: Source) -> None:
    """Raises UserError where a policy is of another model than the run, but for adapters that only the run has."""
    theirs, ours = to_dict(source.model), to_dict(config.model)
    if "suffix" not in (theirs.get("state_in"), ours.get("state_in")):  # in the prompt or not: the same weights
        theirs["state_in"] = ours.get("state_in")
    for part in ("language", "expert"):
        if theirs.get(part) and ours.get(part) and theirs[part]["lora"] is None:
            theirs[part]["lora"] = ours[part]["lora"]
    for field in ("vision", "language", "expert", "vocab_size", "action_dim", "state_in", "time_in"):
        if field == "action_dim" and "expert" not in ours:
            continue  # no weight of pi0-FAST depends on it
        if theirs.get(field) != ours.get(field):
            raise UserError(
                f"--config.init={config.init} is of another model: {field} is {theirs.get(field)}, the config "
                f"says {ours.get(field)}"
            )
    if isinstance(config.model, Pi0Fast):
        _check_habits(config, source.model, source.settings.get("data", {}))


def _check_habits(config: Train, theirs: Pi0Fast, data: Mapping[str, Any]) -> None:
    """Whether the run numbers tokens and writes prompts as the weights of a pi0-FAST have learned."""
    learned = {
        "model.positions": (theirs.positions, config.model.positions),
        "model.missing_cameras": (theirs.missing_cameras, config.model.missing_cameras),
        "data.prompt_style": (data.get("prompt_style", "openpi"), config.data.prompt_style),
    }
    if differ := " ".join(f"--config.{name}={has}" for name, (has, wants) in learned.items() if has != wants):
        raise UserError(f"--config.init={config.init} has learned otherwise: add {differ}")


def _continued(path: Path, config: Train) -> Point:
    policy = checkpoint.read_policy(path)
    if difference := checkpoint.describe_difference(policy.train, config):
        raise UserError(f"--resume: {path} is of a different run: {difference}")
    if policy.step > config.num_steps:
        raise UserError(f"--resume: {path} is beyond config.num_steps={config.num_steps}; give more")
    theirs = Backend(policy.framework).weights
    tensors = theirs.read_params(path / theirs.PARAMS)
    if policy.base is not None:
        tensors = base.complete(policy.base, policy.train, tensors, policy.framework, str(path))
    state = theirs.read_params(path / checkpoint.TRAIN_STATE / theirs.PARAMS)
    if policy.framework != config.backend:
        state = tables.translate_state(state, config.model, policy.framework, config.backend)
    return Point(
        policy.step,
        tables.translate(tensors, config.model, policy.framework, config.backend),
        state,
        checkpoint.read_norm_stats(path, policy.train),
        policy.base,
    )
