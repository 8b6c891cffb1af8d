"""The part of `experiments.bench` that measures errors instead of time.

How far the working dtype takes a chunk from what the plain model computes in float32, on the same device and weights.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator

import numpy as np

from experiments.bench_inputs import random_batch, random_weights
from experiments.bench_parts import Setting
from experiments.bench_report import Figure
from openpi_port.batch import Batch
from openpi_port.config import Pi0, Pi0Fast
from openpi_port.errors import UserError

SHORT = 20  # tokens of a short prompt


def errors(setting: Setting) -> Iterator[Figure]:
    """Of the plain and of the prepared model: the error relative to the chunk's size, and the largest of any action."""
    config, backend, compute = setting.config.model, setting.backend, setting.config.compute
    if isinstance(config, Pi0Fast):
        raise UserError("pi0-FAST writes tokens, whose errors are no numbers")
    weights, seen = random_weights(config, setting.config.backend), observations(config)
    model = backend.infer.load(config, weights, dataclasses.replace(compute, dtype="float32"))
    exact = {name: model.sample_actions(batch, batch["noise"]) for name, batch in seen.items()}
    del model
    gc.collect()
    model = backend.infer.load(config, weights, compute)
    for kind in ("plain", "float8" if setting.float8 else "prepared"):
        if kind != "plain":
            model = backend.fast.optimize(model, float8=setting.float8)
        for name, batch in seen.items():
            error = model.sample_actions(batch, batch["noise"]) - exact[name]
            relative = np.linalg.norm(error) / np.linalg.norm(exact[name])
            yield Figure(f"errors/{kind}/{name}", float(relative), "relative")
            yield Figure(f"errors/{kind}/{name}/largest", float(np.abs(error).max()), "absolute")


def observations(config: Pi0) -> dict[str, Batch]:
    """One with everything, one without the last camera, and two of which one lacks it; each with noise."""
    count, length = len(config.cameras), config.max_token_len
    short = min(SHORT, length)
    return {
        f"{count} cameras, {length} tokens": _masked(random_batch(config, 1), [True], [length]),
        f"{count - 1} cameras, {short} tokens": _masked(random_batch(config, 1), [False], [short]),
        "2 samples, one lacks a camera": _masked(random_batch(config, 2), [True, False], [length, short]),
    }


def _masked(batch: Batch, last: list[bool], lengths: list[int]) -> Batch:
    """The batch where samples have the last camera or not, and so many tokens."""
    mask = dict(batch["image_mask"])
    mask[list(mask)[-1]] = np.array(last)
    shown = np.arange(batch["tokenized_prompt"].shape[1]) < np.array(lengths)[:, None]
    return {**batch, "image_mask": mask, "tokenized_prompt_mask": shown}
