"""pi0-FAST: both frameworks compute what openpi and LeRobot compute with the same weights."""

from __future__ import annotations

import dataclasses
import importlib
from functools import partial

import exact
import numpy as np
import pytest
from frameworks import NAMES, Framework, golden_reference

import openpi_port
from openpi_port import UserError
from openpi_port.config import Compute

STEPS = 12
# openpi's logits are themselves 1.05e-4 from a float64 evaluation (`test_rounding`; 1.16e-4 in decoding), so an exact
# implementation would miss 1e-4. Most of it is the rounding of image tokens, 5e-6 in all three: from openpi's own image
# tokens its logits are 4.44e-5 from float64 (`test_rounding`), and two that are so exact at most 9e-5 apart.
ATOL, SAME_IMAGES = 2e-4, 9e-5


@pytest.fixture(scope="module")
def reference(golden):
    found = golden_reference(golden / "openpi" / "pi0_fast")
    # openpi decodes wrongly where a masked camera leaves a hole, so these vectors were made with all cameras valid
    found.seen = {**found.batch, "image_mask": {c: np.ones(2, bool) for c in found.batch["image_mask"]}}
    return found


@pytest.fixture(scope="module", params=NAMES)
def framework(request):
    return Framework(request.param)


@pytest.fixture(scope="module")
def model(reference, framework):
    return framework.load(reference.config, reference.weights)


def with_images(module, embedded, method, *args):
    """Calls a method with openpi's own image tokens in place of the vision tower's."""
    embed = module.embed_prefix
    object.__setattr__(module, "embed_prefix", lambda batch: embed(batch)._replace(x=embedded))
    try:
        return method(*args)
    finally:
        vars(module).pop("embed_prefix", None)


def test_logits_and_loss(reference, framework, model):
    def run(module, batch, embedded):
        return module.logits(batch), with_images(module, embedded, module.logits, batch)

    ours, theirs = framework.compiled(model, run)(reference.batch, reference.outputs["input_embeddings"])
    np.testing.assert_allclose(ours, reference.outputs["logits"], atol=ATOL, rtol=0)
    np.testing.assert_allclose(theirs, reference.outputs["logits"], atol=SAME_IMAGES, rtol=0)
    np.testing.assert_allclose(model.loss(reference.batch), reference.outputs["loss"], atol=1e-4, rtol=0)


def test_inputs(reference, framework, model):
    def run(module, batch):
        tokens, positions, mask = module.joint_inputs(batch)
        return tokens.x, positions, mask

    x, positions, mask = framework.compiled(model, run)(reference.batch)
    np.testing.assert_allclose(x, reference.outputs["input_embeddings"], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(mask, reference.outputs["attn_mask"])
    np.testing.assert_array_equal(positions, np.arange(784)[None].repeat(2, 0))


@pytest.fixture(scope="module")
def gradients(reference):
    """By framework, in one block of the vocabulary."""
    loaded = ((f, f.load(reference.config, reference.weights)) for f in map(Framework, NAMES))
    return {f.name: f.gradients(model, reference.batch) for f, model in loaded}


@pytest.mark.parametrize("block", [None, 200])
def test_gradients(reference, framework, model, gradients, monkeypatch, block):
    """The norm of the whole gradient, in one block and in three."""
    grads = gradients[framework.name]
    if block:
        monkeypatch.setattr(importlib.import_module(f"openpi_port.pi_{framework.name}.pi0_fast"), "BLOCK", block)
        grads = framework.gradients(model, reference.batch)
    norm = np.sqrt(sum(np.square(np.float64(g)).sum() for g in grads.values()))
    assert norm == pytest.approx(float(reference.outputs["grad_norm_global"]), rel=1e-4)


def test_gradients_agree(gradients):
    """Of every parameter, among the frameworks: whole ones, for one number in thousands is off three times as far.

    They are 1.3e-4 apart with XLA compiling quickly, as in tests; those of the keys' bias are nothing but rounding.
    """
    for name, grad in gradients["flax"].items():
        assert np.linalg.norm(gradients["torch"][name] - grad) < 2e-4 * np.linalg.norm(grad) + 1e-5, name


def test_greedy_tokens(reference, model):
    np.testing.assert_array_equal(model.decode(reference.seen, STEPS), reference.outputs["decoded_tokens"])


@pytest.fixture(scope="module")
def exact_logits(reference):
    """The golden logits in float64, from exact image tokens and from openpi's."""

    def logits(x):
        x, mask = x[:, :-1], reference.outputs["attn_mask"][:, :-1, :-1]
        place = np.arange(x.shape[1])[None].repeat(2, 0)
        return exact.logits(reference.weights, reference.config.language, x, place, mask)[:, -15:]

    images = exact.embed_images(reference.weights, reference.config, reference.batch["image"])
    tokens = exact.embed_tokens(reference.weights, reference.batch["tokenized_prompt"])
    return logits(np.concatenate([images, tokens], 1)), logits(reference.outputs["input_embeddings"].astype(np.float64))


def test_rounding(reference, framework, model, exact_logits):
    """Each framework is about as far from float64 as openpi is, and openpi too far for a tolerance of 1e-4."""

    def run(module, batch, embedded):
        return module.logits(batch), with_images(module, embedded, module.logits, batch)

    found = framework.compiled(model, run)(reference.batch, reference.outputs["input_embeddings"])
    for ours, want, rms, most in zip(found, exact_logits, (1.5e-5, 5e-6), (ATOL, SAME_IMAGES / 2), strict=True):
        of_ours, of_openpi = ours - want, reference.outputs["logits"] - want
        assert np.sqrt(np.square(of_ours).mean()) < 1.25 * np.sqrt(np.square(of_openpi).mean()) < 1.25 * rms
        assert most / 2 < np.abs(of_openpi).max() < most and np.abs(of_ours).max() < most


@pytest.mark.parametrize("images", ["ours", "openpi's"])
def test_forced_decoding(reference, framework, model, images):
    """Scores at every step, when openpi's choice of tokens is fed; also from openpi's own image tokens."""

    def run(module, batch, lead, tokens, steps, embedded):
        prefill = partial(module.prefill, batch, lead, STEPS)
        prompt = prefill() if images == "ours" else with_images(module, embedded, prefill)
        hidden, cache, scores = prompt.hidden, prompt.cache, []
        for step in range(STEPS):
            scores.append(module.gemma.logits(hidden))
            hidden, cache = module.advance(prompt, cache, tokens[:, step], steps[step])
        return scores

    lead, tokens = np.zeros(0, np.int32), reference.batch["forced_tokens"]
    embedded = reference.outputs["input_embeddings"]
    scores = framework.compiled(model, run)(reference.seen, lead, tokens, np.arange(STEPS), embedded)
    ours = np.stack(scores, axis=1)
    tolerance = ATOL if images == "ours" else SAME_IMAGES
    np.testing.assert_allclose(ours, reference.outputs["forced_decode_logits"], atol=tolerance, rtol=0)


def test_decoding_is_the_joint_pass(reference, framework):
    """With contiguous positions a masked camera in the middle, padding and the cache change nothing: the greedy tokens
    are those that one pass over prompt and tokens finds likeliest."""
    config = dataclasses.replace(reference.config, positions="contiguous")
    model = framework.load(config, reference.weights)
    masks = {"base_0_rgb": [1, 1], "base_1_rgb": [1, 0], "wrist_0_rgb": [0, 1]}
    batch = {**reference.batch, "image_mask": {c: np.array(m, bool) for c, m in masks.items()}}
    tokens = model.decode(batch, 4)
    prompts = (batch["token_ar_mask"] == 0) & batch["tokenized_prompt_mask"]
    joint = {k: batch[k].copy() for k in ("tokenized_prompt", "tokenized_prompt_mask", "token_ar_mask")}
    for i, length in enumerate(prompts.sum(1)):
        joint["tokenized_prompt"][i, length : length + 4] = tokens[i]
        place = np.arange(16)
        joint["tokenized_prompt_mask"][i] = place < length + 4
        joint["token_ar_mask"][i] = place >= length
    logits = framework.compiled(model, lambda m, b: m.logits(b))({**batch, **joint})
    for i, length in enumerate(prompts.sum(1)):
        np.testing.assert_array_equal(logits[i, length - 1 : length + 3].argmax(-1), tokens[i])


def test_loss_in_blocks(reference, framework, model, monkeypatch):
    """Blocks of the vocabulary of any size; samples without scored tokens, or with all of them."""
    module = importlib.import_module(f"openpi_port.pi_{framework.name}.pi0_fast")
    few = np.zeros((2, 16), bool)
    every = {**reference.batch, "token_loss_mask": np.ones((2, 16), bool)}
    few[1, 7] = True
    some = {**reference.batch, "token_loss_mask": few}
    logits = framework.compiled(model, lambda m, b: m.logits(b))(reference.batch).astype(np.float64)
    targets = reference.batch["tokenized_prompt"][:, 1:]
    entropy = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], 2)[..., 0]
    for block in (128, 200, 600):  # 4 blocks, 2 and a rest, less than one
        monkeypatch.setattr(module, "BLOCK", block)
        loss = framework.compiled(model, lambda m, b: m.loss(b))
        np.testing.assert_allclose(loss(every), entropy.mean(1), atol=1e-5)
        np.testing.assert_allclose(loss(some), [0, entropy[1, 6]], atol=1e-5)


def test_lerobot(golden, framework):
    """LeRobot's checkpoint: its positions, its loss, and with its extra beginning-of-sequence token its tokens."""
    path = golden / "lerobot" / "pi0_fast"
    inputs, want = dict(np.load(path / "inputs.npz")), np.load(path / "outputs_float32.npz")
    batch = {
        group: {k.partition("/")[2]: v for k, v in inputs.items() if k.startswith(f"{group}/")}
        for group in ("image", "image_mask")
    }
    prompt, mask = inputs["prompt_tokens"], inputs["prompt_mask"].astype(bool)
    length = prompt.shape[1]

    def joined(*parts):
        return np.concatenate(parts, axis=1)

    actions, seen = inputs["fast_action_tokens"].astype(np.int32), inputs["fast_action_masks"].astype(bool)
    batch["tokenized_prompt"], batch["tokenized_prompt_mask"] = joined(prompt, actions), joined(mask, seen)
    place = np.arange(length + actions.shape[1])[None].repeat(2, 0)
    batch["token_ar_mask"] = (place >= length).astype(np.int32)
    batch["token_loss_mask"] = batch["tokenized_prompt_mask"] & (place > length)  # the first one is not scored
    model = openpi_port.load_model(path / "pretrained", framework.name, device="cpu", max_token_len=place.shape[1])
    assert model.config.positions == "contiguous"
    counts = batch["token_loss_mask"].sum(1)
    np.testing.assert_allclose((model.loss(batch) * counts).sum() / counts.sum(), want["loss"], atol=5e-4)

    model = openpi_port.load_model(path / "pretrained", framework.name, device="cpu", max_token_len=length + 1)
    bos = np.full((2, 1), 2, np.int32)
    batch = {k: batch[k] for k in ("image", "image_mask")}
    batch |= {"tokenized_prompt": joined(prompt, bos), "tokenized_prompt_mask": joined(mask, bos > 0)}
    np.testing.assert_array_equal(model.decode(batch, STEPS), want["decoded_tokens_kv_cache"])


def test_load_model(reference, golden):
    model = openpi_port.load_model(reference.path, "torch", model="pi0_fast", device="cpu")
    np.testing.assert_allclose(model.loss(reference.batch), reference.outputs["loss"], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(model.decode(reference.seen, STEPS, 0.0, 0), reference.outputs["decoded_tokens"])
    with pytest.raises(UserError, match="'pi0_fast'"):
        openpi_port.load_model(reference.path, "torch", model="pi05")
    with pytest.raises(UserError, match="'pi05'"):
        openpi_port.load_model(golden / "openpi" / "pi05", "torch", model="pi0_fast")


def test_bfloat16(reference, framework):
    """Near float32, and it decodes."""
    model = framework.load(reference.config, reference.weights, Compute(dtype="bfloat16"))
    np.testing.assert_allclose(model.loss(reference.batch), reference.outputs["loss"], atol=0.2)
    assert model.decode(reference.seen, 3).shape == (2, 3)
