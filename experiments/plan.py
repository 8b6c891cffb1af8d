"""What a run would take of a device's memory, before it is started: `experiments.train --plan`."""

from __future__ import annotations

import dataclasses

from openpi_port import memory
from openpi_port.config import Train
from openpi_port.memory import GIB, Plan

UNITS = {"GiB": GIB, "MiB": 2**20}
# GiB of a chip that its compiler leaves to a program (libtpu 0.0.42).
TPUS = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
PARTS = ("weights", "rounded", "gradients", "optimizer", "average", "activations", "total")


def show(config: Train, shape: tuple[int, int], room: int) -> str:
    """A table of memory per device: the run as it is, and with other settings of `remat` and `microbatches`.

    Args:
      config: the run.
      shape: of the mesh: copies of the state, and devices that share one.
      room: bytes of one device.
    """
    others, config = memory.alternatives(config, shape, room), memory.settle(config, shape, room)
    compute = config.compute
    here = f"as configured: remat={compute.remat} microbatches={config.microbatches} gradients={compute.gradients}"
    rows = [(here, memory.plan(config, shape)), *others]
    unit = "GiB" if rows[0][1].total >= GIB else "MiB"
    lines = [
        f"{config.name}: {rows[0][1].num_params / 1e6:.1f} M parameters, {rows[0][1].num_trained / 1e6:.1f} M trained; "
        f"batch {config.batch_size} on {shape[0]} x {shape[1]} devices of {room / GIB:.1f} GiB, {config.backend}",
        f"{f'{unit} per device':58}" + "".join(f"{part:>12}" for part in PARTS),
        *(
            _row(name.replace("--config.compute.", "").replace("--config.", ""), plan, room, unit)
            for name, plan in rows
        ),
        f"largest batch that fits as configured: {memory.largest_batch(config, shape, room)}",
    ]
    sharing = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ema=0.0))
    if config.optimizer.ema:
        saved = rows[0][1].total - memory.plan(sharing, shape).total
        lines.append(
            f"without the average of the weights (--config.optimizer.ema=0): {saved / UNITS[unit]:.1f} {unit} less"
        )
    return "\n".join(lines)


def advice(config: Train, shape: tuple[int, int], room: int) -> str:
    """What to change so that a run fits."""
    for flags, plan in memory.alternatives(config, shape, room):
        if plan.total <= 0.97 * room:
            return f"try {flags}"
    smaller = memory.largest_batch(memory.settle(config, shape, room), shape, room)
    batch = f"--config.batch_size={smaller}" if smaller else "a smaller --config.model.size"
    return (
        f"try {batch}, --config.optimizer.ema=0, --config.frozen=\"('^vision',)\" or more devices (--config.mesh.fsdp)"
    )


def _row(name: str, plan: Plan, room: int, unit: str) -> str:
    numbers = "".join(f"{getattr(plan, part) / UNITS[unit]:12.2f}" for part in PARTS)
    return f"{name:58}{numbers}{'' if plan.total <= room else '  does not fit'}"
