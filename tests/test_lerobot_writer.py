"""The LeRobot v3.0 writer: the layout of a real data set, values and pictures back, and never half a data set."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_port.data import lerobot_writer
from openpi_port.data.lerobot_writer import Description, create
from openpi_port.errors import UserError

TOP = "observation.images.top"
NAMES = ("a", "b", "c")
ABOUT = Description(robot="test", fps=50, cameras={TOP: (32, 48)}, state_names=NAMES, action_names=NAMES)
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
DATA = "data/chunk-000/file-000.parquet"
VIDEO = f"videos/{TOP}/chunk-000/file-000.mp4"


def episode(length: int, first: int = 0, seed: int = 0) -> dict:
    """Pictures of one grey each, which names the frame: 5 levels survive the compression."""
    rng = np.random.default_rng(seed)
    grey = ((first + np.arange(length)) * 5 % 200 + 20).astype(np.uint8)
    images = np.broadcast_to(grey[:, None, None, None], (length, 32, 48, 3))
    state, action = rng.normal(size=(2, length, len(NAMES))).astype(np.float32)
    return {"images": {TOP: images}, "state": state, "action": action}


def write(root: Path, lengths: list[int], tasks: list[str] | None = None) -> list[dict]:
    episodes, first = [], 0
    with create(root, ABOUT) as writer:
        for i, length in enumerate(lengths):
            episodes.append(episode(length, first, seed=i))
            writer.add_episode(**episodes[-1], task=tasks[i] if tasks else "do it")
            first += length
    return episodes


def decode(path: Path) -> Iterator[tuple[float, bool, float]]:
    """Time, whether it is a key frame, and mean brightness of every frame."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield float(frame.time), bool(frame.key_frame), float(frame.to_ndarray(format="rgb24").mean())


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 27), min_size=1, max_size=4))
def test_what_was_written_comes_back(lengths: list[int]):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "set"
        episodes = write(root, lengths)
        rows = pq.read_table(root / DATA).to_pydict()
        for key, name in (("observation.state", "state"), ("action", "action")):
            np.testing.assert_array_equal(rows[key], np.concatenate([e[name] for e in episodes]))
        assert rows["index"] == list(range(sum(lengths)))
        assert rows["frame_index"] == [t for length in lengths for t in range(length)]
        assert rows["episode_index"] == [i for i, length in enumerate(lengths) for _ in range(length)]
        np.testing.assert_allclose(rows["timestamp"], np.array(rows["frame_index"]) / 50, atol=1e-7)

        frames = list(decode(root / VIDEO))
        wanted = np.concatenate([e["images"][TOP][:, 0, 0, 0] for e in episodes])
        np.testing.assert_allclose([f[0] for f in frames], np.arange(sum(lengths)) / 50, atol=1e-9)
        np.testing.assert_allclose([f[2] for f in frames], wanted, atol=2.4)

        keys = np.nonzero([f[1] for f in frames])[0]
        assert np.diff([*keys, len(frames)]).max() <= ABOUT.keyframe_every
        for row in pq.read_table(root / EPISODES).to_pylist():
            start, end = row["dataset_from_index"], row["dataset_to_index"]
            assert end - start == row["length"] == lengths[row["episode_index"]]
            assert start in keys  # an episode decodes without the one before it
            assert row[f"videos/{TOP}/from_timestamp"] == pytest.approx(start / 50)
            assert row[f"videos/{TOP}/to_timestamp"] == pytest.approx(end / 50)


def test_layout_is_that_of_a_real_data_set(tmp_path: Path, shared: Path):
    """The same files, columns and types as LeRobot's own conversion script writes them."""
    write(tmp_path / "set", [5, 6])
    real, ours = shared / "data" / "g1_lerobot_v30", tmp_path / "set"
    camera = "observation.images.cam_high"

    def files(root: Path) -> set[str]:
        found = (str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and p.name != "LICENSE")
        return {name.replace(camera, TOP) for name in found}

    def schema(root: Path, name: str) -> dict[str, str]:
        fields = pq.read_schema(root / name)
        return {f.name.replace(camera, TOP): str(f.type).replace("large_", "") for f in fields}

    assert files(ours) == files(real)
    for name in (EPISODES, DATA, "meta/tasks.parquet"):
        assert schema(ours, name) == schema(real, name), name
    pandas = [json.loads(pq.read_schema(r / "meta/tasks.parquet").metadata[b"pandas"]) for r in (ours, real)]
    assert pandas[0]["index_columns"] == pandas[1]["index_columns"]

    info, theirs = (json.loads((r / "meta/info.json").read_text()) for r in (ours, real))
    assert set(info) == set(theirs)
    for key in ("codebase_version", "data_path", "video_path", "chunks_size"):
        assert info[key] == theirs[key]
    features = {k.replace(camera, TOP): v for k, v in theirs["features"].items()}
    assert set(info["features"]) == set(features)
    assert {k: v["dtype"] for k, v in info["features"].items()} == {k: v["dtype"] for k, v in features.items()}
    assert set(info["features"][TOP]["info"]) == set(features[TOP]["info"])

    stats, theirs = (json.loads((r / "meta/stats.json").read_text()) for r in (ours, real))
    theirs = {k.replace(camera, TOP): v for k, v in theirs.items()}
    assert set(stats) == set(theirs)
    for key, value in theirs.items():
        assert set(value) <= set(stats[key])
    assert np.shape(stats[TOP]["mean"]) == np.shape(theirs[TOP]["mean"])


def test_statistics_are_those_of_all_frames(tmp_path: Path):
    episodes = write(tmp_path / "set", [30, 7, 20])
    stats = json.loads((tmp_path / "set/meta/stats.json").read_text())
    action = np.concatenate([e["action"] for e in episodes]).astype(np.float64)
    for name, value in (("mean", action.mean(0)), ("std", action.std(0)), ("min", action.min(0)),
                        ("q99", np.quantile(action, 0.99, axis=0))):  # fmt: skip
        np.testing.assert_allclose(stats["action"][name], value, atol=1e-6)
    images = np.concatenate([e["images"][TOP] for e in episodes]) / 255
    np.testing.assert_allclose(np.ravel(stats[TOP]["mean"]), images.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(np.ravel(stats[TOP]["std"]), images.std((0, 1, 2)), atol=1e-6)
    assert stats[TOP]["count"] == [57]


def test_tasks_are_numbered_as_they_appear(tmp_path: Path):
    write(tmp_path / "set", [2, 3, 4], ["lift", "move", "lift"])
    tasks = pq.read_table(tmp_path / "set/meta/tasks.parquet").to_pydict()
    assert tasks == {"task_index": [0, 1], "__index_level_0__": ["lift", "move"]}
    rows = pq.read_table(tmp_path / "set" / DATA)["task_index"].to_pylist()
    assert rows == [0] * 2 + [1] * 3 + [0] * 4
    assert pq.read_table(tmp_path / "set" / EPISODES)["tasks"].to_pylist() == [["lift"], ["move"], ["lift"]]


def test_a_large_video_goes_on_in_the_next_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lerobot_writer, "_VIDEO_MB", 0)
    write(tmp_path / "set", [120, 6])  # the encoder looks ahead: nothing comes out for the first frames
    rows = pq.read_table(tmp_path / "set" / EPISODES).to_pylist()
    assert [row[f"videos/{TOP}/file_index"] for row in rows] == [0, 1]
    assert [row[f"videos/{TOP}/from_timestamp"] for row in rows] == [0, 0]
    for i, length in enumerate((120, 6)):
        path = tmp_path / "set" / lerobot_writer.file_name(f"videos/{TOP}", i, "mp4")
        assert len(list(decode(path))) == length


def test_file_names_count_a_thousand_to_a_chunk():
    assert lerobot_writer.file_name("data", 1999, "parquet") == "data/chunk-001/file-999.parquet"


def test_nothing_is_overwritten(tmp_path: Path):
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match="exists already"), create(tmp_path / "set", ABOUT):
        pass
    with pytest.raises(UserError, match="exists already"), create(tmp_path / "late", ABOUT) as writer:
        writer.add_episode(**episode(3), task="x")
        (tmp_path / "late").write_text("mine")  # somebody else takes the name meanwhile
    assert (tmp_path / "late").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["late", "set"]


def test_an_error_or_no_episode_leaves_nothing(tmp_path: Path):
    with pytest.raises(RuntimeError), create(tmp_path / "set", ABOUT) as writer:
        writer.add_episode(**episode(3), task="x")
        raise RuntimeError
    with pytest.raises(UserError, match="no episode"), create(tmp_path / "set", ABOUT):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, message", [
    ({"state": np.zeros((4, 2), np.float32)}, "state is"),
    ({"action": np.zeros((3, 3), np.float32)}, "action is"),
    ({"action": np.full((4, 3), np.nan, np.float32)}, "action has NaN"),
    ({"images": {}}, "cameras"),
    ({"images": {TOP: np.zeros((4, 32, 32, 3), np.uint8)}}, "expected uint8"),
    ({"images": {TOP: np.zeros((4, 32, 48, 3), np.float32)}}, "float32"),
    ({"state": np.zeros((0, 3)), "action": np.zeros((0, 3)), "images": {TOP: np.zeros((0, 32, 48, 3), np.uint8)}},
     "no fewer than 1"),
])  # fmt: skip
def test_a_bad_episode_is_refused_and_the_rest_is_kept(tmp_path: Path, change: dict, message: str):
    with create(tmp_path / "set", ABOUT) as writer:
        writer.add_episode(**episode(4), task="x")
        with pytest.raises(UserError, match=message):
            writer.add_episode(**(episode(4) | change), task="y")
    assert len(pq.read_table(tmp_path / "set" / DATA)) == len(list(decode(tmp_path / "set" / VIDEO))) == 4


_HALF_WAY = """
import os, sys
sys.path[:0] = {path!r}
from tests.test_lerobot_writer import ABOUT, create, episode
with create({root!r}, ABOUT) as writer:
    for _ in range(200):
        writer.add_episode(**episode(40), task="x")
        {then}
"""


def half_way(root: Path, then: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Writes in another process, up to a fault."""
    code = _HALF_WAY.format(path=sys.path, root=str(root), then=then)
    limited = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, preexec_fn=limited
    )


def test_a_killed_writer_leaves_nothing_of_that_name(tmp_path: Path):
    done = half_way(tmp_path / "set", f"os.kill(os.getpid(), {int(signal.SIGKILL)})")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "set").exists()
    assert all(name.startswith(".set.partial-") for name in os.listdir(tmp_path))
    write(tmp_path / "set", [3])  # and is in nobody's way


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path):
    done = half_way(tmp_path / "set", "pass", limit=30_000)
    assert done.returncode == 1 and "File too large" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_schema_of_the_rows_is_float32(tmp_path: Path):
    write(tmp_path / "set", [2])
    assert pq.read_schema(tmp_path / "set" / DATA).field("action").type == pa.list_(pa.float32())
