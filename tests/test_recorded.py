"""torch's plain model on a GPU: one recording per shape and options, and the numbers of the model itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from small_policy import MODEL

from convert import tables
from openpi_port import init
from openpi_port.config import Compute
from openpi_port.pi_torch import infer
from openpi_port.realtime import soft_mask

B, H, D = 2, MODEL.action_horizon, MODEL.action_dim


class Called:
    """Stands in for a recording where there is no GPU: the same call on tensors, whenever it is run."""

    made = 0

    def __init__(self, call, like, device, pool):
        assert (pool is None) == (Called.made == 0)
        Called.made += 1
        self.pool, self._call, self._like = "pool", call, [(a.shape, a.dtype) for a in like]

    def run(self, arrays):
        assert [(a.shape, a.dtype) for a in arrays] == self._like
        return self._call(*map(torch.from_numpy, arrays)).numpy()


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_recordings_give_what_the_model_gives(kind, monkeypatch):
    config = MODEL if kind == "pi0" else dataclasses.replace(MODEL, state_in="prompt", time_in="adarms")
    rng = np.random.default_rng(0)
    weights = {p: x + 0.1 * rng.standard_normal(x.shape, np.float32) for p, x in dict(init.Fresh(config, 0)).items()}
    weights = dict(tables.translate(weights, config, "flax", "torch"))
    plain, model = (infer.load(config, dict(weights), Compute()) for _ in range(2))  # on the GPU where there is one
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
    plain._recordings, model._recordings = None, {}
    if not torch.cuda.is_available():
        Called.made = 0
        monkeypatch.setattr(infer, "Recorded", Called)
    for way in ways:
        for scale in (1.0, 0.5):  # a replay takes the new values
            want = plain.sample_actions(batch, scale * noise, 2, **way)
            np.testing.assert_allclose(model.sample_actions(batch, scale * noise, 2, **way), want, atol=1e-6, rtol=0)
    swapped = {**batch, "image": dict(reversed(batch["image"].items()))}
    np.testing.assert_allclose(
        model.sample_actions(swapped, noise, 2), plain.sample_actions(batch, noise, 2), atol=1e-6, rtol=0
    )
    assert len(model._recordings) == 3
    model.sample_actions(batch, noise, 3)
    assert len(model._recordings) == 4
