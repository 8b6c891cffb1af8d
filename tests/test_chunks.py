"""From chunks to single actions: the classes that a control loop asks at every step."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from openpi_port.errors import UserError
from openpi_port.serving.chunks import Ahead, OpenLoop, RealTime


class Counting:
    """Chunk n is 100 n + 0, 1, 2, ...; takes `seconds`."""

    def __init__(self, seconds=0.0):
        self.calls, self.seconds = 0, seconds

    def infer(self, observation):
        time.sleep(self.seconds)
        self.calls += 1
        return {"actions": 100.0 * self.calls + np.arange(6.0)[:, None], "policy_timing": {"infer_ms": 1.0}}

    def reset(self):
        pass


def test_open_loop_is_openpi_s_broker(openpi_client):
    from openpi_client.action_chunk_broker import ActionChunkBroker

    ours, theirs = OpenLoop(Counting(), 4), ActionChunkBroker(Counting(), 4)
    for step in range(10):
        if step == 6:
            ours.reset()
            theirs.reset()
        np.testing.assert_equal(ours.infer({}), theirs.infer({}))
    assert [float(OpenLoop(Counting()).infer({})["actions"][0])] == [100.0]


def test_ahead_leaves_out_the_past_and_never_stops():
    policy = Counting()
    ahead = Ahead(policy, replan=4, lead=2)
    played = []
    for _ in range(9):
        played.append(float(ahead.infer({})["actions"][0]))
        time.sleep(0.05)
    ahead.close()
    # Asked at step 2 of a chunk, taken over at step 4: the answer's first two actions are in the past.
    assert played == [100, 101, 102, 103, 202, 203, 204, 205, 302]


def test_ahead_plays_on_while_the_answer_is_late():
    policy = Counting()
    ahead = Ahead(policy, replan=3, lead=1)
    ahead.infer({})
    policy.seconds = 0.3
    played = [float(ahead.infer({})["actions"][0]) for _ in range(6)]
    ahead.close()
    assert played == [101, 102, 103, 104, 105, 204]  # asked at 2, needed at 6: four steps are in the past


@pytest.mark.parametrize("make", [lambda: OpenLoop(Counting(), 0), lambda: OpenLoop(Counting(), 7).infer({})])
def test_replan_must_fit(make):
    with pytest.raises(UserError, match="replan"):
        make()


# Real-time chunking


class Gated:
    """Chunk n is 100 n + 0, 1, 2, ...; answers when it is let, and remembers what it was asked."""

    def __init__(self):
        self.asked, self.gate = [], threading.Semaphore(1)

    def infer(self, observation):
        self.asked.append(observation)
        self.gate.acquire()
        return {"actions": 100.0 * len(self.asked) + np.arange(8.0)[:, None]}


def step(player, observation=None):
    return float(player.infer({"state": np.zeros(1)} if observation is None else observation)["actions"][0])


def let_answer(policy, player):
    policy.gate.release()
    wait_for(player._asked[0].done)


def wait_for(done):
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_the_control_loop():
    """Asks with what is left and the longest delay, takes over when the answer is there, waits at the end."""
    policy = Gated()
    player = RealTime(policy, replan=3, delay=3, history=2)
    picture = np.zeros(2)
    assert [step(player) for _ in range(3)] == [100, 101, 102]
    assert step(player, {"images": {"top": picture}}) == 103  # asked here, at step 3
    picture[:] = 9
    assert step(player) == 104
    let_answer(policy, player)
    assert [step(player), step(player)] == [202, 203]  # two steps later; three after the question the next one
    wait_for(lambda: len(policy.asked) == 3)
    _, first, second = policy.asked
    np.testing.assert_array_equal(first["previous_actions"][:, 0], [103, 104, 105, 106, 107])
    np.testing.assert_array_equal(first["images"]["top"], [0, 0])
    assert first["delay"] == 3
    np.testing.assert_array_equal(second["previous_actions"][:, 0], [203, 204, 205, 206, 207])
    assert second["delay"] == 3  # the longest that is remembered
    assert [step(player) for _ in range(4)] == [204, 205, 206, 207]
    threading.Timer(0.05, policy.gate.release).start()
    assert step(player) == 305  # waited; five actions are in the past
    assert list(player._delays) == [2, 5]
    wait_for(lambda: len(policy.asked) == 4)  # at once, because five are more than three
    assert policy.asked[-1]["delay"] == len(policy.asked[-1]["previous_actions"]) == 3  # no more than are left
    player.reset()
    policy.gate.release(2)
    assert step(player) == 500 and "delay" not in policy.asked[-1]  # a new episode
    player.close()


def test_errors_of_the_policy_reach_the_control_loop():
    class Broken(Gated):
        def infer(self, observation):
            if "delay" in observation:
                raise UserError("no")
            return super().infer(observation)

    policy = Broken()
    player = RealTime(policy, replan=1)
    step(player)
    with pytest.raises(UserError, match="no"):
        for _ in range(8):
            step(player)
    policy.gate.release()
    assert step(player) == 200  # begins anew
    player.close()


@pytest.mark.parametrize("numbers", [(0, 0, 1), (1, -1, 1), (1, 0, 0)])
def test_numbers_of_the_control_loop(numbers):
    with pytest.raises(UserError, match="replan="):
        RealTime(Gated(), *numbers)


def test_a_chunk_must_outlast_replan():
    with pytest.raises(UserError, match="below the 8"):
        step(RealTime(Gated(), replan=8))
