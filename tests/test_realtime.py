"""Real-time chunking: the published formulas, Flax against torch, policies, servers and the control loop."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from frameworks import NAMES, Framework
from small_policy import ACTION_DIM, FAST, HORIZON, MODEL, make_checkpoint, observation_of

from openpi_port import Policy, init
from openpi_port.errors import UserError
from openpi_port.realtime import guidance, soft_mask
from openpi_port.rng import draw_noise
from openpi_port.robots import aloha
from openpi_port.schedule import euler_times
from openpi_port.serving.chunks import RealTime
from openpi_port.serving.client import Client, ServerError
from openpi_port.serving.server import Options, background

LIMIT = 5.0
# Two float32 frameworks differ by 2e-5 in velocities of order 1 (test_pi0). With the pull these are larger, and as many
# times more sensitive to rounding.
RTOL = 2e-5
STEPS = 3
B, H, D = 3, 6, 5  # batch, horizon, action dim
PI0 = dataclasses.replace(
    MODEL, action_dim=D, action_horizon=H, cameras=("base_0_rgb",), vocab_size=50, max_token_len=6
)
MODELS = {"pi0": PI0, "pi05": dataclasses.replace(PI0, state_in="prompt", time_in="adarms")}


@pytest.fixture(scope="module", params=MODELS)
def reference(request):
    """Random weights in both frameworks, a batch, and a previous chunk with every delay from 0 on."""
    rng, config = np.random.default_rng(0), MODELS[request.param]
    weights = {p: x + 0.1 * rng.standard_normal(x.shape, np.float32) for p, x in dict(init.Fresh(config, 0)).items()}
    models = {name: Framework(name).load(config, weights) for name in NAMES}
    actions, noise, previous = rng.standard_normal((3, B, H, D), np.float32)
    batch = {
        "image": {"base_0_rgb": rng.integers(0, 256, (B, 32, 32, 3), np.uint8)},
        "image_mask": {"base_0_rgb": np.array([True, False, True])},
        "state": rng.standard_normal((B, D), np.float32),
        "tokenized_prompt": rng.integers(2, 50, (B, 6)).astype(np.int32),
        "tokenized_prompt_mask": np.arange(6) < np.array([[3], [6], [5]]),
        "actions": actions,
        "noise": noise,
        "time": np.array([0.2, 0.9, 0.5], np.float32),
    }
    mask = np.stack([soft_mask(H, d, H - 1) for d in range(B)])[..., None] * np.ones(D, np.float32)
    plain = {name: model.sample_actions(batch, noise, STEPS) for name, model in models.items()}
    return SimpleNamespace(models=models, batch=batch, previous=previous, weights=mask, plain=plain)


@pytest.fixture(params=NAMES)
def framework(request):
    return Framework(request.param)


def compiled(framework, model, function):
    """A function of the module and of arrays, as one of numpy."""
    if framework.name == "torch":
        import torch

        return torch.no_grad()(lambda *args: framework.numpy(function(model.module, *framework.array(args))))
    import jax
    from flax import nnx

    graph, state = nnx.split(model.module)
    jitted = jax.jit(lambda state, args: function(nnx.merge(graph, state), *args))
    return lambda *args: np.asarray(jitted(state, framework.array(args)))


# The formulas


@pytest.mark.parametrize(("horizon", "delay", "left"), [(8, 2, 6), (50, 0, 25), (50, 10, 25), (4, 4, 4), (5, 3, 3)])
def test_soft_mask(horizon, delay, left):
    """Equation 5: s = H - left."""
    want = []
    for i in range(horizon):
        c = (left - i) / (left - delay + 1)
        want.append(1.0 if i < delay else c * (np.e**c - 1) / (np.e - 1) if i < left else 0.0)
    np.testing.assert_allclose(soft_mask(horizon, delay, left), want, rtol=1e-6)


def test_guidance(framework):
    """Equations 2 and 4, in the paper's time."""
    time = np.array([1.0, 0.999, 0.7, 0.5, 0.1], np.float32)
    tau = 1.0 - np.float64(time[1:])
    r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
    want = [LIMIT, *np.minimum(LIMIT, (1 - tau) / (tau * r2))]
    np.testing.assert_allclose(framework.numpy(guidance(framework.array(time), LIMIT)), want, rtol=1e-5)


# A flow that is known exactly: actions from a Gaussian, over all actions and dims of a chunk together

A, J, EULER = 5, 2, 8
RNG = np.random.default_rng(3)
MEAN = RNG.standard_normal(A * J)
MIXED = RNG.standard_normal((A * J, A * J))
COVARIANCE = MIXED @ MIXED.T / (A * J) + 0.1 * np.eye(A * J)
NOISE, PREVIOUS = RNG.standard_normal((2, 3, A, J))
WEIGHTS = np.stack([soft_mask(A, d, 4) for d in (0, 2, 4)])[..., None]


def published(noise, previous, weights, num_steps, limit):
    """Algorithm 1's GuidedInference in float64, in the paper's time and with its sign of the velocity."""
    action = noise.reshape(-1, A * J).astype(np.float64)
    target = previous.reshape(action.shape)
    diagonal = np.broadcast_to(weights, noise.shape).reshape(action.shape)
    for k in range(num_steps):
        tau = k / num_steps
        spread = tau**2 * COVARIANCE + (1 - tau) ** 2 * np.eye(A * J)  # of A^tau
        gain = tau * COVARIANCE @ np.linalg.inv(spread)  # d E[A^1 | A^tau] / d A^tau
        expected = MEAN + (action - tau * MEAN) @ gain.T
        velocity = (expected - action) / (1 - tau)
        estimate = action + (1 - tau) * velocity
        r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        weight = limit if tau == 0 else min(limit, (1 - tau) / (tau * r2))
        velocity = velocity + weight * ((target - estimate) * diagonal) @ gain
        action = action + velocity / num_steps
    return action.reshape(noise.shape)


class Gaussian:
    """Stands for a model: the exact velocity, in our time, from the eigenvectors of the covariance."""

    def __init__(self, framework):
        values, vectors = np.linalg.eigh(COVARIANCE)
        self.constants = framework.array(tuple(np.float32(x) for x in (values, vectors, MEAN)))

    def prefill(self, batch):
        return None, None

    def denoise(self, prefix, cache, state, x_t, time):
        values, vectors, mean = self.constants
        t = time[:, None]
        centred = (x_t.reshape(-1, A * J) - (1 - t) * mean) @ vectors
        scaled = centred * (t - (1 - t) * values) / (t**2 + (1 - t) ** 2 * values)
        return (scaled @ vectors.T - mean).reshape(x_t.shape)


class Drift(Gaussian):
    """A velocity that doesn't depend on the actions: the estimate's Jacobian is the identity."""

    def denoise(self, prefix, cache, state, x_t, time):
        return self.constants[2].reshape(A, J) + 0 * x_t


def sample(framework, model, noise, previous, weights, limit):
    batch = {"state": np.zeros((len(noise), J), np.float32)}
    inputs = [np.float32(x) for x in (noise, previous, np.broadcast_to(weights, noise.shape))]
    sampler = framework.backend.realtime.sample_guided
    return framework.numpy(sampler(model, *framework.array((batch, *inputs)), EULER, limit))


@pytest.mark.parametrize("limit", [0.5, LIMIT, 100.0])
def test_known_flow(framework, limit):
    got = sample(framework, Gaussian(framework), NOISE, PREVIOUS, WEIGHTS, limit)
    want = published(NOISE, PREVIOUS, WEIGHTS, EULER, limit)
    np.testing.assert_allclose(got, want, atol=3e-5, rtol=0)
    assert np.abs(want - published(NOISE, PREVIOUS, 0 * WEIGHTS, EULER, limit)).max() > 0.1


def test_full_weights_lead_to_the_previous_chunk(framework):
    """Where the Jacobian is the identity, every step takes guidance / steps of the distance."""
    apart = NOISE - MEAN.reshape(A, J) - PREVIOUS  # where nothing pulls
    for limit, kept in ((1.0, (1 - 1.0 / EULER) ** EULER), (float(EULER), 0.0)):
        got = sample(framework, Drift(framework), NOISE, PREVIOUS, np.ones(()), limit)
        np.testing.assert_allclose(got - PREVIOUS, kept * apart, atol=1e-5)


# The models


def test_every_step_is_the_same_in_both_frameworks(reference):
    """Guided velocities at each Euler step, along the trajectory of one framework; then whole chunks."""
    observation = {k: v for k, v in reference.batch.items() if k not in ("actions", "noise", "time")}
    f, module = Framework("torch"), reference.models["torch"].module
    prefix, cache = ([f.numpy(x) for x in part] for part in module.prefill(f.array(observation)))

    def velocity(name):
        backend = Framework(name).backend

        def function(module, prefix, cache, state, x_t, time, previous, weights):
            seen = backend.pi0.Tokens(*prefix), backend.pi0.KVCache(*cache)
            plain = lambda x: module.denoise(*seen, state, x, 0 * x[:, 0, 0] + time)  # noqa: E731
            return backend.realtime.guided_velocity(plain, x_t, time, previous, weights, LIMIT)

        whole = compiled(Framework(name), reference.models[name], function)
        held = reference.previous, reference.weights
        return lambda x_t, time: whole(prefix, cache, observation["state"], x_t, time, *held)

    flax, torch = map(velocity, NAMES)
    times, dt = euler_times(STEPS)
    x_t = reference.batch["noise"]
    for t in times:
        v = torch(x_t, t)
        np.testing.assert_allclose(flax(x_t, t), v, atol=RTOL * max(1, np.abs(v).max()), rtol=0)
        x_t = x_t + dt * v
    for model in reference.models.values():
        held = {"previous": reference.previous, "weights": reference.weights, "limit": LIMIT}
        actions = model.sample_actions(reference.batch, reference.batch["noise"], STEPS, **held)
        np.testing.assert_allclose(actions, x_t, atol=1e-4, rtol=0)


def test_guidance_pulls_and_weight_zero_does_not(reference, framework):
    model, b, plain = reference.models[framework.name], reference.batch, reference.plain[framework.name]
    weights = np.ones_like(reference.previous)
    weights[0] = 0
    guided = model.sample_actions(b, b["noise"], STEPS, previous=reference.previous, weights=weights)
    np.testing.assert_allclose(guided[0], plain[0], atol=1e-5, rtol=0)
    far, near = (np.square(x[1:] - reference.previous[1:]).mean() for x in (plain, guided))
    assert near < 0.5 * far


def test_a_caller_s_inference_mode_does_no_harm(reference):
    import torch

    b, model = reference.batch, reference.models["torch"]
    held = {"previous": reference.previous, "weights": reference.weights}
    want = model.sample_actions(b, b["noise"], STEPS, **held)
    with torch.inference_mode():
        np.testing.assert_array_equal(model.sample_actions(b, b["noise"], STEPS, **held), want)
        inputs = Framework("torch").array((b, b["noise"], *held.values()))
        got = Framework("torch").backend.realtime.sample_guided(model.module, *inputs, STEPS)
    np.testing.assert_array_equal(got.numpy(), want)


def test_one_way_at_a_time(reference):
    b, held = reference.batch, {"previous": reference.previous, "weights": reference.weights, "delay": np.zeros(B)}
    for names in (("previous",), ("weights",), ("delay",), tuple(held)):
        with pytest.raises(UserError, match=f"got {', '.join(names)}"):
            reference.models["torch"].sample_actions(b, b["noise"], **{name: held[name] for name in names})


def test_given_actions_come_back(reference):
    """Bit for bit, and a delay of 0 is plain sampling; what is given decides the rest."""
    b, delay, chunks = reference.batch, np.arange(B), {}
    for name, model in reference.models.items():
        got = model.sample_actions(b, b["noise"], STEPS, previous=reference.previous, delay=delay)
        np.testing.assert_allclose(got[0], reference.plain[name][0], atol=1e-5, rtol=0)
        for row, d in enumerate(delay):
            np.testing.assert_array_equal(got[row, :d], reference.previous[row, :d])
        assert np.abs(got[1:, -1] - reference.plain[name][1:, -1]).max() > 1e-3
        chunks[name] = got
    np.testing.assert_allclose(chunks["flax"], chunks["torch"], atol=1e-4, rtol=0)


def test_times_of_single_actions(reference):
    """The same time for every action is the batch's; with different ones, losses agree."""
    b = reference.batch
    same = np.repeat(b["time"][:, None], H, 1)
    own = np.where(np.arange(H) < np.arange(1, B + 1)[:, None], np.float32(0), same)
    noise = b["noise"][:, None]
    usual, alike = (reference.models["torch"].loss(b, noise, t[:, None]) for t in (b["time"], same))
    np.testing.assert_allclose(alike, usual, atol=1e-5, rtol=0)
    flax, torch = (reference.models[n].loss(b, noise, own[:, None]) for n in NAMES)
    np.testing.assert_allclose(flax, torch, atol=1e-4, rtol=0)
    assert np.abs(torch - usual)[own > 0].max() > 1e-3


# Policies: delta actions of a real ALOHA, in its own units


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


# The control loop


class Gated:
    """Chunk n is 100 n + 0, 1, 2, ...; answers when it is let, and remembers what it was asked."""

    def __init__(self):
        self.asked, self.gate = [], threading.Semaphore(1)

    def infer(self, observation):
        self.asked.append(observation)
        self.gate.acquire()
        return {"actions": 100.0 * len(self.asked) + np.arange(8.0)[:, None]}


def step(player, observation=None):
    return float(player.infer({"state": np.zeros(1)} if observation is None else observation)["actions"][0])


def let_answer(policy, player):
    policy.gate.release()
    wait_for(player._asked[0].done)


def wait_for(done):
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_the_control_loop():
    """Asks with what is left and the longest delay, takes over when the answer is there, waits at the end."""
    policy = Gated()
    player = RealTime(policy, replan=3, delay=3, history=2)
    picture = np.zeros(2)
    assert [step(player) for _ in range(3)] == [100, 101, 102]
    assert step(player, {"images": {"top": picture}}) == 103  # asked here, at step 3
    picture[:] = 9
    assert step(player) == 104
    let_answer(policy, player)
    assert [step(player), step(player)] == [202, 203]  # two steps later; three after the question the next one
    wait_for(lambda: len(policy.asked) == 3)
    _, first, second = policy.asked
    np.testing.assert_array_equal(first["previous_actions"][:, 0], [103, 104, 105, 106, 107])
    np.testing.assert_array_equal(first["images"]["top"], [0, 0])
    assert first["delay"] == 3
    np.testing.assert_array_equal(second["previous_actions"][:, 0], [203, 204, 205, 206, 207])
    assert second["delay"] == 3  # the longest that is remembered
    assert [step(player) for _ in range(4)] == [204, 205, 206, 207]
    threading.Timer(0.05, policy.gate.release).start()
    assert step(player) == 305  # waited; five actions are in the past
    assert list(player._delays) == [2, 5]
    wait_for(lambda: len(policy.asked) == 4)  # at once, because five are more than three
    assert policy.asked[-1]["delay"] == len(policy.asked[-1]["previous_actions"]) == 3  # no more than are left
    player.reset()
    policy.gate.release(2)
    assert step(player) == 500 and "delay" not in policy.asked[-1]  # a new episode
    player.close()


def test_the_control_loop_with_a_server(torch_policy):
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


def test_errors_of_the_policy_reach_the_control_loop():
    class Broken(Gated):
        def infer(self, observation):
            if "delay" in observation:
                raise UserError("no")
            return super().infer(observation)

    policy = Broken()
    player = RealTime(policy, replan=1)
    step(player)
    with pytest.raises(UserError, match="no"):
        for _ in range(8):
            step(player)
    policy.gate.release()
    assert step(player) == 200  # begins anew
    player.close()


@pytest.mark.parametrize("numbers", [(0, 0, 1), (1, -1, 1), (1, 0, 0)])
def test_numbers_of_the_control_loop(numbers):
    with pytest.raises(UserError, match="replan="):
        RealTime(Gated(), *numbers)


def test_a_chunk_must_outlast_replan():
    with pytest.raises(UserError, match="below the 8"):
        step(RealTime(Gated(), replan=8))
