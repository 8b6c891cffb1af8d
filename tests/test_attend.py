"""Attention of training, to keys that heads share and to their own: outputs and gradients of the plain one."""

from __future__ import annotations

import dataclasses
import importlib.util
import os

import pytest
import torch

from openpi_port.config import SIGLIP, Compute
from openpi_port.masks import UNSEEN, Blocks, dense
from openpi_port.pi_torch import attention, siglip
from openpi_port.pi_torch.fast import attend, attend_own

INTERPRETED = importlib.util.find_spec("triton") is not None and bool(os.environ.get("TRITON_INTERPRET"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, S, N, H = 2, 9, 21, 3, 64


def inputs(blocks: bool) -> tuple[list[torch.Tensor], Blocks, torch.Tensor]:
    """Queries, keys and values; who sees which keys, not equally many in both samples; and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = (B, T, N, H), (B, S, 1, H), (B, S, 1, H), (B, T, N, H)
    *qkv, gradient = (0.3 * torch.randn(shape, generator=generator) for shape in shapes)
    keys = torch.tensor(
        [[0] * 15 + [UNSEEN] * 2 + [1, 2, 2, 2], [UNSEEN] * 4 + [0] * 13 + [1, 2, 2, 2]], dtype=torch.int32
    )
    queries = torch.tensor([[1] + [2] * (T - 1)] * B, dtype=torch.int32).to(DEVICE) if blocks else None
    return [x.to(DEVICE).requires_grad_() for x in qkv], Blocks(queries, keys.to(DEVICE)), gradient.to(DEVICE)


@pytest.mark.parametrize("blocks", [False, True])
def test_against_plain(blocks):
    (q, k, v), mask, gradient = inputs(blocks)
    plain = attention._plain(q, k, v, dense(mask)).view_as(q)
    found = attend.attention(q, k[:, :, 0], v[:, :, 0], mask).view_as(q)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    mine, wanted = (torch.autograd.grad(x, (q, k, v), gradient) for x in (found, plain))
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    unseen = mask.keys == UNSEEN
    assert not mine[1][unseen].any() and not mine[2][unseen].any()


@pytest.mark.skipif(not (INTERPRETED or DEVICE == "cuda"), reason="needs Triton, and a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize("blocks", [False, True])
def test_kernels(blocks, monkeypatch):
    from openpi_port.pi_torch.fast import attend_kernel

    if DEVICE == "cpu":  # several tiles of rows and keys; a GPU takes them as they are
        monkeypatch.setattr(attend_kernel, "FORWARD", (16, 16, 4, 2))
        monkeypatch.setattr(attend_kernel, "FEW", (16, 16, 32, 4, 2))
    qkv, mask, gradient = inputs(blocks)
    q, k, v = (x.detach() for x in (qkv[0], *(x[:, :, 0] for x in qkv[1:])))
    close = {"atol": 2e-3 if DEVICE == "cuda" else 1e-5, "rtol": 1e-2}
    wanted = [x.to(DEVICE) for x in attend._attention(*(x if x is None else x.cpu() for x in (q, k, v, *mask)))]
    for mine, theirs in zip(attend_kernel.forward(q, k, v, *mask), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, **close)
    arguments = gradient, q, k, v, *wanted, *mask
    for mine, theirs in zip(attend_kernel.weights(*arguments), attend._weights(*arguments), strict=True):
        torch.testing.assert_close(mine, theirs, **close)


def own(heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries, keys and values of 64 tokens, and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, 64, 3, heads, dim, generator=generator)
    return qkv.to(DEVICE).requires_grad_(), torch.randn(B, 64, heads * dim, generator=generator).to(DEVICE)


@pytest.mark.parametrize("dim", [64, 72])
def test_own_keys_against_plain(dim):
    qkv, gradient = own(2, dim)
    q, k, v = qkv.unbind(2)
    plain = attention._plain(q * dim**-0.5, k, v, None)
    found = attend_own.attention(qkv)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    mine, wanted = (torch.autograd.grad(x, qkv, gradient)[0] for x in (found, plain))
    torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not (INTERPRETED or DEVICE == "cuda"), reason="needs Triton, and a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize("dim", [64, 72])
def test_kernels_of_own_keys(dim, monkeypatch):
    from openpi_port.pi_torch.fast import attend_own_kernel

    for name in ("FORWARD", "QUERIES", "KEYS"):  # several programs a head, several turns of their loops
        monkeypatch.setattr(attend_own_kernel, name, (32, 4, 1))
    monkeypatch.setattr(attend_own_kernel, "PART", 16)
    close = {"atol": 1e-2 if DEVICE == "cuda" else 1e-5, "rtol": 1e-2}
    qkv, gradient = (x.detach() for x in own(2, dim))
    gradient = gradient.view(B, 64, 2, dim)
    wanted = [x.to(DEVICE) for x in attend_own._attention(qkv.cpu())]
    for mine, theirs in zip(attend_own_kernel.forward(qkv), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, **close)
    theirs = attend_own._attention_gradients(*(x.cpu() for x in (gradient, qkv, *wanted)))
    torch.testing.assert_close(attend_own_kernel.gradients(gradient, qkv, *wanted), theirs.to(DEVICE), **close)


def test_vision_in_training_takes_one_product_for_queries_keys_and_values(monkeypatch):
    """A layer of vision, in bfloat16 as on a GPU, is the plain one."""
    generator = torch.Generator().manual_seed(0)
    config = dataclasses.replace(SIGLIP["debug"], width=64, num_heads=2, mlp_dim=32)
    block = siglip.Block(config, Compute(attention="sdpa")).bfloat16()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    x = torch.randn(2, 64, 64, generator=generator).bfloat16().requires_grad_()
    leaves, found = [x, *(p for n, p in block.named_parameters() if n != "attn.k.bias")], []  # whose gradient is noise
    for fits in (False, True):
        monkeypatch.setattr(attend, "fits", lambda device, fits=fits: fits)
        out = block(x)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).norm() < 0.02 * theirs.norm()
