"""Steps between sample and batch: golden deltas, inverses, nothing mutated, and clear errors."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from openpi_port import transforms as t
from openpi_port.config import EXPERT, LANGUAGE, SIGLIP, Data, Pi0
from openpi_port.errors import UserError
from openpi_port.normalize import Stats

CAMERAS = {"base_0_rgb": "observation.images.top"}
MODEL = Pi0(SIGLIP["debug"], LANGUAGE["debug"], EXPERT["debug"], action_dim=20, action_horizon=4, max_token_len=6)


class Letters:
    """A tokenizer for tests: one token per letter."""

    def encode(self, prompt, state, max_len, **_):
        text = prompt + ("" if state is None else "".join(f" {v:.0f}" for v in state))
        ids = [ord(c) for c in text][:max_len]
        return np.array(ids + [0] * (max_len - len(ids)), np.int32), np.arange(max_len) < len(ids)


def raw_sample(rng, dim=14, horizon=4):
    return {
        "observation.images.top": rng.integers(0, 255, (24, 32, 3), dtype=np.uint8),
        "observation.state": rng.uniform(0, 0.9, dim).astype(np.float32),
        "action": rng.uniform(0, 0.9, (horizon, dim)).astype(np.float32),
        "action_is_pad": np.arange(horizon) > 2,
        "task": "Transfer cube",
        "episode_index": 3,
        "frame_index": 7,
    }


def random_stats(rng, dim=14):
    def one():
        low = rng.normal(size=dim)
        return Stats(rng.normal(size=dim), rng.uniform(0.1, 2, dim), low, low + rng.uniform(0.1, 2, dim))

    return {"state": one(), "actions": one()}


def data_config(robot="aloha", norm="zscore", delta=((True,) * 6 + (False,)) * 2, **more):
    return Data("some/data", robot, CAMERAS, delta=delta, norm=norm, **more)


def test_golden_delta(golden):
    io = np.load(golden / "openpi/io/io.npz")
    step = t.Delta(tuple(io["delta/mask"].tolist()))
    got = step.forward({"state": io["norm/state"], "actions": io["norm/x"]})
    np.testing.assert_allclose(got["actions"], io["delta/out"], rtol=0, atol=1e-15)
    np.testing.assert_allclose(step.inverse(got)["actions"], io["delta/back"], rtol=0, atol=1e-14)


def freeze(tree):
    """Makes every array of a sample read-only, so that a step that writes into its input fails."""
    for value in tree.values():
        if isinstance(value, dict):
            freeze(value)
        elif isinstance(value, np.ndarray):
            value.flags.writeable = False
    return tree


@settings(max_examples=30, deadline=None)
@given(
    robot=st.sampled_from(["aloha", "aloha_sim", "lerobot"]),
    norm=st.sampled_from(["zscore", "quantile"]),
    delta=st.lists(st.booleans(), max_size=14),
    state_in=st.sampled_from(["suffix", "prompt"]),
    extra=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_the_whole_list_and_back(robot, norm, delta, state_in, extra, seed):
    rng = np.random.default_rng(seed)
    raw = freeze(raw_sample(rng))
    keys = set(raw)
    stats = random_stats(rng, 14 + (extra if robot != "lerobot" else 0))  # longer statistics are cut, as in openpi
    model = dataclasses.replace(MODEL, state_in=state_in)
    steps = t.pipeline(data_config(robot, norm, tuple(delta)), model, stats, Letters())
    sample = t.forward(steps, raw)

    assert set(raw) == keys
    assert list(sample["image"]) == list(sample["image_mask"]) == list(MODEL.cameras)
    assert all(i.shape == (224, 224, 3) and i.dtype == np.uint8 for i in sample["image"].values())
    assert [bool(m) for m in sample["image_mask"].values()] == [True, False, False]
    assert not sample["image"]["right_wrist_0_rgb"].any() and "prompt" not in sample
    assert sample["state"].shape == (20,) and sample["actions"].shape == (4, 20)
    assert sample["state"].dtype == sample["actions"].dtype == np.float32
    assert not sample["state"][14:].any() and not sample["actions"][:, 14:].any()
    assert sample["tokenized_prompt"].shape == (6,) and sample["tokenized_prompt_mask"].dtype == bool
    np.testing.assert_array_equal(sample["action_is_pad"], raw["action_is_pad"])

    answer = freeze({"state": sample["state"], "actions": sample["actions"]})
    back = t.inverse(steps, answer)
    np.testing.assert_allclose(back["actions"], raw["action"], atol=2e-4)
    np.testing.assert_allclose(back["state"], raw["observation.state"], atol=2e-4)


@settings(max_examples=60, deadline=None)
@given(
    step=st.sampled_from(["repack", "delta", "zscore", "quantile", "resize", "fill", "pad", "dims"]),
    dim=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_every_step_is_undone_by_its_inverse(step, dim, seed):
    rng = np.random.default_rng(seed)
    steps = {
        "repack": t.Repack(CAMERAS, "state", "actions", "go"),
        "delta": t.Delta(tuple(rng.integers(0, 2, dim).astype(bool).tolist())),
        "zscore": t.Normalize(random_stats(rng, dim), "zscore"),
        "quantile": t.Normalize(random_stats(rng, dim), "quantile"),
        "resize": t.Resize(8),
        "fill": t.FillCameras(MODEL.cameras),
        "pad": t.PadDims(dim + 3, dim, dim),
        "dims": t.Dims(dim, dim),
    }
    sample = {
        "image": {"base_0_rgb": np.zeros((4, 6, 3), np.uint8)},
        "observation.images.top": np.zeros((4, 6, 3), np.uint8),
        "state": rng.normal(size=dim),
        "actions": rng.normal(size=(3, dim)),
    }
    freeze(sample)
    back = steps[step].inverse(steps[step].forward(sample))
    np.testing.assert_allclose(back["actions"], sample["actions"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(back["state"], sample["state"], rtol=1e-9, atol=1e-9)


def test_an_observation_needs_no_actions():
    rng = np.random.default_rng(0)
    steps = t.pipeline(data_config(), MODEL, random_stats(rng), Letters())
    raw = raw_sample(rng)
    observation = {k: raw[k] for k in ("observation.images.top", "observation.state")} | {"prompt": "hello"}
    sample = t.forward(steps, observation)
    assert "actions" not in sample
    assert sample["tokenized_prompt"].tolist() == [ord(c) for c in "hello"] + [0]


def test_which_prompt_wins():
    repack = t.Repack({}, "state", "actions", "fixed")
    base = {"state": np.zeros(2)}
    assert repack.forward({**base, "prompt": "given", "task": "task"})["prompt"] == "given"
    assert repack.forward({**base, "task": "task"})["prompt"] == "fixed"
    assert t.Repack({}, "state", "actions").forward({**base, "task": "task"})["prompt"] == "task"


def test_statistics_see_what_normalisation_sees_without_images():
    raw = raw_sample(np.random.default_rng(0))
    del raw["observation.images.top"]
    sample = t.forward(t.before_normalize(data_config(), images=False), raw)
    full = t.forward(t.before_normalize(data_config()), raw_sample(np.random.default_rng(0)))
    np.testing.assert_array_equal(sample["actions"], full["actions"])
    np.testing.assert_array_equal(sample["state"], full["state"])


def test_images_of_both_layouts_and_types_agree():
    image = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    for other in (image.transpose(2, 0, 1), ((image + 0.5) / 255).astype(np.float32)):
        np.testing.assert_array_equal(t.as_uint8_image(other, "x"), image)


def broken(**changes):
    raw = raw_sample(np.random.default_rng(0))
    for key, value in changes.items():
        key = {"top": "observation.images.top", "state": "observation.state"}.get(key, key)
        if value is None:
            del raw[key]
        else:
            raw[key] = value
    return raw


NAN = np.full((4, 14), 0.5, np.float32)
NAN[2, 5] = np.nan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top": None}, "episode 3, frame 7: no camera 'observation.images.top'"),
        ({"state": None}, "no 'observation.state'; there is action"),
        ({"state": np.zeros(13, np.float32)}, "state has 13 dimensions, this robot has 14"),
        ({"state": np.full(14, np.inf)}, r"frame 7: observation.state\[0\] is not a finite number"),
        ({"action": NAN}, r"episode 3, frame 7: action\[2, 5\] is not a finite number"),
        ({"action": np.zeros((4, 7))}, "actions has 7 dimensions, this robot has 14"),
        ({"task": None}, "frame 7: no prompt"),
        ({"top": np.zeros((24, 32, 4), np.uint8)}, r"\[24, 32, 4\] is no image"),
        ({"top": np.full((24, 32, 3), 255.0)}, r"within \[0, 1\]"),
        ({"top": np.zeros((24, 32, 3), np.int64)}, "got int64"),
        ({"state": np.array(["a"] * 14)}, "expected numbers"),
    ],
)
def test_bad_samples_are_named(changes, message):
    steps = t.pipeline(data_config(), MODEL, random_stats(np.random.default_rng(0)), Letters())
    with pytest.raises(UserError, match=message) as error:
        t.forward(steps, broken(**changes))
    assert "\n" not in str(error.value)


def test_a_config_that_does_not_fit_is_named():
    stats = random_stats(np.random.default_rng(0))
    narrow = dataclasses.replace(MODEL, action_dim=13)
    with pytest.raises(UserError, match="action_dim=13 is less"):
        t.pipeline(data_config(), narrow, stats, Letters())
    with pytest.raises(UserError, match="no camera top_rgb; it has base_0_rgb"):
        t.pipeline(dataclasses.replace(data_config(), cameras={"top_rgb": "x"}), MODEL, stats, Letters())
    with pytest.raises(UserError, match="delta has 15 entries"):
        steps = t.pipeline(data_config(delta=(True,) * 15), MODEL, stats, Letters())
        t.forward(steps, raw_sample(np.random.default_rng(0)))
    with pytest.raises(UserError, match="names no camera"):
        steps = t.pipeline(dataclasses.replace(data_config(), cameras={}), MODEL, stats, Letters())
        t.forward(steps, raw_sample(np.random.default_rng(0)))
    with pytest.raises(UserError, match="20 dimensions, .*only 8"):
        t.PadDims(8, 20, 20).forward({"state": np.zeros(20)})
