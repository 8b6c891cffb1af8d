"""Prepared models: the same numbers as the plain ones, on whole chunks (float32, CPU)."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_fast
from frameworks import NAMES, Framework, golden_reference
from small_policy import MODEL, make_checkpoint, observation_of
from tiny_fast import TINY

from openpi_port import Policy, UserError, init
from openpi_port import batch as batches
from openpi_port.config import Lora
from openpi_port.rng import draw_noise

ATOL = 1e-4


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def reference(request, golden):
    return golden_reference(golden / "openpi" / request.param)


@pytest.fixture(scope="module", params=NAMES)
def models(request, reference):
    """The plain model and the prepared one."""
    framework = Framework(request.param)
    plain = framework.load(reference.config, reference.weights)
    return plain, framework.backend.fast.optimize(plain)


def seen(batch, cameras, prompt):
    """The batch with those cameras (camera -> bool [B]) and so many prompt tokens (int [B])."""
    mask = np.arange(batch["tokenized_prompt"].shape[1]) < np.asarray(prompt)[:, None]
    return {**batch, "image_mask": {c: np.asarray(m) for c, m in cameras.items()}, "tokenized_prompt_mask": mask}


def test_golden(reference, models):
    """Two samples, of which one lacks a camera, against openpi."""
    b = reference.batch
    got = models[1].sample_actions(b, b["noise"])
    np.testing.assert_allclose(got, reference.outputs["sample_actions_10"], atol=ATOL, rtol=0)


@pytest.mark.parametrize(("present", "prompt"), [((0, 1, 1), 16), ((0, 0, 0), 1)], ids=["no base", "none"])
def test_absent_cameras_and_short_prompts(reference, models, present, prompt):
    b = reference.batch
    cameras = dict(zip(reference.config.cameras, ([bool(p)] for p in present), strict=True))
    one = {k: {c: a[:1] for c, a in v.items()} if isinstance(v, dict) else v[:1] for k, v in b.items()}
    one = seen(one, cameras, [prompt])
    plain, fast = (m.sample_actions(one, one["noise"], 3) for m in models)
    np.testing.assert_allclose(fast, plain, atol=ATOL, rtol=0)


def test_samples_that_differ(reference, models):
    """Other cameras and other prompts in every sample, and images that are floats."""
    b = dict(reference.batch)
    b["image"] = {c: a.astype(np.float32) / 255 * 2 - 1 for c, a in b["image"].items()}
    b = seen(b, dict(zip(reference.config.cameras, ([1, 0], [0, 1], [0, 0]), strict=True)), [5, 2])
    b["image_mask"] = {c: m.astype(bool) for c, m in b["image_mask"].items()}
    plain, fast = (m.sample_actions(b, b["noise"], 3) for m in models)
    np.testing.assert_allclose(fast, plain, atol=ATOL, rtol=0)


def test_loss_is_the_plain_one(reference, models):
    b = reference.batch
    plain, fast = (m.loss(b, b["noise"], b["time"]) for m in models)
    np.testing.assert_array_equal(fast, plain)


def test_trim(reference):
    b, config = reference.batch, reference.config
    cut = batches.trim(seen(b, dict.fromkeys(config.cameras, [False, True]), [1, 2]), config)
    assert list(cut["image"]) == list(config.cameras)
    gone = batches.trim(seen(b, dict.fromkeys(config.cameras, [False, False]), [0, 0]), config)
    assert gone["image"] == {} and gone["tokenized_prompt"].shape[1] == batches.prompt_lengths(config)[0]
    assert [batches.prompt_lengths(SimpleNamespace(max_token_len=n)) for n in (48, 200, 11)] == [
        [16, 32, 48], [80, 160, 200], [11]
    ]  # fmt: skip


@pytest.mark.parametrize("backend", NAMES)
def test_a_policy_that_is_prepared(backend, tmp_path):
    path, noise = make_checkpoint(tmp_path / "20"), draw_noise(3, 0, (4, 32))
    policy = Policy.from_pretrained(path, backend, device="cpu")
    plain = policy.infer(observation_of(1), noise)["actions"]
    policy.optimize().warmup()
    np.testing.assert_allclose(policy.infer(observation_of(1), noise)["actions"], plain, atol=ATOL)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_must_be_merged(name):
    config = dataclasses.replace(MODEL, expert=dataclasses.replace(MODEL.expert, lora=Lora(rank=2, alpha=2.0)))
    framework = Framework(name)
    model = framework.load(config, init.Fresh(config, 0))
    with pytest.raises(UserError, match="merge_lora=True"):
        framework.backend.fast.optimize(model)


# ---- pi0-FAST

TWO_CAMERAS = dataclasses.replace(
    TINY, vision=MODEL.vision, language=MODEL.language, cameras=("base_0_rgb", "wrist_0_rgb")
)


@pytest.fixture(scope="module", params=NAMES)
def fast_framework(request):
    return Framework(request.param)


def test_greedy_tokens(golden, fast_framework):
    """Every token is allowed, and what is generated first hangs on the prompt's last token."""
    reference = golden_reference(golden / "openpi" / "pi0_fast")
    plain, batch = fast_framework.load(reference.config, reference.weights), reference.batch
    fast = fast_framework.backend.fast.optimize(plain)
    np.testing.assert_array_equal(fast.decode(batch, 12), plain.decode(batch, 12))
    np.testing.assert_array_equal(fast.loss(batch), plain.loss(batch))


def test_decoding_whole_chunks(fast_framework):
    """With the grammar, likeliest and drawn tokens, prompts of many lengths, an absent camera."""
    plain = fast_framework.load(TWO_CAMERAS, init.Fresh(TWO_CAMERAS, 3))
    fast = fast_framework.backend.fast.optimize(plain)
    grammar, batch = tiny_fast.grammar(), tiny_fast.batch_of_prompts(3, TWO_CAMERAS)
    for temperature in (0.0, 1.0):
        a, b = (m.decode(batch, 40, temperature, 5, grammar) for m in (plain, fast))
        np.testing.assert_array_equal(a, b)
    two = {k: {c: a[:2] for c, a in v.items()} if isinstance(v, dict) else v[:2] for k, v in batch.items()}
    np.testing.assert_array_equal(fast.decode(two, 40, 0.0, 5, grammar), plain.decode(two, 40, 0.0, 5, grammar))
