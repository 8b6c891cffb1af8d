"""The page that shows what a run reads: the sequence against the models', what is flagged, and that it is made."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from frameworks import NAMES, Framework
from small_policy import ACTION_DIM, FAST, HORIZON, MODEL

from openpi_port import init, masks, sequence
from openpi_port.config import Data, Train

DATA = Data(repo_id="none", robot="aloha_sim", cameras={})
PI05 = dataclasses.replace(MODEL, state_in="prompt", time_in="adarms")
RUNS = {
    "pi0": Train(name="pi0", model=MODEL, data=DATA),
    "pi05": Train(name="pi05", model=PI05, data=DATA),
    "insulated": Train(name="insulated", model=PI05, data=DATA, insulate=True),
    "pi0_fast": Train(name="fast", model=FAST, data=DATA),
    "contiguous": Train(name="fast", model=dataclasses.replace(FAST, positions="contiguous"), data=DATA),
}


def random_batch(model, size=3):
    """Prompts of several lengths, and cameras that are absent."""
    rng = np.random.default_rng(0)
    length = model.max_token_len
    place = np.arange(length)
    prompt, used = rng.integers(1, length // 2, (size, 1)), rng.integers(length // 2, length + 1, (size, 1))
    batch = {
        "image": {c: np.zeros((size, 32, 32, 3), np.uint8) for c in model.cameras},
        "image_mask": {c: rng.random(size) < 0.6 for c in model.cameras},
        "tokenized_prompt": rng.integers(1, 99, (size, length)).astype(np.int32),
        "tokenized_prompt_mask": place < used,
    }
    if isinstance(model, type(FAST)):
        causal = (place >= prompt) & (place < used)
        return {**batch, "token_ar_mask": causal.astype(np.int32), "token_loss_mask": causal}
    return {
        **batch,
        "state": np.zeros((size, ACTION_DIM), np.float32),
        "actions": np.zeros((size, HORIZON, ACTION_DIM), np.float32),
        "noise": np.zeros((size, HORIZON, ACTION_DIM), np.float32),
        "time": np.full(size, 0.5, np.float32),
        "action_tokens": np.ones((size, 9), np.int32),
        "action_tokens_mask": np.arange(9) < rng.integers(2, 10, (size, 1)),
    }


def passes(framework, config, batch, monkeypatch):
    """Positions [B, T] and mask [B, T, S] of every pass through the language stack in a training step."""
    module = framework.load(config.model, init.Fresh(config.model, 0)).module
    kind, method = type(module.gemma), "forward" if framework.name == "torch" else "__call__"
    original, seen = getattr(kind, method), []

    def spy(self, xs, conds, positions, mask, *rest, **options):
        mask = masks.dense(mask) if isinstance(mask, masks.Blocks) else mask
        seen.append((framework.numpy(positions), framework.numpy(mask)))
        return original(self, xs, conds, positions, mask, *rest, **options)

    monkeypatch.setattr(kind, method, spy)
    arrays = framework.array(batch)
    if config.insulate:
        framework.backend.insulated.losses(module, arrays, arrays["noise"], arrays["time"])
    elif "noise" in batch:
        module.loss(arrays, arrays["noise"], arrays["time"])
    else:
        module.loss(arrays)
    return seen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("run", RUNS)
def test_sequences_are_the_models(name, run, monkeypatch):
    config, framework = RUNS[run], Framework(name)
    batch = random_batch(config.model)
    seen = passes(framework, config, batch, monkeypatch)
    assert len(seen) == 1 + config.insulate
    for i in range(len(batch["tokenized_prompt"])):
        sample = {k: {c: m[i] for c, m in v.items()} if isinstance(v, dict) else v[i] for k, v in batch.items()}
        ours = sequence.build(config, sample)
        assert [b.stop for b in ours.blocks[:-1]] == [b.start for b in ours.blocks[1:]]
        assert ours.blocks[0].start == 0 and ours.blocks[-1].stop == len(ours.valid)
        positions, mask = (x[i] for x in seen[0])
        size = len(positions)  # without the last token of FAST, and without the actions of knowledge insulation
        rows = ours.valid[:size]  # of the others nothing is read
        np.testing.assert_array_equal(ours.positions[:size][rows], positions[rows])
        np.testing.assert_array_equal(ours.mask[:size, :size][rows], np.broadcast_to(mask, (size, size))[rows])
        if config.insulate:
            positions, mask = (x[i] for x in seen[1])
            assert not ours.mask[size:, config.model.prefix_len : size].any()
            keys = np.r_[: config.model.prefix_len, size : size + HORIZON]
            np.testing.assert_array_equal(ours.positions[size:], positions)
            np.testing.assert_array_equal(ours.mask[size:][:, keys], mask)
