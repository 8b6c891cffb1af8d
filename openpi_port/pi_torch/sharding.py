"""How training spreads over devices and processes; the model knows nothing of it.

torchrun starts one process per device. With `fsdp` of one, every process holds the whole state, computes as a single
device does, and gradients are added up when the last part of the batch is through. Else FSDP2 splits each layer's
matrices along axis 0 (which can be sent without being rearranged) and gathers a layer when it is needed, in the dtype
in which it computes; `data` copies of that average their gradients among them. Small parameters stay whole: they are
used in float32, and their gradients are averaged together once the others are done.
"""

from __future__ import annotations

import atexit
import datetime
import os
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from openpi_port import memory, meshes
from openpi_port.config import Train
from openpi_port.errors import UserError
from openpi_port.pi_torch import device as devices
from openpi_port.pi_torch import weights as weights_io
from openpi_port.pi_torch.fast.adamw import Rows
from openpi_port.pi_torch.layers import lowered

LARGE = 2**20  # elements of a gradient that is sent by itself
PATIENCE = datetime.timedelta(hours=2)  # with one another; what one process fetches, the others wait for


def join() -> tuple[int, int]:
    """Joins the processes of a run, if its surroundings say that there are several; however it ends, it leaves them.

    That is so under `torchrun`, which sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Returns:
      This process's number, and how many there are.

    Raises:
      UserError: it can't be known which processes belong together, or there is no GPU left for this one.
    """
    env = os.environ
    if int(env.get("WORLD_SIZE", 1)) == 1:
        if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
            raise UserError(
                f"srun started {env['SLURM_NTASKS']} processes that don't know of each other: let srun start one "
                "torchrun per machine (docs/launch.md)"
            )
        return 0, 1
    if not dist.is_initialized():
        device = devices.find(None)
        if device.type == "cuda":
            if device.index >= torch.cuda.device_count():
                raise UserError(
                    f"process {device.index} of this machine finds {torch.cuda.device_count()} GPUs: start one process "
                    "for each (--nproc-per-node=), and let all processes of a machine see all of them"
                )
            torch.cuda.set_device(device)
        backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
        try:
            store, rank, count = next(dist.rendezvous("env://"))
            # With a fixed port, torchrun's next attempt finds the store with the addresses of the one that failed.
            store = dist.PrefixStore(f"attempt {env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
            atexit.register(dist.destroy_process_group)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"the processes of the run don't find each other: {' '.join(str(error).split())}") from None
    return dist.get_rank(), dist.get_world_size()


def barrier(name: str) -> None:
    """Waits until all processes are here.

    Args:
      name: of the place, the same in all.
    """
    del name  # which only JAX wants to know
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


class Vote:
    """Whether any process wants something, without waiting for the answer."""

    def __init__(self) -> None:
        self._asked: tuple[Any, Tensor] | None = None

    def __call__(self, vote: bool) -> bool:
        """Votes; returns what the vote before came to."""
        if not dist.is_initialized():
            return vote
        before, here = self._asked, torch.tensor(float(vote))
        self._asked = dist.all_reduce(here, dist.ReduceOp.MAX, async_op=True), here
        if before is None:
            return False
        before[0].wait()
        return bool(before[1])


class Layout:
    """Where a run's tensors lie.

    Attributes:
      shape: devices along `data` and `fsdp`.
      config: the run, with what is "auto" of what takes memory settled.
      device: this process's.
      parameters: of the model, by name, once it is filled.
      parts: what this device holds of each, sharing its memory; but where the model has a rounded copy, the float32.
      copies: those rounded copies: a device with the whole state rounds what its layers use in bfloat16 once a step.
    """

    def __init__(self, config: Train, device: str | None) -> None:
        """Takes the devices of all processes (each the one of that name, None: its own) as the config says."""
        self.device = devices.find(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # where Triton starts kernels, and whose streams are the current ones
        self._count = dist.get_world_size() if dist.is_initialized() else 1
        self.shape = meshes.shape(config.mesh, self._count, self._count, config.batch_size)
        self.config = config = memory.settle(config, self.shape, devices.describe(self.device)[1])
        self._min_size = config.mesh.min_size
        self._stored_in = partial(meshes.stored_in, config)
        self._compute = config.compute
        self._dtype = torch.bfloat16 if config.compute.dtype == "bfloat16" else None
        self._mesh: DeviceMesh | None = None
        self.parameters: dict[str, nn.Parameter] = {}
        self.parts: dict[str, Tensor] = {}
        self.copies: dict[str, Tensor] = {}

    def fill(self, loss: nn.Module, weights: Mapping[str, np.ndarray]) -> nn.Module:
        """Fills a model, strictly, and spreads it.

        Args:
          loss: a module with the model as its `model`, that computes a loss from this process's part of a batch.
          weights: by torch name.

        Returns:
          What to call instead of `loss`.
        """
        weights_io.load(loss.model, weights, self.device, self._stored_in)
        if self.shape[1] > 1:
            self._split(loss)
        self.parameters = dict(loss.model.named_parameters())
        self.parts = {n: p.detach().to_local() if isinstance(p, DTensor) else p for n, p in self.parameters.items()}
        if self._mesh is None and self._dtype is not None:
            self._round(loss.model)
        return loss

    def place(self, array: np.ndarray, name: str) -> Tensor:
        """This device's part of an array of the host that belongs to the parameter of that name."""
        if isinstance(self.parameters[name], DTensor):
            rows = -(-array.shape[0] // self.shape[1])  # the last device may get fewer
            first = rows * self._mesh["fsdp"].get_local_rank()
            array = array[first : first + rows]
        return torch.tensor(np.asarray(array), device=self.device)

    def put(self, batch: Any) -> Any:
        """This process's part of a batch on its device."""
        return devices.put(batch, self.device)

    def complete(self, grads: Mapping[str, Tensor | Rows], sums: Tensor) -> tuple[list[Tensor | Rows], Tensor]:
        """Brings together the gradients of all devices that are not yet.

        Args:
          grads: by name of the parameter, each device's share of the mean; where a state is split, parts of the mean.
          sums: of those that are parts of one tensor, that tensor.

        Returns:
          This device's parts of them, and their norm over all devices.
        """
        parts = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads.values()]
        split, whole = [], []
        for grad, part in zip(grads.values(), parts, strict=True):
            (split if isinstance(grad, DTensor) else whole).append(part)
        if self._mesh is None:
            inside = sums.untyped_storage().data_ptr()
            single = [p for p in parts if isinstance(p, Tensor) and p.untyped_storage().data_ptr() != inside]
            if self._count > 1:
                _add_up([sums, *single])
            return parts, _norm([sums, *single, *(p.values for p in parts if isinstance(p, Rows))])
        if whole:
            flat = torch.cat([grad.flatten() for grad in whole])
            dist.all_reduce(flat)
            flat /= self._count
            for grad, mean in zip(whole, flat.split([grad.numel() for grad in whole]), strict=True):
                grad.copy_(mean.view_as(grad))
        square = _norm(split).to(self.device).square()
        dist.all_reduce(square, group=self._mesh["fsdp"].get_group())
        return parts, (square + _norm(whole).to(self.device).square()).sqrt()

    def gather(self, parts: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Whole arrays on the host: all of them, or of several processes each gets its share.

        Args:
          parts: this device's; each belongs to the parameter whose name comes after the last "/" of its own.
        """
        likes = {name: self.parameters[name.rpartition("/")[2]] for name in parts}
        mine = meshes.owners({name: like.nbytes for name, like in likes.items()}, self._count)
        rank, found = dist.get_rank() if self._count > 1 else 0, {}
        for name, (part, like) in zip(parts, zip(parts.values(), likes.values(), strict=True), strict=True):
            if isinstance(like, DTensor):
                options = {"run_check": False, "shape": like.shape, "stride": like.stride()}
                part = DTensor.from_local(part, like.device_mesh, like.placements, **options).full_tensor()
            if mine[name] == rank:
                found[name] = devices.get(part)
        return found

    def _split(self, loss: nn.Module) -> None:
        """Splits every layer, and the rest together, in place."""
        # Nothing works in place on what a layer returns: it may be a view.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(self.device.type, self.shape, mesh_dim_names=("data", "fsdp"))
        self._mesh = mesh
        small = {p for p in loss.parameters() if p.numel() < self._min_size}
        options = {"mesh": mesh if self.shape[0] > 1 else mesh["fsdp"], "ignored_params": small}
        layers = [*loss.model.vision.blocks, *loss.model.gemma.layers]
        for module, dtype in [*((layer, self._dtype) for layer in layers), (loss, None)]:
            policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
            fully_shard(module, mp_policy=policy, **options)

    def _round(self, model: nn.Module) -> None:
        """Gives the layers rounded parameters instead of having them round float32 ones at every use."""
        for part in (model.vision.blocks, model.vision.head, model.gemma.layers):
            lowered(part, self._compute)
        self.parameters = dict(model.named_parameters())
        self.copies = {n: p.detach() for n, p in self.parameters.items() if p.dtype == self._dtype}


def _add_up(grads: list[Tensor]) -> None:
    """The sums over all devices, in place."""
    small = [grad for grad in grads if grad.numel() < LARGE]
    large = [part for grad in grads if grad.numel() >= LARGE for part in grad.view(-1).split(2**27)]
    for part in large:
        dist.all_reduce(part)
    if small:
        flat = torch.cat([grad.flatten().float() for grad in small])
        dist.all_reduce(flat)
        for grad, total in zip(small, flat.split([grad.numel() for grad in small]), strict=True):
            grad.copy_(total.view_as(grad))


def _norm(grads: list[Tensor]) -> Tensor:
    """Of all together, in float32: in one launch for each dtype, because that of a mixture is one for each tensor."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for grad in grads:
        for piece in grad.split(2**30) if grad.ndim == 1 else [grad]:  # each of what 32 bits count
            if piece.numel():
                groups.setdefault(piece.dtype, []).append(piece)
    norms = [norm for group in groups.values() for norm in torch._foreach_norm(group, 2, dtype=torch.float32)]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
