"""The parity report: the frameworks agree tensor by tensor, also with other systems' outputs, and faults are found."""

from __future__ import annotations

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from einops import rearrange
from frameworks import NAMES

from configs import pi0_aloha
from convert import formats, parity, parity_batch, parity_page, parity_rows, tables
from openpi_port import init
from openpi_port.backends import Backend
from openpi_port.checkpoint import Policy
from openpi_port.config import Compute, Gemma, Pi0, Pi0Fast, Siglip, Train
from openpi_port.errors import UserError
from openpi_port.fields import build

TOLERANCE = parity_rows.TOLERANCE["float32"]
FLOW = set(parity_rows.STAGES) - {"decode"}  # the stages of pi0 and pi0.5
FAST = set(parity_rows.STAGES) - {"suffix", "trajectory"}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Everything here runs once, so what XLA's optimizer takes is most of the time."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def side(config: Pi0 | Pi0Fast, weights, name: str) -> parity.Side:
    backend = Backend(name)
    weights = tables.translate(weights, config, "flax", name)
    return parity.Side(name, backend, backend.infer.load(config, weights, Compute(), "cpu").module)


def traced(one: parity.Side, batch, part: str = "forward") -> dict[str, np.ndarray]:
    with one.backend.device.precision(Compute()):
        return dict(getattr(one.backend.trace, part)(one.module, batch))


# --- The two frameworks, and what openpi-PyTorch and LeRobot compute with the same weights.


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def golden_model(request, golden):
    """Traces of the golden checkpoints, each side's from a format of its own: openpi's orbax, openpi-PyTorch's."""
    path = golden / "openpi" / request.param
    sources = [formats.open_checkpoint(path), formats.open_checkpoint(path / "openpi_pytorch")]
    sides = [parity.load(source, name, "float32", "cpu") for source, name in zip(sources, NAMES, strict=True)]
    batch = parity_batch.golden(sources[0].model)
    return SimpleNamespace(
        name=request.param, config=sources[0].model, sides=sides, batch=batch, root=golden,
        traces={name: traced(s, batch) | traced(s, batch, "sampling") for name, s in zip(NAMES, sides, strict=True)},
        # Compiling the gradient in Flax takes longest; test_pi0 holds pi0's against openpi's own.
        gradients={
            s.backend.name: dict(
                tables.translate(
                    s.backend.trace.gradients(s.module, batch), sources[0].model, s.backend.name, "flax"
                )
            )
            for s in (sides if request.param == "pi05" else sides[1:])
        },
    )  # fmt: skip


def test_frameworks_agree(golden_model):
    """Every intermediate, the cache, every Euler step, every gradient."""
    m = golden_model
    valid = parity_batch.valid_prefix(m.config, m.batch)
    pairs = parity_rows.compare_traces(*(m.traces[name].items() for name in NAMES), TOLERANCE, valid)
    rows = [row for row, _, _ in pairs]
    stages = FLOW - {"gradients"}
    if len(m.gradients) == 2:
        gradients = parity_rows.compare_gradients(*(m.gradients[name] for name in NAMES), TOLERANCE)
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


# --- pi0-FAST: openpi's checkpoint in Flax, LeRobot's of the same weights in PyTorch.


@pytest.fixture(scope="module")
def fast_report(golden):
    """With openpi's numbering of tokens and openpi's length for both; LeRobot's habits are others."""
    path, habits = golden / "openpi/pi0_fast", {"positions": "openpi", "missing_cameras": "visible"}
    sources = [
        formats.open_checkpoint(p, max_token_len=16, **habits) for p in (path, golden / "lerobot/pi0_fast/pretrained")
    ]
    parity.same_architecture(*(source.model for source in sources))
    sides = [parity.load(source, name, "float32", "cpu") for source, name in zip(sources, NAMES, strict=True)]
    return parity.run(*sides, parity_batch.golden(sources[0].model), ("forward", "sampling"), "float32", "golden")


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


def test_pi0_fast_gradients(small_fast):
    m = small_fast
    flax, torch = (
        dict(tables.translate(s.backend.trace.gradients(s.module, m.batch), m.config, name, "flax"))
        for name, s in m.sides.items()
    )
    rows = parity_rows.compare_gradients(flax, torch, TOLERANCE)
    assert len(rows) == len(tables.entries(m.config)) and all(row.ok for row in rows)


def test_scores_of_large_vocabularies(small_fast, monkeypatch):
    """The loss is in what is left of the logits."""
    m = small_fast
    shown = m.traces["forward"]["flax"]
    for name, s in m.sides.items():
        monkeypatch.setattr(s.backend.trace, "SMALL_VOCABULARY", 299)
        put = lambda x: s.backend.device.put(x, s.backend.device.find("cpu"))  # noqa: B023, E731
        text = (m.batch["tokenized_prompt"][:, 1:], m.batch["token_loss_mask"][:, 1:])
        parts = s.backend.trace.score_parts(*map(put, (shown["output/logits"], *text)))
        assert list(parts) == ["target_logits", "logsumexp"], name
        parts = {name: np.asarray(part) for name, part in parts.items()}
        for name, part in parts.items():
            np.testing.assert_allclose(part, shown[f"output/{name}"], atol=1e-5)
        entropy = (parts["logsumexp"] - parts["target_logits"]).sum(1) / text[1].sum(1)
        np.testing.assert_allclose(entropy, shown["output/loss"], atol=1e-5)


# --- Faults, planted in one framework: the first tensor beyond tolerance is where the fault is.


@pytest.fixture(scope="module")
def small():
    """A tiny pi0.5 with lively weights, and the trace of either framework."""
    config = build(Train, pi0_aloha.get_config("debug")).model
    config = dataclasses.replace(config, state_in="prompt", time_in="adarms")
    return lively(config, parts=("forward",))


@pytest.fixture(scope="module")
def small_fast():
    """A tiny pi0-FAST."""
    config = Pi0Fast(
        vision=Siglip(width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=16, image_size=32),
        language=Gemma(width=32, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=16),
        vocab_size=300,
        max_token_len=12,
    )
    return lively(config, parts=("forward", "sampling"))


def lively(config: Pi0 | Pi0Fast, parts: tuple[str, ...]) -> SimpleNamespace:
    rng = np.random.default_rng(0)
    fresh = init.Fresh(config, 0)  # has zeros, under which faults hide
    weights = {n: fresh[n] + rng.normal(0, 0.1, fresh.shapes[n]).astype(np.float32) for n in fresh}
    batch = parity_batch.random(config, 2, seed=0)
    sides = {name: side(config, weights, name) for name in NAMES}
    traces = {part: {name: traced(sides[name], batch, part) for name in NAMES} for part in parts}
    return SimpleNamespace(config=config, weights=weights, batch=batch, sides=sides, traces=traces)


def first_beyond(
    model, faulty: str, weights=None, part: str = "forward"
) -> tuple[str | None, dict[str, parity_rows.Row]]:
    """Compares a framework as it now is with the other one before; stops at the first tensor beyond tolerance."""
    healthy = next(name for name in NAMES if name != faulty)
    one = side(model.config, weights or model.weights, faulty)
    trace = getattr(one.backend.trace, part)(one.module, model.batch)
    valid = parity_batch.valid_prefix(model.config, model.batch, part)
    rows = {}
    for row, _, _ in parity_rows.compare_traces(model.traces[part][healthy].items(), trace, TOLERANCE, valid):
        rows[row.name] = row
        if not row.ok:
            return row.name, rows
    return None, rows


def transposed_head(backend, monkeypatch):
    attention = backend.gemma.attention
    monkeypatch.setattr(
        backend.gemma, "attention",
        lambda q, *args: rearrange(attention(q, *args), "B T (N H) -> B T (H N)", N=q.shape[2]),
    )  # fmt: skip


def adjacent_rope(backend, monkeypatch):
    rope, pairs, halves = backend.gemma.rope, "B T N (h two) -> B T N (two h)", "B T N (two h) -> B T N (h two)"
    monkeypatch.setattr(
        backend.gemma, "rope", lambda x, where: rearrange(rope(rearrange(x, pairs, two=2), where), halves, two=2)
    )


def unscaled_embedding(backend, monkeypatch):
    embed = backend.gemma.Gemma.embed
    monkeypatch.setattr(
        backend.gemma.Gemma, "embed", lambda self, tokens: embed(self, tokens) / self.embedding.shape[1] ** 0.5
    )


def large_eps(backend, monkeypatch):
    """1e-5 in every RMS norm, as in other model families."""
    layers, scaled = backend.layers, backend.layers.rms_normalize
    # x / sqrt(m + 1e-5) = s x / sqrt(s^2 m + 1e-6) with s^2 = 1/10, but for a factor that is s too.
    monkeypatch.setattr(layers, "rms_normalize", lambda x: scaled(x * 10**-0.5))


def shifted_mask(backend, monkeypatch):
    mask = backend.pi0.attention_mask
    roll = {"flax": lambda x: x.at[:, 1:].set(x[:, :-1]), "torch": lambda x: x.roll(1, 1)}[backend.name]
    monkeypatch.setattr(backend.pi0, "attention_mask", lambda valid, starts: mask(valid, roll(starts)))


FAULTS = {
    transposed_head: "layers/00/language/attended",
    adjacent_rope: "layers/00/language/q",
    unscaled_embedding: "prefix/prompt",
    large_eps: "layers/00/language/norm_attn_small",
    shifted_mask: "masks/attention",
}


@pytest.mark.parametrize("faulty", NAMES)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found_where_it_is(small, fault, faulty, monkeypatch):
    fault(Backend(faulty), monkeypatch)
    found, _ = first_beyond(small, faulty)
    assert found == FAULTS[fault]


def test_without_faults_nothing_is_found(small):
    assert first_beyond(small, "torch")[0] is None


@pytest.mark.parametrize("faulty", NAMES)
def test_faults_of_pi0_fast(small_fast, faulty, monkeypatch):
    """The pairs of the rotary embedding; and positions that are wrong only where tokens are generated."""
    backend = Backend(faulty)
    with monkeypatch.context() as patch:
        adjacent_rope(backend, patch)
        assert first_beyond(small_fast, faulty)[0] == FAULTS[adjacent_rope]
    position = backend.trace.Pi0Fast.position
    monkeypatch.setattr(
        backend.trace.Pi0Fast, "position", lambda self, length, step: position(self, length, step) + (step > 1)
    )
    assert first_beyond(small_fast, faulty, part="sampling")[0].startswith("decode/03/")


@pytest.mark.parametrize("faulty", NAMES)
def test_eps_of_the_vision_norms(small, faulty, monkeypatch):
    """Healthy activations hide this one: only the probe with small inputs shows it."""
    layers, scale = Backend(faulty).layers, 10**-0.5
    method = "__call__" if faulty == "flax" else "forward"
    real = getattr(layers.LayerNorm, method)
    monkeypatch.setattr(layers.LayerNorm, method, lambda self, x: real(self, x * scale))  # the same as eps 1e-5
    found, rows = first_beyond(small, faulty)
    assert found == "vision/00/norm_attn_small" and rows[found].relative > 0.1


@pytest.mark.parametrize("faulty", NAMES)
def test_one_swapped_head_of_one_layer(small, faulty):
    """A fault of a conversion: two heads of the queries of one expert in the last layer."""
    path = "gemma/layers/experts/1/q/kernel"
    kernel = small.weights[path].copy()
    heads = rearrange(kernel, "L D (N H) -> N L D H", N=small.config.expert.num_heads)
    heads[[0, 1], -1] = heads[[1, 0], -1]
    kernel = rearrange(heads, "N L D H -> L D (N H)")
    assert first_beyond(small, faulty, small.weights | {path: kernel})[0] == "layers/01/expert/q"


# --- The command.


@pytest.fixture(scope="module")
def checkpoint(golden):
    return golden / "openpi" / "pi05"


def command(*args: str) -> int:
    return parity.main([*map(str, args), "--backend-a=torch", "--backend-b=torch", "--device=cpu"])


def test_command(checkpoint, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert command(checkpoint, checkpoint / "openpi_pytorch", "--batch=golden", f"--out={page}") == 0
    out = capsys.readouterr().out
    for stage in FLOW:
        assert re.search(rf"^{stage}: \d+ tensors agree$", out, re.MULTILINE), stage
    assert page.read_text().count("data:image/png;base64,") == 4


def test_command_finds_a_difference(checkpoint, tmp_path, capsys):
    """One weight of one layer in a copy of the checkpoint."""
    from openpi_port.pi_torch import weights as weights_io

    source = formats.open_checkpoint(checkpoint / "openpi_pytorch")
    changed = dict(source.to("torch"))
    name = "gemma.layers.1.experts.0.up.weight"
    changed[name] = changed[name] + np.float32(0.05)
    weights_io.write_params(tmp_path / "model.safetensors", changed)
    described = formats.open_checkpoint(checkpoint).model
    (tmp_path / "policy.json").write_text(json.dumps({"format": 1, "model": dataclasses.asdict(described)}))
    page = tmp_path / "page.html"
    assert command(checkpoint, tmp_path, "--parts=forward", f"--out={page}") == 1
    out = capsys.readouterr().out
    assert "first tensor beyond tolerance: layers/01/language/mlp" in out
    assert re.search(r"layers/01/language/mlp .*<- first", out)
    assert "<tr class='first beyond'><td>layers/01/language/mlp</td>" in page.read_text()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--parts=gradient"], "gradients"),
        (["--batch-size=0"], "--batch-size=0"),
        (["--batch=dataset"], "use --batch=random"),
        (["--batch=golden", "--model.max_token_len=20"], "max_token_len 16"),
        (["--nonsense=1"], "--nonsense=1: no such argument"),
        (["--dtype=float16"], "float16"),
    ],
)
def test_command_mistakes(checkpoint, capsys, args, message):
    assert command(checkpoint, checkpoint, *args) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_batch_of_the_checkpoints_own_data(tmp_path):
    train = build(Train, pi0_aloha.get_config("debug"))
    policy = Policy(train, step=0, framework="torch", tokenizer_sha256="").to_json()
    (tmp_path / "policy.json").write_text(json.dumps(policy))
    source = SimpleNamespace(path=tmp_path, settings=policy, model=train.model, norm_stats=None)
    batch, again = (parity_batch.make("dataset", source, size=2, seed=0) for _ in range(2))
    random = parity_batch.random(train.model, 2, seed=0)
    assert {k: v.shape for k, v in batch.items() if k not in ("image", "image_mask")} == {
        k: v.shape for k, v in random.items() if k not in ("image", "image_mask")
    }
    assert {k: v.shape for k, v in batch["image"].items()} == {k: v.shape for k, v in random["image"].items()}
    np.testing.assert_array_equal(batch["noise"], again["noise"])
    assert np.abs(batch["state"]).max() < 20  # normalised


def test_different_architectures(golden, capsys):
    assert command(golden / "openpi" / "pi0", golden / "openpi" / "pi05") == 2
    assert "different architectures: " in capsys.readouterr().err


def test_different_habits_of_pi0_fast(golden, capsys):
    """Where the weights don't say how tokens are numbered, the command must."""
    sides = (golden / "openpi/pi0_fast", golden / "lerobot/pi0_fast/pretrained")
    assert command(*sides, "--model.max_token_len=16", "--model.missing_cameras=masked") == 2
    assert "positions is openpi and contiguous" in capsys.readouterr().err
    assert command(golden / "openpi/pi0", golden / "openpi/pi0_fast") == 2
    assert "different architectures: Pi0 and Pi0Fast" in capsys.readouterr().err


def test_not_finite_is_beyond_tolerance():
    x = np.array([1.0, np.nan], np.float32)
    assert not parity_rows.compare("a/b", x, x, TOLERANCE).ok
    assert not parity_rows.compare("a/b", x[:1], x[:1] + np.float32(2e-4), TOLERANCE).ok
    assert not parity_rows.compare("a/b", x, x[:1], TOLERANCE).ok
    assert parity_rows.compare("a/b", 0 * x[:1], 0 * x[:1], TOLERANCE).ok
    with pytest.raises(UserError, match="not the same architecture"):
        list(parity_rows.compare_traces([("a", x)], [("b", x)], TOLERANCE, np.ones((1, 1), bool)))


def test_page_of_part_of_a_report():
    """Without masks and trajectories there are no pictures of them."""
    row = parity_rows.compare("gradients/w", np.ones(3, np.float32), np.zeros(3, np.float32), TOLERANCE)
    html = parity_page.page(parity.Report("<a>", "b", "float32", TOLERANCE, "random", [row], {}))
    assert html.count("data:image/png") == 1 and "&lt;a&gt;" in html and "diverges at gradients/w" in html
