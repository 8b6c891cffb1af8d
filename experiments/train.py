"""Trains a policy, in either framework.

    python -m experiments.train --config=pi0_aloha
    python -m experiments.train --config=pi0_aloha:mini --config.backend=torch --config.batch_size=64
    python -m experiments.train --config=pi0_aloha:mini --resume

Ctrl-C or SIGTERM saves a checkpoint and ends; `--resume` goes on as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags as absl_flags
from tqdm import tqdm

from experiments import flags
from experiments import plan as plans
from experiments.metrics import Metrics
from experiments.processes import Processes, SharedError, Stop
from openpi_port import checkpoint, memory, meshes, starting
from openpi_port.backends import Backend
from openpi_port.base import Base
from openpi_port.config import Train
from openpi_port.data import material
from openpi_port.errors import UserError

RESUME = absl_flags.DEFINE_bool("resume", False, "go on with the run of this name, from its last checkpoint")
RESUME_IF_ANY = absl_flags.DEFINE_bool(
    "resume_if_any", False, "go on if there is a checkpoint, else start: for what runs the same command again"
)
PLAN = absl_flags.DEFINE_bool("plan", False, "only say how much memory the run would take")
PLAN_GIB = absl_flags.DEFINE_float("plan_gib", None, "for --plan: memory of a device; by default of the one at hand")
PLAN_TPU = absl_flags.DEFINE_enum("plan_tpu", None, list(plans.TPUS), "for --plan: of a TPU that is not at hand")
START = time.perf_counter()


def main() -> None:
    """Trains what the command line says."""
    config = flags.config()
    if PLAN.value:
        show_plan(config)
        return
    run = Path(config.out) / config.name
    processes = Processes(Backend(config.backend))
    with processes.end_together():
        announce(config, processes)
        resume = RESUME.value or ((RESUME_IF_ANY.value or restarted()) and bool(checkpoint.steps(run)))
        train(config, run, processes.in_turn("start", lambda: starting.point(run, config, resume=resume)))


def restarted() -> bool:
    """Whether torchrun or SLURM has started this command again after a failure."""
    return any(int(os.environ.get(f"{name}_RESTART_COUNT", 0)) for name in ("TORCHELASTIC", "SLURM"))


def train(config: Train, run: Path, start: starting.Point) -> None:
    """Trains from a starting point to the last step.

    Args:
      config: the run.
      run: its directory.
      start: step, weights, optimizer state and statistics to begin with.
    """
    backend = Backend(config.backend)
    processes = Processes(backend)
    process = processes.index, processes.count
    data = processes.in_turn("data", lambda: material.load(config, start.norm_stats))
    processes.say(data.describe())
    trainer = backend.train.Trainer(config, start.weights)
    if start.train_state is not None:
        trainer.restore(start.step, start.train_state)
    stop, stopping = Stop(backend), False
    saver = checkpoint.Saver(run, config.keep_every, process)
    window = Window(run, data)
    batches = data.batches(start.step, process)
    with (
        Metrics(None if processes.index else run, start.step) as metrics,
        tqdm(
            total=config.num_steps, initial=start.step, unit="step", dynamic_ncols=True, disable=processes.index > 0
        ) as bar,
        saver,
    ):
        while trainer.step < config.num_steps and not stopping:
            batch = window.wait_for(batches)
            window.add({**trainer.update(batch), **lost(batch)})
            stopping = stop.asked()
            bar.update()
            step, last = trainer.step, trainer.step == config.num_steps
            if step == start.step + 1:
                window.first(step)
                processes.say(f"first step done {time.perf_counter() - START:.1f} s after the start")
            evaluating = data.has_validation and (step % config.eval_every == 0 or last)
            if step % config.log_every == 0 or evaluating or last or stopping:
                numbers = window.numbers(step)
                metrics.write(step, **numbers)
                bar.set_postfix_str(
                    f"loss {numbers['loss']:.4f}, {numbers['samples_per_s']:.1f} samples/s, "
                    f"{numbers['data_wait']:.0%} waiting for data"
                )
            if evaluating:
                losses = data.validate(trainer.evaluate, process)
                metrics.write(step, **losses)
                processes.say(f"step {step}: loss {numbers['loss']:.4f}, validation {losses['validation_loss']:.4f}")
                window.pause()
            if step % config.save_every == 0 or last or stopping:
                window.check(step)  # never save what a bad loss has spoilt
                save(saver, config, data, trainer, backend, process, start.base)
        batches.close()
    if processes.index == 0:
        finish(config, run, trainer.step, backend)


def announce(config: Train, processes: Processes) -> None:
    """Says what will run, and refuses what the device can't hold, before anything is fetched or allocated."""
    backend = Backend(config.backend)
    device = backend.device
    kind, (name, room) = device.kind(device.find(None)), device.describe(device.find(None))
    attention = backend.attention.resolve(config.compute, device.find(None)).attention
    num_devices = device.count()
    shape = meshes.shape(config.mesh, num_devices, processes.count, config.batch_size)
    several = f"{shape[0]} x {shape[1]} times " if shape != (1, 1) else ""
    config = memory.written(config, kind)
    settled = memory.settle(config, shape, room)
    plan, remat, parts = memory.plan(settled, shape), settled.compute.remat, settled.microbatches
    processes.say(
        f"{config.name}: {plan.num_params / 1e6:.1f} M parameters ({config.model.size}), {config.backend} on "
        f"{several}{name}, {config.compute.dtype}, attention {attention}, remat {remat}, "
        f"{parts} part{'s' * (parts > 1)} a batch\nmemory per device: about {plan}; "
        f"it has {room / memory.GIB:.1f} GiB"
    )
    if plan.total > room:
        raise UserError(
            f"training needs about {plan.total / memory.GIB:.0f} GiB, {name} has {room / memory.GIB:.0f} GiB: "
            f"{plans.advice(config, shape, room)}"
        )


def show_plan(config: Train) -> None:
    """Says what the run would take, of the devices that the config asks for."""
    device = Backend(config.backend).device
    if PLAN_TPU.value:
        if PLAN_GIB.value or config.backend == "torch":
            raise UserError("--plan_tpu says how much memory there is, and is for Flax: leave out --plan_gib and torch")
        kind, room = "tpu", int(plans.TPUS[PLAN_TPU.value] * memory.GIB)
    else:
        kind, (_, room) = device.kind(device.find(None)), device.describe(device.find(None))
        if PLAN_GIB.value:  # on a machine without an accelerator, of a GPU
            kind, room = "gpu" if kind == "cpu" else kind, int(PLAN_GIB.value * memory.GIB)
    config = memory.written(config, kind)
    print(plans.show(config, (max(config.mesh.data, 1), config.mesh.fsdp), room))


def save(
    saver: checkpoint.Saver,
    config: Train,
    data: material.Material,
    trainer: Any,
    backend: Backend,
    process: tuple[int, int],
    base: Base | None,
) -> None:
    """Copies the state to the host and has it written in the background; of several processes each does its part."""
    saver.wait()  # before there is a second copy
    policy = checkpoint.Policy(config, trainer.step, config.backend, data.tokenizer.fingerprint, base)
    files = {"": trainer.weights(only_trained=base is not None), checkpoint.TRAIN_STATE: trainer.train_state()}
    weights = backend.weights

    def fill(directory: Path) -> None:
        (directory / checkpoint.TRAIN_STATE).mkdir(exist_ok=True)
        for folder, tensors in files.items():
            weights.write_params(directory / folder / weights.PARAMS, tensors, process)

    def seal(directory: Path) -> None:
        for folder in files:
            weights.seal_params(directory / folder / weights.PARAMS, process[1])
        if data.sequence is not None:
            data.sequence.fast.save(directory / checkpoint.FAST_TOKENIZER)
        stats = {name: member.norm_stats for name, member in data.members.items()}
        checkpoint.describe(directory, policy, stats, data.tokenizer.content)

    saver.save(trainer.step, fill, seal)


def finish(config: Train, run: Path, step: int, backend: Backend) -> None:
    """Says what it took and what to do next."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    device = backend.device.peak(backend.device.find(None))
    print(f"peak memory: host {host / memory.GIB:.1f} GiB" + (f", device {device / memory.GIB:.1f} GiB" * bool(device)))
    path, other = run / str(step), "torch" if config.backend == "flax" else "flax"
    if step < config.num_steps:
        print(f"stopped at step {step}; the same command with --resume goes on")
        return
    env = "aloha_transfer_cube" if config.data.robot == "aloha_sim" else "dataset"
    print(
        f"checkpoint: {path}\n"
        f"  evaluate: python -m experiments.eval --checkpoint={path} --env={env}\n"
        f"  serve:    python -m experiments.serve --checkpoint={path}\n"
        f"  convert:  python -m convert {path} {path}_{other} --to={other}\n"
        f"  go on:    the same command with --resume --config.num_steps={2 * config.num_steps}\n"
        f"  curves:   tensorboard --logdir={run}"
    )


def lost(batch: Mapping[str, Any]) -> dict[str, float]:
    """What FAST tokens lose of a batch's actions: coefficients clipped per chunk, and the share of chunks cut."""
    return {key: float(np.mean(batch[key])) for key in ("actions_clipped", "actions_cut") if key in batch}


class Window:
    """Times and losses since the last log line; looks at the device only when asked for numbers."""

    def __init__(self, run: Path, data: material.Material) -> None:
        self._run, self._data = run, data
        self._pending: list[Mapping[str, Any]] = []
        self._steps, self._waited, self._since = 0, 0.0, time.perf_counter()

    def wait_for(self, batches: Any) -> Any:
        """The next batch; the time it takes counts as waiting for data once the device has nothing left to do."""
        if not batches.ready() and self._pending:
            float(self._pending[-1]["loss"])
        begin = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - begin
        return batch

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a step, which may still be being computed."""
        self._pending.append(metrics)
        self._steps += 1

    def first(self, step: int) -> None:
        """Waits for the first step, which compiled, and leaves it out of the speed."""
        self.check(step)
        self.pause()

    def pause(self) -> None:
        """Leaves out of the speed what was done since the last numbers."""
        self._steps, self._waited, self._since = 0, 0.0, time.perf_counter()

    def check(self, step: int) -> None:
        """Raises SharedError if a loss or gradient since the last numbers was not finite; says of which samples."""
        for i, metrics in enumerate(self._pending):
            bad = next((key for key in ("loss", "grad_norm") if not math.isfinite(float(metrics[key]))), None)
            if bad is not None:
                at = step - len(self._pending) + i + 1
                value, samples = float(metrics[bad]), self._data.samples(at)
                file = self._run / f"bad_batch_{at}.json"
                report = {
                    "step": at,
                    bad: str(float(metrics[bad])),
                    "samples": [dataclasses.asdict(s) for s in samples],
                }
                file.write_text(json.dumps(report, indent=1) + "\n")
                raise SharedError(
                    f"the {bad} of step {at} is {value}: stopped; the last checkpoint is from before. "
                    f"The batch: {', '.join(map(str, samples[:3]))}"
                    f"{f' and {len(samples) - 3} more' if len(samples) > 3 else ''}, listed in {file}. "
                    f"Outliers in the data, or too high a --config.optimizer.peak_lr, are the usual reasons"
                )

    def numbers(self, step: int) -> dict[str, float]:
        """Means since the last call, samples per second and the share of time spent waiting for data."""
        self.check(step)
        means = {key: float(np.mean([float(m[key]) for m in self._pending])) for key in self._pending[0]}
        elapsed = time.perf_counter() - self._since
        means["samples_per_s"] = self._steps * self._data.config.batch_size / elapsed
        means["data_wait"] = self._waited / elapsed
        self._pending = []
        self.pause()
        return means


if __name__ == "__main__":
    flags.run(main)
