"""The LIBERO adapter: against a stand-in for the package, which CI lacks; where it is there, one episode in earnest."""

from __future__ import annotations

import importlib.util
import sys
import types

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from openpi_port import UserError, observation, transforms
from openpi_port.config import Data
from openpi_port.robots import libero as robot
from openpi_port.sim import libero, rollout, simulation

INSTALLED = importlib.util.find_spec("libero") is not None


def test_axis_angle_is_scipys():
    rng = np.random.default_rng(0)
    for quaternion in [*rng.normal(size=(20, 4)), [1.0, 0, 0, 0], [0, 0, 0, 1.0]]:
        quaternion = np.asarray(quaternion) / np.linalg.norm(quaternion)
        vector = libero.axis_angle(quaternion)
        assert Rotation.from_rotvec(vector).approx_equal(Rotation.from_quat(quaternion), atol=1e-6)
        assert 0 <= np.linalg.norm(vector) <= 2 * np.pi


class Env:
    """Answers like libero.libero.envs.env_wrapper.ControlEnv; the hand goes where it is told."""

    obj_of_interest = ("bowl", "plate")

    def __init__(self, bddl_file_name, use_camera_obs, has_offscreen_renderer):
        assert bddl_file_name == "files/suite_folder/task_1.bddl" and not use_camera_obs
        self.log, self.sim = [], self
        self.data = types.SimpleNamespace(qpos=np.zeros(9))

    def seed(self, seed):
        self.log.append(("seed", seed))

    def reset(self):
        self.log.append("reset")

    def set_init_state(self, state):
        self.log.append(("state", int(state)))
        self.hand, self.steps = np.array([0.0, 0.0, 1.0]), 0
        return self._seen()

    def step(self, action):
        self.hand = self.hand + 0.05 * np.clip(action[:3], -1, 1)
        self.steps += 1
        return self._seen(), 0.0, self.check_success(), {}

    def check_success(self):
        return self.steps > 30

    def render(self, camera_name, width, height):
        image = np.zeros((height, width, 3), np.uint8)
        image[0, 0] = {"agentview": 100, "robot0_eye_in_hand": 200}[camera_name]  # which comes out at the other end
        self.log.append(camera_name)
        return image

    def _seen(self):
        near, far = np.array([0.1, 0.0, 0.9]), np.array([0.2, 0.1, 0.9])
        return {
            "robot0_eef_pos": self.hand, "robot0_eef_quat": np.array([1.0, 0, 0, 0]),
            "robot0_gripper_qpos": np.array([0.04, -0.04]), "bowl_pos": near, "plate_pos": far,
        }  # fmt: skip

    def close(self):
        self.log.append("close")


@pytest.fixture
def package(monkeypatch):
    """The stand-in, with one suite of two tasks and three initial states."""

    def task(i):
        return types.SimpleNamespace(language=f"task {i}", problem_folder="suite_folder", bddl_file=f"task_{i}.bddl")

    class Suite:
        get_task = staticmethod(task)
        get_num_tasks = staticmethod(lambda: 2)
        get_task_init_states = staticmethod(lambda i: [10, 11, 12])

    names = {
        "libero": {},
        "libero.libero": {"get_libero_path": lambda key: "files"},
        "libero.libero.benchmark": {
            "get_benchmark_dict": lambda: {"libero_spatial": Suite}, "get_benchmark": lambda name: Suite,
        },
        "libero.libero.envs": {},
        "libero.libero.envs.env_wrapper": {"ControlEnv": Env},
    }  # fmt: skip
    for name, content in names.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["libero.libero"].benchmark = sys.modules["libero.libero.benchmark"]
    monkeypatch.setattr(libero.gl, "require", lambda: "osmesa")
    libero._suite.cache_clear()
    yield
    libero._suite.cache_clear()


def test_the_adapter(package):
    with libero.LiberoSim("libero_spatial_1", image_size=8) as sim:
        env = sim._env
        sim.reset(4)
        assert env.log == [("seed", 4), "reset", ("state", 11)] and env.steps == libero.SETTLE and sim.fulfilled is None
        seen = sim.observe()
        assert env.log[3:] == ["agentview", "robot0_eye_in_hand"] and sim.instruction == "task 1"
        assert seen["observation/image"][7, 7, 0] == 100 and seen["observation/wrist_image"][7, 7, 0] == 200
        assert sim.picture(seen) is seen["observation/image"] and sim.picture(None)[7, 7, 0] == 100
        np.testing.assert_allclose(seen["observation/state"], [0, 0, 1, np.pi, 0, 0, 0.04, -0.04], atol=1e-6)
        assert sim.step(np.array([1.0, 0, 0, 0, 0, 0, -1])) == 0 and sim.state[0] == pytest.approx(0.05)
        for wrong in (np.zeros(8), np.full(7, np.nan)):
            with pytest.raises(UserError, match="7 finite numbers"):
                sim.step(wrong)
        env.data.qpos[2] = np.inf
        with pytest.raises(simulation.Diverged):
            sim.step(libero.REST)
    assert env.log[-1] == "close"
    # What it observes is what openpi's robot description reads.
    data = Data(repo_id="", robot="libero", cameras=robot.CAMERAS, state=robot.STATE, actions=robot.ACTIONS)
    sample = transforms.forward(
        transforms.before_normalize(data), observation.rename({**seen, "prompt": sim.instruction}, data)
    )
    assert sample["state"].shape == (robot.STATE_DIM,) and set(sample["image"]) == set(robot.CAMERAS)


def test_an_episode_of_the_expert(package):
    """In this process: the stand-in does not travel to a worker."""
    setting = rollout.Setting("libero_spatial_0", max_steps=220, after=10, films=1, frame_size=8)
    Env_, name = Env, "files/suite_folder/task_0.bddl"

    class First(Env_):
        def __init__(self, bddl_file_name, **options):
            assert bddl_file_name == name
            super().__init__("files/suite_folder/task_1.bddl", **options)

    sys.modules["libero.libero.envs.env_wrapper"].ControlEnv = First
    with simulation.open_("libero_spatial_0", render=True) as sim:
        stage = rollout._Stage(sim, setting)
        stage.reset(0, True)
        stage.expert()
        episode = stage.episode()
    assert episode.success and episode.end == "libero_spatial_0" and len(episode.frames) > 10
    assert episode.actions.shape[1] == 7 and episode.states.shape[1] == 8


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("libero_spatial", "libero_spatial_0"),
        ("libero_spatial_2", "has tasks 0 to 1"),
        ("libero_spatal_0", "did you mean libero_spatial"),
        ("libero_goal_0", "no suite libero_goal"),
    ],
)
def test_wrong_names_are_one_line(package, task, words):
    with pytest.raises(UserError, match=words):
        simulation.about(task)


@pytest.mark.skipif(INSTALLED, reason="LIBERO is installed")
def test_without_the_package_the_command_says_what_to_do():
    libero._suite.cache_clear()
    with pytest.raises(UserError, match="docs/libero.md"):
        simulation.about("libero_spatial_0")


@pytest.mark.skipif(not INSTALLED, reason="LIBERO's package needs an environment of its own: requirements-libero.txt")
def test_the_expert_puts_the_bowl_onto_the_plate():
    setting = rollout.Setting("libero_spatial_0", max_steps=220, after=10, render=False)
    (episode,) = rollout.rollout(setting, [0], None, workers=1)
    assert episode.success and episode.end == "libero_spatial_0"
