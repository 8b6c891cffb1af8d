"""What `experiments.bench` measures with: random weights and batches."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from convert import layout, tables
from openpi_port.config import Pi0, Pi0Fast, Train
from openpi_port.realtime import own_times

NOISE = 1_048_573  # a prime, so that no two rows of a tensor are alike


def random_weights(model: Pi0 | Pi0Fast, side: str) -> dict[str, np.ndarray]:
    """Tensors of the right shapes and scale, made of one block of noise over and over: quick to make at any size.

    Every tensor begins elsewhere in it. They are rounded to bfloat16, so that every dtype computes with the same.
    """
    block = np.random.default_rng(0).standard_normal(NOISE, np.float32)
    shapes = layout.side_shapes(tables.entries(model), side)
    scaled = {d: (block / np.sqrt(d)).astype(bfloat16).astype(np.float32) for d in {s[-1] for s in shapes.values()}}
    return {n: np.resize(np.roll(scaled[s[-1]], zlib.crc32(n.encode())), s) for n, s in shapes.items()}


def random_batch(model: Pi0, size: int, draws: int = 1) -> dict[str, Any]:
    """A batch of noise with every camera present and a full prompt."""
    rng = np.random.default_rng(0)
    chunk = (size, model.action_horizon, model.action_dim)
    drawn = (size,) if draws == 1 else (size, draws)
    pixels = model.vision.image_size
    return {
        "image": {c: rng.integers(0, 256, (size, pixels, pixels, 3), np.uint8) for c in model.cameras},
        "image_mask": {c: np.ones(size, bool) for c in model.cameras},
        "state": rng.standard_normal(chunk[::2], np.float32),
        "tokenized_prompt": rng.integers(0, model.vocab_size, (size, model.max_token_len)).astype(np.int32),
        "tokenized_prompt_mask": np.ones((size, model.max_token_len), bool),
        "actions": rng.standard_normal(chunk, np.float32),
        "action_is_pad": np.zeros(chunk[:2], bool),
        "noise": rng.standard_normal((*drawn, *chunk[1:]), np.float32),
        "time": rng.uniform(0.001, 1, drawn).astype(np.float32),
    }


def random_prompt(model: Pi0Fast, size: int) -> dict[str, Any]:
    """What pi0-FAST reads: two cameras and a prompt of 180 tokens, as far as the model has room for both."""
    rng = np.random.default_rng(0)
    pixels, length = model.vision.image_size, model.max_token_len
    return {
        "image": {c: rng.integers(0, 256, (size, pixels, pixels, 3), np.uint8) for c in model.cameras},
        "image_mask": {c: np.full(size, i < 2) for i, c in enumerate(model.cameras)},
        "tokenized_prompt": rng.integers(2, model.vocab_size, (size, length)).astype(np.int32),
        "tokenized_prompt_mask": np.tile(np.arange(length) < min(180, length - 1), (size, 1)),
    }


def shown(batch: dict[str, Any], cameras: int | None, tokens: int | None) -> dict[str, Any]:
    """The batch with so many of its cameras and prompt tokens; None leaves them."""
    some = dict(batch)
    if cameras is not None:
        masks = batch["image_mask"].items()
        some["image_mask"] = {name: mask & (i < cameras) for i, (name, mask) in enumerate(masks)}
    if tokens is not None:
        prompt = batch["tokenized_prompt"]
        some["tokenized_prompt_mask"] = np.tile(np.arange(prompt.shape[1]) < tokens, (len(prompt), 1))
    return some


def training_batch(config: Train) -> dict[str, Any]:
    """Noise with all that the run's loss reads."""
    model, size = config.model, config.batch_size
    rng = np.random.default_rng(1)
    if isinstance(model, Pi0Fast):
        where = np.tile(np.arange(model.max_token_len) >= model.max_token_len // 2, (size, 1))
        full = {
            "tokenized_prompt_mask": np.ones_like(where),
            "image_mask": {c: np.ones(size, bool) for c in model.cameras},
        }
        return random_prompt(model, size) | full | {"token_ar_mask": where.astype(np.int32), "token_loss_mask": where}
    batch = random_batch(model, size, config.draws)
    if config.max_delay:
        batch["time"] = own_times(batch["time"], config.max_delay // 2, model.action_horizon)
    if config.insulate:
        shape = (size, config.max_action_tokens)
        batch["action_tokens"] = rng.integers(0, model.vocab_size, shape).astype(np.int32)
        batch["action_tokens_mask"] = np.ones(shape, bool)
    return batch
