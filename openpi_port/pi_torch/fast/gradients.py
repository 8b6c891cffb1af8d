"""Where a training step's gradients lie, and how they are added up over the parts of a batch.

What layers use in bfloat16 may have sums beside it, all of them pieces of one tensor, to which products add as they
multiply (`products`). Of an embedding that is only looked up there are the rows that were. The rest autograd adds up.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openpi_port.pi_torch import device as devices
from openpi_port.pi_torch.fast import adamw

_EMBEDDING = "gemma.embedding"


class Gradients:
    """The gradients of a model's trained parameters.

    Args:
      model: the model.
      parameters: those that are trained, by name, as the model uses them.
      summed: the names of those that get sums.
      dtype: of the sums.
      parts: of a batch, a pass each.
      sparse: whether the embedding is only looked up.

    Attributes:
      together: the sums as one tensor, empty if there are none.
      by_rows: the name of the parameter whose gradient is `adamw.Rows`, if there is one.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        summed: Collection[str],
        dtype: torch.dtype,
        parts: int,
        *,
        sparse: bool,
    ) -> None:
        self._parameters, self._parts, self._stays = parameters, parts, False
        self.by_rows = _EMBEDDING if sparse and _EMBEDDING in parameters else None
        model.gemma.sparse = self.by_rows is not None
        device = next(iter(parameters.values())).device
        self.together, self._sums = _together({n: p for n, p in parameters.items() if n in summed}, dtype, device)
        for name, total in self._sums.items():
            owner, _, leaf = name.rpartition(".")
            if leaf == "weight":
                model.get_submodule(owner).total = total
            else:
                parameters[name].register_post_accumulate_grad_hook(partial(_add_up, total))
        elsewhere = {*self._sums, self.by_rows}
        self._autograd = {name: p for name, p in parameters.items() if name not in elsewhere}  # adds these up

    def stay(self) -> None:
        """Gives gradients their place for good: a recorded pass writes to it, or adds if it is one of several."""
        self._stays = True
        for parameter in self._autograd.values():
            parameter.grad = torch.zeros_like(parameter) if self._parts > 1 else None

    def take_rows(self) -> tuple[Tensor, ...]:
        """After a pass, of an embedding that is only looked up: which rows, int [N], and their gradients [N, D]."""
        if self.by_rows is None:
            return ()
        embedding = self._parameters[self.by_rows]
        rows, embedding.grad = embedding.grad, None
        return rows._indices()[0], rows._values()

    def complete(self, rows: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor | adamw.Rows]:
        """All gradients by name, after the last pass; `rows` is what `take_rows` gave after each."""
        found: dict[str, Tensor | adamw.Rows] = dict(self._sums)
        for name, parameter in self._autograd.items():
            # What the loss doesn't reach still decays, as in optax.
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if self.by_rows is not None:
            indices, values = (torch.cat(x) for x in zip(*rows, strict=True))
            if devices.count() > 1:
                indices, values = (_of_all_devices(x) for x in adamw.once(indices, values))
            size = len(self._parameters[self.by_rows])
            found[self.by_rows] = adamw.rows(indices, values, size, devices.count())
        return {name: found[name] for name in self._parameters}

    def clear(self) -> None:
        """After a step, or what was done of one."""
        self.together.zero_()
        if self.by_rows is not None:
            self._parameters[self.by_rows].grad = None
        if not self._stays:
            for parameter in self._autograd.values():
                parameter.grad = None
        elif self._parts > 1 and self._autograd:
            torch._foreach_zero_([parameter.grad for parameter in self._autograd.values()])


def _together(like: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Zeros in the shapes of named tensors, as pieces of one tensor; and that tensor."""
    sizes = [-(-x.numel() // 128) * 128 for x in like.values()]  # so that all begin where reading is fastest
    whole = torch.zeros(sum(sizes), dtype=dtype, device=device)
    pieces = zip(whole.split(sizes), like.items(), strict=True)
    # As data: autograd would take a change of one for a change of all.
    return whole, {name: piece[: x.numel()].view_as(x).data for piece, (name, x) in pieces}


def _add_up(total: Tensor, parameter: Tensor) -> None:
    """Moves a pass's gradient into the sum."""
    total += parameter.grad
    parameter.grad = None


def _of_all_devices(part: Tensor) -> Tensor:
    """Those of all devices, one after another."""
    parts = [torch.empty_like(part) for _ in range(devices.count())]
    dist.all_gather(parts, part)
    return torch.cat(parts)
