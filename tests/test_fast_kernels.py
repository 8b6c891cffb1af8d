"""The Triton kernels against their plain form: on a GPU in bfloat16, elsewhere in Triton's interpreter in float32.

The interpreter needs Triton and numpy 2.2 or older: `TRITON_INTERPRET=1 python -m pytest tests/test_fast_kernels.py`.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
import numpy as np
import tiny_fast
import torch
import triton.language as tl
from frameworks import Framework, batch_of, opened

from convert import tables
from openpi_port import batch as batches
from openpi_port import init
from openpi_port.config import Compute
from openpi_port.pi_torch import device as devices
from openpi_port.pi_torch import infer, pi0_fast
from openpi_port.pi_torch.fast import decode, float8, kernels, onednn, ops, pack, prepare, tiles
from openpi_port.pi_torch.fast.kernels import ends
from openpi_port.pi_torch.fast.kernels import float8 as kernels_float8

GPU = torch.cuda.is_available()
if not GPU and not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("no GPU, and TRITON_INTERPRET is not set", allow_module_level=True)
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
ERROR = 1e-2 if GPU else 1e-6
B, T, S, D, N, H, F, J = 2, 11, 70, 128, 4, 32, 256, 14
M, AT = B * T, S - T


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel doesn't write is not a number, and no counter is zero by chance."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 7)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: fill(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: fill(empty_like(*args, **kwargs)))


@pytest.fixture
def make():
    """Random arrays: `make.x` in the working dtype, `make.f` in float32."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def f(*shape):
        return torch.randn(*shape, device=DEVICE, generator=generator)

    return SimpleNamespace(f=f, x=lambda *shape: f(*shape).to(DTYPE), w=lambda n, k: (f(n, k) * k**-0.5).to(DTYPE))


def exact(*tensors):
    """In float32 on the CPU, where `ops` takes the plain form."""
    return [t.float().cpu() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]


def close(got, want):
    got, want = got.float().cpu(), want.float().cpu()
    assert (got - want).norm() <= ERROR * want.norm()


def stream_of(make, scale):
    x = make.x(M, D)
    return kernels.start(x, scale), ops.start(*exact(x, scale))


def caches(make):
    return [torch.zeros(B, S, H, device=DEVICE, dtype=DTYPE) for _ in range(2)], [
        torch.zeros(B, S, H) for _ in range(2)
    ]


@pytest.fixture
def parts_of(monkeypatch):
    """Makes `ops.add_linear` compute so many products over parts, on a CPU too."""
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    return lambda count: monkeypatch.setattr(tiles, "parts", lambda *_: count)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_products_in_parts(make, parts_of, count):
    """What a product in parts leaves, the norm that follows adds up."""
    x, a, w = make.x(M, D), make.x(M, F), make.w(D, F)
    offset, scale, bias, room = make.f(D), make.f(D), make.f(D), 32.0
    for of in ("layer_norm", "rms_norm", "float8"):
        parts_of(count)
        total = ops.add_linear(x.clone(), a, w)
        assert (total.parts is None) == (count == 1)
        given = {"layer_norm": (offset, scale, bias), "rms_norm": (scale,), "float8": (room,)}[of]
        norm = getattr(ops, of) if of != "float8" else float8.rms_norm
        got, normed = norm(total, *given)
        with pytest.MonkeyPatch.context() as plain:
            plain.setattr(ops, "on_gpu", lambda x: False)
            want, wanted = norm(ops.add_linear(*exact(x, a, w)), *exact(*given))
        close(got, want)
        if of == "float8":
            assert (normed.float().cpu() - wanted.float()).norm() <= (2e-2 if GPU else 0.1) * wanted.float().norm()
        else:
            close(normed, wanted)


def test_rows(make):
    x = make.x(M, D)
    close(kernels.geglu(x), ops.geglu(*exact(x)))


def test_float8_rows(make):
    """As in plain torch, but for what a last bit of float32 takes to the other side (the interpreter halves some)."""
    x, factors = make.x(M, D), make.f(M).abs()
    nearly = []
    y, rows = kernels_float8.geglu(x)
    nearly += list(zip((y, rows), float8.geglu(*exact(x)), strict=True))
    for got, want in nearly:
        got, want = got.float().cpu(), want.float()
        assert (got - want).norm() <= (1e-2 if GPU else 0.1) * want.norm()
    got, want = x.clone(), exact(x)[0].clone()
    kernels_float8.add_(got, x, factors)
    float8.add_(want, *exact(x, factors))
    close(got, want)


@pytest.mark.parametrize("heads", [N, 0], ids=["all", "keys and values"])
def test_split_qkv(make, heads):
    qkv, turns = make.x(M, (heads + 2) * H), pack.turns(M, H, torch.device(DEVICE))
    ours, plain = caches(make)
    q = kernels.split_qkv(qkv, turns, *ours)
    want = ops.split_qkv(*exact(qkv, turns), *plain)
    for got, wanted in zip((q, *ours), (want, *plain), strict=True):
        close(got, wanted)


@pytest.mark.parametrize("biased", [False, True])
def test_streaming(make, biased):
    """One layer of the expert, each kernel on what the one before left."""
    scale, bias = make.f(D).abs() + 0.5, make.f((N + 2) * H) if biased else None
    stream, plain = stream_of(make, scale)
    turns, at = pack.turns(M, H, torch.device(DEVICE)), torch.tensor([AT, 5], dtype=torch.int32, device=DEVICE)
    w, ours, theirs = make.w((N + 2) * H, D), *caches(make)
    q = kernels.normed_qkv(stream, w, bias, turns, *ours, at)
    seen = ops.see(at.cpu(), torch.zeros(T), T, S, N, torch.zeros(1))
    want = ops.normed_qkv(plain, *exact(w, bias, turns), *theirs, seen)
    for got, wanted in zip((q, *ours), (want, *theirs), strict=True):
        close(got, wanted)

    w, bias = make.w(2 * F, D), make.f(2 * F) if biased else None
    a, want = kernels.normed_geglu(stream, w, bias), ops.normed_geglu(plain, *exact(w, bias))
    close(a, want)

    w, gate = make.w(D, F), make.f(D) if biased else None
    for _ in range(2):  # the counters are left as they were found
        after = kernels.add_projected(stream, a, w, gate, scale)
    wanted = ops.add_projected(plain, *exact(a, w, gate, scale))
    close(after.x, wanted.x)
    norm = torch.rsqrt(after.squares.sum(1, keepdim=True) / D + ops.EPS)
    close(after.scaled * norm, wanted.scaled)


def test_streaming_float8(make):
    """Weights that are float8 are those numbers."""
    scale, factor = make.f(D).abs() + 0.5, torch.full((), 0.25, device=DEVICE)
    stream, plain = stream_of(make, scale)
    gate_up, down = make.w(2 * F, D).to(float8.FLOAT8), make.w(D, F).to(float8.FLOAT8)
    a = kernels.normed_geglu(stream, gate_up, None, factor)
    close(a, ops.normed_geglu(plain, gate_up.float().cpu() / 4, None))
    after = kernels.add_projected(stream, a, down, None, scale, factor)
    close(after.x, ops.add_projected(plain, *exact(a), down.float().cpu() / 4, None, *exact(scale)).x)


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize("limited", [False, True])
def test_attend(make, monkeypatch, splits, limited, described):
    """Few keys in one sample, so that some programs have none, and one token that sees fewer."""
    monkeypatch.setattr(tiles, "attend", lambda *_: tiles.Attend(16, 16, splits, 4, 2, described))
    q, k, v = make.x(M, N * H) * H**-0.5, make.x(B, S, H), make.x(B, S, H)
    past = torch.tensor([3, AT], dtype=torch.int32, device=DEVICE)
    extra, most = torch.tensor([1] + [T] * (T - 1), dtype=torch.int32, device=DEVICE) if limited else None, T * limited
    got = kernels.attend(q, k, v, ops.Seen(past, extra, most, None))
    seen = ops.see(past.cpu(), None if extra is None else extra.cpu(), most, S, N, torch.zeros(1))
    close(got, ops.attend(*exact(q, k, v), seen))


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("rows", [16, 32])
def test_attend_all(make, monkeypatch, rows, described):
    """Heads of a width that is no power of two, and a number of rows that is none."""
    monkeypatch.setattr(tiles, "attend_all", lambda *_: tiles.Attend(rows, 16, 1, 4, 2, described))
    qkv = make.x(2 * 35, 3 * 2 * 24)
    close(kernels.attend_all(qkv, 2, 2), ops.attend_all(*exact(qkv), 2, 2))


@pytest.mark.parametrize("swish", [False, True])
def test_both_ends(make, monkeypatch, swish):
    if not GPU:
        monkeypatch.setattr(ends, "_exact_dot", lambda a, b, acc: tl.dot(a, b, acc))
    x_t, first, bias, scale, tokens = make.f(B, T - 1, J), make.f(D, J), make.f(D), make.f(D), T
    got = kernels.lift(x_t, first, bias, tokens, swish=swish, dtype=DTYPE)
    want = ops.lift(*exact(x_t, first, bias), tokens, swish=swish, dtype=torch.float32)
    close(got.x, want.x)
    assert not got.arrived.any()
    stream, plain = stream_of(make, scale)
    w, bias = make.w(J, D), make.f(J)
    moved = kernels.leave(stream, w, bias, x_t, -0.1)
    close(moved - x_t, ops.leave(plain, *exact(w, bias, x_t), -0.1) - x_t.cpu())


@pytest.mark.skipif(GPU, reason="in bfloat16 see docs/performance.md")
@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_a_whole_chunk(golden, monkeypatch, parts_of, name):
    """Every kernel in its place, in the interpreter: vision, prefix and an Euler step of two samples."""
    weights, config = opened(golden / "openpi" / name)
    plain = Framework("torch").load(config, dict(weights))
    batch = batch_of(golden / "openpi" / name)
    want = plain.sample_actions(batch, batch["noise"], 1)
    monkeypatch.setattr(ends, "_exact_dot", lambda a, b, acc: tl.dot(a, b, acc))
    monkeypatch.setattr(onednn, "takes", lambda *of: False)
    parts_of(2)
    monkeypatch.delattr(torch, "_addmm_activation")  # a CPU's has another gelu
    got = Framework("torch").backend.fast.optimize(plain).sample_actions(batch, batch["noise"], 1)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


@pytest.fixture
def on_a_gpu(golden):
    """A golden model as loaded on a GPU in a dtype, and its batch."""
    if not GPU:
        pytest.skip("CUDA graphs need a GPU")

    def load(name, dtype):
        weights, config = opened(golden / "openpi" / name)
        weights = tables.translate(dict(weights), config, "flax", "torch")
        return infer.load(config, weights, Compute(dtype=dtype))

    return load


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_recorded_chunks(golden, on_a_gpu, name):
    """In float32 the plain model's; in bfloat16 as near to it as the plain one; the same bits every time."""
    exact, rounded = (on_a_gpu(name, dtype) for dtype in ("float32", "bfloat16"))
    two = batch_of(golden / "openpi" / name)  # of which one lacks a camera
    one = {k: {c: a[:1] for c, a in v.items()} if isinstance(v, dict) else v[:1] for k, v in two.items()}
    absent = {**one, "image_mask": {c: np.array([i > 0]) for i, c in enumerate(one["image_mask"])}}
    calls = [(batch, batch["noise"], steps) for batch in (two, one, absent) for steps in (1, 10)]
    want, plain = ([model.sample_actions(*call) for call in calls] for model in (exact, rounded))
    for model, bound in ((exact, 0.0), (rounded, 1.5)):
        fast = prepare.optimize(model)
        for call, w, p in zip(calls, want, plain, strict=True):
            got = fast.sample_actions(*call)
            assert np.linalg.norm(got - w) <= bound * np.linalg.norm(p - w) + 1e-5 * np.linalg.norm(w)
        for call, got in zip(calls, [fast.sample_actions(*call) for call in calls], strict=True):
            np.testing.assert_array_equal(fast.sample_actions(*call), got)
        assert len(fast.recordings) == len(calls)


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_recorded_chunks_in_float8(golden, on_a_gpu, name):
    """The kernels compute what plain torch computes with the same rounded weights."""
    if GPU and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    batch = batch_of(golden / "openpi" / name)
    plain = [on_a_gpu(name, dtype) for dtype in ("float32", "bfloat16")]
    exact, emulated, got = (
        model.sample_actions(batch, batch["noise"])
        for model in (plain[0], *(prepare.optimize(p, float8=True) for p in plain))
    )
    error = np.linalg.norm(emulated - exact)
    assert 1e-3 * np.linalg.norm(exact) < error and np.linalg.norm(got - exact) <= 1.5 * error


def test_recorded_tokens(golden, on_a_gpu):
    """In float32 the plain model's, with and without a grammar."""
    plain, batch = on_a_gpu("pi0_fast", "float32"), batch_of(golden / "openpi" / "pi0_fast")
    fast = prepare.optimize(plain)
    for _ in range(2):
        np.testing.assert_array_equal(fast.decode(batch, 12), plain.decode(batch, 12))
    weights = tables.translate(init.Fresh(tiny_fast.TINY, 3), tiny_fast.TINY, "flax", "torch")
    plain, batch = infer.load(tiny_fast.TINY, weights, Compute()), tiny_fast.batch_of_prompts(3)
    fast, grammar = prepare.optimize(plain), tiny_fast.grammar()
    for temperature, seed in ((0.0, 5), (1.0, 5), (1.0, 6)):
        got, want = (m.decode(batch, 40, temperature, seed, grammar) for m in (fast, plain))
        np.testing.assert_array_equal(got, want)


def test_scores_of_tokens(golden, on_a_gpu, monkeypatch):
    """In bfloat16 as near to float32 as the plain model's, when all are fed the same tokens."""
    batch = batch_of(golden / "openpi" / "pi0_fast")
    exact, rounded = (on_a_gpu("pi0_fast", dtype) for dtype in ("float32", "bfloat16"))
    tokens = torch.from_numpy(exact.decode(batch, 6)).long().cuda()
    prepared = [prepare.optimize(rounded), prepare.optimize(exact, float8=True), prepare.optimize(rounded, float8=True)]
    want, plain, fast, emulated, eight = (
        forced_scores(monkeypatch, model, batch, tokens) for model in (exact, rounded, *prepared)
    )
    assert (fast - want).norm() <= 1.5 * (plain - want).norm()
    assert (eight - want).norm() <= 1.5 * (emulated - want).norm() + 1.5 * (plain - want).norm()


def forced_scores(monkeypatch, model, batch, tokens):
    """Scores [G, B, V] of the next token after each of `tokens` [B, G], without a graph."""
    seen = []

    def choose(scores, *_):
        seen.append(scores.float())
        return tokens[:, len(seen) - 1]

    monkeypatch.setattr(pi0_fast, "choose", choose)
    monkeypatch.setattr(decode, "choose", choose)
    batch, steps = batches.select(batch, batches.prompt(batch)), tokens.shape[1]
    with torch.inference_mode():
        if isinstance(model, infer.FastModel):
            model.module.decode(devices.put(batch, tokens.device), steps)
        else:
            trimmed = batches.trim(batch, model.config)
            arrays = [*prepare._observe(trimmed, model.config), np.zeros(tokens.shape, np.float32)]
            inputs = devices.put(arrays, tokens.device)
            shape = (len(tokens), len(arrays[2]) // len(tokens), steps)
            decoder = decode.Decoder(model.module, model._language, *shape, 0.0, None)
            decoder.begin(*inputs)
            for _ in range(steps - 1):
                decoder.advance()
    return torch.stack(seen)
