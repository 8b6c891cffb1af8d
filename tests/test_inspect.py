"""The page that shows what a run reads: the sequence against the models', what is flagged, and that it is made."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace

import commands
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from frameworks import NAMES, Framework
from small_policy import ACTION_DIM, FAST, HORIZON, MODEL, make_checkpoint

from configs import pi0_aloha, pi0_fast_aloha, pi05_aloha, pi05_aloha_ki
from experiments import inspect_page, inspect_pictures, inspect_subject
from experiments.inspect_tokens import action_pieces, prompt_pieces
from openpi_port import init, masks, sequence, transforms
from openpi_port.config import Data, Train
from openpi_port.data.datasets import open_datasets
from openpi_port.data.lerobot_writer import Description, create
from openpi_port.fields import build

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
    """Positions [B, T] and mask [B, T, S] of every pass through the language stack that sees the whole sequence."""
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
        module.velocity(arrays, arrays["noise"], arrays["time"])
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


def debug(module, **data):
    """A config at debug size on the data set that ships, without a cache of frames on disk."""
    config = build(Train, module.get_config("debug"))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, cache_gb=0.0, **data))


def bad(findings):
    return [f.text for f in findings if f.level == "bad"]


@pytest.mark.parametrize(
    ("module", "pieces", "blocks"),
    [
        (pi0_aloha, ["⟨bos⟩", "Transfer", "␣cube", "⏎"], "base_0_rgb prompt padding state actions"),
        (pi0_fast_aloha, ["⟨bos⟩", "Task:", "␣transfer"], "base_0_rgb prompt action_tokens padding"),
        (pi05_aloha_ki, ["⟨bos⟩", "Task:", "␣"],
         "base_0_rgb prompt padding action_tokens padding_of_the_tokens actions"),
    ],
)  # fmt: skip
def test_pages_of_configs(module, pieces, blocks):
    subject = inspect_subject.of_config(debug(module))
    samples, findings = inspect_subject.look(subject, 2)
    assert len(samples) == 2 and not bad(findings)
    first = samples[0]
    said = prompt_pieces(subject, first)
    assert [p.text for p in said][: len(pieces)] == pieces
    assert " ".join(b.name.replace(" ", "_") for b in first.sequence.blocks) == blocks
    if module is not pi0_aloha:  # 14 numbers
        state = "".join(p.text for p in said if p.kind == "state").split("␣")
        assert len([number for number in state if number]) == 14
    tokens = action_pieces(subject, first) if module is pi05_aloha_ki else [p for p in said if p.kind == "tokens"]
    if "tokens" in blocks:
        assert tokens[-1].text == "⟨eos⟩" and tokens[-2].text == "|" and tokens[-3].text.startswith("a")
        assert len(tokens) == next(b.stop - b.start for b in first.sequence.blocks if b.kind == "tokens")
    page = inspect_page.page(subject, samples, findings)
    assert page.count("data:image/png") == 2 * 3 + 2 and page.count("<polyline") >= 2 * 2 * 14
    assert "Nothing suspicious was found" in page
    assert "left_arm_waist" in page and "Transfer cube" in page and "<script" not in page and "http" not in page


@dataclasses.dataclass(frozen=True)
class Blind:
    """A step that masks every camera."""

    def forward(self, sample):
        return {**sample, "image_mask": dict.fromkeys(sample["image_mask"], np.bool_(False))}


@pytest.fixture(scope="module")
def pi0():
    return inspect_subject.of_config(debug(pi0_aloha))


def test_chunks_that_are_longer_than_the_episodes(pi0):
    (part,) = pi0.parts
    samples, findings = inspect_subject.look(pi0, 1)
    assert not any("beyond their episode's end" in f.text for f in findings)
    page = inspect_page.page(pi0, samples, findings)
    assert "at 50 a second (a chunk is 1 s)" in page
    frames, _ = open_datasets(dataclasses.replace(part.data, cameras={}), horizon=300)
    padding = np.mean([frames.numbers(row)["action_is_pad"] for row in frames.rows(0)])
    assert frames.padding == pytest.approx(padding, abs=0.01)  # all are almost as long
    found = inspect_subject._of_part(pi0, dataclasses.replace(part, frames=frames))
    assert any(f"{frames.padding:.0%} of the actions lie beyond" in f.text and "chunks 300" in f.text for f in found)


def test_page_of_a_mixture():
    config = debug(pi0_aloha)
    other = dataclasses.replace(config.data, cache_gb=8.0, episodes=(3, 4), prompt="hand it over")
    subject = inspect_subject.of_config(dataclasses.replace(config, mixture={"other": other}))
    samples, findings = inspect_subject.look(subject, 1)
    assert [s.prompt for s in samples] == ["Transfer cube", "hand it over"] and not bad(findings)
    page = inspect_page.page(subject, samples, findings)
    assert page.count("In the robot's units") == 2 and page.count("Data: aloha_sim_transfer_cube") == 2


def test_tiny_ranges_are_flagged(pi0):
    (part,) = pi0.parts
    std = part.stats["actions"].std.copy()
    std[3] = 1e-7
    stats = {**part.stats, "actions": dataclasses.replace(part.stats["actions"], std=std)}
    steps = [transforms.Normalize(stats, s.mode) if isinstance(s, transforms.Normalize) else s for s in part.steps]
    subject = dataclasses.replace(pi0, parts=(dataclasses.replace(part, stats=stats, steps=tuple(steps)),))
    samples, findings = inspect_subject.look(subject, 1)
    assert any("statistics: actions[3]" in text for text in bad(findings))
    assert any("normalised actions[3] reaches" in text for text in bad(findings))
    page = inspect_page.page(subject, samples[:0], findings)
    assert page.count("<tr class='bad'>") == 1 and "Nothing suspicious" not in page


def test_masked_cameras_are_flagged(pi0):
    (part,) = pi0.parts
    at = next(i for i, s in enumerate(part.steps) if isinstance(s, transforms.FillCameras)) + 1
    part = dataclasses.replace(part, steps=(*part.steps[:at], Blind(), *part.steps[at:]))
    subject = dataclasses.replace(pi0, parts=(part,))
    samples, findings = inspect_subject.look(subject, 1)
    assert any("all cameras are masked" in text for text in bad(findings))
    tokens = samples[0].sequence
    assert inspect_pictures.label(tokens.blocks[0], tokens) == "base_0_rgb (16, masked)"
    assert inspect_pictures.colour(tokens.blocks[0], tokens) == inspect_pictures.GREY


def test_mistakes_of_a_config_are_flagged():
    config = debug(pi05_aloha, norm="zscore")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, max_token_len=20))
    _, findings = inspect_subject.look(inspect_subject.of_config(config), 2)
    words = " / ".join(bad(findings))
    assert "data.norm=zscore" in words and "2 of 2 prompts are cut to max_token_len=20" in words
    fast = debug(pi0_fast_aloha)
    fast = dataclasses.replace(fast, model=dataclasses.replace(fast.model, max_token_len=50))
    subject = inspect_subject.of_config(fast)
    samples, findings = inspect_subject.look(subject, 1)
    assert not samples and any("max_token_len=50" in text for text in bad(findings))
    page = inspect_page.page(subject, samples, findings)
    assert "Statistics" in page and "Parameters" in page and "id='Cameras'" not in page


def test_page_of_a_checkpoint_without_its_data(tmp_path):
    subject = inspect_subject.of_checkpoint(str(make_checkpoint(tmp_path / "20")))
    samples, findings = inspect_subject.look(subject, 4)
    assert len(samples) == 1 and samples[0].actions is None
    assert any("the data set none is not on this machine" in f.text for f in findings)
    assert any("lacks are black and masked: right_wrist_0_rgb" in f.text for f in findings)
    page = inspect_page.page(subject, samples, findings)
    assert "class='masked'" in page and "id='Actions'" not in page and "step 20" in page


def test_the_command(tmp_path):
    run = partial(commands.run, "experiments.inspect")
    out = tmp_path / "page.html"
    done = run(f"--out={out}", "--config=pi0_aloha:debug", "--samples=1", "--config.data.cache_gb=0.0")
    assert done.returncode == 0, done.stderr
    assert "1 sample," in done.stdout and out.read_text().startswith("<!doctype html>")
    done = run(f"--out={out}")
    assert (
        done.returncode == 2 and done.stderr.startswith("error: give one of --config") and done.stderr.count("\n") == 1
    )


def test_episodes_whose_pictures_are_missing(tmp_path):
    """A video that ends before its table: what looks at some samples only sees nothing."""
    root, key = tmp_path / "toy", "observation.images.top"
    with create(root, Description("toy", 10, {key: (32, 32)}, ["a"], ["a"])) as writer:
        for length in (6, 5, 4):
            images = np.full((length, 32, 32, 3), 50, np.uint8)
            values = np.linspace(0, 1, length, dtype=np.float32)[:, None]
            writer.add_episode({key: images}, values, values, "x")
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    name = f"videos/{key}/from_timestamp"
    starts = pa.array([start + 0.1 * (number == 2) for number, start in enumerate(table[name].to_pylist())])
    pq.write_table(table.set_column(table.column_names.index(name), name, starts), path)
    data = Data(repo_id=str(root), robot="lerobot", cameras={"base_0_rgb": key}, validation=0.0)
    frames, _ = open_datasets(data, horizon=2)
    subject = lambda *frames: SimpleNamespace(parts=(inspect_subject.Part(data, (), {}, "", *frames),))  # noqa: E731
    assert inspect_subject.damaged(subject(None, frames)) == []
    frames, _ = open_datasets(data, horizon=2, image_size=32)
    first, *rest = inspect_subject.damaged(subject(frames))
    assert first.level == "bad" and '--config.data.skip="(2,)" leaves these out' in first.text
    assert len(rest) == 1 and "no frame at 1.5000 s" in rest[0].text and "for episode 2, frame 3" in rest[0].text
