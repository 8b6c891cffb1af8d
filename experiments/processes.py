"""The processes of a run: which one speaks, which goes first, when all stop, and how all end if one fails."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from openpi_port.backends import Backend
from openpi_port.errors import UserError

Result = TypeVar("Result")
# What the frameworks say when the process at the other end is gone.
LOST = re.compile(r"connection (closed|reset|refused)|broken pipe|coordination|heartbeat|nccl|gloo|peer", re.IGNORECASE)


class SharedError(UserError):
    """An error that all processes find alike, so that one of them tells."""


class Processes:
    """All processes of a run, seen from one of them.

    Attributes:
      index: this one's number.
      count: how many there are.
    """

    def __init__(self, backend: Backend) -> None:
        """Joins them."""
        self._sharding = backend.sharding
        self.index, self.count = self._sharding.join()

    def say(self, *words: Any) -> None:
        """Prints a line, in the first process, above a progress bar if there is one."""
        if self.index == 0:
            tqdm.write(" ".join(map(str, words)))
            sys.stdout.flush()

    def in_turn(self, place: str, call: Callable[[], Result]) -> Result:
        """Calls in the first process, which may fetch or cache something, then in all others.

        Args:
          place: names it.
          call: what to do.
        """
        if self.index:
            self._sharding.barrier(place)
        result = call()
        if not self.index:
            self._sharding.barrier(place)
        return result

    @contextlib.contextmanager
    def end_together(self) -> Iterator[None]:
        """Ends a process that fails at once, without waiting for the others: they notice, or the launcher ends them."""
        try:
            yield
        except Exception as error:
            if self.count == 1:
                raise
            words = " ".join(str(error).split())
            if isinstance(error, UserError):
                told = words
            elif LOST.search(words):
                told = "another process ended; what it said last is the reason"
            else:
                told = "".join(traceback.format_exception(error))
            if not (isinstance(error, SharedError) and self.index):
                # In one piece, so that the lines of several processes don't mix.
                sys.stderr.write(f"error: process {self.index} of {self.count}: {told}\n")
                sys.stderr.flush()
            sys.stdout.flush()
            os._exit(2)


class Stop:
    """Ctrl-C and SIGTERM ask to stop after the step; a second Ctrl-C stops at once. All processes stop at one step."""

    def __init__(self, backend: Backend) -> None:
        self._asked = False
        self._vote = backend.sharding.Vote()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def asked(self) -> bool:
        """Whether to stop; to be called once after every step, by all processes."""
        return self._vote(self._asked)

    def _ask(self, *_: Any) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.write("stopping after this step; a checkpoint will be saved")
