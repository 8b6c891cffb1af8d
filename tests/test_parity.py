"""The parity report: the frameworks agree tensor by tensor, also with what other systems compute."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from frameworks import NAMES
from traces import TOLERANCE

from convert import formats, parity, parity_batch, parity_page, parity_rows, tables

FLOW = set(parity_rows.STAGES) - {"decode"}  # the stages of pi0 and pi0.5
FAST = set(parity_rows.STAGES) - {"suffix", "trajectory"}


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def golden_model(request, golden):
    """Traces of the golden checkpoints, each side's from a format of its own: openpi's orbax, openpi-PyTorch's."""
    path = golden / "openpi" / request.param
    sources = [formats.open_checkpoint(path), formats.open_checkpoint(path / "openpi_pytorch")]
    batch = parity_batch.golden(sources[0].model)
    traces, gradients = {}, {}
    for source, name in zip(sources, NAMES, strict=True):
        # Compiling the gradient in Flax takes longest; test_pi0 holds pi0's against openpi's own.
        parts = parity.PARTS if request.param == "pi05" or name == "torch" else ("forward", "sampling")
        found = {part: dict(tensors) for part, tensors in parity.Side(source, name, device="cpu").traced(batch, parts)}
        traces[name] = found["forward"] | found["sampling"]
        if "gradients" in found:
            gradients[name] = found["gradients"]
    return SimpleNamespace(
        name=request.param, config=sources[0].model, batch=batch, root=golden, traces=traces, gradients=gradients
    )


def test_frameworks_agree(golden_model):
    """Every intermediate, the cache, every Euler step, every gradient."""
    m = golden_model
    valid = parity_batch.valid_prefix(m.config, m.batch)
    pairs = parity_rows.compare_traces(*(m.traces[name].items() for name in NAMES), TOLERANCE, valid)
    rows = [row for row, _, _ in pairs]
    stages = FLOW - {"gradients"}
    if len(m.gradients) == 2:
        gradients = parity_rows.compare_gradients(m.gradients["flax"], m.gradients["torch"].items(), TOLERANCE)
        assert len(gradients) == len(tables.entries(m.config))
        rows, stages = rows + gradients, FLOW
    assert [row.name for row in rows if not row.ok] == []
    assert {row.stage for row in rows} == stages
    assert sum(row.name.endswith("/x_t") and row.stage == "trajectory" for row in rows) == 10


@pytest.mark.parametrize("framework", NAMES)
def test_the_trace_is_the_model(golden_model, framework):
    """What the trace puts together from parts is what the whole model returns."""
    m = golden_model
    t = m.traces[framework]
    last = f"layers/{m.config.language.depth - 1:02d}"
    for e, expert in enumerate(("language", "expert")):
        gate = t.get(f"{last}/{expert}/gate_mlp", 1)
        out = t[f"{last}/{expert}/after_attention"] + gate * t[f"{last}/{expert}/mlp"]
        np.testing.assert_allclose(out, t[f"{last}/{expert}/out"], atol=1e-5, err_msg=f"expert {e}")
    last = f"vision/{m.config.vision.depth - 1:02d}"
    images = t["vision/tokens"].reshape(len(m.config.cameras), len(m.batch["state"]), *t["vision/tokens"].shape[1:])
    np.testing.assert_allclose(np.concatenate(images, 1), t["prefix/tokens"][:, : -m.config.max_token_len], atol=1e-5)
    chunk = t["output/expert"][:, -m.config.action_horizon :]
    weights = dict(formats.open_checkpoint(m.root / "openpi" / m.name).canonical())
    velocity = chunk @ weights["action_out_proj/kernel"] + weights["action_out_proj/bias"]
    np.testing.assert_allclose(velocity, t["output/velocity"], atol=1e-5)
    np.testing.assert_allclose(t["trajectory/09/x_t"], t["trajectory/actions"], atol=1e-5)


# Behind the time embedding, float64 there and float32 in JAX and here, outputs differ by up to 2.6e-4 (losses);
# before it by rounding alone. LeRobot also steps in double precision: 6e-5 in the actions.
BEFORE_TIME, AFTER_TIME = 1e-4, 5e-4
NAMED = {
    "prefix_tokens": ("prefix/tokens", BEFORE_TIME),
    "suffix_tokens": ("suffix/tokens", AFTER_TIME),
    "attn_mask": ("masks/attention", 0),
    "positions": ("masks/positions", 0),
    "prefix_out": ("output/language", BEFORE_TIME),
    "adarms_cond": ("suffix/condition", AFTER_TIME),
    "suffix_out": ("output/expert", AFTER_TIME),
    "v_t": ("output/velocity", AFTER_TIME),
    "loss": ("output/loss", AFTER_TIME),
    "sample_actions_10": ("trajectory/actions", AFTER_TIME),
}
REFERENCES = {
    "openpi-PyTorch": "openpi/{}/outputs_openpi_pytorch_float32.npz",
    "LeRobot 0.4.4": "lerobot/{}/outputs_float32.npz",
    "LeRobot 0.6.2": "lerobot/{}/outputs_v062_float32.npz",
}


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("reference", REFERENCES)
def test_other_systems_outputs(golden_model, framework, reference):
    m = golden_model
    theirs = dict(np.load(m.root / REFERENCES[reference].format(m.name)))
    valid = parity_batch.valid_prefix(m.config, m.batch)
    shared = [name for name in NAMED if name in theirs]
    assert {"prefix_tokens", "suffix_tokens", "loss", "sample_actions_10"} <= set(shared)
    for name in shared:
        ours_name, atol = NAMED[name]
        a, b = m.traces[framework][ours_name], theirs[name]
        if name == "prefix_out":
            a, b = a[valid], b[valid]
        np.testing.assert_allclose(a, b, atol=atol, rtol=0, err_msg=name)


def test_openpi_pytorch_gradients(golden_model):
    """Norms of gradients under the names of openpi-PyTorch; the gap is again the time embedding's."""
    m = golden_model
    theirs = np.load(m.root / REFERENCES["openpi-PyTorch"].format(m.name))
    found = {k.removeprefix("grad_norm/"): float(v) for k, v in theirs.items() if k.startswith("grad_norm/")}
    for gradients in m.gradients.values():
        ours = tables.translate(gradients, m.config, "flax", "hf")
        compared = sorted(set(found) & set(ours))
        assert len(compared) > 0.9 * len(ours)
        for name in compared:
            assert np.linalg.norm(ours[name]) == pytest.approx(found[name], rel=1e-3, abs=1e-5), name


# pi0-FAST: openpi's checkpoint in Flax, LeRobot's of the same weights in PyTorch.


@pytest.fixture(scope="module")
def fast_report(golden):
    """With openpi's numbering of tokens and openpi's length for both; LeRobot's habits are others."""
    path, habits = golden / "openpi/pi0_fast", {"positions": "openpi", "missing_cameras": "visible"}
    sources = [
        formats.open_checkpoint(p, max_token_len=16, **habits) for p in (path, golden / "lerobot/pi0_fast/pretrained")
    ]
    parity.same_architecture(*(source.model for source in sources))
    sides = [parity.Side(source, name, device="cpu") for source, name in zip(sources, NAMES, strict=True)]
    return parity.run(*sides, parity_batch.golden(sources[0].model), ("forward", "sampling"), "golden")


def test_pi0_fast_agrees(fast_report):
    assert [row.name for row in fast_report.rows if not row.ok] == []
    assert {row.stage for row in fast_report.rows} == FAST - {"gradients"}
    names = {row.name for row in fast_report.rows}
    assert {"output/logits", "output/loss", "decode/11/logits", "decode/tokens", "cache/02/v"} <= names


def test_pi0_fast_trace_is_what_openpi_computes(fast_report, golden):
    """The scores that the trace shows, where the text is scored."""
    path = golden / "openpi/pi0_fast"
    scored = np.load(path / "inputs.npz")["token_loss_mask"][:, 1:]
    theirs = np.load(path / "outputs_float32.npz")["logits"]
    for ours in fast_report.pictures["output/logits"]:
        np.testing.assert_allclose(ours[scored], theirs[scored], atol=2e-4, rtol=0)  # see test_pi0_fast
        assert not ours[~scored].any()
    for ours in fast_report.pictures["masks/attention"]:
        np.testing.assert_array_equal(ours, np.load(path / "outputs_float32.npz")["attn_mask"])


def test_pi0_fast_page(fast_report):
    """Errors, masks and scores; no trajectories."""
    html = parity_page.page(fast_report)
    assert html.count("data:image/png") == 3 and "Scores of the tokens" in html
    assert "decode: " in parity.text(fast_report, color=False)
