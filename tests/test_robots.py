"""Robot adaptors against openpi's, both directions; every one can be undone, also the one that the docs show."""

from __future__ import annotations

import importlib
import re

import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings

from openpi_port import robots
from openpi_port.config import Data, Train
from openpi_port.errors import UserError
from openpi_port.fields import build
from openpi_port.robots import aloha, droid
from openpi_port.transforms import FillCameras, Repack, forward, inverse

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
FAST_CAMERAS = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")
ADAPTED = ["aloha", "aloha_sim"]


@pytest.fixture(scope="module")
def io(golden):
    return dict(np.load(golden / "openpi/io/io.npz"))


def inputs(io, prefix):
    raw = {k.removeprefix(prefix): v for k, v in io.items() if k.startswith(prefix)}
    return {**raw, "prompt": "do it"}


def check(io, prefix, got, atol):
    want = {k.removeprefix(prefix): v for k, v in io.items() if k.startswith(prefix)}
    assert set(want) == {"state", "actions"} | {f"{p}/{c}" for p in ("image", "image_mask") for c in got["image"]}
    for name, value in want.items():
        here = got
        for part in name.split("/"):
            here = here[part]
        assert here.dtype == value.dtype
        np.testing.assert_allclose(here, value, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize(("name", "prefix"), [("aloha", "aloha_True"), ("aloha_sim", "aloha_False")])
def test_golden_aloha(io, name, prefix):
    cameras = {"base_0_rgb": "images/cam_high", "left_wrist_0_rgb": "images/cam_left_wrist"}
    data = Data("x", name, cameras, state="state", actions="actions")
    steps = (Repack(cameras, "state", "actions"), *robots.load(name).steps(data))
    raw = inputs(io, f"{prefix}/in/")
    got = forward((*steps, FillCameras(CAMERAS)), raw)
    check(io, f"{prefix}/out/", got, 1e-12)
    back = inverse(steps, {"actions": io[f"{prefix}/outputs/in"][:, :14]})
    np.testing.assert_allclose(back["actions"], io[f"{prefix}/outputs/out"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("model", ["pi0", "pi05", "pi0_fast"])
@pytest.mark.parametrize("name", ["droid", "libero"])
def test_golden_single_arms(io, name, model):
    robot = robots.load(name)
    fast = model == "pi0_fast"
    cameras = droid.FAST_CAMERAS if fast and name == "droid" else robot.CAMERAS
    names = FAST_CAMERAS if fast and name == "droid" else CAMERAS
    data = Data("x", name, cameras, state=robot.STATE, actions=robot.ACTIONS)
    steps = (Repack(cameras, robot.STATE, robot.ACTIONS), *robot.steps(data))
    got = forward((*steps, FillCameras(names, missing_visible=fast)), inputs(io, f"{name}/in/"))
    assert tuple(got["image"]) == names
    check(io, f"{name}/{model}/", got, 0)
    wide = np.pad(got["actions"], [(0, 0), (0, 32 - robot.ACTION_DIM)])
    np.testing.assert_array_equal(inverse(steps, {"actions": wide})["actions"], got["actions"])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), dtype=st.sampled_from([np.float32, np.float64]))
def test_aloha_inverse_undoes_forward(seed, dtype):
    rng = np.random.default_rng(seed)
    sample = {
        "state": rng.uniform(-3, 3, 14).astype(dtype),
        "actions": rng.uniform(-3, 3, (5, 14)).astype(dtype),
    }
    sample["state"][aloha.GRIPPERS] = rng.uniform(0, 0.99, 2)  # what the linkage reaches
    before = {k: v.copy() for k, v in sample.items()}
    step = aloha.AdaptToPi()
    there = step.forward(sample)
    for value in (*sample.values(), *there.values()):
        value.flags.writeable = False
    back = step.inverse(there)
    for key in sample:
        np.testing.assert_array_equal(sample[key], before[key])
        assert there[key].dtype == back[key].dtype == dtype
        np.testing.assert_allclose(back[key], sample[key], atol=1e-4 if dtype == np.float32 else 1e-9)


@pytest.mark.parametrize("name", ["aloha", "aloha_sim", "droid", "libero", "ur5"])
def test_another_robots_data_are_refused(name):
    robot = robots.load(name)
    check = robot.steps(Data("x", name, {}))[0]
    good = {"state": np.zeros(robot.STATE_DIM), "actions": np.zeros((3, robot.ACTION_DIM))}
    assert check.forward(good) is good
    for key in good:
        with pytest.raises(UserError, match=f"{key} has {good[key].shape[-1] + 1} dimensions"):
            check.forward({**good, key: np.zeros((3, good[key].shape[-1] + 1))})


def test_unknown_robot_names_the_near_ones():
    assert robots.load("lerobot").steps(Data("x", "lerobot", {})) == ()
    with pytest.raises(UserError, match="config.data.robot='alohaa'.*aloha"):
        robots.load("alohaa")
    for module in ("os", "aloha.DELTA", ""):
        with pytest.raises(UserError):
            robots.load(module)


def property_of(robot):
    """`inverse` undoes `forward`, and neither writes into what it is given."""
    data = Data("x", "any", {})
    rng = np.random.default_rng(0)
    for dtype, atol in ((np.float32, 1e-4), (np.float64, 1e-9)):
        sample = {
            "state": rng.uniform(0, 0.99, robot.STATE_DIM).astype(dtype),  # which all grippers reach
            "actions": rng.uniform(0, 0.99, (5, robot.ACTION_DIM)).astype(dtype),
        }
        before = {key: value.copy() for key, value in sample.items()}
        there = forward(robot.steps(data), sample)
        for value in there.values():
            value.flags.writeable = False
        back = inverse(robot.steps(data), there)
        for key in sample:
            np.testing.assert_array_equal(sample[key], before[key])
            np.testing.assert_allclose(back[key], sample[key], rtol=1e-5, atol=atol)
        assert forward(robot.steps(data), {"state": sample["state"]})["state"].shape == there["state"].shape


@pytest.mark.parametrize("name", [name for name in robots.names() if robots.load(name).STATE_DIM])
def test_every_robot_can_be_undone(name):
    property_of(robots.load(name))


def test_the_page_about_robots_is_right(monkeypatch, tmp_path):
    """Its two files, as they stand there."""
    config, module = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adding_a_robot.md").read_text(), re.DOTALL)
    (tmp_path / "my_arm.py").write_text(module)
    (tmp_path / "pi0_my_arm.py").write_text(config)
    monkeypatch.setattr(robots, "__path__", [*robots.__path__, str(tmp_path)])
    monkeypatch.syspath_prepend(tmp_path)
    arm = robots.load("my_arm")
    property_of(arm)
    degrees = {"state": np.float32([180, 0, -90, 0, 0, 0, 100])}
    np.testing.assert_allclose(
        forward(arm.steps(None), degrees)["state"], [np.pi, 0, -np.pi / 2, 0, 0, 0, 1], rtol=1e-6
    )
    run = build(Train, importlib.import_module("pi0_my_arm").get_config("debug"))
    assert run.data.cameras["left_wrist_0_rgb"] == "observation.images.wrist" and run.name == "pi0_my_arm_debug"
    assert run.data.delta == (True,) * 6 + (False,) and run.model.cameras == CAMERAS
