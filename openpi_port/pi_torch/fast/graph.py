"""One launch for everything: a computation of one shape as a CUDA graph, between one copy from and one to the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from openpi_port.pi_torch import device as devices

ALIGNED = 256  # bytes, at which every input begins


class Recordings:
    """Computes on numpy arrays: on a GPU recorded, once for every shape of them and what else it hangs on.

    A plain model's thousands of small kernels take ten times longer to launch one by one than to run.

    Args:
      device: where.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[Hashable, Recorded | Session] = {}

    def __len__(self) -> int:
        return len(self._made)

    def clear(self) -> None:
        """Forgets all: a recording knows the weights by where they lie."""
        self._made.clear()

    def run(self, options: Hashable, call: Callable[..., Tensor], arrays: Sequence[np.ndarray]) -> np.ndarray:
        """What `call` makes of tensors with these values; the same call for the same options."""
        if self._device.type != "cuda":
            return call(*devices.put(tuple(arrays), self._device)).cpu().numpy()
        key = options, *((a.shape, a.dtype) for a in arrays)
        if key not in self._made:
            beside = next(iter(self._made.values()), None)
            self._made[key] = Recorded(call, arrays, self._device, beside)
        return self._made[key].run(arrays)

    def decode(self, options: Hashable, make: Callable[[], Writer], arrays: Sequence[np.ndarray]) -> np.ndarray:
        """What a writer writes after these arrays, int32 [B, G]; the same kind of writer for the same options."""
        key = options, *((a.shape, a.dtype) for a in arrays)
        if key not in self._made:
            self._made[key] = Session(make(), arrays, self._device)
        return self._made[key].run(arrays)


class Writer(Protocol):
    """Writes token after token, in tensors that keep their place.

    Attributes:
      tokens: int32 [B, G], what it has written.
      advances: how often it can go on after the beginning.
    """

    tokens: Tensor
    advances: int

    def begin(self, *inputs: Tensor) -> Tensor:
        """Up to the first token that is chosen; whether all samples have ended, bool [1]."""

    def advance(self) -> Tensor:
        """One token more; the same."""


class Session:
    """A writer at work in one shape: on a GPU two recordings, called elsewhere.

    Args:
      writer: see there.
      like: one array per input.
      device: where.
    """

    def __init__(self, writer: Writer, like: Sequence[np.ndarray], device: torch.device) -> None:
        self._writer = writer
        if device.type == "cuda":
            begin = Recorded(writer.begin, like, device, None)
            self._begin, self._wait = begin.launch, begin.wait
            if writer.advances:
                begin.run(like)  # what is recorded next begins with the values that this leaves
                self._advance = Recorded(writer.advance, (), device, begin).launch
        else:
            self._begin = lambda arrays: partial(writer.begin, *devices.put(tuple(arrays), device))
            self._advance, self._wait = lambda: writer.advance, lambda: None

    def run(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Writes until all samples have ended.

        A GPU is given the next token's work before it is known whether there is one, so that it doesn't wait for that.
        What has ended writes zeros, which are there already.
        """
        ended = self._begin(arrays)
        for _ in range(self._writer.advances):
            following = self._advance()
            if ended():
                break
            ended = following
        else:
            ended()
        self._wait()
        return self._writer.tokens.cpu().numpy().copy()


class Recorded:
    """A call on tensors, recorded; runs on numpy arrays of the same shapes and dtypes.

    The copies from and to the host are no part of the graph: between a copy at its beginning and its first kernel the
    GPU would wait until all kernels have been handed over (0.6 ms for a chunk of pi0 on an H100).

    Args:
      call: from tensors on the device to one tensor. Looks at no value, and computes the same whenever it is called.
      like: one array per argument.
      device: the GPU.
      beside: a recording whose memory and stream this one shares; the two never run at once. None for its own.
    """

    def __init__(
        self,
        call: Callable[..., Tensor],
        like: Sequence[np.ndarray],
        device: torch.device,
        beside: Recorded | None,
    ) -> None:
        ends = np.cumsum([-(-a.nbytes // ALIGNED) * ALIGNED for a in like], dtype=int)
        size = int(ends[-1]) if like else 0
        self._pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self._inputs = torch.empty(size, dtype=torch.uint8, device=device)
        parts = [slice(begin, begin + a.nbytes) for begin, a in zip([0, *ends], like, strict=False)]
        host = self._pinned.numpy()
        self._host = [host[part].view(a.dtype).reshape(a.shape) for part, a in zip(parts, like, strict=True)]
        inputs = [
            self._inputs[part].view(torch.from_numpy(view).dtype).view(view.shape)
            for part, view in zip(parts, self._host, strict=True)
        ]
        self._fill(like)
        self._stream = torch.cuda.Stream(device) if beside is None else beside._stream
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            self._inputs.copy_(self._pinned)
            call(*inputs)  # compiles kernels, chooses algorithms, fills caches
            self._stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            pool = None if beside is None else beside._graph.pool()
            how = {"pool": pool, "stream": self._stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(self._graph, **how):
                self._result = made = call(*inputs)
        self._out = deque(torch.empty(made.shape, dtype=made.dtype, pin_memory=True) for _ in range(2))

    def run(self, arrays: Sequence[np.ndarray] = ()) -> np.ndarray:
        """Computes; arrays as those at the beginning."""
        return self.launch(arrays)()

    def launch(self, arrays: Sequence[np.ndarray] = ()) -> Callable[[], np.ndarray]:
        """Begins to compute; what is returned waits for the end, before the launch after the next."""
        self._fill(arrays)
        self._out.rotate()
        out, done = self._out[0], torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            if arrays:
                self._inputs.copy_(self._pinned, non_blocking=True)
            self._graph.replay()
            out.copy_(self._result, non_blocking=True)
            done.record()

        def result() -> np.ndarray:
            done.synchronize()
            return out.numpy().copy()

        return result

    def wait(self) -> None:
        """Until all that was launched has ended."""
        self._stream.synchronize()

    def _fill(self, arrays: Sequence[np.ndarray]) -> None:
        for host, array in zip(self._host, arrays, strict=True):
            host[...] = array


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
