"""Training-time real-time chunking: which actions are given, what is learned, and what a checkpoint says about it."""

from __future__ import annotations

import dataclasses

import jobs
import numpy as np
import pytest
from frameworks import NAMES, Framework
from small_policy import MODEL

from configs import pi0_aloha, pi0_fast_aloha, pi05_aloha_ki
from convert import formats, parity_batch, tables, target
from openpi_port import Policy, init, starting
from openpi_port.config import Optimizer, Pi0, Train
from openpi_port.data import material
from openpi_port.data.loader import Part, eval_batches, train_batches
from openpi_port.errors import UserError
from openpi_port.fields import build
from openpi_port.rng import draw_delay, draw_time

A, J, MOST = 6, 5, 4


def test_delays_are_uniform_and_a_function_of_seed_and_index():
    delays = [draw_delay(7, i, MOST) for i in range(2000)]
    assert delays == [draw_delay(7, i, MOST) for i in range(2000)] != [draw_delay(8, i, MOST) for i in range(2000)]
    counts = np.bincount(delays, minlength=MOST + 1)
    assert len(counts) == MOST + 1 and (np.abs(counts - 400) < 4 * np.sqrt(400 * 0.8)).all()


@dataclasses.dataclass(frozen=True)
class Rows:
    """Row i has i real actions, at least one."""

    def __len__(self):
        return A + 1

    def __getitem__(self, row):
        image = np.zeros((8, 8, 3), np.uint8)
        return {
            "image": {"base_0_rgb": image},
            "state": np.zeros(J, np.float32),
            "actions": np.full((A, J), row, np.float32),
            "action_is_pad": np.arange(A) >= max(row, 1),
        }


@pytest.mark.parametrize("draws", [1, 3])
def test_batches_give_the_first_actions(draws):
    shape = {"batch_size": 32, "seed": 7, "action_dim": J, "action_horizon": A, "draws": draws}
    plain, given = (train_batches([Part(Rows(), (), augment="none")], **shape, max_delay=m) for m in (0, MOST))
    plain, given, delays = next(plain), next(given), set()
    for i in range(32):
        time = draw_time(7, i, () if draws == 1 else (draws,))
        np.testing.assert_array_equal(plain["time"][i], time)
        delay = min(draw_delay(7, i, MOST), int((~given["action_is_pad"][i]).sum()) - 1)
        want = np.where(np.arange(A) < delay, 0, time[..., None])
        np.testing.assert_array_equal(given["time"][i], want)
        delays.add(delay)
    assert given["time"].dtype == np.float32 and delays == set(range(MOST + 1))
    for key in ("noise", "actions", "state"):
        np.testing.assert_array_equal(given[key], plain[key])
    validation = next(eval_batches(Part(Rows(), ()), **shape, num_batches=1, max_delay=MOST))
    assert validation["time"].shape[-1] == A and (validation["time"] == 0).any()


# The loss


def config_of(**model) -> Train:
    small = dataclasses.replace(MODEL, action_dim=J, action_horizon=A, cameras=("base_0_rgb",), vocab_size=50, **model)
    optimizer = Optimizer(peak_lr=3e-4, warmup_steps=0, ema=0.0)
    config = build(Train, pi0_aloha.get_config("debug"))
    return dataclasses.replace(config, model=small, optimizer=optimizer, max_delay=MOST)


def batch_of(model: Pi0, draws: int) -> dict:
    rng, size = np.random.default_rng(0), 3
    shape, length = (size, A, J), model.max_token_len
    time = rng.uniform(0.1, 1, (size, draws, 1) if draws > 1 else (size, 1)).astype(np.float32)
    given = np.arange(A) < np.array([[0], [2], [4]])
    return {
        "image": {"base_0_rgb": rng.integers(0, 256, (size, 32, 32, 3), np.uint8)},
        "image_mask": {"base_0_rgb": np.ones(size, bool)},
        "state": rng.standard_normal((size, J), np.float32),
        "tokenized_prompt": rng.integers(2, 50, (size, length)).astype(np.int32),
        "tokenized_prompt_mask": np.ones((size, length), bool),
        "actions": rng.standard_normal(shape, np.float32),
        "action_is_pad": np.arange(A) >= np.array([[6], [4], [5]]),
        "noise": rng.standard_normal(shape if draws == 1 else (size, draws, A, J), np.float32),
        "time": np.where(given if draws == 1 else given[:, None], np.float32(0), time),
    }


@pytest.mark.parametrize(
    ("model", "draws"), [({}, 2), ({"state_in": "prompt", "time_in": "adarms"}, 1)], ids=["pi0", "pi05"]
)
def test_frameworks_train_alike_on_what_is_not_given(model, draws):
    config = config_of(**model)
    batch, weights = batch_of(config.model, draws), init.Fresh(config.model, 0)
    runs, moments = [], []
    for name in NAMES:
        f = Framework(name)
        trainer = f.backend.train.Trainer(config, tables.translate(weights, config.model, "flax", name), "cpu")
        updates = [trainer.update(batch)]
        state = {k.removeprefix("mu/"): v for k, v in trainer.train_state().items() if k.startswith("mu/")}
        moments.append(dict(tables.translate(state, config.model, name, "flax")))  # a tenth of the clipped gradient
        updates += [trainer.update(batch) for _ in range(2)]
        runs.append([[float(u["loss"]), float(u["grad_norm"])] for u in updates])
    np.testing.assert_allclose(runs[0], runs[1], rtol=2e-4)
    for path, moment in moments[0].items():
        np.testing.assert_allclose(moments[1][path], moment, atol=1e-6, rtol=1e-3, err_msg=path)
    loss = f.load(config.model, weights).loss(batch, batch["noise"], batch["time"])
    counted = ~batch["action_is_pad"] & (batch["time"].reshape(3, -1, A)[:, 0] > 0)
    assert counted.sum() == 6 + 2 + 1
    assert runs[0][0][0] == pytest.approx(loss[counted].mean(), rel=1e-5)
    assert runs[0][2][0] < runs[0][0][0]


# Runs and checkpoints


def test_a_checkpoint_knows_what_it_was_trained_for(tmp_path, monkeypatch):
    """It is served conditioned, also after a conversion; the report of parity reads it with plain times."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = jobs.debug(pi0_aloha, tmp_path, backend="torch", num_steps=1, max_delay=10)
    config = jobs.with_data(config, validation=0.0)
    batch = next(material.load(config).batches(0))
    assert batch["time"].shape == (2, config.draws, 50)
    path = jobs.run(config)
    source = formats.open_checkpoint(str(path / "1"))
    target.write(source, tmp_path / "flax", "flax")
    assert parity_batch.make("dataset", source, 2, 0)["time"].shape == (2,)

    observation = {"images": {"top": np.zeros((48, 64, 3), np.uint8)}, "state": np.zeros(14), "prompt": "x"}
    previous = np.random.default_rng(0).normal(0, 0.1, (30, 14))
    for where, name in ((path / "1", "torch"), (tmp_path / "flax", "flax")):
        policy = Policy.from_pretrained(where, name, device="cpu", num_steps=1)
        assert policy.metadata["realtime"] == "conditioned" and policy.metadata["max_delay"] == 10
        if name == "torch":
            actions = policy.infer(observation, previous=previous, delay=10)["actions"]
            np.testing.assert_allclose(actions[:10], previous[:10], atol=1e-4)
    with pytest.raises(UserError, match="config.max_delay is 0, was 10"):
        starting.point(path, dataclasses.replace(config, max_delay=0), resume=True)


@pytest.mark.parametrize("most", [-1, 50])
def test_one_action_at_least_is_to_learn(most):
    with pytest.raises(UserError, match="from 0 to 49"):
        build(Train, {**pi0_aloha.get_config("debug"), "max_delay": most})


def test_pi0_fast_has_no_flow_times():
    with pytest.raises(UserError, match="pi0-FAST has no flow times"):
        build(Train, {**pi0_fast_aloha.get_config("debug"), "max_delay": 1})


def test_with_knowledge_insulation(tmp_path, monkeypatch):
    """Both at once: the flow's loss is on what is not given, the tokens' on all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = build(Train, {**pi05_aloha_ki.get_config("debug"), "max_delay": 40})
    config = dataclasses.replace(config, batch_size=2)
    loaded = material.load(config)
    batch = next(loaded.batches(0))
    weights = init.Fresh(config.model, 0)
    trainer = Framework("torch").backend.train.Trainer(
        config, tables.translate(weights, config.model, "flax", "torch"), "cpu"
    )
    metrics = trainer.update(batch)
    assert np.isfinite(float(metrics["loss_flow"])) and (batch["time"] == 0).any()
