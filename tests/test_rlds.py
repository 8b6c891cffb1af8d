"""RLDS without TensorFlow: step for step what tensorflow-datasets itself reads, DROID's schema, faults as one line."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import shutil
from pathlib import Path

import grain
import numpy as np
import pytest
import rlds_writer
import tensorflow_datasets as tfds
from PIL import Image
from rlds_writer import EPISODES, LENGTHS, droid_episode, write_droid

from configs import pi0_lerobot, pi05_droid
from experiments import train
from openpi_port import robots, starting, transforms
from openpi_port.config import Data, Train
from openpi_port.data import material, rlds, rlds_index
from openpi_port.data.datasets import find, open_datasets
from openpi_port.data.frame_cache import FrameCache
from openpi_port.data.rlds import RldsDataset
from openpi_port.errors import UserError
from openpi_port.fields import build
from openpi_port.images import resize_with_pad
from openpi_port.robots import droid

BRIDGE = {"base_0_rgb": "observation/image_0", "left_wrist_0_rgb": "observation/image_1"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def open_droid(root: Path, **changes) -> RldsDataset:
    arguments = {"cameras": droid.CAMERAS, "horizon": 4, "state": droid.STATE, "action": droid.RLDS_VELOCITIES}
    return RldsDataset(root, **(arguments | changes))


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_bridge_equals_tfds(shared, split):
    """Every step of the real data set, its two cameras, chunks and padding, against tensorflow-datasets."""
    root = shared / "data" / "octo_bridge"
    data = Data(repo_id=str(root), robot="lerobot", cameras=BRIDGE, state="observation/state", split=split, cache_gb=0)
    metadata, open_ = find(data)
    ours = open_(cameras=BRIDGE, horizon=4, state=data.state, action="action")
    builder = tfds.builder_from_directory(str(metadata.root))
    row = 0
    for number, record in enumerate(grain.experimental.TFRecordIterDataset(str(metadata.shards[0].path))):
        theirs = list(builder.info.features.deserialize_example_np(record)["steps"])
        actions = np.stack([step["action"] for step in theirs])
        for frame, step in enumerate(theirs):
            got = ours[row]
            for key in BRIDGE.values():
                np.testing.assert_array_equal(got[key], step["observation"][key.rpartition("/")[2]])
            np.testing.assert_array_equal(got["observation/state"], step["observation"]["state"])
            chunk = np.minimum(np.arange(frame, frame + 4), len(theirs) - 1)
            np.testing.assert_array_equal(got["action"], actions[chunk])
            np.testing.assert_array_equal(got["action_is_pad"], np.arange(frame, frame + 4) >= len(theirs))
            assert got["task"] == step["language_instruction"].decode()
            assert (got["episode_index"], got["frame_index"]) == (number, frame)
            row += 1
    assert row == len(ours) == 250 and len(ours.episodes) == 25


def test_droid(tmp_path):
    """Two files, parts of state and action apart, float64, PNG; the first instruction that is not empty."""
    data = open_droid(write_droid(tmp_path).parent, task=droid.RLDS_TASK)
    assert len(data) == sum(map(sum, LENGTHS)) and [e.length for e in data.episodes] == [3, 5, 4]
    row = 0
    for episode in (e for part in EPISODES for e in part):
        for frame in range(len(episode["is_first"])):
            got = data[row]
            for key in (*droid.CAMERAS.values(), *droid.STATE.split(",")):
                np.testing.assert_array_equal(got[key], np.asarray(episode[key][frame], got[key].dtype))
            for key in droid.RLDS_VELOCITIES.split(","):
                np.testing.assert_array_equal(got[key][0], np.float32(episode[key][frame]))
                np.testing.assert_array_equal(
                    got[key][-1], np.float32(episode[key][min(frame + 3, len(episode[key]) - 1)])
                )
            assert got["task"] == (episode["language_instruction"][frame] or "in other words")
            row += 1
    some = open_droid(tmp_path, episodes=[2, 0], image_size=16)
    assert [e.index for e in some.episodes] == [2, 0] and some[0]["task"] == "task 3"
    picture = EPISODES[1][0]["observation/wrist_image_left"][1]
    np.testing.assert_array_equal(some[1]["observation/wrist_image_left"], resize_with_pad(picture, 16))
    again = pickle.loads(pickle.dumps(some))
    np.testing.assert_array_equal(again[5]["observation/wrist_image_left"], some[5]["observation/wrist_image_left"])


def test_frame_cache_changes_nothing(tmp_path, monkeypatch):
    settings = Data(
        repo_id=str(write_droid(tmp_path)), robot="droid", cameras=droid.CAMERAS, state=droid.STATE,
        actions=droid.RLDS_VELOCITIES, prompt="x", validation=0.3,
    )  # fmt: skip
    cached, validation = open_datasets(settings, horizon=2, image_size=16, cache=FrameCache(16, 1.0))
    plain, _ = open_datasets(settings, horizon=2, image_size=16)
    assert len(cached.episodes) == 2 and len(validation.episodes) == 1
    for _ in range(2):
        for row in range(len(plain)):
            for key in plain.camera_keys:
                np.testing.assert_array_equal(cached[row][key], plain[row][key])
    monkeypatch.setattr(rlds, "_decode", None)
    for row in range(len(cached)):
        cached[row]  # every frame was kept


def test_a_file_is_scanned_once(tmp_path, monkeypatch):
    root = write_droid(tmp_path)
    one = open_droid(root)
    scan, scanned = rlds_index.scan, []
    monkeypatch.setattr(rlds_index, "scan", lambda m, s, p: scanned.append(s.path.name) or scan(m, s, p))
    np.testing.assert_array_equal(open_droid(root).numbers(3)["action_dict/joint_velocity"],
                                  one.numbers(3)["action_dict/joint_velocity"])  # fmt: skip
    assert scanned == []
    if Path("/proc/self/fd").exists():
        still_open = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        assert not [path for path in still_open if path.endswith(".npz")], "there may be thousands"
    changed = [EPISODES[0], [droid_episode(9, 6)]]
    write_droid(tmp_path / "other", changed)
    path = sorted(root.glob("*.tfrecord*"))[1]
    path.write_bytes((tmp_path / "other" / "toy" / "1.0.0" / path.name).read_bytes())
    assert len(open_droid(root)) == 14 and scanned == [path.name], "only the file that changed"
    for spoilt in (tmp_path / "cache").rglob("*.npz"):
        spoilt.write_bytes(b"PK")
    assert len(open_droid(root)) == 14 and len(scanned) == 3


# --- faults ----------------------------------------------------------------------------------------------------------


def fails(root: Path, match: str, **changes) -> None:
    with pytest.raises(UserError, match=match) as error:
        open_droid(root, **changes)[0]
    assert "\n" not in str(error.value) and str(root) in str(error.value)


def test_truncated_file(tmp_path):
    root = write_droid(tmp_path)
    path = sorted(root.glob("*.tfrecord*"))[0]
    whole = path.read_bytes()
    for size, after in ((len(whole) - 3, 1), (len(whole) // 4, 0), (5, 0)):
        path.write_bytes(whole[:size])
        fails(root, f"{path.name}: tfrecord file is cut off after {after} records")
    path.write_bytes(whole[: len(rlds_writer.frame(rlds_writer.example(EPISODES[0][0])))])
    fails(root, r"has 1 episodes, dataset_info.json says 2")
    path.unlink()
    fails(root, f"{path.name}: can't be read")


def test_damaged_bytes(tmp_path):
    root = write_droid(tmp_path)
    path = sorted(root.glob("*.tfrecord*"))[1]
    whole = bytearray(path.read_bytes())
    for position, words in ((2, "checksum of a length"), (13, "episode 0 of the file is damaged")):
        spoilt = whole.copy()
        spoilt[position] ^= 0x41
        path.write_bytes(spoilt)
        fails(root, words)
    at = whole.index(b"IDAT")
    path.write_bytes(whole[:at] + b"\0" * 40 + whole[at + 40 :])
    data = open_droid(root)
    with pytest.raises(UserError, match=rf"{path.name}: observation/\w+ of episode 2, frame \d is no readable image"):
        for row in range(len(data)):
            data[row]


def test_index_that_cannot_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    root = write_droid(tmp_path)
    with pytest.raises(UserError, match=r"the index of toy-train.*can't be written.*XDG_CACHE_HOME"):
        open_droid(root)


def test_files_that_are_not_what_they_say(tmp_path):
    lacking = {k: v for k, v in EPISODES[1][0].items() if k != "observation/joint_position"}
    fails(write_droid(tmp_path / "a", [EPISODES[0], [lacking]]), r"has no feature steps/observation/joint_position")
    uneven = EPISODES[1][0] | {"language_instruction": ["x"] * 3}
    fails(write_droid(tmp_path / "b", [[uneven]]), r"has 4 steps of .* and 3 of language_instruction")
    odd = EPISODES[1][0] | {"observation/joint_position": np.zeros(27)}
    fails(write_droid(tmp_path / "c", [[odd]]), r"steps/observation/joint_position is damaged \(27 numbers")
    encoded = EPISODES[1][0] | {"observation/joint_position": [b"x"] * 4}
    fails(write_droid(tmp_path / "d", [[encoded]]), "byte strings where numbers are expected")
    nan = EPISODES[1][0] | {"observation/joint_position": np.full((4, 7), np.nan)}
    fails(write_droid(tmp_path / "e", [[nan]]), "observation/joint_position is nan in dimension 0 at episode 0")


def test_names_that_are_not_there(tmp_path):
    root = write_droid(tmp_path)
    fails(root, r"no camera 'observation/wrist_left'.*did you mean observation/wrist_image_left", cameras={
        "base_0_rgb": "observation/wrist_left"})  # fmt: skip
    fails(root, r"no state column 'observation/joints'", state="observation/joints")
    fails(root, r"no state column 'embedding'", state="embedding")
    fails(root, r"no action column 'action'.*action_dict", action="action")
    fails(root, r"no instruction 'text'", task="text")
    fails(root, r"no episode 7; there are 3, 0 to 2", episodes=[7])
    (root / "features.json").write_text("{")
    fails(root, "features.json can't be read")
    with pytest.raises(UserError, match="no RLDS data set"):
        RldsDataset(tmp_path / "cache", cameras={}, horizon=1)


def test_settings(tmp_path):
    root = write_droid(tmp_path)
    settings = Data(repo_id=str(root), robot="droid", cameras={}, split="validation")
    with pytest.raises(UserError, match=r"no split 'validation' \(config.data.split\); known: train"):
        find(settings)
    shutil.copytree(root, root.parent / "2.0.0")
    with pytest.raises(UserError, match="holds 2 RLDS data sets"):
        find(dataclasses.replace(settings, repo_id=str(tmp_path / "toy")))
    embedded = dataclasses.replace(settings, repo_id="aloha_sim_transfer_cube")
    with pytest.raises(UserError, match="config.data.split='validation' is for RLDS"):
        find(embedded)


def libero(root: Path) -> Path:
    """The features of modified_libero_rlds."""
    rng = np.random.default_rng(0)
    image, length = tfds.features.Image(shape=(16, 16, 3)), 4
    steps = {
        "action": tfds.features.Tensor(shape=(7,), dtype=np.float32),
        "language_instruction": tfds.features.Text(),
        "observation": {
            "image": image, "wrist_image": image,
            "state": tfds.features.Tensor(shape=(8,), dtype=np.float32),
            "joint_state": tfds.features.Tensor(shape=(7,), dtype=np.float32),
        },
    }  # fmt: skip
    pictures = rng.integers(0, 256, (2, length, 16, 16, 3), np.uint8)
    episode = {
        "action": rng.normal(size=(length, 7)), "language_instruction": ["open the drawer"] * length,
        "observation/image": pictures[0], "observation/wrist_image": pictures[1],
        "observation/state": rng.normal(size=(length, 8)), "observation/joint_state": rng.normal(size=(length, 7)),
    }  # fmt: skip
    return rlds_writer.write(root / "libero" / "1.0.0", steps, [[episode]])


@pytest.mark.parametrize(("name", "state_dim", "action_dim"), [("droid", 8, 8), ("libero", 8, 7)])
def test_presets_fit_the_published_schemas(tmp_path, name, state_dim, action_dim):
    """A raw step through the robot's own steps, with the names that the robots' files give."""
    if name == "droid":
        data = build(Train, pi05_droid.get_config("debug")).data
        data = dataclasses.replace(data, repo_id=str(write_droid(tmp_path)))
    else:
        robot, root = robots.load(name), libero(tmp_path)
        data = Data(repo_id=str(root), robot=name, cameras=robot.CAMERAS, state=robot.STATE, actions=robot.RLDS_ACTIONS)
    train, _ = open_datasets(data, horizon=3, image_size=16)
    raw = train[0]
    sample = transforms.forward(transforms.before_normalize(data), raw)
    assert sample["state"].shape == (state_dim,) and sample["actions"].shape == (3, action_dim)
    assert set(sample["image"]) == set(data.cameras) and sample["prompt"] == raw["task"] != ""
    if name == "droid":  # positions relative to the state, the gripper absolute
        joints = raw["action_dict/joint_position"] - raw["observation/joint_position"]
        np.testing.assert_array_equal(sample["actions"][:, :7], joints)
        np.testing.assert_array_equal(sample["actions"][:, 7:], raw["action_dict/gripper_position"])


# --- training --------------------------------------------------------------------------------------------------------


def test_bridge_trains(shared, tmp_path):
    config = build(Train, pi0_lerobot.get_config("debug"))
    data = Data(
        repo_id=str(shared / "data" / "octo_bridge"), robot="lerobot", cameras=BRIDGE, state="observation/state"
    )
    config = dataclasses.replace(
        config, out=str(tmp_path), data=data, num_steps=3, batch_size=2, eval_batches=1, backend="torch"
    )
    path = Path(config.out) / config.name
    train.train(config, path, starting.point(path, config, resume=False))
    assert (path / "3" / "policy.json").exists()
    batches = material.load(config).batches(0)
    batch = next(batches)
    batches.close()
    assert batch["actions"].shape == (2, 50, 32) and not batch["actions"][..., 7:].any()
    assert batch["image_mask"]["left_wrist_0_rgb"].all() and not batch["image_mask"]["right_wrist_0_rgb"].any()


def test_the_writer_of_these_tests_writes_what_tfds_reads(tmp_path):
    root = write_droid(tmp_path)
    builder = tfds.builder_from_directory(str(root))
    path = builder.info.splits["train"].filepaths[1]
    (record,) = list(grain.experimental.TFRecordIterDataset(str(path)))
    steps = list(builder.info.features.deserialize_example_np(record)["steps"])
    theirs = steps[2]["observation"]["exterior_image_1_left"]
    np.testing.assert_array_equal(theirs, EPISODES[1][0]["observation/exterior_image_1_left"][2])
    assert np.asarray(Image.open(io.BytesIO(rlds_writer.png(theirs)))).shape == theirs.shape
