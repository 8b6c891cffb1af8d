"""Steps that can't be done, or are broken off: an error that says so, and nothing wrong afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from frameworks import NAMES, Framework
from steps import batches, run_config
from torch import Tensor, nn

from openpi_port import memory
from openpi_port.config import Compute
from openpi_port.errors import UserError
from openpi_port.pi_torch import device as devices
from openpi_port.pi_torch import pi0_fast, sharding
from openpi_port.pi_torch.fast import compiled, norms, products
from openpi_port.pi_torch.fast.replay import Replayed
from openpi_port.pi_torch.layers import Linear
from openpi_port.pi_torch.train import _compile, _compile_layers


def broken_off(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["within the backward pass", "after it"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_that_is_broken_off_leaves_no_gradients(where, microbatches, monkeypatch):
    """Whoever catches Ctrl-C, or an error, goes on as if the step had not begun."""
    config = dataclasses.replace(run_config(), batch_size=4, microbatches=microbatches)
    first, second = batches(config, 2)
    trainer, undisturbed = (Framework("torch").trainer(config) for _ in range(2))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where == "after it":
            patch.setattr(trainer._layout, "complete", broken_off)
        else:  # when the embedding, which comes last, may have its gradient already
            patch.setattr(trainer._gradients, "take_rows", broken_off)
        trainer.update(first)
    found, wanted = trainer.update(second), undisturbed.update(second)
    assert trainer.step == 1
    assert all(float(found[key]) == float(wanted[key]) for key in ("loss", "grad_norm"))


@pytest.mark.parametrize("backend", NAMES)
def test_parts_that_a_device_cannot_make_are_refused(backend):
    """The batch divides, but not what each of two devices has of it."""
    config = dataclasses.replace(run_config(), backend=backend, batch_size=4, microbatches=4)
    assert memory.settle(config, (1, 1), 2**40).microbatches == 4
    with pytest.raises(UserError, match="config.microbatches=4 doesn't divide the 2 samples that each of 2 devices"):
        memory.settle(config, (2, 1), 2**40)


def test_a_batch_that_does_not_divide_is_refused():
    """Not taken as one part, whose gradient would be divided by two."""
    trainer = Framework("torch").trainer(dataclasses.replace(run_config(), batch_size=4, microbatches=2))
    (batch,) = batches(run_config(), 1)  # of three
    with pytest.raises(UserError, match="a batch of 3 samples doesn't divide into config.microbatches=2 parts"):
        trainer.update(batch)
    assert np.isfinite(trainer.evaluate(batch)) and trainer.step == 0


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_train_is_an_error(name):
    with pytest.raises(UserError, match="leaves nothing to train"):
        Framework(name).trainer(run_config(frozen=(".*",)))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_which_no_action_counts(name):
    """The last moment of an episode, of whose one action it is known that it is given."""
    config = dataclasses.replace(run_config(max_delay=4), batch_size=1)
    (batch,) = batches(config, 1)
    batch["action_is_pad"][:, 1:] = True
    batch["time"] = np.full((1, config.model.action_horizon), 0.5, np.float32)
    batch["time"][:, :2] = 0
    trainer = Framework(name).trainer(config)
    assert trainer.evaluate(batch) == 0
    if name == "torch":  # Flax would compile for long
        assert float(trainer.update(batch)["grad_norm"]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_another_shape_is_refused(name):
    config = run_config()
    trainer = Framework(name).trainer(config)
    state = trainer.train_state()
    key = next(key for key in state if key.startswith("mu/action_out_proj") and key.endswith("bias"))
    with pytest.raises(UserError, match=rf"{key} is \(1,\)"):
        trainer.restore(1, state | {key: state[key][:1]})  # which would fill all of it
    assert trainer.step == 0


def seconds(function: Callable[..., Tensor], *leaves: Tensor) -> None:
    """Asks for second derivatives."""
    first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    (sum(g.square().sum() for g in first) + sum(leaf.sum() for leaf in leaves)).backward()


@pytest.mark.parametrize("small", [0, products.SMALL])
def test_second_derivatives_are_refused(small, monkeypatch):
    """Where the backward pass knows numbers whose own derivatives it doesn't, they would be wrong."""
    monkeypatch.setattr(products, "SMALL", small)
    x, scale = torch.randn(5, 8, requires_grad=True), torch.zeros(8, requires_grad=True)
    linears, targets = [Linear(8, size) for size in (6, 3)], torch.tensor([0, 3, 1, 1, 2])
    table = torch.randn(20, 8, requires_grad=True)
    for function, *leaves in (
        (lambda x, _: pi0_fast._CrossEntropy.apply(x, table, targets), x, table),
        (lambda x, *_: torch.cat(products.several(x, linears), -1), x, *(linear.weight for linear in linears)),
        (lambda x, scale: norms.fork(x, scale, None)[1], x, scale),
    ):
        with pytest.raises(RuntimeError, match="differentiate twice"):
            seconds(function, *leaves)
    seconds(lambda x, table: F.linear(x, table), x, table)  # torch's own are not


def test_a_recorded_pass_takes_no_other_batch():
    """Copied into the recorded one it would be repeated, converted, or cut."""
    replayed, seen = Replayed(lambda batch: batch, lambda: None, None), []
    batch = {"image": {"base": torch.zeros(2, 3, dtype=torch.uint8)}, "state": torch.zeros(2, 4)}
    replayed._graph, replayed._batch, replayed._made = SimpleNamespace(replay=lambda: seen.append(1)), batch, batch
    replayed._replay(batch)
    for key, value in (
        ("state", torch.zeros(1, 4)),
        ("image", {"base": torch.zeros(2, 3)}),
        ("image", {**batch["image"], "wrist": torch.zeros(2, 3, dtype=torch.uint8)}),
    ):
        with pytest.raises(ValueError, match="the step was recorded for a batch of"):
            replayed._replay(batch | {key: value})
    assert seen == [1]


def test_layers_are_compiled_on_a_cpu_where_that_is_asked_for(monkeypatch):
    layers, auto = (dataclasses.replace(run_config(), compute=Compute(compile=how)) for how in ("layers", "auto"))
    for there in (True, False):
        monkeypatch.setattr(compiled, "has_compiler", lambda there=there: there)
        assert _compile(auto, torch.device("cpu")) == "none"
        if there:
            assert _compile(layers, torch.device("cpu")) == "layers"
        else:
            with pytest.raises(UserError, match="config.compute.compile='layers' needs a C"):
                _compile(layers, torch.device("cpu"))


def test_every_trainer_of_a_process_compiles_its_layers(monkeypatch):
    """torch stops at eight variants of the same code, of all that call it together."""

    class Layer(nn.Module):
        def forward(self, x: Tensor, more: int = 1) -> Tensor:
            return x + more

    found, plain = [], torch.compile
    backend = lambda graph, _: found.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda f, dynamic, options: plain(f, backend=backend, dynamic=dynamic))
    for size in range(2, 14):
        layers = [Layer(), Layer()]
        _compile_layers(layers)
        for layer in layers:
            torch.testing.assert_close(layer(torch.zeros(size), more=3), torch.full((size,), 3.0))
    assert len(found) == 12


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_precision_that_was_set_in_the_other_way(setting):
    """torch refuses to be asked for what `torch.backends` has set; that setting is found again."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest" if setting == "tf32" else "high")
        torch.backends.cuda.matmul.fp32_precision = setting
        with devices.precision(Compute(dtype="float32")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cuda.matmul.fp32_precision == setting
    finally:
        torch.set_float32_matmul_precision(before)


def test_more_processes_than_gpus(monkeypatch):
    for key, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.find("cuda") == devices.find(None) == torch.device("cuda:3")
    with pytest.raises(UserError, match="process 3 of this machine finds 2 GPUs"):
        sharding.join()
