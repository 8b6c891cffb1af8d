"""Policies: every way to name an observation, exact transforms, noise, batches, threads and faults."""

from __future__ import annotations

import importlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from frameworks import NAMES
from small_policy import ALOHA, FAST, HORIZON, make_checkpoint, observation_of

from openpi_port import Policy, UserError, load_model, transforms
from openpi_port.observation import rename
from openpi_port.rng import draw_noise
from openpi_port.robots import droid


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("policy") / "20")


@pytest.fixture(scope="module", params=NAMES)
def policy(request, checkpoint) -> Policy:
    return Policy.from_pretrained(checkpoint, request.param, device="cpu")


@pytest.fixture(scope="module")
def torch_policy(checkpoint) -> Policy:
    return Policy.from_pretrained(checkpoint, "torch", device="cpu")


def test_the_whole_way_equals_its_parts(policy):
    """Delta actions of real ALOHA: state and actions change space, and the inverse needs the robot's own state."""
    observation = observation_of(0)
    noise = draw_noise(3, 0, (policy.horizon, 32))
    got = policy.infer(observation, noise)
    assert got["actions"].shape == (policy.horizon, 14) and got["actions"].dtype == np.float32
    assert got["policy_timing"]["infer_ms"] > 0

    from openpi_port.tokenizers import paligemma

    steps = transforms.pipeline(policy.data, policy.model.config, policy.stats, paligemma.load("small"))
    images = {ALOHA[c]: observation["images"][ALOHA[c].rpartition(".")[2]] for c in ALOHA}
    sample = transforms.forward(steps, {**images, "observation.state": observation["state"], "prompt": "lift it"})
    batch = {k: {c: a[None] for c, a in v.items()} if isinstance(v, dict) else v[None] for k, v in sample.items()}
    chunk = policy.model.sample_actions(batch, noise[None])[0]
    want = transforms.inverse(steps, {"actions": chunk, "state": sample["state"]})["actions"]
    np.testing.assert_allclose(got["actions"], want, atol=1e-6)


def test_both_frameworks_answer_the_same(checkpoint):
    noise = draw_noise(3, 0, (4, 32))
    flax, torch = (Policy.from_pretrained(checkpoint, b, device="cpu").infer(observation_of(1), noise) for b in NAMES)
    np.testing.assert_allclose(flax["actions"], torch["actions"], atol=1e-4)


@pytest.mark.parametrize("change", ["dots", "slashes", "nested", "channels_first", "float", "numpy_prompt"])
def test_every_way_to_send_an_observation(torch_policy, change):
    plain = observation_of(2)
    images, state = plain["images"], plain["state"]
    sent = {
        "dots": {**{f"observation.images.{c}": i for c, i in images.items()}, "observation.state": state},
        "slashes": {**{f"observation/images/{c}": i for c, i in images.items()}, "observation/state": state},
        "nested": {"observation": {"images": images, "state": state}},
        "channels_first": {"images": {c: i.transpose(2, 0, 1) for c, i in images.items()}, "state": state},
        "float": {
            "images": {c: np.minimum((i + 0.5) / 255, 1) for c, i in images.items()},
            "state": list(map(float, state)),
        },
        "numpy_prompt": plain,
    }[change]
    prompt = np.array("lift it") if change == "numpy_prompt" else "lift it"
    noise = draw_noise(0, 0, (4, 32))
    want = torch_policy.infer(plain, noise)["actions"]
    np.testing.assert_allclose(torch_policy.infer({**sent, "prompt": prompt}, noise)["actions"], want, atol=1e-5)


def test_a_longer_name_wins_over_a_short_one(torch_policy):
    data = torch_policy.data
    sent = {"observation.state": np.zeros(14), "state": np.ones(14), "extra": 3}
    assert rename(sent, data).keys() == {"observation.state"}
    assert not rename(sent, data)["observation.state"].any()


def test_a_batch_equals_single_calls(policy):
    observations = [observation_of(i, prompt=p) for i, p in enumerate(("lift it", "transfer", "put it down"))]
    noise = np.stack([draw_noise(0, i, (4, 32)) for i in range(3)])
    together = policy.infer_batch(observations, noise)
    for observation, n, result in zip(observations, noise, together, strict=True):
        np.testing.assert_allclose(policy.infer(observation, n)["actions"], result["actions"], atol=1e-5)
    assert np.abs(together[0]["actions"] - together[1]["actions"]).max() > 1e-3
    assert policy.infer_batch([]) == []


def test_noise_is_drawn_anew_for_every_call_and_repeats_with_the_seed(checkpoint):
    a, b = (Policy.from_pretrained(checkpoint, "torch", device="cpu", seed=5) for _ in range(2))
    b.warmup()  # doesn't count
    first, second = (a.infer(observation_of(0))["actions"] for _ in range(2))
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(b.infer(observation_of(0))["actions"], first)
    noise = draw_noise(5, 1, (4, 32))
    np.testing.assert_array_equal(b.infer({**observation_of(0), "noise": noise})["actions"], second)


def test_threads_never_get_each_other_s_answers(torch_policy):
    noise = draw_noise(0, 0, (4, 32))
    want = [torch_policy.infer(observation_of(i), noise)["actions"] for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: torch_policy.infer(observation_of(i % 4), noise)["actions"], range(16)))
    for i, actions in enumerate(got):
        np.testing.assert_array_equal(actions, want[i % 4])


def test_prompt_of_the_call_or_the_default(checkpoint):
    policy = Policy.from_pretrained(checkpoint, "torch", device="cpu", default_prompt="put it down")
    noise = draw_noise(0, 0, (4, 32))
    silent = {k: v for k, v in observation_of(0).items() if k != "prompt"}
    default = policy.infer(silent, noise)["actions"]
    np.testing.assert_array_equal(default, policy.infer({**silent, "prompt": "put it down"}, noise)["actions"])
    assert np.abs(default - policy.infer({**silent, "prompt": "lift it"}, noise)["actions"]).max() > 1e-3
    assert policy.metadata["default_prompt"] == "put it down"


def without(key):
    return lambda o: {k: v for k, v in o.items() if k != key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("state"), "state"),
        (without("prompt"), "no prompt"),
        (lambda o: {**o, "images": {"cam_high": o["images"]["cam_high"]}}, "cam_left_wrist"),
        (lambda o: {**o, "state": np.zeros(7)}, "wrong robot"),
        (lambda o: {**o, "state": np.full(14, np.nan)}, "not a finite number"),
        (lambda o: {**o, "state": "zero"}, "expected numbers"),
        (lambda o: {**o, "state": np.zeros(14, complex)}, "expected numbers"),
        (lambda o: {**o, "state": np.zeros((1, 14))}, r"has shape \[1, 14\], expected one state, \[J\]"),
        (lambda o: {**o, "state": [[0.0] * 14, [0.0]]}, "state is no array"),
        (lambda o: {**o, "state": np.full(14, 1e300)}, "actions are not finite"),
        (lambda o: {**o, "images": {**o["images"], "cam_high": np.zeros((0, 8, 3), np.uint8)}}, r"\[0, 8, 3\] is no"),
        (lambda o: {**o, "images": {**o["images"], "cam_high": np.zeros((0, 8, 3))}}, r"\[0, 8, 3\] is no image"),
        (lambda o: {**o, "prompt": 3}, "prompt is text"),
        (lambda o: {**o, "noise": np.zeros((4, 14), np.float32)}, "noise is finite"),
        (lambda o: {**o, "noise": [[0.0], [0.0, 1.0]]}, "noise is no array"),
        (lambda o: {**o, "previous_actions": [[0.0], [0.0, 1.0]], "delay": 1}, "previous_actions is no array"),
        (lambda o: {**o, "images": {**o["images"], "cam_high": np.zeros((8, 8))}}, "no image"),
        (lambda o: {**o, b"x": 1}, "names are text"),
        (lambda o: {**o, "images/cam_high": 1}, "two values"),
        (lambda o: {"a": {"b": {"c": {"d": {"e": 1}}}}}, "nested deeper"),
        (lambda o: [1, 2], "a dictionary"),
    ],
)
def test_what_is_wrong_is_named(torch_policy, change, words):
    with pytest.raises(UserError, match=words):
        torch_policy.infer(change(observation_of(0)))


def test_openpi_checkpoint_needs_a_robot(golden):
    path = golden / "openpi/pi0"
    with pytest.raises(UserError, match="what robot"):
        Policy.from_pretrained(path, "torch")


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_openpi_checkpoint_as_a_policy(golden, name):
    """Weights, statistics and normalisation from openpi's directory; names from the robot's file."""
    rng = np.random.default_rng(0)
    joints = {"observation/joint_position": rng.normal(size=7), "observation/gripper_position": rng.uniform(size=1)}
    images = {key: rng.integers(0, 256, (180, 320, 3), dtype=np.uint8) for key in droid.CAMERAS.values()}
    answers = []
    for backend in NAMES:
        opened = Policy.from_pretrained(
            golden / "openpi" / name, backend, device="cpu", robot="droid", tokenizer="small", default_prompt="go"
        )
        assert opened.data.norm == ("zscore" if name == "pi0" else "quantile")
        noise = draw_noise(0, 0, (opened.horizon, 8))
        answers.append(opened.infer({**images, **joints}, noise)["actions"])
    np.testing.assert_allclose(*answers, atol=1e-4)
    assert answers[0].shape[1] == 8 and np.isfinite(answers[0]).all()


def test_pi0_fast_writes_whole_chunks(tmp_path):
    """Random weights: only the grammar of the tokens makes these chunks."""
    path = make_checkpoint(tmp_path / "20", FAST)
    answers = []
    for backend in NAMES:
        opened = Policy.from_pretrained(path, backend, device="cpu")
        assert opened.noise_shape is None
        opened.warmup()  # the robot has fewer dimensions than the model
        results = opened.infer_batch([observation_of(0), observation_of(1, prompt="put it down")])
        answers.append(np.stack([r["actions"] for r in results]))
    assert answers[0].shape == (2, HORIZON, 14) and np.isfinite(answers[0]).all()
    np.testing.assert_allclose(*answers, atol=1e-4)
    with pytest.raises(UserError, match="takes none"):
        opened.infer({**observation_of(0), "noise": np.zeros((HORIZON, 14))})


def test_pi0_fast_without_grammar(tmp_path, caplog):
    """As openpi decodes: what is no chunk is an error, never zeros, and the rate of such is logged."""
    path = make_checkpoint(tmp_path / "20", FAST)
    opened = Policy.from_pretrained(path, "torch", device="cpu", constrained=False)
    for count in (1, 2):
        with pytest.raises(UserError, match=f"no chunk of actions .*{count} of {count} chunks malformed"):
            opened.infer(observation_of(0))
    assert (opened.malformed, opened.decoded) == (2, 2)
    assert "2 of 2 chunks malformed (100.0%)" in caplog.text
    whole = Policy.from_pretrained(path, "torch", device="cpu")
    tokens = whole.model.decode(_stacked(whole.prepare(observation_of(0))), 200, grammar=whole._grammar)
    opened.model.decode = lambda *_, **__: tokens  # a model that has learned
    np.testing.assert_array_equal(opened.infer(observation_of(0))["actions"], whole.infer(observation_of(0))["actions"])
    assert (opened.malformed, opened.decoded) == (2, 3)


def _stacked(sample):
    return {k: _stacked(v) if isinstance(v, dict) else np.asarray(v)[None] for k, v in sample.items()}


def test_faults_of_a_checkpoint(checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "norm_stats.json").rename(tmp_path / "stats")
    with pytest.raises(UserError, match="no statistics"):
        Policy.from_pretrained(broken)
    (tmp_path / "stats").rename(broken / "norm_stats.json")
    policy = json.loads((broken / "policy.json").read_text())
    policy["tokenizer"]["sha256"] = "0" * 64
    (broken / "policy.json").write_text(json.dumps(policy))
    with pytest.raises(UserError, match="not the tokenizer"):
        Policy.from_pretrained(broken)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"backend": "tensorflow"}, "backend"),
        ({"backend": "torch", "device": "cuda:7"}, "device='cuda:7'"),
        ({"backend": "flax", "device": "tpu"}, "device='tpu'"),
        ({"robot": "alhoa"}, "aloha"),
        ({"data": {"sate": "x"}}, "data.sate"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 2.5}, "num_steps"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"dtype": "float16", "backend": "torch"}, "dtype='float16'"),
    ],
)
def test_wrong_arguments(checkpoint, arguments, words):
    with pytest.raises(UserError, match=words):
        Policy.from_pretrained(checkpoint, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
@pytest.mark.parametrize(("backend", "device"), [("torch", "cuda"), ("flax", "gpu")])
def test_a_device_that_is_absent_is_not_another(checkpoint, backend, device):
    with pytest.raises(UserError, match=f"device='{device}' is not here"):
        Policy.from_pretrained(checkpoint, backend, device=device)


@pytest.mark.parametrize("backend", NAMES)
def test_a_batch_that_lacks_something_is_named(checkpoint, backend):
    model = load_model(checkpoint, backend, device="cpu")
    with pytest.raises(
        UserError, match="batch: no image_mask, state, tokenized_prompt, tokenized_prompt_mask; this reads"
    ):
        model.sample_actions({"image": {}}, np.zeros((1, HORIZON, 32), np.float32))


def test_openpi_s_broker_plays_a_policy_of_this_process(openpi_client, torch_policy):
    broker = importlib.import_module("openpi_client.action_chunk_broker").ActionChunkBroker(torch_policy, HORIZON)
    assert broker.infer(observation_of(0))["actions"].shape == (14,)
    broker.reset()
