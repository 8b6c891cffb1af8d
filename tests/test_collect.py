"""The simulation, the scripted expert and `experiments.collect`; the physics always, pictures where OpenGL works."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path

import av
import commands
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import collect
from openpi_port.errors import UserError
from openpi_port.sim import aloha, demonstrate, expert, gl

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "openpi_port" / "assets" / "aloha_sim_transfer_cube"
START = [0, -0.96, 1.16, 0, -0.3, 0, 0.0998, 0, -0.96, 1.16, 0, -0.3, 0, 0.0998]  # gym-aloha's start pose

needs_gl = pytest.mark.skipif(
    not any(gl.works(name) for name in gl.BACKENDS), reason="no OpenGL: apt-get install libosmesa6"
)


@pytest.fixture(scope="module")
def transfer():
    with aloha.AlohaSim("transfer_cube", render=False) as sim:
        yield sim


run = partial(commands.run, "experiments.collect")


@pytest.mark.parametrize("task", aloha.TASKS)
@pytest.mark.parametrize("disturbed", [False, True])
def test_expert_succeeds_in_the_ordinary_simulation(task: str, disturbed: bool):
    plan = expert.Expert(task)
    with aloha.AlohaSim(task, render=False) as sim:
        episodes = [demonstrate.record(sim, plan, seed, disturbed) for seed in range(2000, 2003)]
        assert episodes.count(None) <= disturbed  # 3 in 100 fail when disturbed, none otherwise
        for episode in filter(None, episodes):
            length = len(episode.rewards)
            assert episode.images is None
            assert episode.state.shape == episode.actions.shape == (length, 14)
            assert episode.state.dtype == episode.actions.dtype == np.float32
            assert list(episode.rewards).index(aloha.SUCCESS) == length - 1 - demonstrate.AFTER_SUCCESS
            assert episode.instruction == sim.instruction
            np.testing.assert_allclose(episode.state[0], START, atol=1e-3)


def test_labels_stay_clean_while_the_arms_are_disturbed(transfer: aloha.AlohaSim):
    plan = expert.Expert("transfer_cube")
    clean, noisy = (demonstrate.record(transfer, plan, 2000, disturbed) for disturbed in (False, True))
    shared = min(len(clean.actions), len(noisy.actions))
    np.testing.assert_array_equal(clean.actions[:shared], noisy.actions[:shared])
    apart = np.abs(clean.state[:shared] - noisy.state[:shared])[:, :6]
    assert 0.005 < apart.mean() < 0.05


def test_the_tasks_differ_only_after_the_grasp(transfer: aloha.AlohaSim):
    transfer.reset(3)
    lift, move = (expert.Expert(task)(transfer.cube).actions for task in ("lift_cube", "transfer_cube"))
    np.testing.assert_array_equal(lift[:80], move[:80])
    assert np.abs(lift[:160, :7] - lift[0, :7]).max() < 0.05  # the left arm keeps out of it
    assert np.abs(move[:160, :7] - move[0, :7]).max() > 0.5


def test_lifting_counts_from_its_height_on():
    with aloha.AlohaSim("lift_cube", render=False) as sim:
        sim.reset(3)
        actions = expert.Expert("lift_cube")(sim.cube).actions
        seen = [(sim.step(action), sim.cube[2] >= aloha.LiftCube.height, sim.fulfilled) for action in actions]
    assert {(0, False, None), (1, False, None), (2, False, None), (aloha.SUCCESS, True, "lift_cube")} <= set(seen)
    assert all(
        (reward == aloha.SUCCESS) == (task == "lift_cube") and (high or task is None) for reward, high, task in seen
    )


def test_a_lost_cube_is_no_demonstration(transfer: aloha.AlohaSim):
    plan = expert.Expert("transfer_cube")

    def mistaken(cube: np.ndarray, tail: int) -> expert.Demonstration:
        return plan(cube + [0.05, 0.05, 0, 0, 0, 0, 0], tail)

    assert demonstrate.record(transfer, mistaken, 2000, False) is None


def test_success_has_to_last():
    assert demonstrate._held([0, 2, 4, 2] + [4] * 50)
    assert demonstrate._held([4] * 40 + [2, 4, 2, 4, 4, 4, 2, 4, 4, 4])
    assert not demonstrate._held([0, 2, 4, 4] + [1] * 50)
    assert not demonstrate._held([0, 2, 3])


def test_disturbance_has_the_stated_size_and_leaves_the_grippers_alone():
    delicate = np.arange(6000) >= 3000
    noise = demonstrate.disturbance(delicate, np.random.default_rng(0))
    assert not noise[:, [6, 13]].any() and not noise[0].any()
    arms = np.delete(noise, [6, 13], axis=1)
    assert arms[100:2900].std() == pytest.approx(demonstrate.NOISE, rel=0.1)
    assert arms[3100:].std() == pytest.approx(demonstrate.NOISE_DELICATE, rel=0.1)


def test_simulation_is_gym_alohas(transfer: aloha.AlohaSim, monkeypatch: pytest.MonkeyPatch):
    """Same start, same physics, same reward as the public environment, which renders too slowly to compare."""
    from gym_aloha.env import AlohaEnv  # after openpi_port.sim, which settles how dm_control renders

    monkeypatch.setattr(
        aloha.gym_tasks.TransferCubeTask,
        "get_observation",
        lambda self, physics: {"qpos": self.get_qpos(physics), "images": {"top": np.zeros(1)}},
    )
    theirs = AlohaEnv("transfer_cube", obs_type="pixels_agent_pos")
    expected, _ = theirs.reset(seed=7)
    transfer.reset(7)
    rewards = set()
    for action in expert.Expert("transfer_cube")(transfer.cube).actions:
        np.testing.assert_array_equal(transfer.state, expected["agent_pos"].astype(np.float32))
        reward = transfer.step(action)
        assert (transfer.fulfilled == "transfer_cube") == (reward == aloha.SUCCESS)
        expected, their_reward, *_ = theirs.step(action)
        assert reward == their_reward
        rewards.add(reward)
    assert {0, 1, 2, 4} <= rewards


def test_reset_is_a_function_of_the_seed(transfer: aloha.AlohaSim):
    transfer.reset(5)
    cube = transfer.cube
    transfer.step(np.zeros(14))
    transfer.reset(6)
    state = transfer.state
    assert not np.array_equal(transfer.cube, cube)
    transfer.reset(5)
    np.testing.assert_array_equal(transfer.state, state)
    transfer.reset(5)
    np.testing.assert_array_equal(transfer.cube, cube)


@pytest.mark.parametrize("action", [np.zeros(13), np.zeros((1, 14)), np.full(14, np.nan)])
def test_impossible_actions_are_refused(transfer: aloha.AlohaSim, action: np.ndarray):
    transfer.reset(0)
    with pytest.raises(UserError, match="14 finite joint targets"):
        transfer.step(action)


def test_unknown_task_names_the_near_ones():
    with pytest.raises(UserError, match="did you mean transfer_cube"):
        aloha.AlohaSim("tranfer_cube", render=False)
    with pytest.raises(UserError, match="lift_cube"):
        expert.Expert("lift")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(sorted(aloha.TASKS)), min_size=1, max_size=2, unique=True), st.integers(0, 9999))
def test_attempts_take_turns_and_disturb_half_of_each_task(tasks: list[str], seed: int):
    found = list(islice(collect.attempts(tasks, seed), 8 * len(tasks)))
    assert [a.seed for a in found] == list(range(seed, seed + len(found)))
    for task in tasks:
        assert sum(a.task == task for a in found) == 8
        assert sum(a.task == task and a.disturbed for a in found) == 4


def test_user_mistakes_are_one_line_and_leave_nothing(tmp_path: Path):
    out = tmp_path / "new"
    for environment, argument, message in (
        ({"MUJOCO_GL": "off"}, "--episodes=1", "MUJOCO_GL=off"),
        ({}, "--task=pour_tea", "no simulated task 'pour_tea'"),
        ({}, "--out=" + str(tmp_path), "exists already"),
    ):
        done = run(f"--out={out}", argument, **environment)
        assert done.returncode == 2
        assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_without_opengl_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gl, "works", lambda name: False)
    monkeypatch.setattr(gl, "choose", lambda: gl.OFF)
    monkeypatch.setenv("MUJOCO_GL", "off")
    with pytest.raises(UserError, match="apt-get install libosmesa6"):
        aloha.AlohaSim("transfer_cube")
    monkeypatch.setattr(gl, "works", lambda name: name == "osmesa")
    with pytest.raises(UserError, match="set MUJOCO_GL=osmesa"):
        aloha.AlohaSim("transfer_cube")


@needs_gl
def test_pictures_show_the_scene():
    with aloha.AlohaSim("transfer_cube", image_size=64) as sim:
        sim.reset(1000)
        image = sim.observe()["images"]["top"]
        x, y = sim.cube[:2]
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    red = (image[..., 0] > 150) & (image[..., 1] < 100)
    row, column = (float(v.mean()) for v in np.nonzero(red))
    # The camera looks straight down from 0.8 m above (0, 0.6), 78 degrees wide; y points up in the picture.
    scale = 32 / (0.75 * np.tan(np.radians(39)))
    assert column == pytest.approx(31.5 + x * scale, abs=2)
    assert row == pytest.approx(31.5 - (y - 0.6) * scale, abs=2)


@needs_gl
def test_ctrl_c_leaves_a_whole_data_set_of_the_finished_episodes(tmp_path: Path):
    out, log = tmp_path / "set", tmp_path / "log"
    command = [sys.executable, "-m", "experiments.collect", "--task=lift_cube", f"--out={out}"]
    with log.open("w") as stderr:
        process = subprocess.Popen([*command, "--workers=1"], cwd=ROOT, stdout=stderr, stderr=stderr)
        deadline = time.monotonic() + 60
        while "frames=" not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0, log.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "set"]
    episodes = pq.read_table(out / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    rows = pq.read_table(out / "data/chunk-000/file-000.parquet")
    with av.open(str(out / f"videos/{collect.CAMERA}/chunk-000/file-000.mp4")) as video:
        frames = sum(1 for _ in video.decode(video=0))
    assert 1 <= len(episodes) <= 3
    assert sum(e["length"] for e in episodes) == len(rows) == frames
    assert episodes[0]["tasks"] == [aloha.LiftCube.instruction]
    said = re.search(r"(\d+) episodes, (\d+) frames", log.read_text())
    assert [int(v) for v in said.groups()] == [len(episodes), frames]


def test_embedded_data_set_replays_to_success(transfer: aloha.AlohaSim):
    rows = pq.read_table(EMBEDDED / "data/chunk-000/file-000.parquet", filters=[("episode_index", "=", 0)])
    state, actions = (np.array(rows[key].to_pylist(), np.float32) for key in ("observation.state", "action"))
    transfer.reset(1000)
    for recorded, action in zip(state, actions, strict=True):
        np.testing.assert_allclose(transfer.state, recorded, atol=1e-3)  # 0 on the machine that made it
        reward = transfer.step(action)
    assert reward == aloha.SUCCESS


def test_embedded_data_set_is_small_and_names_its_command():
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6e6
    episodes = pq.read_table(EMBEDDED / "meta/episodes/chunk-000/file-000.parquet", columns=["length", "tasks"])
    assert len(episodes) == 20
    assert {task for tasks in episodes["tasks"].to_pylist() for task in tasks} == {"Transfer cube"}
    assert "python -m experiments.collect --task=transfer_cube --episodes=20" in (EMBEDDED / "README.md").read_text()
