"""The one pass of AdamW in torch: its plain form is torch's own AdamW, and the kernel is the plain form."""

from __future__ import annotations

import dataclasses
import importlib.util
import os

import pytest
import torch

from openpi_port.config import Optimizer
from openpi_port.pi_torch.fast import adamw

CONFIG = Optimizer(weight_decay=0.1, ema=0.9)


def slots(device: str = "cpu") -> list[adamw.Slot]:
    """A large parameter with a rounded copy, a small one without."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in ((70, 33), (5,)):
        weight, mu, nu = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
        copy = weight.bfloat16() if len(shape) == 2 else None
        made.append(adamw.slot(weight, 0.1 * mu, nu.square() * 0.01, weight.clone(), copy, by_rows=False))
    return made


def gradients(found: list[adamw.Slot]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(s.weight.shape, generator=generator).to(s.weight.device) for s in found]
    return [g if s.copy is None else g.bfloat16() for g, s in zip(grads, found, strict=True)]


def test_against_torch():
    mine, count, rate = slots(), 7, 1e-2
    theirs = [torch.nn.Parameter(s.weight.clone()) for s in mine]
    options = {"betas": (CONFIG.b1, CONFIG.b2), "eps": CONFIG.eps, "weight_decay": CONFIG.weight_decay}
    optimizer = torch.optim.AdamW(theirs, lr=rate, **options)
    scale, averages = torch.tensor(0.5), [s.average.clone() for s in mine]
    for parameter, slot, grad in zip(theirs, mine, gradients(mine), strict=True):
        parameter.grad = grad.float() * scale
        step = torch.tensor(float(count - 1))
        optimizer.state[parameter] = {"step": step, "exp_avg": slot.mu.clone(), "exp_avg_sq": slot.nu.clone()}
    optimizer.step()
    adamw.step(mine, gradients(mine), scale, count, rate, CONFIG)
    for slot, parameter, before in zip(mine, theirs, averages, strict=True):
        torch.testing.assert_close(slot.weight, parameter.detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(slot.average, before.lerp(slot.weight, 1 - CONFIG.ema))
        assert slot.copy is None or torch.equal(slot.copy, slot.weight.bfloat16())


def some_rows(device: str = "cpu") -> tuple[adamw.Rows, torch.Tensor]:
    """Of the large parameter, one of them four times; and what these add up to."""
    indices = torch.tensor([3, 69, 3, 0, 17, 3, 3], device=device)
    values = torch.randn(7, 33, generator=torch.Generator().manual_seed(2)).to(device)
    return adamw.rows(indices, values, 70), torch.zeros(70, 33, device=device).index_add_(0, indices, values)


def test_a_gradient_of_few_rows():
    found, dense = some_rows()
    torch.testing.assert_close(found.dense(), dense)
    torch.testing.assert_close(found.values.norm(), dense.norm())
    a, b = (slots()[0] for _ in range(2))
    for slot, grad in ((a, found), (b, dense)):
        adamw.step([slot], [grad], torch.tensor(0.5), 3, 1e-2, CONFIG)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


def test_devices_that_add_up_in_any_order_agree_to_the_bit(monkeypatch):
    """As a GPU's atomic additions do; weights that each device steps by itself would drift apart."""
    plain, orders = torch.Tensor.index_add_, iter(range(100))

    def in_any_order(self: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(next(orders)))
        return plain(self, dim, index[order], source[order])

    monkeypatch.setattr(torch.Tensor, "index_add_", in_any_order)
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 5, (2, 40), generator=generator)
    values = torch.randn(2, 40, 33, generator=generator)
    own = [adamw.once(*of_one) for of_one in zip(indices, values, strict=True)]
    gathered = [torch.cat(parts) for parts in zip(*own, strict=True)]  # what every device is told
    one, *others = (adamw.rows(*gathered, 70, 2).dense() for _ in range(4))
    torch.testing.assert_close(one, plain(torch.zeros(70, 33), 0, indices.flatten(), values.flatten(0, 1)))
    assert all(torch.equal(other, one) for other in others)


def embedding(device: str = "cpu") -> adamw.Slot:
    """A parameter of which rows 17, 30 and 40 have had gradients: one has moments, one an average of its own."""
    weight, *_ = slots(device)[0]
    found = adamw.slot(weight, *(torch.zeros_like(weight) for _ in range(2)), weight.clone(), None, by_rows=True)
    found.mu[17, 4] = found.nu[30, 32] = 0.1
    found.average[40, 0] += 0.5
    found.find_idle()
    return found


def test_rows_without_a_gradient_are_left_alone_where_decay_is_rounded_away():
    slot, (grad, _) = embedding(), some_rows()
    assert {*torch.nonzero(~slot.idle).flatten().tolist()} == {17, 30, 40}
    before = slot.weight.clone()
    for decay, idle in ((1e-10, 70 - 6), (0.1, 0)):
        config = dataclasses.replace(CONFIG, weight_decay=decay)
        still = slot.idle.clone().logical_and_(grad.where < 0)
        adamw.step([slot], [grad], torch.tensor(0.5), 3, 2.5e-5, config)  # the plain way, which knows no idle rows
        assert slot.idle.sum() == idle
        assert torch.equal(slot.weight[still], before[still]) == (idle > 0)
        assert torch.equal(slot.average[still], slot.weight[still]) == (idle > 0)
        assert not slot.mu[still].any() and not slot.nu[still].any()


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
def test_kernel():
    from openpi_port.pi_torch.fast import adamw_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain, fused = ([*slots(device), adamw.slot(*slots(device)[0][:5], by_rows=True)] for _ in range(2))
    for slot, other, grad in zip(plain, fused, [*gradients(plain[:2]), some_rows(device)[0]], strict=True):
        arguments = (grad, torch.tensor(0.5, device=device), 0.4, 0.3, 1e-2, CONFIG)
        adamw._plain(slot, *arguments)
        adamw_kernel.step(other, *arguments)
        for name, a, b in zip(slot._fields, slot, other, strict=True):
            if a is not None:
                torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-2 if name == "copy" else 1e-5)
    plain, fused = embedding(device), embedding(device)
    grad = some_rows(device)[0]
    fused.idle.logical_and_(grad.where < 0)
    arguments = (grad, torch.tensor(0.5, device=device), 0.4, 0.3, 2.5e-5, dataclasses.replace(CONFIG, weight_decay=0))
    adamw._plain(plain, *arguments)
    adamw_kernel.step(fused, *arguments)
    for a, b in zip(plain[:4], fused[:4], strict=True):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-5)
    fused.nu[5] = 7  # which would be changed if it were read
    adamw_kernel.step(fused, *arguments)
    assert fused.idle[5] and (fused.nu[5] == 7).all()
