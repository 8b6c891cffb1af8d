"""How training spreads over devices and processes; the model knows nothing of it.

One program runs over a mesh of all devices with the axes `data` and `fsdp`. Batches are split over both; parameters,
moments and averages over `fsdp`, by a rule over their shapes (`meshes.axis`). XLA derives from that what each device
computes and what they tell one another.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from openpi_port import meshes
from openpi_port.config import Train
from openpi_port.errors import UserError
from openpi_port.pi_flax import device as devices
from openpi_port.pi_flax import weights as weights_io


def join() -> tuple[int, int]:
    """Joins the processes of a run, if its surroundings say that there are several, before any device is touched.

    A run has its GPUs for itself: it takes 95 % of their memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    That is so under `srun`, on a TPU, and where JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are set.

    Returns:
      This process's number, and how many there are.

    Raises:
      UserError: it can't be known which processes belong together.
    """
    # JAX takes three quarters of a GPU's memory unless told otherwise; NCCL, cuDNN and the driver need the rest.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    if not jax.distributed.is_initialized() and (options := _surroundings()) is not None:
        try:
            # A process that is gone is noticed after these seconds at the latest.
            jax.distributed.initialize(**options, heartbeat_timeout_seconds=30)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"the processes of the run don't find each other: {' '.join(str(error).split())}") from None
    return jax.process_index(), jax.process_count()


def _surroundings() -> dict[str, Any] | None:
    """What tells the processes of each other; None if there is only this one."""
    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env:
        try:
            return {"num_processes": int(env["JAX_NUM_PROCESSES"]), "process_id": int(env["JAX_PROCESS_ID"])}
        except (KeyError, ValueError):
            raise UserError(
                "JAX_COORDINATOR_ADDRESS is set: JAX_NUM_PROCESSES and JAX_PROCESS_ID must be too, to numbers"
            ) from None
    if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        return {}
    if importlib.util.find_spec("libtpu") and env.get("JAX_PLATFORMS", "tpu").startswith("tpu") and _asks_for_hosts():
        return {}
    if int(env.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "torchrun started several processes, but Flax takes all GPUs of a machine in one: start it without "
            "torchrun, or see docs/launch.md for several machines"
        )
    return None


def _asks_for_hosts() -> bool:
    """Whether JAX can learn of a TPU's other hosts: from Kubernetes' environment, or Google's metadata.

    JAX itself says that the metadata are not to be asked where it finds no chip, when it is imported.
    """
    told = {"TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"} & os.environ.keys()
    return bool(told) or "TPU_SKIP_MDS_QUERY" not in os.environ


def barrier(name: str) -> None:
    """Waits until all processes are here.

    Args:
      name: of the place, the same in all.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class Vote:
    """Whether any process wants something, without waiting for the answer."""

    def __init__(self) -> None:
        self._mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,), devices=jax.devices())
        whole = NamedSharding(self._mesh, PartitionSpec())
        self._any = jax.jit(lambda votes: votes.any(), out_shardings=whole)
        self._asked: jax.Array | None = None

    def __call__(self, vote: bool) -> bool:
        """Votes; returns what the vote before came to."""
        if jax.process_count() == 1:
            return vote
        before, here = self._asked, np.full(jax.local_device_count(), vote)
        split = NamedSharding(self._mesh, PartitionSpec("all"))
        self._asked = self._any(jax.make_array_from_process_local_data(split, here))
        return False if before is None else bool(before)


def _arranged(shape: tuple[int, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in that shape, those that talk most beside each other.

    An axis may be a part of one of a TPU's torus, as 2 x 8 of 4 x 4 chips is, which `jax.make_mesh` refuses.

    Raises:
      UserError: they are no rectangle of a TPU's chips.
    """
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except AssertionError:
        raise UserError(
            f"config.mesh: data={shape[0]} times fsdp={shape[1]}: {len(devices)} chips of this TPU are no rectangle; "
            f"take all, or a power of two"
        ) from None


class Layout:
    """Where a run's tensors lie.

    Attributes:
      shape: devices along `data` and `fsdp`.
      device: one of this process's.
      whole: the sharding of what lies whole on every device.
    """

    def __init__(self, config: Train, device: str | None) -> None:
        """Takes the devices of a platform (None: of the default one) as the config says."""
        found = jax.devices(device)
        self.shape = meshes.shape(config.mesh, len(found), jax.process_count(), config.batch_size)
        self._min_size = config.mesh.min_size
        self._stored_in = partial(meshes.stored_in, config)
        taken = found[: self.shape[0] * self.shape[1]]
        self._mesh = Mesh(_arranged(self.shape, taken), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
        self.device = devices.find(device)
        self.whole = NamedSharding(self._mesh, PartitionSpec())

    def fill(self, module: nnx.Module, weights: Mapping[str, np.ndarray]) -> nnx.Module:
        """Fills a model, strictly, with every device's part of the weights (by Flax path)."""
        return weights_io.load(module, weights, self.place, self._stored_in)

    def place(self, array: np.ndarray) -> jax.Array:
        """An array of the host on the devices, each of which takes its part."""
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, self._sharding(array.shape), lambda index: array[index])

    def put(self, batch: Any) -> Any:
        """This process's part of a batch, as part of the whole one."""
        split = NamedSharding(self._mesh, PartitionSpec(("data", "fsdp")))
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(split, leaf), batch)

    def complete(self, grads: Any) -> jax.Array:
        """The norm of a gradient over all devices; XLA has seen to everything else."""
        return optax.tree.norm(grads)

    def gather(self, arrays: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
        """Whole arrays on the host: all of them, or of several processes each gets its share."""
        mine = meshes.owners({name: array.nbytes for name, array in arrays.items()}, jax.process_count())
        found: dict[str, Any] = {}
        together: Callable[[jax.Array], jax.Array] = jax.jit(lambda array: array, out_shardings=self.whole)
        for name, array in arrays.items():  # one at a time, so that no device needs room for more
            if not array.is_fully_addressable and not array.is_fully_replicated:
                array = together(array)
                array = devices.get(array) if mine[name] == jax.process_index() else None
            if mine[name] == jax.process_index():
                found[name] = array
        return devices.get(found)

    def _sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        axis = meshes.axis(shape, self.shape[1], self._min_size)
        spec = () if axis is None else (None,) * axis + ("fsdp",)
        return NamedSharding(self._mesh, PartitionSpec(*spec))
