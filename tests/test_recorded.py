"""torch's plain model on a GPU: one recording per shape and options, and the numbers of the model itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny_fast
import torch
from small_policy import MODEL
from tiny_fast import TINY

from convert import tables
from openpi_port import batch as batches
from openpi_port import grammar as grammars
from openpi_port import init
from openpi_port.config import Compute
from openpi_port.grammar import Grammar
from openpi_port.pi_torch import device as devices
from openpi_port.pi_torch import infer
from openpi_port.pi_torch.fast import graph, onednn, prepare
from openpi_port.pi_torch.fast.graph import Recordings
from openpi_port.realtime import soft_mask

B, H, D = 2, MODEL.action_horizon, MODEL.action_dim


class Called:
    """Stands in for a recording where there is no GPU: the same call on tensors, whenever it is run."""

    made = 0

    def __init__(self, call, like, device, beside):
        assert (beside is None) == (Called.made == 0)
        Called.made += 1
        self._call, self._like = call, [(a.shape, a.dtype) for a in like]
        self.run(like)

    def run(self, arrays=()):
        return self.launch(arrays)()

    def launch(self, arrays=()):
        assert [(a.shape, a.dtype) for a in arrays] == self._like
        result = self._call(*map(torch.from_numpy, arrays)).numpy().copy()
        return lambda: result

    def wait(self):
        pass


class Unrecorded(Recordings):
    """Calls, on a GPU too."""

    def run(self, options, call, arrays):
        return call(*devices.put(tuple(arrays), self._device)).cpu().numpy()


@pytest.fixture
def device(monkeypatch):
    """The GPU where there is one; else recordings are played on the CPU."""
    if not torch.cuda.is_available():
        Called.made = 0
        monkeypatch.setattr(graph, "Recorded", Called)
        return torch.device("cuda")  # as far as the recordings know
    return devices.find(None)


def subject(kind):
    """A config, what loads a model of random weights, a batch, its noise, and the ways of sampling."""
    config = MODEL if kind == "pi0" else dataclasses.replace(MODEL, state_in="prompt", time_in="adarms")
    rng = np.random.default_rng(0)
    weights = {p: x + 0.1 * rng.standard_normal(x.shape, np.float32) for p, x in dict(init.Fresh(config, 0)).items()}
    weights = dict(tables.translate(weights, config, "flax", "torch"))
    side = config.vision.image_size
    batch = {
        "image": {c: rng.integers(0, 256, (B, side, side, 3), np.uint8) for c in config.cameras},
        "image_mask": {c: np.array([True, i == 0]) for i, c in enumerate(config.cameras)},
        "state": rng.standard_normal((B, D), np.float32),
        "tokenized_prompt": rng.integers(2, config.vocab_size, (B, config.max_token_len)).astype(np.int32),
        "tokenized_prompt_mask": np.arange(config.max_token_len) < np.array([[3], [config.max_token_len]]),
    }
    noise, previous = rng.standard_normal((2, B, H, D), np.float32)
    ways = [
        {},
        {"previous": previous, "weights": np.repeat(soft_mask(H, 1, H - 1)[None, :, None], B, 0)},
        {"previous": previous, "delay": np.array([0, 2], np.int32)},
    ]
    load = lambda: infer.load(config, dict(weights), Compute())  # noqa: E731, on the GPU where there is one
    return config, load, batch, noise, ways


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_recordings_give_what_the_model_gives(kind, device):
    config, load, batch, noise, ways = subject(kind)
    plain, model = load(), load()
    plain.recordings, model.recordings = Unrecorded(devices.find(None)), Recordings(device)
    for way in ways:
        for scale in (1.0, 0.5):  # a replay takes the new values
            want = plain.sample_actions(batch, scale * noise, 2, **way)
            np.testing.assert_allclose(model.sample_actions(batch, scale * noise, 2, **way), want, atol=1e-6, rtol=0)
    swapped = {**batch, "image": dict(reversed(batch["image"].items()))}
    np.testing.assert_allclose(
        model.sample_actions(swapped, noise, 2), plain.sample_actions(batch, noise, 2), atol=1e-6, rtol=0
    )
    assert len(model.recordings) == 3
    model.sample_actions(batch, noise, 3)
    assert len(model.recordings) == 4


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_tokens_of_recordings(prepared, device):
    """Those of steps one by one, in the first call and in later ones, with room for one token and for many."""
    weights = dict(tables.translate(init.Fresh(TINY, 1), TINY, "flax", "torch"))
    model = infer.load(TINY, weights, Compute())
    module, batch, whole = model.module, tiny_fast.batch_of_prompts(3), tiny_fast.grammar()
    ways = [(40, t, seed, g) for g in (whole, None) for t in (0.0, 1.0) for seed in (1, 2)]
    ways += [(len(whole.lead) + 30, 0.0, 0, whole), (1, 0.0, 0, None)]
    where, wanted = model.module.gemma.embedding.device, []
    for steps, temperature, seed, g in ways:
        draws = grammars.check(g, steps, temperature, seed, 3)
        given = devices.put((batches.select(batch, batches.FAST), draws if temperature else np.zeros(0)), where)
        held = None if g is None else Grammar(*devices.put(g, where))
        tokens = module.decode(given[0], steps, temperature or 1.0, given[1] if temperature else None, held)
        wanted.append(tokens.cpu().numpy())
    if prepared:
        model = prepare.optimize(model)
    model.recordings = Recordings(device)
    for _ in range(2):
        for way, want in zip(ways, wanted, strict=True):
            Called.made = 0
            np.testing.assert_array_equal(model.decode(batch, *way), want)
    assert len(model.recordings) == 6


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_prepared_weights_are_held_once(kind, device, monkeypatch):
    """The plain module's weights become views of the packed ones, and its answers stay the same, gradients included."""
    monkeypatch.setattr(onednn, "takes", lambda *of: False)  # as on a GPU
    _, load, batch, noise, ways = subject(kind)
    model = load()
    model.recordings = Recordings(device)
    want = [model.sample_actions(batch, noise, 2, **way) for way in ways]
    fast = prepare.optimize(model)
    assert len(model.recordings) == 0  # they know where the weights lay
    Called.made = 0
    for way, wanted in zip(ways, want, strict=True):
        np.testing.assert_allclose(fast.sample_actions(batch, noise, 2, **way), wanted, atol=1e-4 if not way else 1e-6)
    layer, packed = fast.module.gemma.layers[0], fast._flow.language
    expert, mlp = layer.experts[0], fast.module.vision.blocks[0].mlp
    assert expert.gate.weight.data_ptr() == packed.blocks[0].gate_up.data_ptr()
    assert mlp.down.weight.data_ptr() == packed.vision.layers[0].down.data_ptr()
