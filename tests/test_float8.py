"""Models prepared with MLPs in float8: in range whatever comes, near the plain model, and refused where they can't be.

A CPU computes the same rounded numbers in float32; the kernels are compared in test_fast_kernels.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from frameworks import Framework, golden_reference
from small_policy import MODEL

from openpi_port import UserError, init
from openpi_port.pi_torch.fast import decode, float8, ops
from openpi_port.pi_torch.fast.ops import Sum
from openpi_port.pi_torch.fast.pack import Block, Norm

M, D, F = 6, 64, 256


def test_an_mlp():
    """Against float32: as far as 3 bits of mantissa are, also where some rows and columns are much larger."""
    generator = torch.Generator().manual_seed(0)
    x, scale = torch.randn(M, D, generator=generator), 1 + 0.5 * torch.randn(D, generator=generator)
    gate_up, down = (torch.randn(n, k, generator=generator) * k**-0.5 for n, k in ((2 * F, D), (D, F)))
    x[2, 5], x[3], gate_up[7], down[:, 9] = 3e4, 1e-3 * x[3], 50 * gate_up[7], 50 * down[:, 9]
    want = x + ops.geglu(ops.rms_norm(Sum(x), scale)[1] @ gate_up.T) @ down.T
    nothing = x[:0]
    packed = float8.pack(Block(nothing, nothing, gate_up, down), Norm(scale, None, None))
    got = float8.add_mlp(Sum(x.clone()), packed)
    errors = ((got - want).norm(dim=1) / (want - x).norm(dim=1)).tolist()
    assert min(errors) > 0.005 and max(errors) < 0.1
    assert packed.gate_up.dtype == packed.down.dtype == torch.float8_e4m3fn
    largest = float8.rms_norm(Sum(torch.eye(M, D)), packed.room)[1].float().amax()
    assert float8.LARGEST / 2 < largest <= float8.LARGEST


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_a_chunk(golden, name):
    reference = golden_reference(golden / "openpi" / name)
    framework = Framework("torch")
    plain = framework.load(reference.config, reference.weights)
    fast, batch = framework.backend.fast.optimize(plain, float8=True), reference.batch
    error = np.linalg.norm(fast.sample_actions(batch, batch["noise"]) - reference.outputs["sample_actions_10"])
    assert 1e-3 < error / np.linalg.norm(reference.outputs["sample_actions_10"]) < 0.1


def test_scores_of_tokens(golden, monkeypatch):
    """Of tokens that are written after images and prompt, all fed the same."""
    reference = golden_reference(golden / "openpi" / "pi0_fast")
    framework, seen = Framework("torch"), []
    plain = framework.load(reference.config, reference.weights)
    tokens = torch.from_numpy(plain.decode(reference.batch, 4)).long()

    def choose(scores, *_):
        seen.append(scores)
        return tokens[:, (len(seen) - 1) % 4]

    monkeypatch.setattr(decode, "choose", choose)
    for eight in (False, True):
        framework.backend.fast.optimize(plain, float8=eight).decode(reference.batch, 4)
    want, got = torch.stack(seen[:4]), torch.stack(seen[4:])
    errors = ((got - want).norm(dim=(1, 2)) / want.norm(dim=(1, 2))).tolist()
    assert len(errors) == 4 and min(errors) > 1e-3 and max(errors) < 0.5


def test_where_it_is_not(monkeypatch):
    framework = Framework("flax")
    with pytest.raises(UserError, match="only torch"):
        framework.backend.fast.optimize(framework.load(MODEL, init.Fresh(MODEL, 0)), float8=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    embedding = SimpleNamespace(device=torch.device("cuda"))
    model = SimpleNamespace(module=SimpleNamespace(gemma=SimpleNamespace(embedding=embedding)))
    with pytest.raises(UserError, match="A100 has no such products"):
        Framework("torch").backend.fast.optimize(model, float8=True)
