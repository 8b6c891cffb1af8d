"""pi0 and pi0.5 in both frameworks against what openpi computes with the same weights (float32, CPU)."""

from __future__ import annotations

import numpy as np
import pytest
from frameworks import NAMES, Framework, golden_reference

from convert import tables
from openpi_port.config import Compute
from openpi_port.masks import attention_mask, positions

# Section Precision of the design: two float32 frameworks differ by about 2e-5 after 18 layers.
ATOL = 1e-4


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def reference(request, golden):
    return golden_reference(golden / "openpi" / request.param)


@pytest.fixture(scope="module", params=NAMES)
def framework(request):
    return Framework(request.param)


@pytest.fixture(scope="module")
def model(reference, framework):
    return framework.load(reference.config, reference.weights)


@pytest.fixture(scope="module")
def gradients(reference, framework, model):
    """Of the mean loss; compiling them takes Flax longest."""
    return framework.gradients(model, reference.batch)


def close(ours, theirs, atol=ATOL):
    np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0)


def test_intermediates(reference, framework, model):
    """Embeddings, masks, positions and hidden states of one joint pass."""
    f, want, module = framework, reference.outputs, model.module
    batch, noise, time = f.array((reference.batch, reference.batch["noise"], reference.batch["time"]))
    t = time[:, None, None]
    prefix = module.embed_prefix(batch)
    suffix, cond = module.embed_suffix(batch["state"], t * noise + (1 - t) * batch["actions"], time)
    close(f.numpy(prefix.x), want["prefix_tokens"])
    close(f.numpy(suffix.x), want["suffix_tokens"])
    np.testing.assert_array_equal(f.numpy(prefix.valid), want["prefix_mask"])

    valid, starts = (
        np.concatenate([f.numpy(getattr(x, name)) for x in (prefix, suffix)], 1) for name in ("valid", "starts_block")
    )
    mask, where = attention_mask(*f.array((valid, starts))), positions(f.array(valid))
    np.testing.assert_array_equal(f.numpy(mask), want["attn_mask"])
    np.testing.assert_array_equal(f.numpy(where), want["positions"])
    (prefix_out, suffix_out), _ = module.gemma([prefix.x, suffix.x], [None, cond], where, mask)
    seen = want["prefix_mask"]  # padding queries attend to nothing; what they compute is nobody's business
    close(f.numpy(prefix_out)[seen], want["prefix_out"][seen])
    close(f.numpy(suffix_out), want["suffix_out"])


def test_loss(reference, model):
    b = reference.batch
    close(model.loss(b, b["noise"], b["time"]), reference.outputs["loss"])


@pytest.mark.parametrize("num_steps", [1, 4, 10])
def test_sample_actions(reference, model, num_steps):
    b = reference.batch
    close(model.sample_actions(b, b["noise"], num_steps), reference.outputs[f"sample_actions_{num_steps}"])


def test_gradients(reference, gradients):
    """The norm of every parameter's gradient, under openpi's names."""
    ours = tables.translate(gradients, reference.config, "flax", "openpi")
    norms = {name: np.linalg.norm(np.float64(grad)) for name, grad in ours.items()}
    want = {k.removeprefix("grad_norm/"): float(v) for k, v in reference.outputs.items() if "grad_norm/" in k}
    assert norms.keys() == want.keys()
    for name, norm in want.items():  # a key bias shifts all logits of a row: its gradient is rounding
        assert norms[name] == pytest.approx(norm, rel=1e-3, abs=1e-6), name


def test_bfloat16(reference, framework):
    """As far from float32 as openpi's own bfloat16 is, at most twice (the roundings are independent)."""
    model = framework.load(reference.config, reference.weights, Compute(dtype="bfloat16"))
    b, theirs = reference.batch, np.load(reference.path / "outputs_bfloat16.npz")
    exact = reference.outputs
    for name, got in {
        "loss": model.loss(b, b["noise"], b["time"]),
        "sample_actions_10": model.sample_actions(b, b["noise"]),
    }.items():
        allowed = 2 * np.abs(theirs[name] - exact[name]).max()
        assert np.abs(got - exact[name]).max() < allowed, name


def test_cached_velocity_is_the_joint_one(reference, framework, model):
    """`prefill` and `denoise` compute what `velocity` computes."""
    f, module = framework, model.module
    batch, x_t, time = f.array((reference.batch, reference.batch["noise"], reference.batch["time"]))
    prefix, cache = module.prefill(batch)
    cached = module.denoise(prefix, cache, batch["state"], x_t, time)
    close(f.numpy(cached), f.numpy(module.velocity(batch, x_t, time)), 2e-5)


def test_remat_changes_nothing(reference, framework, gradients):
    """What is kept, and whether layers are a loop, makes no difference to the gradients."""
    how = {"torch": "auto", "flax": "unrolled" if reference.path.name == "pi0" else "scan"}[framework.name]
    compute = Compute(remat="dots" if reference.path.name == "pi0" else "full", compile=how)
    other = framework.gradients(framework.load(reference.config, reference.weights, compute), reference.batch)
    for name in gradients:
        close(other[name], gradients[name], 1e-5)


def test_float_images(reference, model):
    """Images in [-1, 1] are taken as they are."""
    b = reference.batch
    floats = {name: np.float32(x) / 255 * 2 - 1 for name, x in b["image"].items()}
    close(model.loss({**b, "image": floats}, b["noise"], b["time"]), reference.outputs["loss"])


def test_draws_share_a_prefix(reference, model):
    """R draws of noise and time give the mean of their losses, one by one."""
    b, rng = reference.batch, np.random.default_rng(0)
    noise = rng.standard_normal((len(b["time"]), 3, *b["noise"].shape[1:]), np.float32)
    time = rng.uniform(0.1, 1, noise.shape[:2]).astype(np.float32)
    one_by_one = [model.loss(b, noise[:, i], time[:, i]) for i in range(3)]
    close(model.loss(b, noise, time), np.mean(one_by_one, 0), 2e-5)
