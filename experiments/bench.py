"""Measures latency and throughput with random weights on the device at hand.

    python -m experiments.bench --config=pi0_aloha:base --config.backend=torch
    python -m experiments.bench --config=pi0_aloha:mini --only=inference --json=bench.json

Inference is the wall clock from an observation in the host's memory to actions in the host's memory. Every figure is
a median, with the 90th percentile beside it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags as absl_flags

from convert import layout, tables
from experiments import flags, floors
from openpi_port import memory
from openpi_port.backends import Backend
from openpi_port.config import Compute, Pi0, Pi0Fast, Train

PARTS = ("inference", "train")
TOKENS = 50  # of a pi0-FAST chunk
ONLY = absl_flags.DEFINE_list("only", list(PARTS), f"what to measure: {', '.join(PARTS)}")
REPEAT = absl_flags.DEFINE_integer("repeat", 30, "timed calls of inference", lower_bound=1)
STEPS = absl_flags.DEFINE_integer("steps", 10, "timed training steps", lower_bound=1)
FAST = absl_flags.DEFINE_bool("fast", False, "inference by the prepared model (pi_*/fast/)")
JSON = absl_flags.DEFINE_string("json", None, "also write the figures to this file")


def main() -> None:
    """Measures what `--only` names and prints a table."""
    config = flags.config()
    backend = Backend(config.backend)
    device, _ = backend.device.describe(backend.device.find(None))
    rows: dict[str, Any] = {"device": device, "backend": config.backend, "size": config.model.size}
    begin = time.perf_counter()
    weights = random_weights(config.model, config.backend)
    spent = time.perf_counter() - begin
    print(f"{config.name}, {config.backend} on {device}; weights made in {spent:.0f} s", flush=True)
    for part in ONLY.value:
        rows |= {"inference": inference, "train": train}[part](config, backend, weights)
    for name, value in rows.items():
        print(f"{name:36} {value:.4g}" if isinstance(value, float) else f"{name:36} {value}")
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(rows, indent=1) + "\n")


def inference(config: Train, backend: Backend, weights: dict[str, np.ndarray]) -> dict[str, float]:
    """A chunk at batch 1: of 10 Euler steps, or of 50 tokens; with --fast also its parts. Beside it the floor."""
    begin = time.perf_counter()
    model = backend.infer.load(config.model, weights, Compute(dtype=config.compute.dtype))
    if FAST.value:
        model = backend.fast.optimize(model)
    if isinstance(config.model, Pi0Fast):
        batch = random_prompt(config.model, 1)
        arguments: tuple[Any, ...] = (batch, TOKENS)
        call = partial(model.decode, *arguments)
    else:
        batch = random_batch(config.model, 1)
        arguments = (batch, batch["noise"])
        call = partial(model.sample_actions, *arguments)
    call()
    ready = time.perf_counter() - begin
    rows = {"inference/ready_s": ready, **summary("inference", timed(call, REPEAT.value))}

    dtype = config.compute.dtype
    rates = backend.device.rates(backend.device.find(None), dtype)
    rows |= {"device/tflops": rates[0] / 1e12, "device/gb_per_s": rates[1] / 1e9}
    cameras, prompt = (sum(v.sum() for v in batch["image_mask"].values()), batch["tokenized_prompt_mask"].sum())
    parts = floors.inference(config.model, int(cameras), int(prompt), item=2 if dtype == "bfloat16" else 4)
    floor = {name: 1e3 * work.seconds(rates) for name, work in parts.items()}
    whole = sum(ms * {"step": 10, "token": TOKENS}.get(name, 1) for name, ms in floor.items())
    rows |= {"inference/floor_ms": whole, "inference/over_floor": rows["inference/median_ms"] / whole}
    if FAST.value:
        for name, stage in model.stages(*arguments).items():
            stage()
            rows |= summary(f"inference/{name}", timed(stage, REPEAT.value))
            rows |= {f"inference/{name}/floor_ms": floor[name]}
            rows |= {f"inference/{name}/over_floor": rows[f"inference/{name}/median_ms"] / floor[name]}
    return rows


def summary(name: str, times: list[float]) -> dict[str, float]:
    """Median and 90th percentile of seconds, in milliseconds."""
    return {
        f"{name}/median_ms": 1e3 * float(np.median(times)),
        f"{name}/p90_ms": 1e3 * float(np.quantile(times, 0.9)),
    }


def train(config: Train, backend: Backend, weights: dict[str, np.ndarray]) -> dict[str, float]:
    """Optimizer steps on one batch that lies ready."""
    trainer = backend.train.Trainer(config, weights)
    batch = random_batch(config.model, config.batch_size, config.draws)
    if config.insulate:
        shape = (config.batch_size, config.max_action_tokens)
        tokens = np.random.default_rng(1).integers(0, config.model.vocab_size, shape).astype(np.int32)
        batch |= {"action_tokens": tokens, "action_tokens_mask": np.ones(shape, bool)}
    begin = time.perf_counter()
    float(trainer.update(batch)["loss"])
    ready = time.perf_counter() - begin
    times = timed(lambda: float(trainer.update(batch)["loss"]), STEPS.value)
    step = float(np.median(times))
    return {
        "train/first_step_s": ready,
        "train/step_ms": 1e3 * step,
        "train/samples_per_s": config.batch_size / step,
        "train/planned_gib": memory.plan(config).total / memory.GIB,
        "train/peak_gib": backend.device.peak(backend.device.find(None)) / memory.GIB,
    }


def timed(call: Callable[[], Any], repeat: int) -> list[float]:
    """Seconds of each of `repeat` calls."""
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def random_weights(model: Pi0, side: str) -> dict[str, np.ndarray]:
    """Tensors of the right shapes and scale, made of one block of noise over and over: quick to make at any size."""
    block = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    shapes = layout.side_shapes(tables.entries(model), side)
    return {n: np.resize(block, math.prod(s)).reshape(s) / np.float32(math.sqrt(s[-1])) for n, s in shapes.items()}


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


if __name__ == "__main__":
    flags.run(main)
