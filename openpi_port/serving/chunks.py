"""From chunks to single actions: how a control loop walks through what a policy answers.

All classes take anything with `infer(observation) -> {"actions": [A, D], ...}`: a Policy, our Client, openpi's client.
Axis letters: A actions in a chunk, D dimensions of the robot.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from openpi_port.errors import UserError


class Infers(Protocol):
    """A policy, here or elsewhere."""

    def infer(self, observation: Mapping[str, Any]) -> Mapping[str, Any]:
        """One observation to one chunk."""


class OpenLoop:
    """Asks for a chunk, plays its first `replan` actions, asks again (openpi's ActionChunkBroker).

    The robot stands still while it waits for the answer.

    Args:
      policy: whom to ask.
      replan: actions to play per chunk; None plays all of it.
    """

    def __init__(self, policy: Infers, replan: int | None = None) -> None:
        self._policy, self._replan = policy, _positive(replan)
        self._result: Mapping[str, Any] | None = None
        self._step = 0

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The next action.

        Args:
          observation: looked at only when a new chunk is due.

        Returns:
          The chunk's result with "actions" [D], and arrays of A rows likewise.
        """
        if self._result is None:
            self._result, self._step = self._policy.infer(observation), 0
        length = _length(self._result, self._replan)
        action = _row(self._result, self._step)
        self._step += 1
        if self._step >= length:
            self._result = None
        return action

    def reset(self) -> None:
        """Forgets the chunk: a new episode begins."""
        self._result = None


class Ahead:
    """Asks for the next chunk while the present one is played, so that the robot never stands still.

    The answer belongs to the observation of `delay` steps ago: its first `delay` actions are in the past when it
    comes, and are left out. If it is not there in time, the present chunk goes on to its end; only then does the
    robot wait.

    Args:
      policy: whom to ask; called in another thread.
      replan: actions to play before the next chunk takes over.
      lead: how many actions before that the question is put: the latency in control steps, rounded up.

    Raises:
      UserError: not 0 < lead < replan.
    """

    def __init__(self, policy: Infers, replan: int, lead: int) -> None:
        if not 0 < lead < replan:
            raise UserError(f"replan={replan}, lead={lead}: lead must be above 0 and below replan")
        self._policy, self._replan, self._lead = policy, replan, lead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._result: Mapping[str, Any] | None = None
        self._step = 0  # of the present chunk
        self._end = 0  # the step from which the next chunk may take over
        self._asked: tuple[Future[Mapping[str, Any]], int] | None = None  # the answer, and the step of its observation

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The next action; see `OpenLoop.infer`. Called once per control step."""
        if self._result is None:
            self._take(self._policy.infer(observation), 0)
        length = len(self._result["actions"])
        if self._asked is None and self._step >= self._end - self._lead:
            self._asked = self._thread.submit(self._policy.infer, observation), self._step
        if self._asked is not None and (self._step >= length or (self._step >= self._end and self._asked[0].done())):
            answer, asked_at = self._asked
            self._take(answer.result(), self._step - asked_at)
        action = _row(self._result, self._step)
        self._step += 1
        return action

    def reset(self) -> None:
        """Forgets chunk and question: a new episode begins."""
        self._result, self._asked = None, None

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self, result: Mapping[str, Any], delay: int) -> None:
        length = len(result["actions"])
        if delay >= length:
            raise UserError(f"the answer came after {delay} steps, a chunk has {length}: the policy is too slow")
        self._result, self._step, self._asked = result, delay, None
        self._end = min(delay + self._replan, length)


class RealTime:
    """Asks for the next chunk while the present one is played, and says how the present one goes on.

    Real-time chunking (algorithm 1 of arXiv 2506.07339): the question brings along the actions that are not played yet,
    and how many of them will be when the answer comes: the longest of the last delays. So the next chunk continues the
    present one, and takes over as soon as it is there. If the present one ends before that, the robot waits.

    Threads may share one; then each call is one control step.

    Args:
      policy: whom to ask, in another thread: a Policy, or the client of a server that has one.
      replan: actions to play from one question to the next, at least; the paper's s_min.
      delay: how many control steps the first answers are expected to take.
      history: how many delays are remembered; the paper's b.

    Raises:
      UserError: replan, delay or history that can't be, or a policy that doesn't know real-time chunking.
    """

    def __init__(self, policy: Infers, replan: int, delay: int = 0, history: int = 10) -> None:
        if replan < 1 or delay < 0 or history < 1:
            raise UserError(f"replan={replan}, delay={delay}, history={history}: not below 1, 0 and 1")
        about = getattr(policy, "metadata", None)
        if isinstance(about, Mapping) and not about.get("realtime"):
            raise UserError("this policy can't go on from a previous chunk: pi0-FAST, or another project's server?")
        self._policy, self._replan = policy, replan
        self._delays = deque([delay], maxlen=history)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="realtime")
        self._lock = threading.Lock()
        self._result: Mapping[str, Any] | None = None
        self._step = 0  # of the present chunk
        self._asked: tuple[Future[Mapping[str, Any]], int] | None = None  # the answer, and the step of its observation

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The next action; see `OpenLoop.infer`. Called once per control step; the observation is copied."""
        with self._lock:
            if self._result is None:
                first = self._ask(observation).result()
                if self._replan >= len(first["actions"]):
                    raise UserError(f"replan={self._replan}: below the {len(first['actions'])} of a chunk")
                self._result, self._step = first, 0
            at_end = self._step == len(self._result["actions"])
            if self._asked is not None and (at_end or self._asked[0].done()):
                self._take(*self._asked)
            if self._asked is None and self._step >= self._replan:
                left = self._result["actions"][self._step :]
                held = {"previous_actions": left, "delay": min(max(self._delays), len(left))}
                self._asked = self._ask({**observation, **held}), self._step
            action = _row(self._result, self._step)
            self._step += 1
            return action

    def reset(self) -> None:
        """Forgets chunk and question: a new episode begins. Delays are remembered."""
        with self._lock:
            if self._asked is not None:
                self._asked[0].cancel()
            self._result, self._asked = None, None

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _ask(self, observation: Mapping[str, Any]) -> Future[Mapping[str, Any]]:
        return self._thread.submit(self._policy.infer, _copy(observation))

    def _take(self, answer: Future[Mapping[str, Any]], asked_at: int) -> None:
        self._result, self._asked = None, None  # after an error all begins anew
        result, delay = answer.result(), self._step - asked_at
        if delay >= len(result["actions"]):
            raise UserError(
                f"the answer came after {delay} steps, a chunk has {len(result['actions'])}: the policy is too slow"
            )
        self._delays.append(delay)
        self._result, self._step = result, delay


def _copy(observation: Any) -> Any:
    """The robot may write its next picture over this one while the question is on its way."""
    if isinstance(observation, Mapping):
        return {key: _copy(value) for key, value in observation.items()}
    return np.array(observation) if isinstance(observation, np.ndarray) else observation


def _positive(replan: int | None) -> int | None:
    if replan is not None and replan < 1:
        raise UserError(f"replan={replan}: at least one action per chunk")
    return replan


def _length(result: Mapping[str, Any], replan: int | None) -> int:
    length = len(result["actions"])
    if replan is not None and replan > length:
        raise UserError(f"replan={replan}, but the policy's chunks have {length} actions")
    return length if replan is None else replan


def _row(result: Mapping[str, Any], step: int) -> dict[str, Any]:
    length = len(result["actions"])
    return {
        key: value[step] if isinstance(value, np.ndarray) and value.ndim and len(value) == length else value
        for key, value in result.items()
    }
