"""Prepared models on a CPU: as exact in bfloat16 as the plain model, oneDNN's products, rows over two devices."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from frameworks import NAMES, Framework, golden_reference
from test_sharding import environment
from torch._inductor import cpp_builder, exc
from torch.nn import functional as F

from openpi_port import backends
from openpi_port.config import Compute
from openpi_port.errors import UserError
from openpi_port.pi_torch.fast import compiled, onednn, tiles


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_as_exact_as_the_plain_model(name, golden):
    reference, framework = golden_reference(golden / "openpi" / "pi0"), Framework(name)
    batch, weights = reference.batch, dict(reference.weights)
    exact = framework.load(reference.config, weights).sample_actions(batch, batch["noise"], 3)
    plain = framework.load(reference.config, weights, Compute(dtype="bfloat16"))
    distance = lambda model: float(np.sqrt(np.square(model.sample_actions(batch, batch["noise"], 3) - exact).mean()))  # noqa: E731
    error = distance(plain)
    assert 0 < distance(framework.backend.fast.optimize(plain)) < 1.25 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_products(dtype):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    x, w, bias, other = draw(5, 24), draw(40, 24) * 0.2, draw(40), draw(5, 40)
    if not onednn.takes(torch.nn.Linear(24, 40), dtype):
        pytest.skip("oneDNN has no part in products of this dtype here")
    laid_out = onednn.lay_out(w)
    product = F.linear(x.float(), w.float())
    biased = product + bias.float()
    ways = {
        lambda w: onednn.linear(x, w): product,
        lambda w: onednn.linear(x, w, bias): biased,
        lambda w: onednn.linear_gelu(x, w, bias): F.gelu(biased, approximate="tanh"),
        lambda w: onednn.linear_times(x, w, bias, other): biased * other.float(),
        lambda w: onednn.linear_plus(x, w, other): product + other.float(),
    }
    near = {} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.02}
    for way, want in ways.items():
        for weight in (w, laid_out):
            torch.testing.assert_close(way(weight).float(), want, **near)


def test_tiles_of_a_smaller_gpu():
    """On an RTX 4090 the prefix's attention has no room for an H100's tile (it raised); all others are the same."""
    large, small = ([tiles.attend(rows, 816, kib * 1024) for rows in (8, 408, 6528)] for kib in (227, 99))
    assert large[:2] == small[:2] and large[2] == tiles.PREFIX_ATTENTION and small[2].keys < large[2].keys
    assert not any(tile.described for tile in (*small, tiles.attend_all(1, 16, 256, 99 * 1024)))
    assert [tiles.attend_all(count, 16, 256, tiles.LARGE).rows for count in (1, 2, 3)] == [64, 64, 128]


def test_which_products_are_several():
    """Those whose sums are deepest, and only where one would leave an H100 half empty."""
    down, o, image_down = (2048, 16384), (2048, 2048), (1152, 4352)
    assert [tiles.parts(rows, *down) for rows in (288, 816, 968, 2 * 816)] == [4, 2, 2, 1]
    assert [tiles.parts(rows, *image_down) for rows in (256, 768)] == [4, 4]
    assert tiles.parts(816, *o) == 1 and tiles.parts(816, 2048, 16384 + 1) == 1


NO_KERNELS = [(None, (9, 0), "needs Triton"), (True, (7, 5), "T4 has none")]


@pytest.mark.parametrize(("triton", "capability", "words"), NO_KERNELS)
def test_where_there_are_no_kernels(monkeypatch, triton, capability, words):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: triton if name == "triton" else find(name, *of))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "T4")
    gemma = SimpleNamespace(embedding=SimpleNamespace(device=torch.device("cuda")))
    model = SimpleNamespace(module=SimpleNamespace(gemma=gemma, compute=Compute(dtype="bfloat16")))
    with pytest.raises(UserError, match=words):
        Framework("torch").backend.fast.optimize(model)


def test_a_torch_without_these_operators(monkeypatch):
    """They are not public: where one is gone, weights are not laid out, and plain torch computes."""
    monkeypatch.setattr(onednn, "_NEEDED", ("_linear_pointwise", "_gone"))
    assert not onednn.takes(torch.nn.Linear(24, 40), torch.float32)


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_what_is_compiled(name, golden, monkeypatch, tmp_path):
    """The functions that are compiled, traced but not compiled: other prompts, cameras and weights than traced with."""
    reference, framework = golden_reference(golden / "openpi" / name), Framework("torch")
    traced = {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "NARROW", 0)
    monkeypatch.setattr(compiled, "_compile", lambda exported, path: traced.update({path.stem: exported.module()}))
    monkeypatch.setattr(compiled, "_open", lambda path: lambda tensors: traced[path.stem](*tensors))
    one = {
        key: {c: a[:1] for c, a in value.items()} if isinstance(value, dict) else value[:1]
        for key, value in reference.batch.items()
    }
    others = {key: 0.9 * value for key, value in reference.weights.items()}
    for weights, present, prompt in (
        (reference.weights, (1, 1, 0), 20),
        (others, (0, 1, 0), 3),
        (others, (0, 0, 0), 1),
    ):
        mask = np.arange(one["tokenized_prompt"].shape[1]) < prompt
        cameras = dict(zip(reference.config.cameras, np.array(present, bool)[:, None], strict=True))
        batch = {**one, "image_mask": cameras, "tokenized_prompt_mask": mask[None]}
        plain = framework.load(reference.config, weights)
        want = plain.sample_actions(batch, batch["noise"], 2)
        fast = framework.backend.fast.optimize(plain)
        np.testing.assert_allclose(fast.sample_actions(batch, batch["noise"], 2), want, atol=1e-4, rtol=0)
        assert isinstance(fast._one, compiled.Compiled)
    assert len(list(tmp_path.rglob("*"))) == 3  # openpi_port/torch/one place
    b = reference.batch  # two samples, which no program takes
    got = framework.backend.fast.optimize(framework.load(reference.config, reference.weights))
    np.testing.assert_allclose(
        got.sample_actions(b, b["noise"]), reference.outputs["sample_actions_10"], atol=1e-4, rtol=0
    )


def test_a_program(tmp_path):
    """From the compiler, with a size that is open, and an argument that it writes."""
    linear, path = torch.nn.Linear(8, 8), tmp_path / "program.pt2"
    if not compiled.has_compiler():
        pytest.skip("no C++ compiler here")

    def function(w, x, kept):
        kept[1:].copy_(F.linear(x, w))
        return (kept, None)

    rows = torch.export.Dim("M", min=2, max=100)
    w, x, kept = linear.weight.detach(), torch.ones(5, 8), torch.zeros(6, 8)
    opened = {id(x): {0: rows}, id(kept): {0: rows + 1}}
    compiled._compile(compiled._export(function, (w, x, kept), opened), path)
    x, kept = torch.randn(7, 8), torch.zeros(8, 8)
    (got,) = compiled._open(path)([w, x, kept])
    torch.testing.assert_close(got[1:], F.linear(x, w))
    torch.testing.assert_close(kept, got)


def test_no_compiler(monkeypatch, capsys, golden):
    def raise_():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(compiled, "NARROW", 0)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", raise_)
    reference = golden_reference(golden / "openpi" / "pi0")
    model = Framework("torch").load(reference.config, reference.weights)
    assert not compiled.pays(model.module)
    assert "no C++ compiler" in capsys.readouterr().err


def test_rows_over_two_devices():
    """Flax in a process with a device per core: samples that differ, and a number of rows that is odd."""
    call = "import openpi_port.backends as b; b.share_cores(); import test_fast_cpu; test_fast_cpu.check_rows()"
    done = subprocess.run(
        [sys.executable, "-c", call],
        env=environment(JAX_NUM_CPU_DEVICES="2"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr


@pytest.mark.parametrize(
    ("before", "devices"),
    [({}, "2"), ({"JAX_NUM_CPU_DEVICES": "3"}, "3"), ({"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, None)],
)
def test_the_environment_decides(before, devices, monkeypatch):
    monkeypatch.setattr(backends.os, "environ", before)
    monkeypatch.setattr(backends.os, "cpu_count", lambda: 16)
    backends.share_cores()
    assert before.get("JAX_NUM_CPU_DEVICES") == devices


def check_rows() -> None:
    reference = golden_reference(ROOT / "tests" / "golden" / "openpi" / "pi0")
    framework, batch = Framework("flax"), reference.batch
    model = framework.backend.fast.optimize(framework.load(reference.config, reference.weights))
    got = model.sample_actions(batch, batch["noise"])
    np.testing.assert_allclose(got, reference.outputs["sample_actions_10"], atol=1e-4, rtol=0)
    assert model._how.mesh.size == 2
    model.stages(batch, batch["noise"])["prefix"]()
