"""The input of the parity report: golden vectors, random numbers, or the checkpoint's own data set.

B batch, A actions, J action dim, T text tokens, S tokens of images and text, G generated tokens.

pi0-FAST takes no noise and no time; its batches have `forced_tokens` [B, G] instead, which decoding is fed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from convert.source import Source
from openpi_port import batch as batches
from openpi_port import checkpoint
from openpi_port.config import Pi0, Pi0Fast
from openpi_port.errors import UserError

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "openpi"
KINDS = ("golden", "random", "dataset")
FORCED = 16  # at most, of a data set's action tokens


def make(kind: str, source: Source, size: int, seed: int) -> dict[str, Any]:
    """A training batch for a checkpoint: observation, actions, noise and time, or tokens.

    Args:
      kind: of `KINDS`.
      source: the checkpoint.
      size: B; golden vectors have their own.
      seed: of the random numbers.

    Raises:
      UserError: the golden vectors are of another size, or the checkpoint names no data set.
    """
    if kind == "golden":
        return golden(source.model)
    return random(source.model, size, seed) if kind == "random" else dataset(source, size)


def golden(config: Pi0 | Pi0Fast) -> dict[str, Any]:
    """The inputs whose outputs the reference systems have computed, where they fit the model.

    Raises:
      UserError: they are of another size.
    """
    fast = isinstance(config, Pi0Fast)
    name = "pi0_fast" if fast else "pi0" if config.state_in == "suffix" else "pi05"
    file = GOLDEN / name / "inputs.npz"
    if not file.exists():
        raise UserError(f"--batch=golden: {file} is not here; use --batch=random")
    batch: dict[str, Any] = {}
    for key, value in np.load(file).items():
        group, _, camera = key.partition("/")
        if camera:
            batch.setdefault(group, {})[camera] = value
        else:
            batch[group] = value
    side = config.vision.image_size
    wanted = {
        "cameras": (set(batch["image"]), set(config.cameras)),
        "image_size": (next(iter(batch["image"].values())).shape[1], side),
        "max_token_len": (batch["tokenized_prompt"].shape[1], config.max_token_len),
    }
    if not fast:
        sizes = (config.action_horizon, config.action_dim)
        wanted["action_horizon, action_dim"] = (batch["actions"].shape[1:], sizes)
    for field, (theirs, ours) in wanted.items():
        if theirs != ours:
            raise UserError(
                f"--batch=golden has {field} {theirs}, the checkpoint {ours}; use --batch=random or dataset"
            )
    if batch["tokenized_prompt"].max() >= config.vocab_size:
        raise UserError(f"--batch=golden has tokens beyond vocab_size={config.vocab_size}; use --batch=random")
    return batch


def random(config: Pi0 | Pi0Fast, size: int, seed: int) -> dict[str, Any]:
    """A batch drawn from a seed; the last sample lacks the last camera, and texts end in padding."""
    rng = np.random.default_rng(seed)
    chunk, side = (size, config.action_horizon, config.action_dim), config.vision.image_size
    length = config.max_token_len
    masks = {name: np.ones(size, bool) for name in config.cameras}
    if size > 1:
        masks[config.cameras[-1]][-1] = False
    batch = {
        "image": {name: rng.integers(0, 256, (size, side, side, 3), np.uint8) for name in config.cameras},
        "image_mask": masks,
        "state": rng.uniform(-1, 1, chunk[::2]).astype(np.float32),
        "tokenized_prompt": rng.integers(0, config.vocab_size, (size, length)).astype(np.int32),
        "tokenized_prompt_mask": np.arange(length) < rng.integers(1, length + 1, (size, 1)),
    }
    if isinstance(config, Pi0Fast):  # the second half of every text is actions
        valid = batch["tokenized_prompt_mask"]
        written = valid & (np.arange(length) >= (valid.sum(1, keepdims=True) + 1) // 2)
        forced = rng.integers(2, config.vocab_size, (size, 8)).astype(np.int32)
        return batch | {"token_ar_mask": written.astype(np.int32), "token_loss_mask": written, "forced_tokens": forced}
    return batch | {
        "actions": rng.uniform(-1, 1, chunk).astype(np.float32),
        "noise": rng.standard_normal(chunk, np.float32),
        "time": rng.uniform(0.05, 1, size).astype(np.float32),
    }


def dataset(source: Source, size: int) -> dict[str, Any]:
    """The first validation batch of the data set that the checkpoint was trained on, without augmentation.

    Raises:
      UserError: the checkpoint doesn't say which, or it can't be opened.
    """
    if not (source.path / checkpoint.POLICY).exists() or "train" not in source.settings:
        raise UserError(
            f"--batch=dataset: {source.path} names no data set (no {checkpoint.POLICY} of a training run); "
            f"use --batch=random"
        )
    from openpi_port.data import material

    config = checkpoint.read_policy(source.path).train
    tokenizer = source.path / checkpoint.TOKENIZER
    config = dataclasses.replace(
        config, batch_size=size, eval_batches=1, max_delay=0, data=dataclasses.replace(config.data, augment="none"),
        tokenizer=str(tokenizer) if tokenizer.exists() else config.tokenizer,
    )  # fmt: skip
    stats = None if source.norm_stats is None else checkpoint.read_norm_stats(source.path, config)
    loaded = material.load(config, stats)
    stream = loaded.batches(0) if loaded.deployed.validation is None else loaded.validation_batches()
    try:
        batch = batches.select(next(stream), [k for k in batches.training(source.model) if k != "action_is_pad"])
    finally:
        stream.close()
    if isinstance(source.model, Pi0Fast):
        return batch | {"forced_tokens": written_tokens(batch)}
    if batch["noise"].ndim == 4:  # several draws of noise and time for each sample
        batch |= {name: batch[name][:, 0] for name in ("noise", "time")}
    return batch


def written_tokens(batch: dict[str, Any]) -> np.ndarray:
    """int32 [B, G]: the first action tokens of a pi0-FAST batch, and 0 after their end."""
    order = np.argsort(batch["token_ar_mask"] == 0, axis=1, kind="stable")[:, :FORCED]
    return np.take_along_axis(np.where(batch["token_ar_mask"] > 0, batch["tokenized_prompt"], 0), order, 1)


def valid_prefix(config: Pi0 | Pi0Fast, batch: dict[str, Any], part: str = "forward") -> np.ndarray:
    """bool [B, S]: which tokens of images and text exist. The others attend to nothing and nobody sees them.

    Args:
      config: of the model.
      batch: see `make`.
      part: of the trace; pi0-FAST reads all tokens but the last in "forward", and the prompt alone in "sampling".
    """
    tokens = config.vision.num_tokens
    images = [np.repeat(batch["image_mask"][name][:, None], tokens, axis=1) for name in config.cameras]
    text = batch["tokenized_prompt_mask"]
    if not isinstance(config, Pi0Fast):
        return np.concatenate([*images, text], axis=1)
    text = text[:, :-1] if part == "forward" else text & (batch["token_ar_mask"] == 0)
    return np.concatenate([*images, text], axis=1)
