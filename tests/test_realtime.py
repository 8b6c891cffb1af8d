"""Real-time chunking: the published formulas and algorithm, and Flax against torch."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from frameworks import NAMES, Framework
from small_policy import MODEL

from openpi_port import init
from openpi_port.errors import UserError
from openpi_port.realtime import guidance, soft_mask
from openpi_port.schedule import euler_times

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

        whole = Framework(name).compiled(reference.models[name], function)
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
