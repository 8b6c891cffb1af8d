"""One launch for everything: a computation of one shape as a CUDA graph, with its copies from and to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


class Recorded:
    """A call on tensors, recorded; runs on numpy arrays of the same shapes and dtypes.

    Args:
      call: from tensors on the device to one tensor. Looks at no value, and computes the same whenever it is called.
      like: one array per argument.
      device: the GPU.
      pool: that of another recording, whose memory this one shares; the two never run at once. None for one of its own.

    Attributes:
      pool: see there.
    """

    def __init__(
        self,
        call: Callable[..., Tensor],
        like: Sequence[np.ndarray],
        device: torch.device,
        pool: tuple[int, int] | None,
    ) -> None:
        pinned = [torch.from_numpy(np.require(a, requirements=["C", "W"])).pin_memory() for a in like]
        self._host = [p.numpy() for p in pinned]
        inputs = [p.to(device) for p in pinned]
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            out = call(*inputs)  # compiles kernels, chooses algorithms, fills caches
            self._out = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
            del out
            self._stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            how = {"pool": pool, "stream": self._stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(self._graph, **how):
                for tensor, source in zip(inputs, pinned, strict=True):
                    tensor.copy_(source, non_blocking=True)
                self._out.copy_(call(*inputs), non_blocking=True)
        self.pool = self._graph.pool()
        self._keep = (inputs, pinned)  # the graph reads them

    def run(self, arrays: Sequence[np.ndarray] = ()) -> np.ndarray:
        """Computes; arrays as those at the beginning."""
        for host, array in zip(self._host, arrays, strict=True):
            host[...] = array
        with torch.cuda.stream(self._stream):
            self._graph.replay()
        self._stream.synchronize()
        return self._out.numpy().copy()


def recorded(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """A call without arguments as a graph; what is returned runs it once and waits for its end."""
    call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def run() -> None:
        graph.replay()
        torch.cuda.synchronize(device)

    return run
