"""Mixtures: exact shares, the same batches for any workers and after a resume, and statistics of each data set."""

from __future__ import annotations

import dataclasses
import itertools
from fractions import Fraction
from pathlib import Path

import jobs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlds_writer import write_droid
from test_loader import ACTIONS, DIM, Rows, Twice, assert_equal, image

from configs import pi0_fast_aloha, pi0_mixture, pi05_aloha_ki
from convert import formats, target
from openpi_port import Policy, checkpoint
from openpi_port.augment import augment
from openpi_port.config import Data, Train
from openpi_port.data import material
from openpi_port.data.loader import Part, train_batches
from openpi_port.data.mixture import Shares
from openpi_port.errors import UserError
from openpi_port.fields import build, to_dict
from openpi_port.rng import generator
from openpi_port.robots import droid

# --- which sample comes from where -----------------------------------------------------------------------------------

WEIGHTS = st.lists(st.floats(0.01, 100).map(lambda w: round(w, 3)), min_size=1, max_size=5)


@settings(deadline=None, max_examples=40)
@given(WEIGHTS, st.integers(1, 400), st.sampled_from([0, 10**6, 2**45]))
def test_shares_are_exact_at_any_moment(weights, total, start):
    shares, exact = Shares(weights), [Fraction(str(w)) for w in weights]
    counts: list[int | None] = [0 if start == 0 else None for _ in weights]
    for index in range(start, start + total):
        number, before = shares.place(index)
        assert counts[number] in (None, before), "each data set is gone through without a gap or a repetition"
        counts[number] = before + 1
        assert abs(before - index * exact[number] / sum(exact)) < len(weights)
    if start == 0:
        assert sum(counts) == total


def test_weights_are_decimal_numbers():
    shares = Shares([0.1, 0.2, 0.7])
    assert [shares.place(10**12 + i) for i in range(10)] == [
        (number, 10**11 * whole + before)
        for number, before in (shares.place(i) for i in range(10))
        for whole in [(1, 2, 7)[number]]
    ], "a whole number of tens later, to the sample"
    assert sorted(shares.place(i)[0] for i in range(10)) == [0, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    assert [Shares([1, 1, 2]).place(i)[0] for i in range(4)] in map(list, itertools.permutations([0, 1, 2, 2]))


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Other(Rows):
    """A second data set: rows from 100 on, another camera."""

    count: int = 5

    def __getitem__(self, row: int) -> dict:
        sample = super().__getitem__(row)
        return {**sample, "actions": sample["actions"] + 100, "state": sample["state"] + 100}


def parts() -> list[Part]:
    return [Part(Rows(), (Twice(),), weight=3.0), Part(Other(), (Twice(),), weight=1.0, augment="none")]


def batches(count: int, members=None, **changes) -> list[dict]:
    arguments = {"batch_size": 4, "seed": 3, "action_dim": DIM, "action_horizon": ACTIONS} | changes
    loader = train_batches(members or parts(), **arguments)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def rows_of(found: list[dict]) -> np.ndarray:
    return np.concatenate([batch["actions"][:, 0, 0] for batch in found]).astype(int)


@pytest.fixture(scope="module")
def ten() -> list[dict]:
    return batches(10)


def test_each_data_set_is_gone_through_as_if_alone(ten):
    rows = rows_of(ten)
    first, second = rows[rows < 100], rows[rows >= 100] - 100
    assert len(first) == 30 and len(second) == 10
    alone = rows_of(batches(8, [Part(Rows(), (Twice(),))]))
    np.testing.assert_array_equal(first, alone[:30])
    for epoch in range(2):
        assert sorted(second[5 * epoch : 5 * epoch + 5]) == list(range(5)), "each row once an epoch"
    for step, batch in enumerate(ten):
        for place in range(4):
            row, seen = int(batch["actions"][place, 0, 0]), batch["image"]["base_0_rgb"][place]
            plain = {"base_0_rgb": image(row % 100)}
            changed = augment(plain, "default", generator(3, 4 * step + place, "augment"))
            np.testing.assert_array_equal(seen, (plain if row >= 100 else changed)["base_0_rgb"])


def test_resume_workers_and_processes_change_nothing(ten):
    for start in (1, 2, 7, 9):
        for one, other in zip(ten[start:], batches(10 - start, start_step=start), strict=True):
            assert_equal(one, other)
    for one, other in zip(ten[3:], batches(7, start_step=3, num_workers=1), strict=True):
        assert_equal(one, other)
    halves = [batches(10, process_index=i, process_count=2) for i in range(2)]
    for step, whole in enumerate(ten):
        for key in ("actions", "noise", "state"):
            np.testing.assert_array_equal(np.concatenate([h[step][key] for h in halves]), whole[key])


# --- a run -----------------------------------------------------------------------------------------------------------


def config_for(tmp_path: Path, **changes) -> Train:
    """The shipped data set beside an RLDS one of another robot with other names, cameras and sizes."""
    config = build(Train, pi0_mixture.get_config("debug"))
    other = tmp_path / "toy" / "1.0.0"
    if not other.exists():
        write_droid(tmp_path)
    toy = Data(
        repo_id=str(other), robot="droid", cameras=droid.CAMERAS, state=droid.STATE, actions=droid.RLDS_VELOCITIES,
        norm="quantile", weight=0.3, validation=0.4,
    )  # fmt: skip
    cameras = ("base_0_rgb", "left_wrist_0_rgb")
    return dataclasses.replace(
        config, name="mixed", out=str(tmp_path / "runs"), batch_size=4, eval_batches=1, log_every=1, backend="torch",
        num_steps=2, model=dataclasses.replace(config.model, cameras=cameras), **{"mixture": {"toy": toy}, **changes},
    )  # fmt: skip


@pytest.fixture(scope="module")
def ran(own_caches, tmp_path_factory) -> tuple[Train, Path]:
    """Two steps of training on a mixture, the second after a resume."""
    config = config_for(tmp_path_factory.mktemp("mixture"))
    jobs.run(dataclasses.replace(config, num_steps=1))
    return config, jobs.run(config, resume=True) / "2"


def test_a_checkpoint_has_the_statistics_of_all(ran):
    config, path = ran
    assert checkpoint.read_policy(path).train == config
    stats = checkpoint.read_norm_stats(path, config)
    computed = {name: member.norm_stats for name, member in material.load(config).members.items()}
    assert {name: len(s["state"].mean) for name, s in stats.items()} == {"": 14, "toy": 8}
    for name, group in stats.items():
        np.testing.assert_array_equal(group["actions"].q99, computed[name]["actions"].q99)
    assert (path / "norm_stats.json").exists() and (path / "assets" / "toy" / "norm_stats.json").exists()


def test_batches_of_two_robots(ran):
    config, _ = ran
    loaded = material.load(config)
    assert "70.0% of samples: 18 training episodes" in loaded.describe() and loaded.has_validation
    stream = loaded.batches(0)
    batch = next(stream)
    stream.close()
    assert batch["actions"].shape == (4, 50, 14) and np.isfinite(batch["actions"]).all()
    toys = batch["image_mask"]["left_wrist_0_rgb"]  # ALOHA's simulation has no such camera
    assert toys.sum() == 2, "what seven tenths of four, rounded down, leave"
    assert not batch["actions"][toys][..., 8:].any() and batch["actions"][~toys][..., 8:].any()


def test_each_robot_has_its_validation_loss(ran):
    config, path = ran
    seen = {}

    def evaluate(batch: dict) -> float:
        toys = batch["image_mask"]["left_wrist_0_rgb"]
        assert toys.all() or not toys.any()
        seen["toy" if toys.all() else "data"] = np.abs(batch["actions"]).mean()
        return float(np.abs(batch["actions"]).mean())

    losses = material.load(config).validate(evaluate)
    assert losses == {
        "validation_loss/data": pytest.approx(seen["data"]),
        "validation_loss/toy": pytest.approx(seen["toy"]),
        "validation_loss": pytest.approx(0.7 * seen["data"] + 0.3 * seen["toy"]),
    }
    assert '"validation_loss/toy"' in (path.parent / "metrics.jsonl").read_text()


@pytest.mark.parametrize("other", [pi0_fast_aloha, pi05_aloha_ki])
def test_robots_of_other_sizes_as_tokens(tmp_path, monkeypatch, other):
    """pi0-FAST pads no actions, as it reads tokens, yet a batch must be stacked; knowledge insulation has both."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = build(Train, other.get_config("debug"))
    toy = config_for(tmp_path).mixture["toy"]
    toy = dataclasses.replace(toy, cameras={"base_0_rgb": toy.cameras["base_0_rgb"]}, prompt="x")
    room = {"max_token_len": 900} if other is pi0_fast_aloha else {}  # noise makes long sequences
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, **room), max_action_tokens=900, mixture={"toy": toy},
        batch_size=4,
    )  # fmt: skip
    stream = material.load(config).batches(0)
    batch = next(stream)
    stream.close()
    toys = ~batch["actions"][..., 8:].any((1, 2))
    assert batch["actions"].shape == (4, config.model.action_horizon, 14) and toys.sum() == 1
    assert batch["token_loss_mask" if room else "action_tokens_mask"].any(1).all()


def test_any_of_the_robots_can_be_deployed(ran, tmp_path):
    config, path = ran
    assert Policy.from_pretrained(path, backend="torch").metadata["robot"] == "aloha_sim"
    policy = Policy.from_pretrained(path, asset="toy", backend="torch")
    assert policy.metadata["robot"] == "droid" and policy.metadata["state_dim"] == 8 and policy.data.norm == "quantile"
    stats = checkpoint.read_norm_stats(path, config)["toy"]
    np.testing.assert_array_equal(policy.stats["state"].mean, stats["state"].mean)
    with pytest.raises(UserError, match=r"no data set 'toi' in the mixture; did you mean toy"):
        formats.open_checkpoint(path, asset="toi")
    source = formats.open_checkpoint(path, asset="toy")
    assert source.train_state == {}
    target.write(source, tmp_path / "toy", "torch")
    moved = formats.open_checkpoint(tmp_path / "toy")
    assert build(Data, moved.settings["data"]) == config.mixture["toy"] and moved.asset_id == "toy"
    np.testing.assert_array_equal(moved.norm_stats["actions"].std, stats["actions"].std)
    target.write(formats.open_checkpoint(path), tmp_path / "openpi", "openpi")
    assert (tmp_path / "openpi" / "assets" / "toy" / "norm_stats.json").exists()


# --- settings --------------------------------------------------------------------------------------------------------


def test_a_run_is_continued_with_its_own_mixture(tmp_path):
    one = config_for(tmp_path)
    toy = one.mixture["toy"]
    assert checkpoint.describe_difference(one, one) is None
    moved = dataclasses.replace(one, mixture={"toy": dataclasses.replace(toy, repo_id="elsewhere", root="x")})
    assert checkpoint.describe_difference(one, moved) is None
    heavier = dataclasses.replace(one, mixture={"toy": dataclasses.replace(toy, weight=0.4)})
    assert checkpoint.describe_difference(one, heavier) == "config.mixture.toy.weight is 0.4, was 0.3"
    assert "config.mixture.toy" in checkpoint.describe_difference(one, dataclasses.replace(one, mixture={}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": 0.0}, r"^config.mixture.toy.weight=0.0: a number above 0"),
        ({"validation": 1.0}, r"^config.mixture.toy.validation=1.0: from 0 to below 1"),
        ({"num_workers": 2}, r"config.mixture.toy.num_workers: set config.data.num_workers, for all"),
        ({"cache_gb": 1.0}, r"config.mixture.toy.cache_gb: set config.data.cache_gb"),
    ],
)
def test_what_cannot_be_honoured(tmp_path, change, words):
    config = to_dict(config_for(tmp_path))
    config["mixture"]["toy"] |= change
    with pytest.raises(UserError, match=words):
        build(Train, config)
    config["mixture"] = {"../toy": config["mixture"]["toy"] | {"weight": 1.0, "num_workers": 0, "cache_gb": 8.0}}
    with pytest.raises(UserError, match="names a directory"):
        build(Train, config)


def test_a_member_without_a_name(tmp_path):
    config = build(Train, pi0_mixture.get_config("debug"))
    with pytest.raises(UserError, match=r"--config.mixture.bridge.repo_id= names no data set"):
        material.load(config)


def test_an_error_names_the_member(tmp_path):
    config = config_for(tmp_path)
    toy = dataclasses.replace(config.mixture["toy"], episodes=(999,))
    with pytest.raises(UserError, match=r"^config.mixture.toy.episodes: .* has no episode 999"):
        material.load(dataclasses.replace(config, mixture={"toy": toy}))
