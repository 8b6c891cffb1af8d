"""What a run takes of a device's memory, known before it starts."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from configs import pi0_aloha
from experiments import flags
from experiments import plan as plans
from openpi_port import memory
from openpi_port.backends import Backend
from openpi_port.config import Compute, Train
from openpi_port.fields import build

GIB = memory.GIB


def base(backend: str, remat: str, microbatches: int = 1, gradients: str = "float32", **changes) -> Train:
    config = build(Train, pi0_aloha.get_config("base"))
    data = dataclasses.replace(config.data, cameras=dict.fromkeys(config.model.cameras, "top"))
    changes = {"data": data, **changes}
    compute = Compute(dtype="bfloat16", remat=remat, gradients=gradients)
    return dataclasses.replace(config, backend=backend, compute=compute, microbatches=microbatches, **changes)


def mini(backend: str) -> Train:
    config = build(Train, pi0_aloha.get_config("mini"))
    return dataclasses.replace(config, backend=backend, batch_size=256, compute=Compute(dtype="bfloat16"))


def test_state():
    """3,238 M parameters: float32 weights, moments and average; a bfloat16 copy of what layers use."""
    plan = memory.plan(base("torch", "full"))
    assert plan.num_params == plan.num_trained == 3_238_048_528
    assert plan.weights == plan.average == plan.optimizer // 2 == 4 * plan.num_params
    layers = plan.num_params - 257152 * 2048  # and a few small ones
    assert plan.rounded == pytest.approx(2 * layers, rel=2e-3)
    for backend in ("flax", "torch"):
        parts = memory.plan(base(backend, "full", 2, "bfloat16"))
        assert parts.gradients == pytest.approx(2 * layers, rel=5e-3)  # the embedding has some in the rows in use alone
        assert memory.plan(base(backend, "dots")).gradients == 0  # of one part they take the place of activations
    assert memory.plan(base("flax", "full"), (1, 2)).optimizer == plan.optimizer // 2


@pytest.mark.parametrize(
    ("config", "measured"),
    [
        (base("torch", "none"), 112.5),
        (base("torch", "dots"), 106.3),
        (base("torch", "full"), 64.6),
        (base("torch", "dots", 4, "bfloat16"), 71.6),
        (base("flax", "dots"), 107.9),
        (base("flax", "dots", 4, "bfloat16"), 73.2),
        (mini("flax"), 5.9),
        (mini("torch"), 4.12),
    ],
)
def test_plan_is_the_measured_peak(config, measured):
    """GiB of `base` at batch 32, on an H200 and an H100, and of `mini` at 256; docs/performance.md has the commands."""
    assert memory.plan(config).total / GIB == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("microbatches", "shape", "peak"),
    [(1, (1, 2), 80.9), (1, (2, 1), 107.8), (4, (2, 1), 73.2)],
)
def test_plan_of_two_devices(microbatches, shape, peak):
    """GiB: two H200 that share the state, measured; that hold copies, as XLA counts it, also for two 80 GB H100."""
    plan = memory.plan(base("flax", "dots", microbatches, "bfloat16", batch_size=64), shape)
    assert plan.total / GIB == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("batch_size", "shape", "microbatches", "peak"),
    [
        (32, (1, 1), 4, 75.1),
        (32, (1, 1), 2, 88.2),
        (512, (8, 4), 1, 40.6),
        (32, (1, 8), 1, 13.8),
        (32, (1, 4), 1, 27.4),
    ],
)
def test_plan_of_tpus(batch_size, shape, microbatches, peak):
    """GiB of a v5p, v5e or v6e chip that the compiler counts; nothing was run. docs/performance.md has the versions."""
    config = memory.written(base("flax", "dots", microbatches, "bfloat16", batch_size=batch_size), "tpu")
    assert config.compute.compile == "scan" and not memory.unrolled(config)
    assert memory.plan(config, shape).total / GIB == pytest.approx(peak, rel=0.1)


def test_more_is_kept_with_more_memory():
    totals = [memory.plan(base("torch", remat)).total for remat in ("full", "dots", "none")]
    assert totals == sorted(totals)
    parts = [memory.plan(base("flax", "dots", n)).activations for n in (1, 2, 4)]
    assert parts[0] == pytest.approx(2 * parts[1]) and parts[1] == pytest.approx(2 * parts[2])


def test_layers_are_written_out_where_nothing_is_frozen():
    """Frozen weights would be copied out of their stacks."""
    config = base("flax", "dots")
    assert memory.unrolled(config)
    assert not memory.unrolled(dataclasses.replace(config, frozen=("^vision",)))
    assert not memory.unrolled(dataclasses.replace(config, backend="torch"))


def test_advice():
    config = base("torch", "dots")
    room = 79 * GIB
    assert memory.plan(config).total > room
    assert plans.advice(config, (1, 1), room) == "try --config.compute.remat=dots --config.microbatches=8"
    size = memory.largest_batch(config, (1, 1), room)
    fits, bigger = (memory.plan(dataclasses.replace(config, batch_size=n)).total for n in (size, size + 1))
    assert fits <= room < bigger
    assert memory.largest_batch(config, (1, 1), 50 * GIB) == 0
    table = plans.show(config, (1, 1), room)
    assert f"largest batch that fits as configured: {size}" in table and "does not fit" in table


def test_auto_is_the_fastest_that_fits():
    auto = base("torch", "auto", gradients="auto")

    def settled(gib: float, config: Train = auto) -> tuple[str, int, str]:
        run = memory.settle(config, (1, 1), int(gib * GIB))
        return run.compute.remat, run.microbatches, run.compute.gradients

    assert settled(300) == ("none", 1, "float32")
    assert settled(139.8) == ("none", 1, "float32") and settled(120) == ("dots", 1, "float32")
    assert settled(79.2) == ("dots", 4, "bfloat16")  # of which 77.3 were held with 2 GiB more in use
    assert settled(79.2, dataclasses.replace(auto, microbatches=8)) == ("none", 8, "float32")
    assert settled(72, base("torch", "auto", gradients="auto"))[:2] == ("dots", 8)
    assert settled(69, base("flax", "auto", gradients="auto"))[:2] == ("full", 1)  # faster there than eight parts
    least = memory.settle(auto, (1, 1), 10 * GIB)  # which a run then refuses
    assert memory.plan(least).total == min(memory.plan(w).total for w in memory._ways(auto, (1, 1)))
    assert settled(10, base("torch", "full", 2, "auto")) == ("full", 2, "float32")  # what is given stays
    split = {
        gib: memory.settle(dataclasses.replace(auto, batch_size=64), (1, 2), gib * GIB) for gib in (300, 90, 45, 38)
    }
    ways = [(run.compute.remat, run.microbatches) for run in split.values()]
    assert ways == [("none", 1), ("dots", 1), ("full", 1), ("full", 2)]  # each part gathers the weights again
    for remat in ("auto", "full"):  # over devices the sum of gradients is of half the size
        two = memory.settle(base("flax", remat, gradients="auto", batch_size=64), (2, 1), 140 * GIB)
        assert (two.microbatches, two.compute.gradients) == (1, "bfloat16")


@pytest.mark.parametrize(("backend", "room"), [("flax", 75.6), ("torch", 79.2)])
def test_the_size_without_a_size(backend, room, monkeypatch, capsys):
    """The largest that the device can train in some way; of an 80 GB H100 either framework gets so many GiB."""
    for gib, size in ((room, "base"), (24, "mini")):
        monkeypatch.setattr(Backend(backend).device, "describe", lambda device, gib=gib: ("GPU", int(gib * GIB)))
        monkeypatch.setattr(sys, "argv", ["train", "--config=pi0_aloha", f"--config.backend={backend}"])
        resolved = flags._resolve(sys.argv)
        assert resolved[1].endswith(f"pi0_aloha.py:{size}")
        assert capsys.readouterr().out.startswith(f"size {size}: training base needs ")
