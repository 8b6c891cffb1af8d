"""The reader: real v2.1 and v3.0 data against LeRobot's own values, every fault as one line; statistics."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from openpi_port.data.frame_cache import FrameCache
from openpi_port.data.lerobot import LeRobotDataset, load_metadata, resolve
from openpi_port.data.lerobot_writer import Description, create
from openpi_port.data.stats import compute
from openpi_port.errors import UserError
from openpi_port.images import resize_with_pad
from openpi_port.transforms import Delta, Repack

CAMERA = "observation.images.cam_high"
TOP = "observation.images.top"
TABLE, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
VIDEO = f"videos/{TOP}/chunk-000/file-000.mp4"
LENGTHS = (14, 9, 11)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Three short episodes of a two-joint robot, v3.0."""
    description = Description("toy", 10, {TOP: (32, 48)}, ["a", "b"], ["a", "b"], keyframe_every=4)
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("made") / "toy"
    with create(root, description) as writer:
        for number, length in enumerate(LENGTHS):
            images = np.stack([np.full((32, 48, 3), 60 * number + 4 * i, np.uint8) for i in range(length)])
            state = rng.normal(size=(length, 2)).astype(np.float32)
            writer.add_episode({TOP: images}, state, state + 1, f"task {number % 2}")
    return root


@pytest.fixture
def toy(made, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "toy"))


def open_toy(root: Path, **changes) -> LeRobotDataset:
    return LeRobotDataset(root, **({"cameras": {"base_0_rgb": TOP}, "horizon": 5} | changes))


def edit_info(root: Path, **changes) -> None:
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_features(root: Path, **changes) -> None:
    features = json.loads((root / "meta" / "info.json").read_text())["features"]
    edit_info(root, features={key: feature | changes for key, feature in features.items()})


def edit_column(root: Path, name: str, change, file: str = TABLE) -> None:
    table = pq.read_table(root / file)
    values = change(table[name].to_pylist())
    at = table.column_names.index(name)
    pq.write_table(table.set_column(at, name, pa.array(values)), root / file)


# Real data


@pytest.fixture(scope="module")
def reference(shared) -> dict:
    return json.loads((shared / "data" / "g1_lerobot_v30_reference.json").read_text())


def test_v30_equals_lerobot(shared, reference):
    data = LeRobotDataset(shared / "data" / "g1_lerobot_v30", cameras={"base_0_rgb": CAMERA}, horizon=10)
    assert len(data) == reference["num_frames"] and len(data.episodes) == reference["num_episodes"]
    assert data.fps == reference["fps"] and data.features[CAMERA]["shape"] == [480, 640, 3]
    for expected in reference["items"]:
        got = data[expected["index"]]
        np.testing.assert_array_equal(got["observation.state"], np.float32(expected["observation.state"]))
        np.testing.assert_array_equal(got["action"][0], np.float32(expected["action"]))
        for key in ("timestamp", "frame_index", "episode_index", "task"):
            assert got[key] == expected[key]
        image = got[CAMERA] / 255
        np.testing.assert_allclose(image.mean((0, 1)), expected["image_mean_per_channel"], atol=1e-6)
        blocks = image[..., 0].reshape(4, 120, 4, 160).mean((1, 3))
        # The reference summed its blocks another way: it is the place of things in the picture that is tested.
        np.testing.assert_allclose(blocks, expected["image_mean_8x8_blocks_ch0"], atol=2e-4)
    pads = 0
    for expected in reference["delta_items"]:
        got = data.numbers(expected["index"])
        np.testing.assert_array_equal(got["action"], np.float32(expected["action"]))
        np.testing.assert_array_equal(got["action_is_pad"], expected["action_is_pad"])
        pads += sum(expected["action_is_pad"])
    assert pads > 0, "the reference goes past an episode's end"


def test_one_episode_of_v30(shared, reference):
    data = LeRobotDataset(shared / "data" / "g1_lerobot_v30", cameras={}, horizon=3, episodes=[1])
    expected = reference["episodes=[1]"]
    assert len(data) == expected["num_frames"]
    np.testing.assert_array_equal(data[0]["observation.state"], np.float32(expected["first_state"]))


def test_v21_holds_the_same_as_v30(shared):
    """v3.0 was made from these two of the hundred episodes; the rest is absent and not asked for."""
    root = shared / "data" / "g1_lerobot_v21"
    old = LeRobotDataset(root, cameras={"base_0_rgb": CAMERA}, horizon=10, episodes=[29, 31])
    new = LeRobotDataset(shared / "data" / "g1_lerobot_v30", cameras={"base_0_rgb": CAMERA}, horizon=10)
    assert len(old) == len(new) and old.metadata.version == "v2.1"
    for index in (0, 215, 220, 221, 487):
        one, other = old[index], new[index]
        for key in ("observation.state", "action", "action_is_pad", CAMERA):
            np.testing.assert_array_equal(one[key], other[key])
        assert (one["task"], one["timestamp"]) == (other["task"], other["timestamp"])
        assert one["episode_index"] == [29, 31][other["episode_index"]]
    with pytest.raises(UserError, match=r"episode_000030\.parquet: parquet file is missing"):
        LeRobotDataset(root, cameras={}, horizon=10, episodes=[29, 30])
    with pytest.raises(UserError, match=r"no episode 100"):
        LeRobotDataset(root, cameras={}, horizon=10, episodes=[100])


# What the reader does


def test_the_shipped_data_set_opens_by_name():
    root = resolve("aloha_sim_transfer_cube")
    data = LeRobotDataset("aloha_sim_transfer_cube", cameras={"base_0_rgb": TOP}, horizon=50, image_size=224)
    sample = data[len(data) - 1]
    assert data.metadata.root == root and sample[TOP].shape == (224, 224, 3)
    assert sample["action"].shape == (50, 14) and sample["action_is_pad"].sum() == 49 and sample["task"]


@settings(max_examples=20, deadline=None)
@given(index=st.integers(0, sum(LENGTHS) - 1), horizon=st.integers(1, 20))
def test_chunks_end_with_their_episode(made, index, horizon):
    data = open_toy(made, horizon=horizon, cameras={})
    sample = data[index]
    ends = np.cumsum(LENGTHS)
    last = ends[np.searchsorted(ends, index, side="right")] - 1
    rows = np.minimum(np.arange(index, index + horizon), last)
    table = pq.read_table(made / TABLE)
    np.testing.assert_array_equal(sample["action"], np.float32(table["action"].to_pylist())[rows])
    np.testing.assert_array_equal(sample["action_is_pad"], np.arange(index, index + horizon) > last)


def test_cached_frames_equal_decoded_ones(made, tmp_path):
    plain = open_toy(made, image_size=24)
    data = open_toy(made, image_size=24, cache=FrameCache(24, 1.0, tmp_path / "frames"))
    order = np.random.default_rng(0).permutation(len(data))
    for _ in range(2):
        for index in order:
            np.testing.assert_array_equal(data[int(index)][TOP], plain[int(index)][TOP])
    whole = open_toy(made)[3][TOP]
    np.testing.assert_array_equal(resize_with_pad(whole, 24), plain[3][TOP])
    warm = pickle.loads(pickle.dumps(data))  # as a worker gets it
    warm._videos.use = None  # decoding would fail now
    for index in order:
        np.testing.assert_array_equal(warm[int(index)][TOP], plain[int(index)][TOP])


def test_episodes_keep_the_given_order_and_may_share_a_file(made):
    data = open_toy(made, episodes=[2, 0])
    assert [e.index for e in data.episodes] == [2, 0] and len(data) == LENGTHS[2] + LENGTHS[0]
    whole = open_toy(made)
    start = LENGTHS[0] + LENGTHS[1]
    for mine, theirs in ((0, start), (LENGTHS[2] - 1, start + LENGTHS[2] - 1), (LENGTHS[2], 0)):
        one, other = data[mine], whole[theirs]
        assert one["frame_index"] == other["frame_index"] and one["task"] == other["task"]
        for key in (TOP, "action"):
            np.testing.assert_array_equal(one[key], other[key])


def test_embedded_images_and_scalar_columns(tmp_path):
    """dtype "image", two episodes in a file of several row groups; scalar actions; state in two columns."""
    root = tmp_path / "old"
    (root / "meta").mkdir(parents=True)
    (root / "data").mkdir()
    features = {
        TOP: {"dtype": "image", "shape": [20, 30, 3], "names": None},
        "joints": {"dtype": "float32", "shape": [2], "names": None},
        "gripper": {"dtype": "float64", "shape": [1], "names": None},
        "action": {"dtype": "float32", "shape": [1], "names": None},
    }
    info = {"codebase_version": "v2.1", "fps": 5, "chunks_size": 1000, "features": features,
            "data_path": "data/all.parquet"}  # fmt: skip
    (root / "meta" / "info.json").write_text(json.dumps(info))
    (root / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "wave"}\n')
    (root / "meta" / "episodes.jsonl").write_text(
        '{"episode_index": 0, "tasks": ["wave"], "length": 2}\n{"episode_index": 1, "tasks": ["wave"], "length": 4}\n'
    )
    images = np.random.default_rng(0).integers(0, 256, (6, 20, 30, 3), np.uint8)

    def png(image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "png")
        return buffer.getvalue()

    table = pa.table({
        TOP: [{"bytes": png(image), "path": None} for image in images],
        "joints": pa.array([[i, -i] for i in range(6)], pa.list_(pa.float32(), 2)),
        "gripper": np.arange(6.0), "action": np.arange(6, dtype=np.float32),
        "timestamp": np.float32([0, 1, 0, 1, 2, 3]) / 5, "episode_index": [0, 0, 1, 1, 1, 1], "task_index": [0] * 6,
    })  # fmt: skip
    pq.write_table(table, root / "data" / "all.parquet", row_group_size=4)
    arguments = {"state": "joints, gripper", "horizon": 2, "cameras": {"base_0_rgb": TOP}}
    data = LeRobotDataset(root, **arguments)
    cached = LeRobotDataset(root, image_size=30, cache=FrameCache(30, 1.0, tmp_path / "frames"), **arguments)
    for index in (5, 0, 4, 3, 3):
        sample = data[index]
        np.testing.assert_array_equal(sample[TOP], images[index])
        np.testing.assert_array_equal(cached[index][TOP], resize_with_pad(images[index], 30))
        np.testing.assert_array_equal(sample["joints"], [index, -index])
        np.testing.assert_array_equal(sample["gripper"], [index])
        np.testing.assert_array_equal(sample["action"], [[index], [index if index in (1, 5) else index + 1]])


# Faults: each is one line that says where


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: shutil.rmtree(r / "meta"), r"info\.json: missing, so .* is no LeRobot data set"),
        (lambda r: (r / "meta/info.json").write_text("{"), r"info\.json: no valid JSON"),
        (lambda r: edit_info(r, codebase_version="v1.6"), r"v1\.6 is not supported \(v2\.0, v2\.1, v3\.0 are\)"),
        (lambda r: edit_info(r, fps=None), r"info\.json: no fps"),
        (lambda r: edit_info(r, fps=20), r"episode 0, frame 1 has timestamp .* expected .* at 20 fps"),
        (lambda r: (r / VIDEO).unlink(), r"file-000\.mp4: video file is missing"),
        (lambda r: (r / TABLE).unlink(), r"file-000\.parquet: parquet file is missing"),
        (lambda r: (r / TABLE).write_bytes((r / TABLE).read_bytes()[:300]), r"parquet file is damaged"),
        (lambda r: (r / "meta/tasks.parquet").unlink(), r"tasks\.parquet: parquet file is missing"),
        (lambda r: (r / EPISODES).unlink(), r"meta/episodes: no parquet file"),
        (
            lambda r: pq.write_table(
                pq.read_table(r / "meta/tasks.parquet").drop(["task_index"]), r / "meta/tasks.parquet"
            ),
            r"tasks\.parquet: no column 'task_index'",
        ),
        (
            lambda r: edit_column(r, "action", lambda v: [*v[:17], [0.0, float("nan")], *v[18:]]),
            r"action is nan in dimension 1 at episode 1, frame 3",
        ),
        (
            lambda r: edit_column(r, "observation.state", lambda v: [*v[:2], [float("inf"), 0.0], *v[3:]]),
            r"observation\.state is inf in dimension 0 at episode 0, frame 2",
        ),
        (
            lambda r: edit_column(r, "observation.state", lambda v: [[*row, 0.0] for row in v]),
            r"observation\.state has 3 numbers in a row, meta/info\.json says 2",
        ),
        (
            lambda r: edit_column(r, "action", lambda v: [*v[:4], [0.5], *v[5:]]),
            r"action has 1 number in a row",
        ),
        (
            lambda r: edit_column(r, "episode_index", lambda v: [0, 0, *v[2:-1], 0]),
            r"episode 0 has 15 frames in rows 0 to 33, meta/ says 14 in one piece",
        ),
        (lambda r: (r / "meta/info.json").write_text("[]"), r"info\.json: not as LeRobot writes it"),
        (lambda r: edit_info(r, fps="fast"), r"info\.json: not as LeRobot writes it .*'fast'"),
        (lambda r: edit_info(r, video_path=None), r"info\.json: no video_path"),
        (lambda r: edit_info(r, features={"action": {}}), r"info\.json: no 'dtype'"),
        (lambda r: edit_info(r, codebase_version="v2.1"), r"tasks\.jsonl: can't be read"),
        (lambda r: edit_features(r, shape=2), r"observation\.state has shape 2 in meta/info\.json"),
        (lambda r: edit_column(r, "length", lambda v: [None, *v[1:]], EPISODES), r"file-000\.parquet: not as LeRobot"),
        (lambda r: edit_column(r, "length", lambda v: [-3, *v[1:]], EPISODES), r"episode 0 has -3 frames"),
        (lambda r: edit_column(r, "action", lambda v: [["a", "b"] for _ in v]), r"action holds string, expected num"),
        (lambda r: edit_column(r, "action", lambda v: [None, *v[1:]]), r"action has no value in 1 of 34 rows"),
        (lambda r: edit_column(r, "task_index", lambda v: [None, *v[1:]]), r"task_index has no value in 1 of 34"),
        (lambda r: edit_column(r, "action", lambda v: [[1e300, 0.0], *v[1:]]), r"action is inf in dimension 0 at epis"),
        (lambda r: edit_column(r, "timestamp", lambda v: [t + 3.7 for t in v]), r"frame 0 has timestamp 3\.7000 s"),
        (lambda r: edit_column(r, "task_index", lambda v: [*v[:-1], 9]), r"no task of index 9"),
    ],
)
def test_bad_data(toy, damage, message):
    damage(toy)
    with pytest.raises(UserError, match=message) as error:
        open_toy(toy)
    assert "\n" not in str(error.value) and str(toy) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cameras": {"base_0_rgb": "observation.images.tpo"}}, r"no camera 'observation\.images\.tpo'; did you mean "),
        ({"state": "observation.stat"}, r"no state column 'observation\.stat'; did you mean observation\.state"),
        ({"action": "actions"}, r"no action column 'actions'; did you mean action"),
        ({"action": "observation.state"}, r"can't be state and action at once"),
    ],
)
def test_unknown_names(made, changes, message):
    with pytest.raises(UserError, match=message):
        open_toy(made, **changes)


def test_all_episodes_with_the_same_trouble_are_named(toy):
    edit_column(toy, "action", lambda v: [[np.nan, 0.0], *v[1:15], [0.0, np.inf], *v[16:]])
    with pytest.raises(UserError, match=r"action is nan in dimension 0 at episode 0, .*so with 2 episodes: \(0,1\)$"):
        open_toy(toy)
    with pytest.raises(
        UserError, match=r"action is inf in dimension 1 at episode 1, frame 1; .*\(config\.data\.skip\)$"
    ):
        open_toy(toy, episodes=[2, 1])
    assert len(open_toy(toy, episodes=[2])) == LENGTHS[2]
    (toy / VIDEO).unlink()
    with pytest.raises(UserError, match=r"file-000\.mp4: video file is missing; .* with 2 episodes: \(0,2\)$"):
        LeRobotDataset(
            toy, cameras={"base_0_rgb": TOP}, horizon=2, state="timestamp", action="frame_index", episodes=[2, 0]
        )


def test_lerobots_v2_descriptions_with_something_missing(shared, tmp_path):
    root = tmp_path / "g1"
    shutil.copytree(shared / "data" / "g1_lerobot_v21" / "meta", root / "meta")
    edit_info(root, chunks_size=None)
    with pytest.raises(UserError, match=r"info\.json: not as LeRobot writes it"):
        load_metadata(root)
    edit_info(root, chunks_size=1000)
    lines = [json.loads(line) for line in (root / "meta/episodes.jsonl").read_text().splitlines()]
    for lacking in ("length", "tasks"):  # the second of which is not needed
        text = "\n".join(json.dumps({k: v for k, v in line.items() if k != lacking}) for line in lines)
        (root / "meta/episodes.jsonl").write_text(text)
        if lacking == "tasks":
            assert len(load_metadata(root).episodes) == len(lines)
            continue
        with pytest.raises(UserError, match=r"episodes\.jsonl: no 'length'"):
            load_metadata(root)


def test_times_and_numbers_in_lists_of_one(toy):
    """As converters write them that take info.json's shape [1] at its word."""
    plain = open_toy(toy)
    for name in ("timestamp", "task_index", "episode_index"):
        edit_column(toy, name, lambda values: [[value] for value in values])
    listed = open_toy(toy)
    for index in (0, 13, 14, 33):
        ours, theirs = listed.numbers(index), plain.numbers(index)
        assert ours["task"] == theirs["task"] and ours["timestamp"] == theirs["timestamp"]
        np.testing.assert_array_equal(ours["action"], theirs["action"])


def test_truncated_video_is_reported_when_it_is_read(toy):
    content = (toy / VIDEO).read_bytes()
    (toy / VIDEO).write_bytes(content[: len(content) // 2])
    data = open_toy(toy)
    with pytest.raises(UserError, match=r"file-000\.mp4: video file"):
        data[0]


def test_video_shorter_than_its_episodes(toy):
    table = pq.read_table(toy / EPISODES)
    name = f"videos/{TOP}/from_timestamp"
    late = pa.array([t + 2.0 for t in table[name].to_pylist()])
    pq.write_table(table.set_column(table.column_names.index(name), name, late), toy / EPISODES)
    with pytest.raises(UserError, match=r"no frame at .* don't belong together"):
        open_toy(toy)[sum(LENGTHS) - 1]


# Statistics


def test_stats_are_those_of_what_is_trained_on(made):
    data = open_toy(made, cameras={})
    steps = (Repack({}, "observation.state", "action"), Delta((True, False)))
    stats = compute(data, steps)
    chunks, states = [], []
    for index in range(len(data)):
        sample = data[index]
        real = sample["action"][~sample["action_is_pad"]]
        chunks.append(real - sample["observation.state"] * np.float32([1, 0]))
        states.append(sample["observation.state"])
    np.testing.assert_allclose(stats["actions"].mean, np.concatenate(chunks).mean(0), atol=1e-6)
    np.testing.assert_allclose(stats["actions"].std, np.concatenate(chunks).std(0), atol=1e-6)
    np.testing.assert_allclose(stats["state"].mean, np.mean(states, 0), atol=1e-6)
    assert stats["actions"].count == sum(len(c) for c in chunks) < len(data) * data.horizon


def test_metadata_counts(made):
    metadata = load_metadata(made)
    assert (
        [episode.length for episode in metadata.episodes] == list(LENGTHS)
        and metadata.cameras == (TOP,)
        and metadata.robot == "toy"
    )
