"""Which data set a name means, which of its episodes are taken, and what its dimensions are called."""

from __future__ import annotations

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import pi0_aloha
from openpi_port import normalize
from openpi_port.config import Data, Train
from openpi_port.data import dimensions, material
from openpi_port.data.datasets import open_datasets
from openpi_port.data.lerobot_meta import ASSETS, find_local, resolve
from openpi_port.data.split import split_episodes
from openpi_port.errors import UserError
from openpi_port.fields import build
from openpi_port.normalize import Stats

SHIPPED = "aloha_sim_transfer_cube"
DATA = Data(repo_id=SHIPPED, robot="lerobot", cameras={}, validation=0.0)


def test_what_lerobot_recorded_is_found_by_its_name(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_LEROBOT_HOME", raising=False)
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
    for variable, home in (
        ("XDG_CACHE_HOME", tmp_path / "a cache" / "huggingface" / "lerobot"),
        ("HF_HOME", tmp_path / "hf" / "lerobot"),
        ("HF_LEROBOT_HOME", tmp_path / "own"),
    ):
        if variable == "HF_HOME":
            monkeypatch.setenv(variable, str(tmp_path / "hf"))
        elif variable == "HF_LEROBOT_HOME":
            monkeypatch.setenv(variable, str(home))
        assert find_local("somebody/toy") is None
        (home / "somebody").mkdir(parents=True)
        (home / "somebody" / "toy").symlink_to(ASSETS / SHIPPED)
        assert resolve("somebody/toy") == home / "somebody" / "toy"
    assert find_local("hf://somebody/toy") is None
    assert resolve("somebody/toy", root=str(tmp_path / "hf" / "lerobot")) == tmp_path / "hf/lerobot/somebody/toy"
    frames, _ = open_datasets(dataclasses.replace(DATA, repo_id="somebody/toy"), horizon=2)
    assert frames[0]["task"] == "Transfer cube"


def test_resolve(monkeypatch, tmp_path):
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match=r"no such directory, and no data set that ships here \(aloha_sim"):
        resolve("/nowhere/at/all")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("somebody/something", "hf://somebody/something"):
        with pytest.raises(UserError, match=r"the Hugging Face hub can't give it") as error:
            resolve(name, root=str(tmp_path))
        assert "\n" not in str(error.value)


def numbers(**changes) -> list[int]:
    training, validation = open_datasets(dataclasses.replace(DATA, **changes), horizon=2)
    return sorted(episode.index for part in (training, validation) if part is not None for episode in part.episodes)


def test_episodes_are_chosen_and_left_out_by_number():
    assert numbers() == list(range(20))
    assert numbers(skip=(0, 7), validation=0.2) == [1, 2, 3, 4, 5, 6, *range(8, 20)]
    assert numbers(episodes=(3, 5, 9), skip=(5,)) == [3, 9]
    for field in ("episodes", "skip"):
        with pytest.raises(UserError, match=rf"config\.data\.{field}: .* has no episode 20; it has 20, 0 to 19"):
            numbers(**{field: (1, 20)})
    with pytest.raises(UserError, match=r"config\.data\.skip leaves no episode"):
        numbers(episodes=(3,), skip=(3,))


@pytest.mark.parametrize(
    "given",
    [["a", "b"], [["a", "b"]], {"motors": ["a", "b"]}, {"left": ["a"], "right": ["b"]}, {"b": 1, "a": 0}],
)
def test_names_of_dimensions_in_all_forms_that_recorders_write(given):
    sample = {"arm": np.zeros(2), "observation/gripper": np.zeros(1)}
    frames = SimpleNamespace(features={"arm": {"names": given}}, numbers=lambda _: sample)
    assert dimensions.names(frames, "arm,observation/gripper") == ["a", "b", "gripper_0"]
    assert dimensions.numbered(frames, "arm", 2) == ["0 a", "1 b"]
    assert dimensions.numbered(frames, "arm", 3) == ["0", "1", "2"] == dimensions.numbered(None, "arm", 3)


@pytest.mark.parametrize("given", [None, 7, [3, None], {"motors": None}, ["only one"]])
def test_names_that_say_nothing(given):
    frames = SimpleNamespace(features={"arm": {"names": given}}, numbers=lambda _: {"arm": np.zeros(2)})
    assert dimensions.names(frames, "arm") == ["arm_0", "arm_1"]


def material_of(**changes) -> material.Material:
    config = build(Train, pi0_aloha.get_config("debug"))
    data = dataclasses.replace(config.data, cache_gb=0.0, episodes=(2, 5), **changes)
    return material.load(dataclasses.replace(config, data=data))


def test_statistics_are_fetched_from_where_they_are(tmp_path):
    computed = material_of().deployed.norm_stats
    given = {key: dataclasses.replace(stats, mean=stats.mean + 1) for key, stats in computed.items()}
    normalize.save_norm_stats(tmp_path / "assets" / "trossen", given)
    for place in (f"file://{tmp_path}/assets/trossen", str(tmp_path / "assets/trossen/norm_stats.json")):
        taken = material_of(norm_stats=place).deployed.norm_stats
        np.testing.assert_array_equal(taken["state"].mean, given["state"].mean)


def test_another_robots_statistics_are_noticed(tmp_path, capsys):
    computed = material_of().deployed.norm_stats
    path = str(tmp_path / "norm_stats.json")

    def train_with(change):
        normalize.save_norm_stats(path, {key: change(stats) for key, stats in computed.items()})
        found = material_of(norm_stats=path).deployed.norm_stats
        return found, capsys.readouterr().err

    padded = lambda s: Stats(*[np.pad(v, (0, 18)) for v in (s.mean, s.std, s.q01, s.q99)])  # noqa: E731
    found, said = train_with(padded)  # as openpi publishes them
    assert said == "" and len(found["actions"].mean) == 14
    _, said = train_with(lambda s: dataclasses.replace(s, std=s.std / 20))
    assert "on aloha_sim_transfer_cube: normalised, " in said and "another robot's statistics" in said
    with pytest.raises(UserError, match=r"swamp the loss: give this robot's own statistics"):
        train_with(lambda s: dataclasses.replace(s, mean=s.mean * 180 / np.pi))
    with pytest.raises(UserError, match=r"statistics of state have 7 dimensions, the data 14: another robot's"):
        train_with(lambda s: Stats(*[v[:7] for v in (s.mean, s.std, s.q01, s.q99)]))


def test_whoever_names_no_camera_is_told_which_there_are():
    with pytest.raises(UserError, match=r"names no camera: --config\.data\.cameras\.base_0_rgb=.* has observation\.im"):
        material_of(cameras={})


@pytest.mark.parametrize("given", ["", "somebody", "somebody/toy/meta", "somebody/toy/data/chunk-000"])
def test_directories_beside_a_data_set(tmp_path, given):
    (tmp_path / "somebody").mkdir()
    shutil.copytree(ASSETS / SHIPPED, tmp_path / "somebody" / "toy", ignore=shutil.ignore_patterns("*.mp4"))
    with pytest.raises(UserError, match="no data set that is known") as error:
        numbers(repo_id=str(tmp_path / given))
    assert ("did you mean" in str(error.value)) == (not given.endswith("chunk-000"))
    assert given.endswith("chunk-000") or str(tmp_path / "somebody" / "toy") + "?" in str(error.value)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.floats(0, 0.99), st.integers(0, 5))
def test_split(n, fraction, seed):
    training, validation = split_episodes(n, fraction, seed)
    assert sorted(training + validation) == list(range(n)) and training
    assert bool(validation) == (fraction > 0 and n > 1)
    assert split_episodes(n, fraction, seed) == (training, validation)
