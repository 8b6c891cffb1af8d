"""Norms in one pass: outputs and gradients of the plain ones, with what goes around them added."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from openpi_port.pi_torch.fast import norms
from openpi_port.pi_torch.layers import LayerNorm, RMSNorm

INTERPRETED = importlib.util.find_spec("triton") is not None and bool(os.environ.get("TRITON_INTERPRET"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [(LayerNorm, 40), (RMSNorm, 64)]


def inputs(kind: type, width: int) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A norm with weights of noise, what it reads, and gradients of the copy and of the output."""
    generator = torch.Generator().manual_seed(0)
    norm = kind(width)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x, around, through = (torch.randn(3, 5, width, generator=generator).to(DEVICE) for _ in range(3))
    return norm.to(DEVICE), x.requires_grad_(), around, through


@pytest.mark.parametrize(("kind", "width"), CASES)
def test_against_autograd(kind, width):
    norm, x, around, through = inputs(kind, width)
    plain = norm(x) if kind is LayerNorm else norm(x, None)[0]
    leaves = [x, *norm.parameters()]
    wanted = torch.autograd.grad((plain, x * 1), leaves, (through, around))
    same, out = norms.fork(x, norm.scale, getattr(norm, "bias", None))
    assert torch.equal(same, x)
    torch.testing.assert_close(out, plain)
    for found, gradient in zip(torch.autograd.grad((out, same), leaves, (through, around)), wanted, strict=True):
        torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "width"), CASES)
def test_of_a_sum(kind, width):
    norm, x, around, through = inputs(kind, width)
    more = (3 * x.detach()).requires_grad_()
    plain = norm(x + more) if kind is LayerNorm else norm(x + more, None)[0]
    leaves = [x, more, *norm.parameters()]
    wanted = torch.autograd.grad((plain, x + more), leaves, (through, around))
    whole, out = norms.fork(x, norm.scale, getattr(norm, "bias", None), more)
    assert torch.equal(whole, x + more)
    torch.testing.assert_close(out, plain)
    for found, gradient in zip(torch.autograd.grad((out, whole), leaves, (through, around)), wanted, strict=True):
        torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not (INTERPRETED or DEVICE == "cuda"), reason="needs Triton, and a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize(("kind", "width"), CASES)
def test_kernels(kind, width, monkeypatch):
    from openpi_port.pi_torch.fast import norms_kernel

    monkeypatch.setattr(norms_kernel, "PROGRAMS", 4)  # each with several rows, the last with fewer
    norm, x, around, through = (t.detach() if isinstance(t, torch.Tensor) else t for t in inputs(kind, width))
    scale, bias = norm.scale.detach(), norm.bias.detach() if kind is LayerNorm else None
    plain = norm(x) if kind is LayerNorm else norm(x, None)[0]
    torch.testing.assert_close(norms_kernel.norm(x, None, scale, bias)[1], plain.detach(), atol=1e-5, rtol=1e-5)
    whole, out = norms_kernel.norm(x - 3, torch.full_like(x, 3), scale, bias)
    torch.testing.assert_close((whole, out), (x, plain.detach()), atol=1e-5, rtol=1e-5)
    dx, sums = norms_kernel.gradients(through, x, scale, around, kind is LayerNorm)
    leaves = [x.requires_grad_(), *norm.parameters()]
    plain = norm(x) if kind is LayerNorm else norm(x, None)[0]
    wanted = torch.autograd.grad((plain, x * 1), leaves, (through, around))
    for found, gradient in zip((dx, *sums), wanted, strict=True):
        torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-5)
