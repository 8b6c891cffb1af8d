"""The forward and backward pass of training as one launch.

A layer of the action expert computes for a third of a millisecond, and starting its kernels one by one takes longer.
So the second pass is recorded as a CUDA graph, and from then on all of it is one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Losses = dict[str, Tensor]


class Replayed:
    """A pass over batches of one shape.

    Args:
      run: takes a batch, leaves gradients at parameters and returns losses. Looks at no value.
      prepare: makes the gradients what they are to be before a pass; what it allocates stays where it is.
      device: the GPU.

    Attributes:
      stream: where everything runs that makes or adds up gradients.
      warm: whether a pass has been made.
    """

    def __init__(self, run: Callable[[Any], Losses], prepare: Callable[[], None], device: torch.device) -> None:
        self._run, self._prepare = run, prepare
        self.stream = torch.cuda.Stream(device)
        self.warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Any = None
        self._losses: Losses = {}

    @property
    def recorded(self) -> bool:
        """Whether the next pass is a launch of the graph, which leaves gradients where they were."""
        return self._graph is not None

    def warm_up(self, batch: Any) -> Losses:
        """The first pass, which compiles what is to be compiled."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            losses = self._run(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        self.warm = True
        return losses

    def _record(self, batch: Any) -> None:
        """Records a pass without running it."""
        self._prepare()
        self._batch = _each(torch.clone, batch)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph has memory of its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self._losses = self._run(self._batch)
        self._graph = graph

    def __call__(self, batch: Any) -> Losses:
        """A recorded pass; the first call records it."""
        if self._graph is None:
            self._record(batch)
        _each(Tensor.copy_, self._batch, batch)
        self._graph.replay()
        return {name: loss.clone() for name, loss in self._losses.items()}


def _each(function: Callable[..., Tensor], *trees: Any) -> Any:
    """Of nested mappings of tensors."""
    if isinstance(trees[0], Mapping):
        return {key: _each(function, *(tree[key] for tree in trees)) for key in trees[0]}
    return function(*trees)
