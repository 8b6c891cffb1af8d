"""`experiments.bench`: floors against figures counted by hand, every part at test size, what is left on disk."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
from frameworks import NAMES
from small_policy import FAST, MODEL

from configs import pi0_aloha
from experiments import bench, bench_errors, bench_floor, bench_inputs, bench_parts, bench_report
from experiments.bench_floor import Rates
from experiments.bench_report import Figure
from openpi_port.config import EXPERT, LANGUAGE, SIGLIP, Compute, Pi0, Pi0Fast, Train
from openpi_port.errors import UserError
from openpi_port.fields import build

RATES = Rates(bytes=3e12, operations=8e14)
BASE = Pi0(SIGLIP["base"], LANGUAGE["base"], EXPERT["base"])


@pytest.fixture
def config():
    return dataclasses.replace(build(Train, pi0_aloha.get_config("debug")), model=MODEL, batch_size=2, draws=1)


def setting(config, **changes):
    return bench_parts.Setting(config, RATES, **{"fast": True, "float8": False, "repeat": 2, "steps": 2, **changes})


def test_floors_at_base_size():
    """Against the counts of the design: TFLOP, GB."""

    def tera(work):
        return work.operations / 1e12

    assert tera(bench_floor.vision(BASE.vision, 2048, 3, 2)) == pytest.approx(0.661, rel=0.01)
    for tokens, want in {560: 2.15, 816: 3.16, 968: 3.76}.items():
        assert tera(bench_floor.prefix(BASE.language, tokens, 2)) == pytest.approx(want, rel=0.01)
    assert tera(bench_floor.prefix(BASE.language, 816, 2, float8=True)) == pytest.approx(1.75, rel=0.01)
    step = bench_floor.euler_step(BASE, 816, 2)
    assert (tera(step), step.bytes / 1e9) == pytest.approx((0.038, 0.641), rel=0.02)
    fast = Pi0Fast(SIGLIP["base"], LANGUAGE["base"])
    assert bench_floor.token(fast, 700, 2).bytes / 1e9 == pytest.approx(5.03, rel=0.01)
    assert bench_floor.token(fast, 700, 2, float8=True).bytes / 1e9 == pytest.approx(3.22, rel=0.01)
    passes, optimizer = bench_floor.training_step(build(Train, pi0_aloha.get_config("base")))
    cameras = dataclasses.replace(build(Train, pi0_aloha.get_config("base")), batch_size=32)
    assert len(cameras.model.cameras) == 3 and tera(passes) / 32 == pytest.approx(12.1, rel=0.02)
    assert optimizer.seconds(Rates(3.35e12, 8e14)) == pytest.approx(0.035, rel=0.02)


def test_the_larger_time_is_the_floor():
    work = bench_floor.Work(8e12, 3e9)  # 10 ms of products, 1 ms of copying
    assert work.seconds(RATES) == pytest.approx(0.01)
    assert (2 * work + bench_floor.Work(0, 3e11)).seconds(RATES) == pytest.approx(0.102)


@pytest.fixture
def clock(monkeypatch):
    """Calls are made, but time is what this says: that of a chunk is 1 s longer than of anything else."""

    def timed(call, repeat, what):
        call()
        return [2.0 if what == "a chunk" else 1.0] * repeat

    monkeypatch.setattr(bench_parts, "timed", timed)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_inference(config, backend, fast, clock):
    figures = list(bench_parts.inference(setting(dataclasses.replace(config, backend=backend), fast=fast)))
    parts = ["vision", "prefix"] * fast + ["chunk of one step", "step"]
    assert [f.name for f in figures] == [f"inference/{n}" for n in ("ready", "chunk", *parts)]
    assert all(f.floor > 0 for f in figures[1:])
    assert figures[-1].value == pytest.approx(1e3 / 9)


@pytest.mark.parametrize("backend", NAMES)
def test_tokens(config, backend, clock, monkeypatch):
    monkeypatch.setattr(bench_parts, "TOKENS", 3)
    config = dataclasses.replace(config, backend=backend, model=FAST)
    names = [f.name for f in bench_parts.inference(setting(config))]
    assert names[2:] == [f"inference/{n}" for n in ("vision", "prefix", "chunk of one token", "token")]


def test_a_step_that_noise_hides_is_not_measured(config, monkeypatch, capsys):
    """Where chunks of one step take as long as those of ten, no time of a step follows, let alone a negative one."""
    monkeypatch.setattr(bench_parts, "timed", lambda call, repeat, what: [1.0 if what == "a chunk" else 1.1] * repeat)
    found = bench_parts.inference(setting(dataclasses.replace(config, backend="torch"), fast=False))
    assert [f.name for f in found][1:] == ["inference/chunk", "inference/chunk of one step"]
    assert "inference/step: not measured" in capsys.readouterr().out
    noisy, calm = [1.0, 1.0, 3.0, 3.0], [1.5, 1.5, 1.5, 1.5]
    assert bench_report.difference("x", noisy, calm, 9) is None
    assert bench_report.difference("x", [3.0] * 4, calm, 3).value == pytest.approx(500)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_errors(config, dtype, expected):
    """Against the plain model in float32; in torch, the other has the same methods."""
    config = dataclasses.replace(config, backend="torch", compute=Compute(dtype=dtype))
    found = {f.name: f.value for f in bench_errors.errors(setting(config))}
    assert len(found) == 12 and all(0 <= error < 10 * expected for error in found.values())
    relative = [error for name, error in found.items() if not name.endswith("largest")]
    assert max(relative) < expected and (min(relative) == 0) == (dtype == "float32")
    with pytest.raises(UserError, match="tokens"):
        list(bench_errors.errors(setting(dataclasses.replace(config, model=FAST))))


def test_some_cameras(config):
    """What is not there is not in the floor either."""
    config = dataclasses.replace(config, backend="torch")
    some = {"cameras": len(MODEL.cameras) - 1, "tokens": 3}
    products = Rates(bytes=1e30, operations=8e14)  # alone count
    both = (dataclasses.replace(setting(config, **s), rates=products) for s in ({}, some))
    whole, part = (list(bench_parts.inference(one)) for one in both)
    for a, b in zip(whole[1:4], part[1:4], strict=True):
        assert a.name == b.name and b.floor < a.floor
    batch = bench_inputs.shown(bench_inputs.random_prompt(FAST, 2), 1, 3)
    assert [m.tolist() for m in batch["image_mask"].values()][:2] == [[True, True], [False, False]]
    assert batch["tokenized_prompt_mask"].sum(1).tolist() == [3, 3]


def test_realtime(config):
    named = [f.name for f in bench_parts.realtime(setting(dataclasses.replace(config, backend="torch"), repeat=1))]
    assert named == ["realtime/plain", "realtime/guided", "realtime/conditioned"]
    with pytest.raises(UserError, match="no flow"):
        list(bench_parts.realtime(setting(dataclasses.replace(config, model=FAST))))


def test_train(config):
    config = dataclasses.replace(config, backend="torch")  # which needs no compiling; the other has the same methods
    named = {f.name: f for f in bench_parts.train(setting(config))}
    assert named["train/throughput"].value == pytest.approx(2 / (named["train/step"].value / 1e3), rel=1e-6)


def test_training_fed_from_video(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = dataclasses.replace(build(Train, pi0_aloha.get_config("debug")), backend="torch")
    named = {f.name: f.value for f in bench_parts.feed(setting(config, steps=2))}
    assert named["feed/throughput"] > 0 and 0 <= named["feed/waiting for data"] <= 100


@pytest.mark.parametrize("backend", NAMES)
def test_attention_and_rates(config, backend):
    chosen = setting(dataclasses.replace(config, backend=backend), repeat=1)
    named = {f.name: f for f in bench_parts.attention(chosen)}
    assert named["attention/plain/suffix x1/with gradients"].floor > named["attention/plain/suffix x1"].floor
    probe, device = chosen.backend.probe, chosen.backend.device.find("cpu")
    assert probe.copy_rate(device, 2**20) > 0 < probe.product_rate(device, "float32", 64)


def test_tokenizers_and_server(config):
    named = [f.name for part in ("tokenizer", "server") for f in bench.PARTS[part](setting(config, repeat=1))]
    assert named == ["tokenizer/prompts", "tokenizer/FAST encode", "tokenizer/FAST decode", "server/overhead"]


def test_files(tmp_path):
    about = {"config": "x", "backend": "flax", "device": "CPU"}
    for name, step in {"a": 20.0, "b": 10.0}.items():
        figures = [
            Figure("inference/step", step, "ms", 1.2 * step, 5.0),
            Figure("train/throughput", step, "samples/s", better="higher"),
            Figure("feed/waiting for data", 0.0, "%"),
        ]
        bench_report.write(tmp_path / f"{name}.json", about | {"day": name}, figures)
    assert bench_report.read(tmp_path / "b.json")[1] == figures
    text = bench_report.compare(tmp_path / "a.json", tmp_path / "b.json")
    assert "day: a -> b" in text and "2x" in text and "0.5x" in text and "device" not in text
    bench_report.plot(tmp_path / "b.png", about, figures)
    assert (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json", "b.png"]
    (tmp_path / "other.json").write_text(json.dumps([1]))
    for bad in ("other.json", "none.json", "b.png"):
        with pytest.raises(UserError, match=bad):
            bench_report.read(tmp_path / bad)


def test_interrupted(config, monkeypatch, tmp_path, capsys):
    """Ctrl-C shows what there is and leaves no file."""

    def part(_):
        yield Figure("part/first", 1.0, "ms")
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "PARTS", {"part": part})
    monkeypatch.setattr(bench.parts, "rates", lambda _: RATES)
    monkeypatch.setattr(bench.flags, "config", lambda: config)
    values = {
        "COMPARE": None,
        "ONLY": ["part"],
        "FAST": False,
        "FLOAT8": False,
        "CAMERAS": None,
        "TOKENS": None,
        "REPEAT": 1,
        "STEPS": 1,
        "PLOT": None,
    }
    for name, value in {**values, "JSON": str(tmp_path / "a.json")}.items():
        monkeypatch.setattr(bench, name, SimpleNamespace(value=value))
    monkeypatch.setattr(bench.flags, "CONFIG", SimpleNamespace(value=1))
    assert bench.main() == 130
    assert "part/first" in (out := capsys.readouterr().out) and "no file written" in out
    assert not list(tmp_path.iterdir())
