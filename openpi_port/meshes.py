"""The rules by which a run's tensors lie on devices and processes, the same in both frameworks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from openpi_port.config import Dtype, Mesh, Train
from openpi_port.errors import UserError


def shape(mesh: Mesh, num_devices: int, num_processes: int, batch_size: int) -> tuple[int, int]:
    """The number of copies of the state, and of devices that share one.

    Args:
      mesh: what is asked for.
      num_devices: of all processes together.
      num_processes: of the run.
      batch_size: of all devices together.

    Raises:
      UserError: other numbers of devices than there are, or a batch that doesn't divide among them.
    """
    data = max(1, num_devices // mesh.fsdp) if mesh.data == -1 else mesh.data
    wanted = data * mesh.fsdp
    if wanted > num_devices or (num_processes > 1 and wanted != num_devices):
        raise UserError(
            f"config.mesh: data={data} times fsdp={mesh.fsdp} is {wanted} devices, this run has {num_devices} in "
            f"{num_processes} processes (docs/launch.md says how to start more)"
        )
    if batch_size % wanted:
        raise UserError(
            f"config.batch_size={batch_size} is no multiple of the {wanted} devices: change it, or --config.mesh.data="
        )
    return data, mesh.fsdp


def copied(shape: tuple[int, int]) -> bool:
    """Whether several devices hold the whole state each, and add up gradients."""
    return shape[0] > 1 and shape[1] == 1


def axis(shape: tuple[int, ...], count: int, min_size: int) -> int | None:
    """Which axis of a parameter is split among `count` devices: the largest that divides evenly.

    Returns:
      The axis; None for what stays whole, because it is small or no axis divides.
    """
    if count == 1 or math.prod(shape) < min_size:
        return None
    return max((i for i, n in enumerate(shape) if n % count == 0), key=lambda i: shape[i], default=None)


def canonical(name: str) -> str:
    """The Flax path of a parameter by its name in either framework.

    torch's differ in dots, in the numbers of stacked layers and in `weight` for `kernel`.
    """
    name = re.sub(r"(blocks|layers)/\d+", r"\1", name.replace(".", "/"))
    return re.sub(r"/weight$", "/kernel", name)


def is_frozen(config: Train, name: str) -> bool:
    """Whether a parameter (by its name in either framework) is left out of the training."""
    path = canonical(name)
    return any(re.search(pattern, path) for pattern in config.frozen)


def stored_in(config: Train, name: str) -> Dtype:
    """The dtype in which a parameter (by its name in either framework) is held while training.

    What is trained is float32. What is frozen is rounded beforehand where it is rounded at every use anyway, so that
    nothing changes but the memory: the matrices of the layers and the embedding, when computing in bfloat16.
    """
    rounded = re.search(r"^(vision/blocks|gemma/layers)/.*kernel$|^gemma/embedding$", canonical(name))
    return config.compute.dtype if rounded and is_frozen(config, name) else "float32"


def owners(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Which process writes which tensor, so that all write about the same number of bytes.

    Args:
      sizes: name -> bytes.
      count: of processes.

    Returns:
      Name -> index of a process.
    """
    loads, found = [0] * count, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        index = loads.index(min(loads))
        loads[index] += sizes[name]
        found[name] = index
    return found
