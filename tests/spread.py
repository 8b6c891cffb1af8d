"""A run for `test_sharding.py`, in one of several processes: a few steps, and a checkpoint of each.

python tests/spread.py BACKEND DIRECTORY data=2,fsdp=4 data=8,fsdp=1,microbatches=2 data=1,fsdp=2,adapters=1
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist
from steps import batches, run_config

from configs import pi0_aloha_lora
from convert import tables
from openpi_port import init
from openpi_port.backends import Backend
from openpi_port.config import Compute, Mesh, Train
from openpi_port.fields import build

STEPS = 3


def config(mesh: Mesh, microbatches: int = 1, *, adapters: bool = False) -> Train:
    """A small run in which every parameter with a suitable axis is split; or of LoRA's adapters, in bfloat16."""
    compute = Compute(remat="auto", gradients="auto", dtype="bfloat16" if adapters else "float32")
    run = dataclasses.replace(run_config(), batch_size=8, mesh=mesh, compute=compute, microbatches=microbatches)
    if not adapters:
        return run
    lora = build(Train, pi0_aloha_lora.get_config("debug"))
    return dataclasses.replace(run, model=lora.model, frozen=lora.frozen)


def part(tree, index: int, count: int):
    """A process's part of a batch."""
    if isinstance(tree, dict):
        return {key: part(value, index, count) for key, value in tree.items()}
    size = len(tree) // count
    return tree[index * size : (index + 1) * size]


def train(backend: str, mesh: Mesh, index: int = 0, count: int = 1, microbatches: int = 1, *, adapters: bool = False):
    """Losses and norms of a few steps (and of evaluations, which Flax would compile for long), and the trainer."""
    run = config(mesh, microbatches, adapters=adapters)
    weights = tables.translate(init.Fresh(run.model, 0), run.model, "flax", backend)
    trainer = Backend(backend).train.Trainer(run, weights, "cpu")
    data = [part(batch, index, count) for batch in batches(run, STEPS)]
    metrics, evaluated = [], []
    for batch in data:
        metrics.append(trainer.update(batch))
        if backend == "torch":
            evaluated.append(trainer.evaluate(data[0]))  # of the average; the next step is of the weights again
    return [*(float(m["loss"]) for m in metrics), *(float(m["grad_norm"]) for m in metrics), *evaluated], trainer


def main() -> None:
    """Runs every mesh that the command line names."""
    backend, directory, *meshes = sys.argv[1:]
    if backend == "torch":  # called after all that is registered later
        atexit.register(lambda: (Path(directory) / f"left.{index}").write_text(str(not dist.is_initialized())))
    index, count = Backend(backend).sharding.join()
    Backend(backend).sharding.LARGE = 2**10
    for i, words in enumerate(meshes):
        sizes = {key: int(value) for key, value in (word.split("=") for word in words.split(","))}
        microbatches, adapters = sizes.pop("microbatches", 1), bool(sizes.pop("adapters", 0))
        mesh = Mesh(**sizes, min_size=2**10)
        losses, trainer = train(backend, mesh, index, count, microbatches, adapters=adapters)
        state = trainer.weights() | trainer.train_state()
        np.savez(Path(directory) / f"{i}.{index}.npz", **{k.replace("/", "|"): v for k, v in state.items()})
        (Path(directory) / f"{i}.{index}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
