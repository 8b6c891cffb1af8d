"""Measures latency and throughput with random weights on the device at hand, beside the least that physics allows.

    python -m experiments.bench --config=pi0_aloha:base --fast --only=inference
    python -m experiments.bench --config=pi0_aloha:mini --config.backend=torch --json=a.json --plot=a.png
    python -m experiments.bench --compare=a.json,b.json
    torchrun --nproc-per-node=2 -m experiments.bench --config=pi0_aloha:base --config.backend=torch --only=train

Inference is the wall clock from an observation in the host's memory to actions in the host's memory; its parts lie on
the device. Times are medians, with the 90th percentile beside them. The floor of a part follows from its shapes and
from the device's bandwidth and matrix products, which are measured first (`experiments/bench_floor.py`).
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from experiments import bench_parts as parts
from experiments import bench_report as report
from experiments import flags
from experiments.bench_errors import errors
from experiments.bench_parts import Setting
from experiments.processes import Processes
from openpi_port.backends import Backend, share_cores
from openpi_port.config import Train
from openpi_port.errors import UserError, near

PARTS: dict[str, Callable[[Setting], Iterator[report.Figure]]] = {
    f.__name__: f
    for f in (
        parts.inference,
        errors,
        parts.realtime,
        parts.train,
        parts.feed,
        parts.attention,
        parts.tokenizer,
        parts.loader,
        parts.server,
    )
}

ONLY = absl_flags.DEFINE_list("only", list(PARTS), f"what to measure: {', '.join(PARTS)}")
REPEAT = absl_flags.DEFINE_integer("repeat", 30, "timed calls", lower_bound=1)
STEPS = absl_flags.DEFINE_integer("steps", 10, "timed training steps", lower_bound=1)
FAST = absl_flags.DEFINE_bool("fast", False, "inference by the prepared model (pi_*/fast/)")
FLOAT8 = absl_flags.DEFINE_bool("float8", False, "as --fast, with products in float8, torch only")
CAMERAS = absl_flags.DEFINE_integer("cameras", None, "that inference sees; default all, of pi0-FAST two", 0)
TOKENS = absl_flags.DEFINE_integer("tokens", None, "of inference's prompt; default all there is room for", 1)
JSON = absl_flags.DEFINE_string("json", None, "also write the figures to this file")
PLOT = absl_flags.DEFINE_string("plot", None, "also draw them, as PNG")
COMPARE = absl_flags.DEFINE_list("compare", None, "two files of --json: print both, measure nothing")


def main() -> int:
    """Measures what `--only` names and prints a table, or compares two earlier runs."""
    if COMPARE.value is not None:
        if len(COMPARE.value) != 2:
            raise UserError("--compare takes two files: --compare=a.json,b.json")
        print(report.compare(*COMPARE.value))
        return 0
    if flags.CONFIG.value is None:
        raise UserError("--config= names no run to take the sizes from (or --compare=a.json,b.json)")
    for name in ONLY.value:
        if name not in PARTS:
            raise UserError(f"--only={name}: {near(name, PARTS)}")
    for flag in (JSON, PLOT):
        if flag.value:  # now, not when all is measured
            Path(flag.value).parent.mkdir(parents=True, exist_ok=True)
    if FAST.value and "train" not in ONLY.value:  # a run would spread over those devices
        share_cores()
    config = flags.config()
    processes = Processes(Backend(config.backend))
    say = processes.say
    fast = FAST.value or FLOAT8.value
    setting = Setting(
        config, parts.rates(config), fast, FLOAT8.value, REPEAT.value, STEPS.value, CAMERAS.value, TOKENS.value
    )
    about = describe(setting)
    say(", ".join(f"{key} {value}" for key, value in about.items() if key != "command"))
    figures: list[report.Figure] = []
    try:
        for figure in measured(setting, ONLY.value):
            figures.append(figure)
            say(f"  {figure.name}: {figure.value:.4g} {figure.unit}")
    except KeyboardInterrupt:
        say(f"{report.table(figures)}\ninterrupted: no file written")
        return 130
    say(report.table(figures))
    if JSON.value and processes.index == 0:
        report.write(JSON.value, about, figures)
    if PLOT.value and processes.index == 0:
        report.plot(PLOT.value, about, figures)
    return 0


def measured(setting: Setting, names: list[str]) -> Iterator[report.Figure]:
    """The figures of the named parts, as they come."""
    for name in names:
        try:
            yield from PARTS[name](setting)
        except UserError as error:  # of one part (no data set, no tokenizer); the others can be measured
            if names == [name]:
                raise
            print(f"  {name}: not measured: {error}", flush=True)
        gc.collect()


def describe(setting: Setting) -> dict[str, Any]:
    """What the figures are of."""
    config, best = setting.config, setting.rates
    backend = Backend(config.backend)
    return {
        "config": config.name,
        "size": config.model.size,
        "backend": config.backend,
        "fast": setting.fast,
        "float8": setting.float8,
        "dtype": config.compute.dtype,
        "batch_size": config.batch_size,
        "device": backend.device.describe(backend.device.find(None))[0],
        "devices": backend.device.count(),
        "bandwidth": f"{best.bytes / 1e9:,.0f} GB/s",
        "products": f"{best.operations / 1e12:.3g} TFLOP/s",
        "versions": _versions(config),
        "day": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python -m experiments.bench", *sys.argv[1:]]),
    }


def _versions(config: Train) -> str:
    names = ("jax", "flax") if config.backend == "flax" else ("torch",)
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


if __name__ == "__main__":
    flags.run(main)
