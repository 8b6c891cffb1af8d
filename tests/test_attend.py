"""Attention with a backward pass of matrix products: outputs and gradients of the plain one."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from openpi_port.masks import UNSEEN, Blocks, dense
from openpi_port.pi_torch import attention
from openpi_port.pi_torch.fast import attend

INTERPRETED = importlib.util.find_spec("triton") is not None and bool(os.environ.get("TRITON_INTERPRET"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, S, N, H = 2, 9, 21, 3, 64
# On a GPU the kernels multiply in TF32: with operands cut to its 10 bits, everything here is at most 6.7e-4 off.
CLOSE = dict.fromkeys(("atol", "rtol"), 1e-3 if DEVICE == "cuda" else 1e-5)


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
    # Computed again in the backward pass, as layers are.
    found = checkpoint(attend.attention, q, k[:, :, 0], v[:, :, 0], mask, use_reentrant=False).view_as(q)
    torch.testing.assert_close(found, plain, **CLOSE)
    mine, wanted = (torch.autograd.grad(x, (q, k, v), gradient) for x in (found, plain))
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
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
    wanted = [x.to(DEVICE) for x in attend._attention(*(x if x is None else x.cpu() for x in (q, k, v, *mask)))]
    for mine, theirs in zip(attend_kernel.forward(q, k, v, *mask), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    arguments = gradient, q, k, v, *wanted, *mask
    for mine, theirs in zip(attend_kernel.weights(*arguments), attend._weights(*arguments), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
