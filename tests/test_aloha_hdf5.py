"""ALOHA's HDF5 episodes, raw and JPEG: what was written comes back, and faults are one line."""

from __future__ import annotations

import dataclasses
import io
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from openpi_port import transforms
from openpi_port.config import Data
from openpi_port.data.aloha_hdf5 import AlohaHdf5Dataset
from openpi_port.data.datasets import find, open_datasets
from openpi_port.data.frame_cache import FrameCache
from openpi_port.data.loader import Part, train_batches
from openpi_port.errors import UserError
from openpi_port.robots import aloha

LENGTHS = {"episode_0": 5, "episode_2": 3, "episode_10": 4}
HIGH = "observations/images/cam_high"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def numbers_of(length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(length)
    pictures = {key: rng.integers(0, 256, (length, 24, 32, 3), np.uint8) for key in aloha.HDF5_CAMERAS.values()}
    columns = {key: rng.normal(size=(length, 14)) for key in ("observations/qpos", "observations/qvel", "action")}
    return columns | pictures


def jpeg(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=50)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def write(root: Path, *, compress: bool = False) -> Path:
    """As ALOHA's recorder writes it: JPEGs are padded with zeros to the longest, their lengths lie beside them."""
    root.mkdir()
    for name, length in LENGTHS.items():
        with h5py.File(root / f"{name}.hdf5", "w") as file:
            file.attrs["sim"], file.attrs["compress"] = False, compress
            sizes = []
            for key, values in numbers_of(length).items():
                if values.ndim == 4 and compress:
                    pieces = [jpeg(image) for image in values]
                    sizes.append([len(piece) for piece in pieces])
                    values = np.zeros((length, max(sizes[-1]) + 7), np.uint8)
                    for row, piece in zip(values, pieces, strict=True):
                        row[: len(piece)] = piece
                file.create_dataset(key, data=values, chunks=(1, *values.shape[1:]))
            if compress:
                file["compress_len"] = np.array(sizes, np.float32)
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    return write(tmp_path / "aloha")


def open_(root: Path, **changes) -> AlohaHdf5Dataset:
    return AlohaHdf5Dataset(root, **({"cameras": aloha.HDF5_CAMERAS, "horizon": 3} | changes))


@pytest.mark.parametrize("compress", [False, True])
def test_what_was_written_comes_back(tmp_path, compress):
    data = open_(write(tmp_path / "aloha", compress=compress))
    assert [e.path.stem for e in data.episodes] == list(LENGTHS), "in natural order"
    row = 0
    for number, length in enumerate(LENGTHS.values()):
        episode = numbers_of(length)
        for frame in range(length):
            got = data[row]
            for key in aloha.HDF5_CAMERAS.values():
                expected = episode[key][frame]
                if compress:
                    expected = np.asarray(Image.open(io.BytesIO(jpeg(expected).tobytes())))
                np.testing.assert_array_equal(got[key], expected)
            np.testing.assert_array_equal(got["observations/qpos"], np.float32(episode["observations/qpos"][frame]))
            chunk = np.minimum(np.arange(frame, frame + 3), length - 1)
            np.testing.assert_array_equal(got["action"], np.float32(episode["action"][chunk]))
            np.testing.assert_array_equal(got["action_is_pad"], np.arange(frame, frame + 3) >= length)
            assert (got["episode_index"], got["frame_index"]) == (number, frame)
            row += 1
    assert row == len(data)
    some = pickle.loads(
        pickle.dumps(open_(tmp_path / "aloha", episodes=[1], state="observations/qpos,observations/qvel"))
    )
    assert len(some) == 3 and some[0]["observations/qvel"].shape == (14,)


def test_jpegs_of_any_length(root):
    """Some recorders store JPEGs as rows of variable length."""
    path = root / "episode_2.hdf5"
    images = numbers_of(3)[HIGH]
    with h5py.File(path, "a") as file:
        del file[HIGH]
        file.create_dataset(HIGH, (3,), h5py.vlen_dtype(np.uint8))
        for i, image in enumerate(images):
            file[HIGH][i] = jpeg(image)
    expected = np.asarray(Image.open(io.BytesIO(jpeg(images[2]).tobytes())))
    np.testing.assert_array_equal(open_(root, episodes=[1])[2][HIGH], expected)


def settings(root: Path, **changes) -> Data:
    fields = {"robot": "aloha", "cameras": aloha.HDF5_CAMERAS, "state": aloha.HDF5_STATE, "prompt": "uncap the pen"}
    return Data(repo_id=str(root), validation=0.3, **(fields | changes))


def test_through_cache_transforms_and_loader(root):
    batches = {}
    for cache_gb in (0.0, 1.0, 1.0):
        cache = FrameCache(16, cache_gb) if cache_gb else None
        train, validation = open_datasets(settings(root), horizon=3, image_size=16, cache=cache)
        assert len(train.episodes) == 2 and len(validation.episodes) == 1
        steps = (*transforms.before_normalize(settings(root)), transforms.FillCameras(tuple(aloha.HDF5_CAMERAS)))
        steps = (*steps, DropPrompt())
        stream = train_batches(
            [Part(train, steps, augment="none")], batch_size=4, seed=0, action_dim=14, action_horizon=3
        )
        batches.setdefault(cache_gb, []).append(next(stream))
        stream.close()
    for batch in batches[1.0]:
        for camera in aloha.HDF5_CAMERAS:
            np.testing.assert_array_equal(batch["image"][camera], batches[0.0][0]["image"][camera])
        np.testing.assert_array_equal(batch["actions"], batches[0.0][0]["actions"])


@dataclasses.dataclass(frozen=True)
class DropPrompt:
    def forward(self, sample: dict) -> dict:
        return {key: value for key, value in sample.items() if key != "prompt"}


# --- faults ----------------------------------------------------------------------------------------------------------


def fails(root: Path, match: str, **changes) -> None:
    with pytest.raises(UserError, match=match) as error:
        data = open_(root, **changes)
        for row in range(len(data)):
            data[row]
    assert "\n" not in str(error.value) and str(root) in str(error.value)


def replace(path: Path, key: str, values: np.ndarray | None) -> None:
    with h5py.File(path, "a") as file:
        del file[key]
        if values is not None:
            file[key] = values


@pytest.mark.parametrize(
    ("key", "values", "words"),
    [
        ("observations/qpos", None, r"no 'observations/qpos'; did you mean observations/qvel"),
        (HIGH, None, r"no 'observations/images/cam_high'; did you mean"),
        ("action", np.zeros((2, 14)), r"3 frames of .*, 2 of action"),
        ("action", np.full((3, 14), np.inf), r"action is inf in dimension 0 at episode 1, frame 0"),
        ("action", np.zeros((3, 7)), r"action has 7 or 14 dimensions"),
        (HIGH, np.zeros((3, 24, 32, 3)), r"cam_high is float64 of shape \(3, 24, 32, 3\); expected uint8"),
        (HIGH, np.zeros((3, 3, 24, 32), np.uint8), r"cam_high is uint8 of shape \(3, 3, 24, 32\); expected uint8"),
        (HIGH, np.zeros((3, 24, 32, 1), np.uint8), r"cam_high is uint8 of shape \(3, 24, 32, 1\); expected uint8"),
        (HIGH, np.zeros((3, 90), np.uint8), r"cam_high, frame 0 is no readable image \(it is neither JPEG nor PNG\)"),
    ],
)
def test_a_file_that_is_not_as_the_others(root, key, values, words):
    replace(root / "episode_2.hdf5", key, values)
    fails(root, words)


def test_damaged_files(root):
    path = root / "episode_10.hdf5"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    fails(root, r"episode_10.hdf5: HDF5 file can't be opened")
    path.write_bytes(b"")
    fails(root, r"episode_10.hdf5: HDF5 file can't be opened")


def test_names(root, tmp_path):
    fails(root, "no episode 3; there are 3, 0 to 2", episodes=[3])
    fails(root, r"no 'observation.state'; did you mean observations/q", state="observation.state")
    with pytest.raises(UserError, match=r"config.data.split='train' is for RLDS"):
        find(settings(root, split="train"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no data set that is known: LeRobot has meta/info.json"):
        find(settings(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"no HDF5 episode"):
        open_(tmp_path / "empty")
