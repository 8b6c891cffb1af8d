"""Conversion to LeRobot v3.0: the same numbers to the bit, pictures within the video's error, whole or not at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import commands
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from rlds_writer import droid_episode, write_droid
from test_aloha_hdf5 import write as write_hdf5

from openpi_port.config import Data
from openpi_port.data.datasets import find
from openpi_port.data.lerobot import LeRobotDataset
from openpi_port.data.to_lerobot import camera_names, convert
from openpi_port.errors import UserError
from openpi_port.robots import aloha, droid


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def data_of(root: Path, **changes) -> Data:
    return Data(**({"repo_id": str(root), "robot": "lerobot", "cameras": {}} | changes))


def droid_data(root: Path, **changes) -> Data:
    return data_of(root, **({"state": droid.STATE, "actions": droid.RLDS_VELOCITIES} | changes))


def assert_same(data: Data, out: Path, fps: int, error: float) -> LeRobotDataset:
    """Chunks and instructions of both data sets, and how far the pictures are apart on average."""
    metadata, open_ = find(data)
    keys = camera_names(tuple(data.cameras.values()) or metadata.cameras)
    one = open_(cameras={key: key for key in keys}, horizon=4, state=data.state, action=data.actions)
    other = LeRobotDataset(out, cameras={key: key for key in keys.values()}, horizon=4)
    assert len(one) == len(other) and other.fps == fps and set(other.metadata.cameras) == set(keys.values())
    worst = 0.0
    for row in range(len(one)):
        a, b = one[row], other[row]
        for columns, key in ((data.state, "observation.state"), (data.actions, "action")):
            joined = np.concatenate([a[column] for column in columns.split(",")], axis=-1)
            np.testing.assert_array_equal(joined, b[key])
        for key in ("action_is_pad", "episode_index", "frame_index"):
            np.testing.assert_array_equal(a[key], b[key])
        assert b["task"] == a.get("task", data.prompt)
        assert b["timestamp"] == pytest.approx(b["frame_index"] / fps, abs=1e-4)
        for key, name in keys.items():
            worst = max(worst, np.abs(a[key].astype(float) - b[name]).mean())
    assert 0 < worst < error
    return other


def test_bridge(shared, tmp_path):
    """The real pictures, all four cameras; beyond colour subsampling little is lost."""
    data = data_of(shared / "data" / "octo_bridge", state="observation/state")
    convert(data, tmp_path / "bridge", fps=5, robot="widowx")
    got = assert_same(data, tmp_path / "bridge", 5, error=6.0)
    assert got.metadata.robot == "widowx" and len(got.metadata.cameras) == 4
    assert got.features["action"]["names"][:2] == ["action_0", "action_1"]


def test_droid_with_an_instruction_a_frame(tmp_path):
    """Parts of state and action become one column; an instruction that changes within an episode stays where it was."""
    episode = droid_episode(0, 5) | {"language_instruction": ["reach", "reach", "", "lift", "lift"]}
    smooth = {key: np.full((5, 18, 32, 3), 100, np.uint8) + np.arange(5, dtype=np.uint8)[:, None, None, None]
              for key in droid.CAMERAS.values()}  # fmt: skip
    data = droid_data(
        write_droid(tmp_path, [[episode | smooth, droid_episode(1, 3)]]),
        task=droid.RLDS_TASK, cameras=droid.CAMERAS,
    )  # fmt: skip
    convert(dataclasses.replace(data, skip=(1,)), tmp_path / "out", fps=15, crf=1)
    kept = LeRobotDataset(tmp_path / "out", cameras={}, horizon=1)
    assert [kept.numbers(row)["task"] for row in range(5)] == ["reach", "reach", "in other words", "lift", "lift"]
    (about,) = pq.read_table(tmp_path / "out/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert about["tasks"] == ["reach", "in other words", "lift"] and len(kept) == 5
    assert kept.features["observation.state"]["names"][6:] == ["joint_position_6", "gripper_position_0"]
    convert(data, tmp_path / "both", fps=15, crf=1)
    assert_same(data, tmp_path / "both", 15, error=60)


def test_hdf5_and_lerobot_itself(tmp_path):
    """HDF5 to LeRobot, and that to LeRobot again: joint names, rate and robot go along."""
    data = data_of(write_hdf5(tmp_path / "aloha", compress=True), state=aloha.HDF5_STATE, prompt="uncap the pen")
    convert(data, tmp_path / "one", fps=50, robot="aloha")
    assert_same(data, tmp_path / "one", 50, error=60)
    again = data_of(tmp_path / "one")
    convert(again, tmp_path / "two", crf=1)
    assert assert_same(again, tmp_path / "two", 50, error=12).metadata.robot == "aloha"
    tables = [pq.read_table(tmp_path / name / "data/chunk-000/file-000.parquet") for name in ("one", "two")]
    assert tables[0].equals(tables[1])


# --- faults ----------------------------------------------------------------------------------------------------------


def fails(data: Data, out: Path, match: str, **changes) -> None:
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError, match=match):
        convert(data, out, **({"fps": 15} | changes))
    assert sorted(out.parent.iterdir()) == before, "nothing is left"


def test_nothing_is_left_of_a_failure(tmp_path):
    source = write_droid(tmp_path)
    (tmp_path / "place").mkdir()
    out, data = tmp_path / "place" / "out", droid_data(source)
    fails(data, out, "frames per second are not recorded; give a whole number as --fps=", fps=None)
    fails(droid_data(source, task="text"), out, "no instruction 'text'")
    fails(data_of(source), out, "no state column 'observation.state'")
    fails(droid_data(source, skip=(0, 1, 2)), out, "skip leaves no episode")
    fails(droid_data(source, episodes=(7,)), out, "has no episode 7; it has 3, 0 to 2")
    cameras = {"a": "observation/wrist_image_left"}
    path = sorted(source.glob("*.tfrecord*"))[1]  # holds the last episode
    whole = path.read_bytes()
    at = whole.rindex(b"IDAT")
    path.write_bytes(whole[:at] + b"\0" * 40 + whole[at + 40 :])
    fails(data, out, r"of episode 2, frame 3 is no readable image")
    convert(droid_data(source, skip=(2,)), out, fps=15)
    fails(droid_data(source, cameras=cameras), out, "exists already")


def test_pictures_that_video_cannot_hold(tmp_path):
    root = write_hdf5(tmp_path / "aloha")
    for path in root.iterdir():
        with h5py.File(path, "a") as file:
            key = aloha.HDF5_CAMERAS["base_0_rgb"]
            images = file[key][:, :, :31]
            del file[key]
            file[key] = images
    data = data_of(root, state=aloha.HDF5_STATE, prompt="x")
    fails(data, tmp_path / "out", r"cam_high: pictures are \(24, 31\), but video needs even sides; give --image_size=")
    convert(data, tmp_path / "out", fps=50, image_size=32)
    assert LeRobotDataset(tmp_path / "out", cameras={}, horizon=1).features["observation.images.cam_high"]["shape"] == [
        32, 32, 3]  # fmt: skip
    with h5py.File(root / "episode_10.hdf5", "a") as file:
        images = file[key][:, :20]
        del file[key]
        file[key] = np.concatenate([images, images], axis=1)
    fails(data, tmp_path / "other", r"cam_high has a picture uint8 \(40, 30, 3\)|even sides", image_size=None)


def test_the_command_line(tmp_path):
    root = write_droid(tmp_path)
    arguments = [f"--repo_id={root}", f"--state={droid.STATE}", f"--actions={droid.RLDS_VELOCITIES}", "--fps=15"]
    arguments.append(f"--out={tmp_path / 'out'}")
    for extra, code, words in (
        ([], 0, "3 episodes, 12 frames"),
        ([], 2, "exists already"),
        (["--skip=x"], 2, "--skip=x"),
        (["--episodes=1,x"], 2, "--episodes=x"),
    ):
        done = commands.run("experiments.to_lerobot", *arguments, *extra)
        assert done.returncode == code and words in done.stdout + done.stderr.splitlines()[-1], done.stderr
        assert "Traceback" not in done.stderr
