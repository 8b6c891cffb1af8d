"""The forward and backward pass of training as one launch.

A layer of the action expert computes for a third of a millisecond, and starting its kernels one by one takes longer.
So the second pass is recorded as a CUDA graph, and from then on all of it is one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class Replayed:
    """A pass over batches of one shape.

    Args:
      run: takes a batch, leaves gradients at parameters and returns nested tensors. Looks at no value.
      prepare: called before the recording, to give gradients their places.
      stream: where everything runs that makes or adds up gradients.
    """

    def __init__(self, run: Callable[[Any], Any], prepare: Callable[[], None], stream: torch.cuda.Stream) -> None:
        self._run, self._prepare, self._stream = run, prepare, stream
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Any = None
        self._made: Any = None

    def of_step(self) -> Callable[[Any], Any]:
        """What makes the passes of the next step: in the first nothing is recorded, because it compiles."""
        return self._replay if self._warm else self._warm_up

    def _warm_up(self, batch: Any) -> Any:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            made = self._run(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        self._warm = True
        return made

    def _replay(self, batch: Any) -> Any:
        if self._graph is None:
            self._record(batch)
        given, recorded = _described(batch), _described(self._batch)
        if given != recorded:  # a copy would repeat, convert or leave out
            raise ValueError(f"the step was recorded for a batch of {recorded}, not of {given}")
        _each(Tensor.copy_, self._batch, batch)
        self._graph.replay()
        return _each(torch.clone, self._made)

    def _record(self, batch: Any) -> None:
        """Records a pass without running it."""
        self._prepare()
        self._batch = _each(torch.clone, batch)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph has memory of its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._made = self._run(self._batch)
        self._graph = graph


def _described(batch: Any) -> Any:
    """Shapes and dtypes of nested mappings of tensors."""
    if isinstance(batch, Mapping):
        return {key: _described(value) for key, value in batch.items()}
    return tuple(batch.shape), batch.dtype


def _each(function: Callable[..., Tensor], *trees: Any) -> Any:
    """Of nested mappings and tuples of tensors."""
    if isinstance(trees[0], Mapping):
        return {key: _each(function, *(tree[key] for tree in trees)) for key in trees[0]}
    if isinstance(trees[0], tuple):
        return tuple(_each(function, *parts) for parts in zip(*trees, strict=True))
    return function(*trees)
