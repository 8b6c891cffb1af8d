"""Injected latency in simulation: which actions are played when, and how smooth that is."""

from __future__ import annotations

import numpy as np
import pytest

from openpi_port.errors import UserError
from openpi_port.sim import rollout
from openpi_port.sim.latency import Player, kinks


def chunk(number):
    """[10, 14]: 100 times its number, plus the action's place."""
    return np.repeat(100.0 * number + np.arange(10.0)[:, None], 14, 1)


def played(style, latency, chunks=3):
    """What three chunks come to, and the questions."""
    player, actions, questions = Player(style, 4, latency), [], []
    for number in range(1, chunks + 1):
        questions.append(player.question())
        actions += list(player.answer(chunk(number), np.full(14, -1.0))[:, 0])
    return actions, questions, player.borders


def test_open_loop_waits():
    actions, questions, borders = played("open_loop", 2)
    assert actions == [-1, -1, 100, 101, 102, 103, 103, 103, 200, 201, 202, 203, 203, 203, 300, 301, 302, 303]
    assert borders == [6, 8, 12, 14] and questions == [{}] * 3
    assert played("open_loop", 0)[0] == [100, 101, 102, 103, 200, 201, 202, 203, 300, 301, 302, 303]


def test_ahead_goes_on_and_leaves_out_the_past():
    actions, questions, borders = played("ahead", 2)
    assert actions == [-1, -1, 100, 101, 102, 103, 104, 105, 202, 203, 204, 205, 302, 303]
    assert borders == [8, 12] and questions == [{}] * 3


def test_realtime_says_how_it_goes_on():
    actions, questions, _ = played("realtime", 2)
    assert actions == played("ahead", 2)[0] and questions[0] == {}
    for number, question in enumerate(questions[1:], 1):
        np.testing.assert_array_equal(question["previous_actions"], chunk(number)[4:])
        assert question["delay"] == 2


def test_kinks():
    """A jump of the targets is one where they meet; the grippers may jump."""
    actions = np.repeat(np.array([0.0, 1, 2, 3, 9, 10, 11])[:, None], 14, 1)
    at, elsewhere = kinks(actions, [0, 4])
    np.testing.assert_array_equal(at, [5])
    np.testing.assert_array_equal(elsewhere, [0, 0, 5, 0])
    actions[:, :6] = actions[:, 7:13] = 0
    assert not any(x.any() for x in kinks(actions, [4]))


@pytest.mark.parametrize(
    ("style", "latency", "words"),
    [("ahead", 4, "must be more than the 4"), ("realtime", 5, "must be more than the 5")],
)
def test_latency_must_fit_the_questions(style, latency, words):
    with pytest.raises(UserError, match=words):
        rollout.Setting("transfer_cube", replan=4, chunks=style, latency=latency)


def test_chunks_must_be_long_enough():
    with pytest.raises(UserError, match=r"--replan=9 and --latency of 2 steps, but the policy's chunks have 10"):
        Player("ahead", 9, 2).answer(chunk(1), np.zeros(14))
    with pytest.raises(UserError, match=r"--replan=11, but"):
        Player("open_loop", 11, 2).answer(chunk(1), np.zeros(14))


def test_a_simulated_robot_is_late():
    """Two seeds with a fake policy: it is asked with what is left, and episodes know where chunks met."""
    asked = []

    def act(observations):
        asked.append(observations)
        return [{"actions": np.repeat(o["state"][None], 10, 0)} for o in observations]

    setting = rollout.Setting(
        "transfer_cube", max_steps=10, replan=4, chunks="realtime", latency=2, render=False
    )  # fmt: skip
    episodes = list(rollout.rollout(setting, [0, 1], act, workers=2))
    assert [len(x) for x in asked] == [2, 2] and "delay" not in asked[0][0]
    for before, now in zip(*asked, strict=True):
        np.testing.assert_array_equal(now["previous_actions"], np.repeat(before["state"][None], 6, 0))
        assert now["delay"] == 2
    for episode in episodes:
        assert episode.borders == (8,) and len(episode.actions) == 10
