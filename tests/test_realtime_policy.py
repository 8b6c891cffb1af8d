"""Real-time chunking of whole policies: delta actions of a real ALOHA, in its own units; in process and served."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from frameworks import NAMES
from small_policy import ACTION_DIM, FAST, HORIZON, make_checkpoint, observation_of

from openpi_port import Policy
from openpi_port.errors import UserError
from openpi_port.realtime import soft_mask
from openpi_port.rng import draw_noise
from openpi_port.robots import aloha
from openpi_port.serving.chunks import RealTime
from openpi_port.serving.client import Client, ServerError
from openpi_port.serving.server import Options, background


def trained_for(path, max_delay):
    """The checkpoint, as if it had been trained to be conditioned."""
    policy = json.loads((path / "policy.json").read_text())
    policy["train"]["max_delay"] = max_delay
    (path / "policy.json").write_text(json.dumps(policy))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("realtime") / "20")


@pytest.fixture(scope="module", params=NAMES)
def guided(request, checkpoint):
    return Policy.from_pretrained(checkpoint, request.param, device="cpu", num_steps=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return trained_for(make_checkpoint(tmp_path_factory.mktemp("realtime") / "20"), 2)


@pytest.fixture(scope="module", params=NAMES)
def conditioned(request, trained):
    return Policy.from_pretrained(trained, request.param, device="cpu", num_steps=2)


@pytest.fixture(scope="module")
def torch_policy(checkpoint):
    return Policy.from_pretrained(checkpoint, "torch", device="cpu", num_steps=2)


FLOW = draw_noise(0, 0, (HORIZON, ACTION_DIM))


def previous_of(policy):
    """What is left of a chunk for another observation, after its first action."""
    return policy.infer(observation_of(5), FLOW)["actions"][1:]


def test_a_policy_brings_the_previous_chunk_into_the_model_s_units(guided, torch_policy):
    """Joint signs, grippers, differences to the new state, z-scores, padding: by hand."""
    observation, previous = observation_of(0), previous_of(torch_policy)
    got = guided.infer(observation, FLOW, previous=previous, delay=2)["actions"]

    state = observation["state"] * aloha.SIGNS
    state[aloha.GRIPPERS] = aloha.opening_to_pi(state[aloha.GRIPPERS])
    actions = previous * aloha.SIGNS
    actions[:, aloha.GRIPPERS] = aloha.command_to_pi(actions[:, aloha.GRIPPERS])
    actions = actions - np.where(aloha.DELTA, state, 0)
    stats = guided.stats["actions"]
    rows = np.zeros((HORIZON, ACTION_DIM), np.float32)
    rows[: len(previous), :14] = (actions - stats.mean) / (stats.std + 1e-6)
    weights = np.zeros_like(rows)
    weights[:, :14] = soft_mask(HORIZON, 2, len(previous))[:, None]

    batch = {k: {c: a[None] for c, a in v.items()} if isinstance(v, dict) else v[None] for k, v in
             guided.prepare(observation).items()}  # fmt: skip
    chunk = guided.model.sample_actions(batch, FLOW[None], 2, previous=rows[None], weights=weights[None])[0]
    back = chunk[:, :14] * (stats.std + 1e-6) + stats.mean + np.where(aloha.DELTA, state, 0)
    back[:, aloha.GRIPPERS] = aloha.command_from_pi(back[:, aloha.GRIPPERS])
    np.testing.assert_allclose(got, back * aloha.SIGNS, atol=1e-4)
    plain = torch_policy.infer(observation, FLOW)["actions"]
    assert np.abs(got[:3] - previous).mean() < 0.5 * np.abs(plain[:3] - previous).mean()


def test_a_policy_that_was_trained_for_it_returns_the_given_actions(conditioned, torch_policy):
    assert conditioned.metadata["realtime"] == "conditioned" and conditioned.metadata["max_delay"] == 2
    previous, observation = previous_of(torch_policy), observation_of(0)
    got = conditioned.infer(observation, FLOW, previous=previous, delay=2)["actions"]
    np.testing.assert_allclose(got[:2], previous[:2], atol=1e-5)
    plain = torch_policy.infer(observation, FLOW)["actions"]
    assert np.abs(got - plain)[2:].max() > 1e-4
    with pytest.raises(UserError, match="trained for up to 2"):
        conditioned.infer(observation, FLOW, previous=previous, delay=3)


@pytest.mark.parametrize("path", ["checkpoint", "trained"])
def test_requests_of_both_kinds_share_a_pass(request, path):
    policy = Policy.from_pretrained(request.getfixturevalue(path), "torch", device="cpu", num_steps=2)
    held = {"previous_actions": previous_of(policy), "delay": 1}
    observations = [observation_of(0), {**observation_of(1), **held}]
    together = policy.infer_batch(observations, np.stack([FLOW] * 2))
    for observation, result in zip(observations, together, strict=True):
        np.testing.assert_allclose(policy.infer(observation, FLOW)["actions"], result["actions"], atol=1e-4)


def test_a_server_continues_chunks(torch_policy):
    observation, previous = observation_of(0), previous_of(torch_policy)
    want = torch_policy.infer(observation, FLOW, previous=previous, delay=1)["actions"]
    asked = {**observation, "noise": FLOW, "previous_actions": previous, "delay": 1}
    with background(torch_policy, Options(host="127.0.0.1", port=0)) as url, Client(url) as client:
        assert client.metadata["realtime"] == "guided"
        np.testing.assert_allclose(client.infer(asked)["actions"], want, atol=1e-6)
        np.testing.assert_allclose(client.infer({**asked, "delay": np.int64(1)})["actions"], want, atol=1e-6)
        with pytest.raises(ServerError, match="previous_actions are numbers"):
            client.infer({**asked, "previous_actions": previous[:, :7]})


def test_the_control_loop_of_two_robots_and_a_server(torch_policy):
    """Chunks of a real policy follow one another while two robots ask at once."""
    with background(torch_policy, Options(host="127.0.0.1", port=0)) as url:

        def drive(seed):
            with Client(url) as client:
                player = RealTime(client, replan=1, delay=1)
                for number in range(30):
                    action = player.infer(observation_of(seed + number))["actions"]
                    assert action.shape == (14,) and np.isfinite(action).all()
                player.close()
                return len(player._delays)

        with ThreadPoolExecutor(2) as pool:
            assert min(pool.map(drive, (0, 100))) == 10  # the history is full


@pytest.mark.parametrize(
    ("previous", "delay", "words"),
    [
        (np.zeros((3, 7)), 1, r"numbers \[N, 14\], got float64 \[3, 7\]"),
        (np.zeros(14), 1, "numbers"),
        (np.full((3, 14), "a"), 1, "numbers"),
        (np.zeros((5, 14)), 1, "5 of them, a chunk has 4"),
        (np.zeros((0, 14)), 0, "0 of them"),
        (np.full((3, 14), np.nan), 1, "not a finite number"),
        (np.zeros((3, 14)), 4, "from 0 to the 3"),
        (np.zeros((3, 14)), -1, "from 0 to the 3"),
        (np.zeros((3, 14)), 1.0, "an integer"),
        (np.zeros((3, 14)), True, "an integer"),
        (np.zeros((3, 14)), None, "come together"),
        (None, 1, "come together"),
    ],
)
def test_what_is_wrong_with_a_previous_chunk_is_named(torch_policy, previous, delay, words):
    with pytest.raises(UserError, match=words):
        torch_policy.infer(observation_of(0), previous=previous, delay=delay)


def test_a_prepared_policy_goes_on_too(checkpoint, torch_policy):
    prepared = Policy.from_pretrained(checkpoint, "torch", device="cpu", num_steps=2).optimize()
    observation, previous = observation_of(0), previous_of(torch_policy)
    want = torch_policy.infer(observation, FLOW, previous=previous, delay=1)["actions"]
    got = prepared.infer(observation, FLOW, previous=previous, delay=1)["actions"]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_limits(checkpoint):
    with pytest.raises(UserError, match="max_guidance"):
        Policy.from_pretrained(checkpoint, "torch", device="cpu", max_guidance=float("inf"))


def test_warming_up_draws_no_noise(torch_policy, checkpoint):
    fresh = Policy.from_pretrained(checkpoint, "torch", device="cpu", num_steps=2)
    fresh.warmup(realtime=True)
    np.testing.assert_array_equal(fresh.infer(observation_of(0))["actions"], torch_policy.infer(
        observation_of(0), FLOW)["actions"])  # fmt: skip


def test_pi0_fast_says_that_it_can_not(tmp_path):
    policy = Policy.from_pretrained(make_checkpoint(tmp_path / "20", FAST), "torch", device="cpu")
    assert policy.metadata["realtime"] is None
    with pytest.raises(UserError, match="pi0-FAST has no flow"):
        policy.infer(observation_of(0), previous=np.zeros((3, 14)), delay=1)
    with pytest.raises(UserError, match="can't go on"):
        RealTime(policy, 2)
