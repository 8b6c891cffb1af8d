"""Requests of several clients gathered into one pass of the model.

While the model computes, requests queue up, and the next pass takes all of them. A request that comes while the model
is idle waits only for other connected clients, and never longer than `wait_s`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openpi_port.serving.metrics import Metrics

Infer = Callable[[Sequence[Any]], Sequence[Any]]


class Batcher:
    """Calls a function with lists of requests, in one thread, so that the event loop never waits.

    Args:
      infer: requests to results, in order; blocks.
      expected: how many requests could be there at once (connected clients).
      metrics: told the size and time of every pass.
      max_batch: requests per pass.
      wait_s: longest wait for company.
    """

    def __init__(
        self, infer: Infer, expected: Callable[[], int], metrics: Metrics, *, max_batch: int, wait_s: float
    ) -> None:
        self._infer, self._expected, self._metrics = infer, expected, metrics
        self._max_batch, self._wait_s = max_batch, wait_s
        self._queue: asyncio.Queue[tuple[Any, asyncio.Future[Any]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task = asyncio.create_task(self._run())

    async def __call__(self, request: Any) -> Any:
        """The result of one request; raises what `infer` raises for it."""
        future = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((request, future))
        return await future

    async def close(self) -> None:
        """Ends after the pass that is under way."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        while not self._queue.empty():
            self._queue.get_nowait()[1].cancel()
        await asyncio.to_thread(self._thread.shutdown)

    async def _run(self) -> None:
        while True:
            batch = [await self._queue.get()]
            await self._gather(batch)
            batch = [(request, future) for request, future in batch if not future.done()]  # who gave up is left out
            if batch:
                await self._compute(batch)

    async def _gather(self, batch: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._wait_s
        while len(batch) < self._max_batch:
            if not self._queue.empty():
                batch.append(self._queue.get_nowait())
            elif len(batch) >= self._expected() or loop.time() >= end:
                return
            else:
                try:
                    async with asyncio.timeout_at(end):
                        batch.append(await self._queue.get())
                except TimeoutError:
                    return

    async def _compute(self, batch: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        loop = asyncio.get_running_loop()
        start = time.perf_counter()
        requests = [request for request, _ in batch]
        try:
            results = await loop.run_in_executor(self._thread, self._infer, requests)
        except Exception as error:
            if len(batch) > 1:  # whoever is to blame, the others get their answers
                for one in batch:
                    await self._compute([one])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        self._metrics.infer_seconds.add(time.perf_counter() - start)
        self._metrics.batch_size.add(len(batch))
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)
