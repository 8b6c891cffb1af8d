"""Batches for training and validation: data sets' samples, transformed, augmented, stacked, in a fixed random order.

Batch k of a run is a pure function of (seed, k). Sample i of the run (k * batch_size + its place in the batch) is row
`shuffle(i)` of the data set, or of several that are mixed, sample j of one of them (mixture.py says which) is its row
`shuffle(j)`; noise, time and augmentation are keyed by i. So nothing has to be saved for a resume but the step, and the
number of workers or processes changes nothing. grain does the shuffling (an index permutation that needs no memory),
the worker processes and the order of their results.

B batch, A actions, J action dim, H W pixels.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import multiprocessing.connection
import os
import queue
import re
import signal
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import cv2
import grain
import numpy as np
from absl import flags

from openpi_port import transforms
from openpi_port.augment import Kind, augment
from openpi_port.data.mixture import Shares
from openpi_port.errors import UserError
from openpi_port.realtime import own_times
from openpi_port.rng import draw_delay, draw_noise, draw_time, generator

Batch = dict[str, Any]
ENDLESS = 2**48  # samples
READ_AHEAD = 2  # batches
MAX_THREADS = 8  # without workers; beyond that Python's lock is the limit


class RandomAccess(Protocol):
    """What a data set has to offer."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Part:
    """A data set of a run, and how its samples are made.

    Attributes:
      dataset: raw samples; must pickle if there are workers.
      steps: raw sample to the model's, without randomness.
      weight: its share of the samples, relative to the other parts'.
      augment: see `openpi_port.augment`.
      state_noise: f32 [J], standard deviation of noise added to the normalised state, also where that is written into
        the prompt; None for none.
    """

    dataset: RandomAccess
    steps: Sequence[transforms.Transform]
    weight: float = 1.0
    augment: Kind = "default"
    state_noise: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class _MakeSample:
    """Row of the data set and index in the run to what is stacked. Travels to the workers."""

    dataset: RandomAccess
    steps: tuple[transforms.Transform, ...]
    seed: int
    augment: Kind
    noise_shape: tuple[int, ...]
    max_delay: int = 0
    state_noise: np.ndarray | None = None

    def __call__(self, index: int, row: int) -> dict[str, Any]:
        index = int(index)
        cut = next((i + 1 for i, s in enumerate(self.steps) if isinstance(s, transforms.Normalize)), len(self.steps))
        sample = transforms.forward(self.steps[:cut], self.dataset[int(row)])
        if self.state_noise is not None:  # before the state may be written into the prompt
            state = sample["state"]
            noise = generator(self.seed, index, "state").standard_normal(state.shape, np.float32)
            sample = {**sample, "state": state + self.state_noise[: len(state)] * noise}
        sample = transforms.forward(self.steps[cut:], sample)
        # Cameras that the robot lacks stay black.
        mask = sample.get("image_mask", {})
        seen = {camera: image for camera, image in sample["image"].items() if mask.get(camera, True)}
        changed = augment(seen, self.augment, generator(self.seed, index, "augment"))
        time = draw_time(self.seed, index, self.noise_shape[:-2])
        if self.max_delay:  # one real action at least is left to learn
            real = int((~sample["action_is_pad"]).sum())
            delay = min(draw_delay(self.seed, index, self.max_delay), real - 1)
            time = own_times(time, delay, self.noise_shape[-2])
        return {
            **sample,
            "image": {camera: changed.get(camera, image) for camera, image in sample["image"].items()},
            "noise": draw_noise(self.seed, index, self.noise_shape),
            "time": time,
        }


@dataclasses.dataclass(frozen=True)
class _MakeAny:
    """The same for several data sets: (which, row) instead of the row."""

    makers: tuple[_MakeSample, ...]

    def __call__(self, index: int, place: tuple[int, int]) -> dict[str, Any]:
        number, row = place
        return self.makers[number](index, row)


@dataclasses.dataclass(frozen=True)
class _Mix:
    """Index in the run to (which data set, row)."""

    shares: Shares
    rows: tuple[grain.MapDataset[int], ...]

    def __call__(self, index: int) -> tuple[int, int]:
        number, index = self.shares.place(int(index))
        return number, self.rows[number][index]


class Batches:
    """An iterator over batches of numpy arrays, the next of which are read ahead in a thread.

    Workers end with `close`, with the program, or with its death.
    """

    def __init__(self, source: grain.IterDataset):
        self._ahead = _Ahead(iter(source))
        # Also runs when the program ends, while the modules that closing needs are still there.
        self._finalizer = weakref.finalize(self, self._ahead.close)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._ahead.take()

    def ready(self) -> bool:
        """Whether the next batch is there already."""
        return self._ahead.ready()

    def close(self) -> None:
        """Ends workers and threads; the iterator is exhausted then."""
        self._finalizer()


class _Ahead:
    """Reads an iterator in a thread, so that neither workers nor copies of their batches hold up who takes them."""

    def __init__(self, iterator: grain.DatasetIterator) -> None:
        self._iterators = [iterator]
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(READ_AHEAD)
        self._closed = threading.Event()
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def ready(self) -> bool:
        return not self._queue.empty()

    def take(self) -> Batch:
        if self._closed.is_set():
            raise StopIteration
        if self._end is None:
            item = self._queue.get()
            if not isinstance(item, BaseException):
                return item
            self._end = item  # what ended the thread ends every later call too
        died = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(self._end))
        if died is not None:
            raise UserError(_why(int(died[1]))) from self._end
        raise self._end

    def close(self) -> None:
        """Ends the thread, waiting for a batch at most, then the workers."""
        self._closed.set()
        if threading.current_thread() is not self._thread:  # a collection of garbage may call this in any thread
            self._thread.join()
            self._end_workers()

    def _end_workers(self) -> None:
        if not self._iterators:
            return
        while self._iterators:
            self._iterators.pop().close()
        # grain's iterators refer to one another, close themselves once more when they are collected, and complain if
        # that is when the interpreter is half gone.
        gc.collect()

    def _read(self) -> None:
        self._fill()
        if self._closed.is_set():  # in this thread, or by one that does the same
            self._end_workers()

    def _fill(self) -> None:
        """Reads until the end or `close`; holds no batch of the workers' afterwards."""
        try:
            for batch in self._iterators[0]:
                # Arrays from workers lie in shared memory that is unmapped with them; the framework may still be
                # copying to the device then, so it gets memory of its own.
                if not self._put(_map_leaves(np.array, batch)):
                    return
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException) -> bool:
        """Waits for room in the queue; False if nobody wants the item any more."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False


def train_batches(
    parts: Sequence[Part],
    *,
    batch_size: int,
    seed: int,
    action_dim: int,
    action_horizon: int,
    draws: int = 1,
    max_delay: int = 0,
    start_step: int = 0,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Endless batches, each epoch of a data set in its own order.

    Args:
      parts: one data set, or several to mix; samples of all have leaves of the same shapes.
      batch_size: B, of all processes together.
      seed: of order, noise, time and augmentation.
      action_dim, action_horizon: J and A of the noise.
      draws: R; above 1, every sample brings R draws of noise and time.
      max_delay: above 0, actions have times of their own: 0 for the first ones, up to so many, drawn per sample.
      start_step: the first batch's number; where a resumed run goes on.
      num_workers: processes of this process that load; 0 loads in threads. A program that uses workers must
        guard its start with `if __name__ == "__main__"`, because workers import its main module.
      process_index, process_count: of a run over several processes; each gets its B / process_count samples, in
        order, of every batch.

    Returns:
      Batches with every leaf of a sample stacked, and "noise" f32 [B,A,J], "time" f32 [B]; with several draws
      [B,R,A,J] and [B,R]; with `max_delay` times have a last axis A.

    Raises:
      UserError: B does not divide among the processes; while iterating, anything wrong with the data, or a worker
        that died.
    """
    shape = _noise_shape(draws, action_horizon, action_dim)
    makers = [_MakeSample(p.dataset, tuple(p.steps), seed, p.augment, shape, max_delay, p.state_noise) for p in parts]
    return _batches(places(parts, seed), makers, batch_size, start_step, num_workers, process_index, process_count)


def places(parts: Sequence[Part], seed: int) -> grain.MapDataset[tuple[int, int]]:
    """Index of a sample in a run to (which data set, row); every epoch has its own order."""
    rows = []
    for number, part in enumerate(parts):
        # As good as endless. grain's own endless length overflows once it is divided by the size of a batch of one.
        epochs = max(1, ENDLESS // max(1, len(part.dataset)))
        # The first is shuffled as it would be alone; the others not alike, should they be equally long.
        own = seed if number == 0 else generator(seed, number, "mixture").integers(2**32)
        rows.append(grain.MapDataset.range(len(part.dataset)).shuffle(seed=int(own) % 2**32).repeat(epochs))
    return grain.MapDataset.range(ENDLESS).map(_Mix(Shares([part.weight for part in parts]), tuple(rows)))


def eval_batches(
    part: Part,
    *,
    batch_size: int,
    seed: int,
    action_dim: int,
    action_horizon: int,
    draws: int = 1,
    max_delay: int = 0,
    num_batches: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """A fixed set of batches for validation: the same samples, noise and times whenever it is called.

    Samples are spread evenly over the data set, without augmentation and noise on the state; a data set of fewer than
    one batch is repeated to fill it. Loads in threads.

    Args:
      part: the data set and its steps.
      num_batches: at most; less where the data set has not that many.
      batch_size, seed, action_dim, action_horizon, draws, max_delay, process_index, process_count: see
        `train_batches`.

    Returns:
      min(num_batches, samples // batch_size) batches, at least one.
    """
    total = len(part.dataset)
    count = max(1, min(num_batches, total // batch_size)) * batch_size
    places = grain.MapDataset.source([(0, i * total // count) for i in range(count)])
    shape = _noise_shape(draws, action_horizon, action_dim)
    make = _MakeSample(part.dataset, tuple(part.steps), seed, "none", shape, max_delay)
    return _batches(places, [make], batch_size, 0, 0, process_index, process_count)


def _noise_shape(draws: int, horizon: int, dim: int) -> tuple[int, ...]:
    return (horizon, dim) if draws == 1 else (draws, horizon, dim)


def _batches(
    places: grain.MapDataset[tuple[int, int]],
    makers: Sequence[_MakeSample],
    batch_size: int,
    start_step: int,
    num_workers: int,
    process_index: int,
    process_count: int,
) -> Batches:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"config.batch_size={batch_size} must be a positive multiple of the {process_count} processes")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads its own flags and refuses to if nobody called absl.app.run
    cv2.setNumThreads(1)  # images are small and samples many: parallel by sample
    samples = places.map_with_index(_MakeAny(tuple(makers)))
    # Local batch j = k * process_count + p is the p-th part of global batch k.
    local = samples.batch(batch_size // process_count, batch_fn=_stack)
    mine = local[process_index::process_count][start_step:]
    if num_workers:
        source = mine.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
        return Batches(source.mp_prefetch(options, worker_init_fn=_start_worker))
    threads = min(os.cpu_count() or 1, MAX_THREADS)
    return Batches(mine.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)))


def _start_worker(index: int, count: int) -> None:
    """Runs first in every worker."""
    del index, count
    cv2.setNumThreads(1)
    # Ctrl-C goes to all processes of the terminal; the parent decides what it means and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for ever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _why(exit_code: int) -> str:
    """One line about a worker's death."""
    reasons = {
        -signal.SIGKILL: "killed, most likely because memory ran out",
        -signal.SIGBUS: "no room in shared memory; give a container more with --shm-size",
    }
    reason = reasons.get(exit_code, f"exit code {exit_code}; what it printed is above")
    return f"a data worker died ({reason}); fewer --config.data.num_workers, or 0 for threads, may help"


def _stack(samples: Sequence[Any]) -> Any:
    """Stacks every leaf of nested dictionaries on a new axis 0."""
    first = samples[0]
    if isinstance(first, dict):
        return {key: _stack([sample[key] for sample in samples]) for key in first}
    return np.stack(samples)


def _map_leaves(function: Any, tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _map_leaves(function, value) for key, value in tree.items()}
    return function(tree)
