"""Trains a policy, in either framework.

    python -m experiments.train --config=pi0_aloha
    python -m experiments.train --config=pi0_aloha:mini --config.backend=torch --config.batch_size=64
    python -m experiments.train --config=pi0_aloha:mini --resume

Ctrl-C or SIGTERM saves a checkpoint and ends; `--resume` goes on as if nothing had happened.
"""

from __future__ import annotations

import math
import resource
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags as absl_flags
from tqdm import tqdm

from experiments import flags
from experiments.metrics import Metrics
from openpi_port import checkpoint, memory, starting
from openpi_port.backends import Backend
from openpi_port.config import Train
from openpi_port.data import material
from openpi_port.errors import UserError

RESUME = absl_flags.DEFINE_bool("resume", False, "go on with the run of this name, from its last checkpoint")
START = time.perf_counter()


def main() -> None:
    """Trains what the command line says."""
    config = flags.config()
    run = Path(config.out) / config.name
    announce(config)
    train(config, run, starting.point(run, config, resume=RESUME.value))


def train(config: Train, run: Path, start: starting.Point) -> None:
    """Trains from a starting point to the last step.

    Args:
      config: the run.
      run: its directory.
      start: step, weights, optimizer state and statistics to begin with.
    """
    backend = Backend(config.backend)
    data = material.load(config, start.norm_stats)
    print(data.describe())
    trainer = backend.train.Trainer(config, start.weights)
    if start.train_state is not None:
        trainer.restore(start.step, start.train_state)
    stop = Stop()
    saver = checkpoint.Saver(run, config.keep_every)
    window = Window(config.batch_size)
    batches = data.batches(start.step)
    with (
        Metrics(run, start.step) as metrics,
        tqdm(total=config.num_steps, initial=start.step, unit="step", dynamic_ncols=True) as bar,
    ):
        while trainer.step < config.num_steps and not stop.asked:
            batch = window.wait_for(batches)
            window.add(trainer.update(batch))
            bar.update()
            step, last = trainer.step, trainer.step == config.num_steps
            if step == start.step + 1:
                window.first(step)
                bar.write(f"first step done {time.perf_counter() - START:.1f} s after the start")
            evaluating = data.has_validation and (step % config.eval_every == 0 or last)
            if step % config.log_every == 0 or evaluating or last or stop.asked:
                numbers = window.numbers(step)
                metrics.write(step, **numbers)
                bar.set_postfix_str(
                    f"loss {numbers['loss']:.4f}, {numbers['samples_per_s']:.1f} samples/s, "
                    f"{numbers['data_wait']:.0%} waiting for data"
                )
            if evaluating:
                loss = float(np.mean([trainer.evaluate(b) for b in data.validation_batches()]))
                metrics.write(step, validation_loss=loss)
                bar.write(f"step {step}: loss {numbers['loss']:.4f}, validation {loss:.4f}")
                window.pause()
            if step % config.save_every == 0 or last or stop.asked:
                window.check(step)  # never save what a bad loss has spoilt
                save(saver, config, data, trainer, backend)
        batches.close()
        saver.wait()
    finish(config, run, trainer.step, backend)


def announce(config: Train) -> None:
    """Says what will run, and refuses what the device can't hold, before anything is fetched or allocated."""
    device = Backend(config.backend).device
    name, room = device.describe(device.find(None))
    plan = memory.plan(config)
    print(
        f"{config.name}: {plan.num_params / 1e6:.1f} M parameters ({config.model.size}), {config.backend} on {name}, "
        f"{config.compute.dtype}\nmemory: about {plan}; the device has {room / memory.GIB:.1f} GiB"
    )
    if plan.total > room:
        raise UserError(
            f"training needs about {plan.total / memory.GIB:.0f} GiB, {name} has {room / memory.GIB:.0f} GiB: try "
            f"a smaller --config.batch_size, --config.compute.remat=full, --config.optimizer.ema=0, "
            f"--config.frozen=\"('^vision',)\" or a smaller --config.model.size"
        )


def save(saver: checkpoint.Saver, config: Train, data: material.Material, trainer: Any, backend: Backend) -> None:
    """Copies the state to the host and has it written in the background."""
    policy = checkpoint.Policy(config, trainer.step, config.backend, data.tokenizer.fingerprint)
    weights, train_state = trainer.weights(), trainer.train_state()

    def fill(directory: Path) -> None:
        if data.sequence is not None:
            data.sequence.fast.save(directory / checkpoint.FAST_TOKENIZER)
        checkpoint.write(
            directory, policy, {name: m.norm_stats for name, m in data.members.items()}, data.tokenizer.content,
            lambda path: backend.weights.write_params(path / backend.weights.PARAMS, weights),
            lambda path: backend.weights.write_params(path / backend.weights.PARAMS, train_state),
        )  # fmt: skip

    saver.save(trainer.step, fill)


def finish(config: Train, run: Path, step: int, backend: Backend) -> None:
    """Says what it took and what to do next."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    device = backend.device.peak(backend.device.find(None))
    print(f"peak memory: host {host / memory.GIB:.1f} GiB" + (f", device {device / memory.GIB:.1f} GiB" * bool(device)))
    path, other = run / str(step), "torch" if config.backend == "flax" else "flax"
    if step < config.num_steps:
        print(f"stopped at step {step}; the same command with --resume goes on")
        return
    print(
        f"checkpoint: {path}\n"
        f"  evaluate: python -m experiments.eval --checkpoint={path} --env=aloha_transfer_cube\n"
        f"  serve:    python -m experiments.serve --checkpoint={path}\n"
        f"  convert:  python -m convert {path} {path}_{other} --to={other}\n"
        f"  go on:    the same command with --resume --config.num_steps={2 * config.num_steps}\n"
        f"  curves:   tensorboard --logdir={run}"
    )


class Stop:
    """Ctrl-C and SIGTERM ask to stop after the step; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.write("stopping after this step; a checkpoint will be saved")


class Window:
    """Times and losses since the last log line; looks at the device only when asked for numbers."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._pending: list[Mapping[str, Any]] = []
        self._steps, self._waited, self._since = 0, 0.0, time.perf_counter()

    def wait_for(self, batches: Any) -> Any:
        """The next batch; the time it takes counts as waiting for data."""
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
        self._steps, self._waited, self._since = 0, 0.0, time.perf_counter()

    def pause(self) -> None:
        """Leaves out of the speed what was done since the last numbers."""
        self._steps, self._waited, self._since = 0, 0.0, time.perf_counter()

    def check(self, step: int) -> None:
        """Raises UserError if a loss since the last numbers was not finite."""
        for i, metrics in enumerate(self._pending):
            if not math.isfinite(float(metrics["loss"])):
                at = step - len(self._pending) + i + 1
                raise UserError(
                    f"the loss of step {at} is {float(metrics['loss'])}: stopped; the last checkpoint is from before. "
                    f"A lower --config.optimizer.peak_lr, or data with outliers, are the usual reasons"
                )

    def numbers(self, step: int) -> dict[str, float]:
        """Means since the last call, samples per second and the share of time spent waiting for data."""
        self.check(step)
        means = {key: float(np.mean([float(m[key]) for m in self._pending])) for key in self._pending[0]}
        elapsed = time.perf_counter() - self._since
        means["samples_per_s"] = self._steps * self._batch_size / elapsed
        means["data_wait"] = self._waited / elapsed
        self._pending = []
        self.pause()
        return means


if __name__ == "__main__":
    flags.run(main)
