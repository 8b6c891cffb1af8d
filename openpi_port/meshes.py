"""The rules by which a run is spread over devices and processes, the same in both frameworks."""

from __future__ import annotations

import math
from collections.abc import Mapping

from openpi_port.config import Mesh
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


def axis(shape: tuple[int, ...], count: int, min_size: int) -> int | None:
    """Which axis of a parameter is split among `count` devices: the largest that divides evenly.

    Returns:
      The axis; None for what stays whole, because it is small or no axis divides.
    """
    if count == 1 or math.prod(shape) < min_size:
        return None
    return max((i for i, n in enumerate(shape) if n % count == 0), key=lambda i: shape[i], default=None)


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
