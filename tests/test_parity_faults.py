"""Faults that are planted in one framework: the report's first tensor beyond tolerance is where the fault is."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from einops import rearrange
from frameworks import NAMES
from traces import TOLERANCE, side, traced

from configs import pi0_aloha
from convert import parity_batch, parity_rows, tables
from openpi_port import init
from openpi_port.backends import Backend
from openpi_port.config import Gemma, Pi0, Pi0Fast, Siglip, Train
from openpi_port.fields import build


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


def test_pi0_fast_gradients(small_fast):
    m = small_fast
    flax, torch = (
        dict(tables.translate(s.backend.trace.gradients(s.module, m.batch), m.config, name, "flax"))
        for name, s in m.sides.items()
    )
    rows = parity_rows.compare_gradients(flax, torch.items(), TOLERANCE)
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
