"""Attention with a backward pass of matrix products: outputs and gradients of the plain one."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from openpi_port.pi_torch import attention
from openpi_port.pi_torch.fast import attend

INTERPRETED = importlib.util.find_spec("triton") is not None and bool(os.environ.get("TRITON_INTERPRET"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, S, N, H = 2, 9, 21, 3, 64


def inputs() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Queries, keys and values; which keys are valid, not equally many; and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = (B, T, N, H), (B, S, 1, H), (B, S, 1, H), (B, T, N, H)
    *qkv, gradient = (0.3 * torch.randn(shape, generator=generator) for shape in shapes)
    valid = torch.tensor([[True] * 15 + [False] * 6, [False] * 4 + [True] * 17])
    return [x.to(DEVICE).requires_grad_() for x in qkv], valid.to(DEVICE), gradient.to(DEVICE)


def test_against_plain():
    (q, k, v), valid, gradient = inputs()
    plain = attention._plain(q, k, v, valid[:, None]).view_as(q)
    mask = attention._packed(valid)
    found = attend.attention(q, k[:, :, 0], v[:, :, 0], valid, mask.order, mask.keys).view_as(q)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    mine, wanted = (torch.autograd.grad(x, (q, k, v), gradient) for x in (found, plain))
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not mine[1][~valid].any() and not mine[2][~valid].any()


@pytest.mark.skipif(not (INTERPRETED or DEVICE == "cuda"), reason="needs Triton, and a GPU or TRITON_INTERPRET=1")
def test_kernel(monkeypatch):
    from openpi_port.pi_torch.fast import attend_kernel

    if DEVICE == "cpu":  # several tiles of rows and keys; a GPU takes them as they are
        monkeypatch.setattr(attend_kernel, "ROWS", 16)
        monkeypatch.setattr(attend_kernel, "KEYS", 16)
    qkv, valid, gradient = inputs()
    q, k, v = (x.detach() for x in qkv)
    mask = attention._packed(valid)
    out, sums = (
        x.to(DEVICE)
        for x in attend._attention(*(x.cpu() for x in (q, k[:, :, 0], v[:, :, 0], valid, *mask[:1], mask.keys)))
    )
    arguments = gradient, q, k[:, :, 0].contiguous(), v[:, :, 0].contiguous(), out, sums, valid
    for found, wanted in zip(attend_kernel.weights(*arguments), attend._weights(*arguments), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-3 if DEVICE == "cuda" else 1e-5, rtol=1e-2)
