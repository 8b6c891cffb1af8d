"""Training pi0-FAST: both frameworks alike, the main job from data to checkpoint, what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from frameworks import NAMES, Framework
from tiny_fast import TINY, batch_of_prompts
from torch.utils.flop_counter import FlopCounterMode

import openpi_port
from configs import pi0_fast_aloha, pi0_fast_droid
from convert import formats, tables
from experiments import train
from openpi_port import UserError, checkpoint, memory, starting
from openpi_port import grammar as grammars
from openpi_port.config import SIZES, Optimizer, Pi0Fast, Train
from openpi_port.data import material
from openpi_port.fields import build
from openpi_port.pi_torch.pi0_fast import _CrossEntropy
from openpi_port.tokenizers import fast, paligemma

pytestmark = pytest.mark.usefixtures("own_caches")


def run_config(**changes) -> Train:
    config = build(Train, pi0_fast_aloha.get_config("debug"))
    optimizer = Optimizer(
        peak_lr=3e-4, end_lr=3e-5, warmup_steps=2, decay_steps=6, weight_decay=1e-2, clip_norm=0.5, ema=0.5
    )
    return dataclasses.replace(config, model=TINY, optimizer=optimizer, batch_size=3, **changes)


def training_batches(count: int) -> list[dict]:
    rng, out = np.random.default_rng(0), []
    place = np.arange(TINY.max_token_len)
    for _ in range(count):
        batch = batch_of_prompts(3)
        batch["tokenized_prompt"] = rng.integers(2, TINY.vocab_size, (3, TINY.max_token_len)).astype(np.int32)
        start = rng.integers(2, 6, (3, 1))
        stop = rng.integers(10, 21, (3, 1))
        batch["tokenized_prompt_mask"] = place < stop
        batch["token_loss_mask"] = (place >= start) & (place < stop)
        batch["token_ar_mask"] = batch["token_loss_mask"].astype(np.int32)
        out.append(batch)
    return out


def test_frameworks_train_alike():
    """Five optimizer steps: losses, averaged and raw weights."""
    config, data = run_config(), training_batches(5)
    losses, weights, raw = {}, {}, {}
    for name in NAMES:
        t = Framework(name).trainer(config)
        losses[name] = [float(t.update(batch)["loss"]) for batch in data] + [t.evaluate(data[0])]
        weights[name] = dict(tables.translate(t.weights(), TINY, name, "flax"))
        state = {k.removeprefix("raw/"): v for k, v in t.train_state().items() if k.startswith("raw/")}
        raw[name] = dict(tables.translate(state, TINY, name, "flax"))
    np.testing.assert_allclose(losses["torch"], losses["flax"], atol=1e-4, rtol=0)
    assert losses["flax"][-1] < losses["flax"][0]
    for path in weights["flax"]:
        if path != "vision/blocks/attn/k/bias":  # its gradient is rounding, which Adam scales up
            np.testing.assert_allclose(raw["torch"][path], raw["flax"][path], atol=1e-4, rtol=0, err_msg=path)
            np.testing.assert_allclose(weights["torch"][path], weights["flax"][path], atol=1e-4, rtol=0, err_msg=path)


# The main job


@pytest.fixture
def job(tmp_path) -> Train:
    return jobs.debug(pi0_fast_aloha, tmp_path)


def run(config: Train, *, resume: bool = False, **changes) -> tuple[Path, list[float]]:
    """The run's directory and its losses; nothing is lost of the actions."""
    path = jobs.run(dataclasses.replace(config, **changes), resume=resume)
    assert not any(jobs.logged(path, "actions_clipped")) and not any(jobs.logged(path, "actions_cut"))
    return path, jobs.logged(path)


def test_move_between_frameworks(job, tmp_path):
    """Two steps in one framework and two in the other are four in one, either way; the checkpoint holds both tokenizers
    and opens."""
    a, b, c = (dataclasses.replace(job, out=str(tmp_path / name)) for name in "abc")
    path, want = run(a, backend="flax", num_steps=4, save_every=2, keep_every=2)
    run(b, backend="torch", num_steps=2)
    _, moved = run(b, backend="flax", num_steps=4, resume=True)
    np.testing.assert_allclose(moved, want, atol=1e-4, rtol=0)
    shutil.copytree(path / "2", Path(c.out) / c.name / "2")
    _, back = run(c, backend="torch", num_steps=4, resume=True)
    np.testing.assert_allclose(back, want[2:], atol=1e-4, rtol=0)
    assert checkpoint.read_policy(path / "4").train.model == job.model
    assert (path / "4" / "tokenizer.model").exists()
    assert fast.load(str(path / "4" / "fast_tokenizer")).token_bytes == fast.load(job.fast_tokenizer).token_bytes
    model = openpi_port.load_model(path / "4", "torch", device="cpu")
    batch = next(material.load(job).batches(0))
    assert np.isfinite(model.loss(batch)).all()


def test_batches(job):
    """What the model learns decodes to the chunk that the data hold, up to the tokenizer's rounding."""
    data = material.load(job)
    batch = next(data.batches(0))
    for row, scored, actions in zip(batch["tokenized_prompt"], batch["token_loss_mask"], batch["actions"], strict=True):
        chunk = data.sequence.decode_actions(grammars.until_end(row[scored]), *actions.shape)
        assert np.sqrt(np.square(chunk - actions).mean(0)).max() < 0.05


def test_state_noise_reaches_the_prompt(job):
    """The model sees the state as text only."""
    noisy = jobs.with_data(job, state_noise=0.1)
    plain, changed = (next(material.load(config).batches(0)) for config in (job, noisy))
    prompt = plain["token_ar_mask"] == 0
    assert (np.where(prompt, plain["tokenized_prompt"] != changed["tokenized_prompt"], False)).any(1).all()
    np.testing.assert_array_equal(plain["actions"], changed["actions"])


def test_sequences_that_do_not_fit(job):
    short = dataclasses.replace(job, model=dataclasses.replace(job.model, max_token_len=40))
    with pytest.raises(UserError, match=r"max_token_len=40.*allow_truncation=True"):
        next(material.load(short).batches(0))
    batch = next(material.load(dataclasses.replace(short, allow_truncation=True)).batches(0))
    assert train.lost(batch) == {"actions_clipped": 0, "actions_cut": 1}


def test_clipped_coefficients_are_counted(job):
    """Statistics of smaller actions make larger numbers than the tokenizer has; every batch says how many."""
    stats = material.load(job).members[""].norm_stats
    narrow = dataclasses.replace(stats["actions"], q01=stats["actions"].q01 / 3, q99=stats["actions"].q99 / 3)
    wide = dataclasses.replace(job, allow_truncation=True)
    batch = next(material.load(wide, {"": {**stats, "actions": narrow}}).batches(0))
    assert train.lost(batch)["actions_clipped"] > 1


def test_configs():
    """Every size builds, reads back and fits its tokenizers."""
    for module in (pi0_fast_aloha, pi0_fast_droid):
        for size in SIZES:
            config = build(Train, module.get_config(size))
            assert isinstance(config.model, Pi0Fast) and config.data.norm == "quantile"
            assert build(Train, dataclasses.asdict(config)) == config
            assert memory.plan(config).total > 0
            # what openpi's decoding does to positions is only for weights that have lived with it
            assert config.model.positions == ("openpi" if config.init else "contiguous")
            if not config.init:  # room for the text's pieces and for all action tokens
                assert config.model.vocab_size >= paligemma.load(config.tokenizer).vocab_size + 128 + (
                    2048 if module is pi0_fast_droid else len(fast.load(config.fast_tokenizer).token_bytes)
                )
    base = build(Train, pi0_fast_aloha.get_config("base"))
    with pytest.raises(UserError, match="draws=2"):
        dataclasses.replace(base, draws=2)
    assert memory.count_params(base.model)[0] == 2_923_335_408


def test_start_from_a_checkpoint_with_other_habits(job, golden):
    """LeRobot's weights number tokens and write prompts in another way; the message says how to follow them."""
    path = golden / "lerobot" / "pi0_fast" / "pretrained"
    source = formats.open_checkpoint(path)
    config = dataclasses.replace(
        job, init=str(path), model=dataclasses.replace(source.model, positions="openpi", missing_cameras="visible")
    )
    with pytest.raises(UserError) as error:
        starting.point(Path("none"), config, resume=False)
    fields = "model.positions=contiguous", "model.missing_cameras=masked", "data.prompt_style=lerobot-0.4"
    assert str(error.value).endswith(" ".join(f"--config.{field}" for field in fields))
    data = dataclasses.replace(config.data, prompt_style="lerobot-0.4")
    assert starting.point(
        Path("none"), dataclasses.replace(config, model=source.model, data=data), resume=False
    ).weights


def test_unknown_tokenizer(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"fast_tokenizer=nobody/nothing.*fast_aloha"):
        fast.load("nobody/nothing")


def test_a_frozen_embedding_costs_no_gradient():
    """torch: of PaliGemma's vocabulary that would be a third of the loss, and a gigabyte."""
    x, targets = torch.randn(5, 8, requires_grad=True), torch.tensor([0, 3, 1, 19, 2])
    table, found = torch.randn(20, 8, requires_grad=True), []
    for trained in (True, False):
        loss = _CrossEntropy.apply(x, table.requires_grad_(trained), targets)
        with FlopCounterMode(display=False) as counter:
            (of_x,) = torch.autograd.grad(loss.sum(), x)
        found.append((of_x, counter.get_total_flops()))
    torch.testing.assert_close(found[1][0], found[0][0])
    product = 2 * 5 * 8 * 20
    assert [flops for _, flops in found] == [3 * product, 2 * product]
