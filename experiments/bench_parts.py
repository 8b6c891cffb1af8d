"""The parts of `experiments.bench`: each measures one thing and returns its figures."""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments import bench_floor as floors
from experiments import bench_report as report
from experiments.bench_floor import Rates, Work
from experiments.bench_inputs import random_batch, random_prompt, random_weights, shown, training_batch
from experiments.bench_report import Figure
from openpi_port import memory, meshes
from openpi_port.backends import Backend
from openpi_port.config import Compute, Pi0, Pi0Fast, Train
from openpi_port.errors import UserError
from openpi_port.realtime import soft_mask
from openpi_port.serving import benchmark as serving
from openpi_port.tokenizers import fast as fast_tokenizers
from openpi_port.tokenizers import paligemma

EULER_STEPS, TOKENS = 10, 50  # of a chunk


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured, and how often.

    Attributes:
      config: the run whose model, data and batch size these are.
      rates: of the device.
      fast: inference by the prepared model.
      float8: which is prepared with products in float8.
      repeat: timed calls.
      steps: timed training steps.
      cameras: that inference sees; None for all, of pi0-FAST two.
      tokens: of its prompt; None for as many as there is room for, of pi0-FAST 180.
    """

    config: Train
    rates: Rates
    fast: bool
    float8: bool
    repeat: int
    steps: int
    cameras: int | None = None
    tokens: int | None = None

    @property
    def backend(self) -> Backend:
        """The framework."""
        return Backend(self.config.backend)

    @property
    def size(self) -> int:
        """Bytes of a weight in the working dtype."""
        return floors.SIZES[self.config.compute.dtype]


def rates(config: Train) -> Rates:
    """Measures the device: copying, and a product of large matrices in the working dtype."""
    backend = Backend(config.backend)
    device = backend.device.find(None)
    on_cpu = backend.device.describe(device)[0].startswith("CPU")
    copied, side = (2**27, 1024) if on_cpu else (2**30, 8192)
    return Rates(
        backend.probe.copy_rate(device, copied), backend.probe.product_rate(device, config.compute.dtype, side)
    )


def inference(setting: Setting) -> Iterator[Figure]:
    """A chunk at batch 1 from the host's memory to the host's: 10 Euler steps, or 50 tokens; and its parts."""
    config, backend = setting.config.model, setting.backend
    weights = random_weights(config, setting.config.backend)
    begin = time.perf_counter()
    model = backend.infer.load(config, weights, setting.config.compute)
    del weights
    if setting.fast:
        model = backend.fast.optimize(model, float8=setting.float8)
    flows = isinstance(config, Pi0)
    batch = random_batch(config, 1) if flows else random_prompt(config, 1)
    batch = shown(batch, setting.cameras, setting.tokens)
    arguments = (batch, batch["noise"]) if flows else (batch, TOKENS)
    call = model.sample_actions if flows else model.decode
    call(*arguments)
    yield Figure("inference/ready", time.perf_counter() - begin, "s")

    work = parts_of_a_chunk(config, batch, setting)
    *_, (last, each) = work.items()
    repeats = EULER_STEPS if flows else TOKENS
    whole = sum(w.seconds(setting.rates) * (repeats if name == last else 1) for name, w in work.items())
    taken = timed(partial(call, *arguments), setting.repeat, "a chunk")
    yield report.times("inference/chunk", taken, whole)
    if setting.fast:
        for name, stage in model.stages(*arguments).items():
            stage()
            seconds = timed(stage, setting.repeat, name)
            yield report.times(f"inference/{name}", seconds, work[name].seconds(setting.rates))
    # A step is the difference of chunks with one and with all: a call of its own takes longer than the step.
    first = timed(partial(call, *arguments[:1], *_one(arguments)), setting.repeat + 1, "one step")[1:]
    yield report.times(f"inference/chunk of one {last}", first, whole - (repeats - 1) * each.seconds(setting.rates))
    step = report.difference(f"inference/{last}", taken, first, repeats - 1, each.seconds(setting.rates))
    if step is not None:
        yield step
    else:
        print(f"  inference/{last}: not measured: calls differ by more than {repeats - 1} of it take", flush=True)


def realtime(setting: Setting) -> Iterator[Figure]:
    """A chunk that goes on from the one before, half of which is left: guided, and conditioned (docs/real_time.md)."""
    config, backend = setting.config.model, setting.backend
    if isinstance(config, Pi0Fast):
        raise UserError("pi0-FAST has no flow that could go on from a chunk")
    model = backend.infer.load(config, random_weights(config, setting.config.backend), setting.config.compute)
    batch, horizon = random_batch(config, 1), config.action_horizon
    mask = soft_mask(horizon, horizon // 10, horizon // 2)[None, :, None]
    ways = {
        "plain": {},
        "guided": {"weights": np.repeat(mask, config.action_dim, 2)},
        "conditioned": {"delay": np.array([horizon // 10], np.int32)},
    }
    for way, how in ways.items():
        held = {"previous": batch["actions"], **how} if how else {}
        call = partial(model.sample_actions, batch, batch["noise"], **held)
        call()
        yield report.times(f"realtime/{way}", timed(call, setting.repeat, way))


def train(setting: Setting) -> Iterator[Figure]:
    """Optimizer steps on one batch that lies ready; of several processes each has its part of it.

    The host looks at the loss of every fifth step: in a run it doesn't wait for each either.
    """
    config, backend = setting.config, setting.backend
    every = dict.fromkeys(config.model.cameras, "any")  # the random batch has all that the model has
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cameras=every))
    _, count = backend.sharding.join()
    shape = meshes.shape(config.mesh, backend.device.count(), count, config.batch_size)
    trainer = backend.train.Trainer(config, random_weights(config.model, config.backend))
    batch = training_batch(dataclasses.replace(config, batch_size=config.batch_size // count))
    begin = time.perf_counter()
    float(trainer.update(batch)["loss"])
    yield Figure("train/first step", time.perf_counter() - begin, "s")
    together = min(5, setting.steps)

    def steps() -> None:
        losses = [trainer.update(batch)["loss"] for _ in range(together)]
        if not math.isfinite(loss := float(losses[-1])):
            raise UserError(f"the loss of random weights is {loss}: this says nothing of real ones")

    float(trainer.update(batch)["loss"])  # where a pass is recorded
    taken = [seconds / together for seconds in timed(steps, setting.steps // together, "training")]
    share = dataclasses.replace(config, batch_size=config.batch_size // math.prod(shape))
    passes, optimizer = floors.training_step(share)
    floor = passes.seconds(setting.rates) + optimizer.seconds(setting.rates)
    yield report.times("train/step", taken, floor)
    yield Figure("train/throughput", config.batch_size / float(np.median(taken)), "samples/s", better="higher")
    yield Figure("train/planned memory", memory.plan(trainer.config, shape).total / memory.GIB, "GiB")
    if peak := backend.device.peak(backend.device.find(None)):
        yield Figure("train/peak memory", peak / memory.GIB, "GiB")


def feed(setting: Setting) -> Iterator[Figure]:
    """Optimizer steps on batches of the data set, decoded while training: what a run gets, and how long it waits."""
    from experiments.train import Window  # needs what decodes video; models are measured without
    from openpi_port.data import material

    config = setting.config
    data = material.load(config)
    trainer = setting.backend.train.Trainer(config, random_weights(config.model, config.backend))
    batches, window = data.batches(0), Window(Path(tempfile.gettempdir()), data)
    try:
        for step in tqdm(range(2 + setting.steps), "training", leave=False, delay=2):
            window.add(trainer.update(window.wait_for(batches)))
            if step == 1:  # compiled, and what is read ahead is there
                window.first(step)
        numbers = window.numbers(trainer.step)
    finally:
        batches.close()
    yield Figure("feed/throughput", numbers["samples_per_s"], "samples/s", better="higher")
    yield Figure("feed/waiting for data", 100 * numbers["data_wait"], "%")


def attention(setting: Setting) -> Iterator[Figure]:
    """Every attention backend that the device has, on the shapes of vision, prefix and suffix; forward and backward.

    Of one sample, and of a batch.
    """
    backend, config = setting.backend, setting.config.model
    device, dtype = backend.device.find(None), setting.config.compute.dtype
    vision, language = config.vision, config.language
    text = (language.num_heads, language.num_kv_heads, language.head_dim)
    shapes = {
        "vision": (vision.num_tokens, vision.num_tokens, (*[vision.num_heads] * 2, vision.width // vision.num_heads)),
        "prefix": (config.prefix_len, config.prefix_len, text),
    }
    if isinstance(config, Pi0):
        shapes["suffix"] = (config.suffix_len, config.prefix_len + config.suffix_len, text)
    on_cpu = backend.device.describe(device)[0].startswith("CPU")
    sizes = sorted({1, setting.config.batch_size})
    for name in backend.attention.BACKENDS:
        compute = Compute(dtype=dtype, attention=name)
        try:
            backend.attention.resolve(compute, device)
        except UserError:  # not on this device
            continue
        if name == "splash" and on_cpu:  # interpreted there, which says nothing
            continue
        for (part, (queries, keys, heads)), count in itertools.product(shapes.items(), sizes):
            size = count * (len(config.cameras) if part == "vision" else 1)
            for backward in (False, True):
                label = f"attention/{name}/{part} x{count}" + ("/with gradients" if backward else "")
                masked = part != "vision"
                try:
                    call = backend.probe.attention(
                        device, compute, size, queries, keys, heads, masked=masked, backward=backward
                    )
                    call()
                except (NotImplementedError, RuntimeError) as error:  # a kernel that doesn't take this shape
                    print(f"  {label}: not measured: {' '.join(str(error).split()):.120}", flush=True)
                    continue
                work = Work(4 * queries * keys * heads[0] * heads[2], 2 * keys * heads[1] * heads[2] * setting.size)
                floor = (size * (3.5 if backward else 1) * work).seconds(setting.rates)
                yield report.times(label, timed(call, setting.repeat, label), floor)


def tokenizer(setting: Setting) -> Iterator[Figure]:
    """Prompts, and chunks of actions as FAST tokens, there and back."""
    config = setting.config
    text = paligemma.load(config.tokenizer)
    prompts = [f"Transfer cube number {i} to the other arm" for i in range(100)]
    taken = timed(lambda: [text.encode_text(p, bos=True) for p in prompts], setting.repeat, "prompts")
    yield Figure("tokenizer/prompts", 100 / float(np.median(taken)), "prompts/s", better="higher")
    actions = fast_tokenizers.load("fast_aloha")
    angle = np.linspace(0, 3, 50)[:, None] + np.random.default_rng(0).uniform(0, 6, (100, 1, 14))
    chunks = (0.9 * np.sin(angle)).astype(np.float32)
    taken = timed(lambda: actions.encode(chunks, out_of_range="nearest"), setting.repeat, "chunks to tokens")
    yield Figure("tokenizer/FAST encode", 100 / float(np.median(taken)), "chunks/s", better="higher")
    tokens = actions.encode(chunks, out_of_range="nearest")
    taken = timed(lambda: actions.decode(tokens, 50, 14), setting.repeat, "tokens to chunks")
    yield Figure("tokenizer/FAST decode", 100 / float(np.median(taken)), "chunks/s", better="higher")


def loader(setting: Setting) -> Iterator[Figure]:
    """Samples per second and core of the data pipeline, three cameras at 224 px; see `openpi_port.data.benchmark`."""
    from openpi_port.data import benchmark as loading  # needs what decodes video; models are measured without

    speed = loading.measure(setting.config.data)
    for name in ("warm", "cold", "uncached"):
        yield Figure(f"loader/{name}", getattr(speed, name), "samples/s per core", better="higher")


def server(setting: Setting) -> Iterator[Figure]:
    """Round trips of three 224 px images through a server whose model takes no time."""
    yield report.times("server/overhead", serving.round_trips(20 * setting.repeat))


def parts_of_a_chunk(config: Pi0 | Pi0Fast, batch: dict[str, Any], setting: Setting) -> dict[str, Work]:
    """Vision, prefix, and one step or token, of what the batch has."""
    size = setting.size
    images = sum(bool(np.any(mask)) for mask in batch["image_mask"].values())
    tokens = images * config.vision.num_tokens + int(batch["tokenized_prompt_mask"].sum(1).max())
    work = {
        "vision": floors.vision(config.vision, config.language.width, images, size),
        "prefix": floors.prefix(config.language, tokens, size, float8=setting.float8),
    }
    if isinstance(config, Pi0):
        return work | {"step": floors.euler_step(config, tokens, size)}
    return work | {"token": floors.token(config, tokens + TOKENS // 2, size, float8=setting.float8)}


def timed(call: Callable[[], Any], repeat: int, what: str) -> list[float]:
    """Seconds of each of `repeat` calls."""
    taken = []
    for _ in tqdm(range(repeat), what, leave=False, delay=2):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return taken


def _one(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """What follows the batch for a chunk of one step or token: (noise, steps) or (tokens,)."""
    return (1,) if isinstance(arguments[1], int) else (arguments[1], 1)
