"""Optimizer steps: the two frameworks stay together, and both are what the formulas say."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import torch
from frameworks import NAMES, Framework
from steps import batches, run_config

from configs import pi0_aloha, pi05_aloha
from convert import tables
from openpi_port import init
from openpi_port.batch import leave_out
from openpi_port.config import Compute, Optimizer, Train
from openpi_port.errors import UserError
from openpi_port.fields import build
from openpi_port.pi_torch import device as devices
from openpi_port.pi_torch import sharding
from openpi_port.pi_torch.fast import norms, products
from openpi_port.pi_torch.fast.gradients import Gradients
from openpi_port.pi_torch.infer import build as build_torch
from openpi_port.pi_torch.layers import Linear
from openpi_port.pi_torch.siglip import Block
from openpi_port.schedule import euler_times, learning_rate


def canonical(trainer_, name: str, config: Train) -> dict[str, np.ndarray]:
    return dict(tables.translate(trainer_.weights(), config.model, name, "flax"))


def test_frameworks_agree_for_five_steps():
    config = run_config()
    data = batches(config, 5)
    losses, weights, raw = {}, {}, {}
    for name in NAMES:
        t = Framework(name).trainer(config)
        losses[name] = [float(t.update(batch)["loss"]) for batch in data]
        losses[name].append(t.evaluate(data[0]))
        weights[name] = canonical(t, name, config)
        state = {k.removeprefix("raw/"): v for k, v in t.train_state().items() if k.startswith("raw/")}
        raw[name] = dict(tables.translate(state, config.model, name, "flax"))
    np.testing.assert_allclose(losses["torch"], losses["flax"], atol=1e-4, rtol=0)
    assert losses["flax"][-1] < losses["flax"][0]  # both of the first batch
    fresh = init.Fresh(config.model, 0)
    for path in fresh:
        # A bias of the keys shifts all logits of a query alike: its gradient is rounding, which Adam scales up.
        if path != "vision/blocks/attn/k/bias":
            np.testing.assert_allclose(raw["torch"][path], raw["flax"][path], atol=1e-4, rtol=0, err_msg=path)
            np.testing.assert_allclose(weights["torch"][path], weights["flax"][path], atol=1e-4, rtol=0, err_msg=path)
    assert max(np.abs(weights["flax"][p] - fresh[p]).max() for p in fresh) > 5e-4  # and they moved


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_stay(name):
    config = run_config(frozen=("^vision", "embedding$"))
    t = Framework(name).trainer(config)
    t.update(batches(config, 1)[0])
    after, fresh = canonical(t, name, config), init.Fresh(config.model, 0)
    for path in fresh:
        frozen = path.startswith("vision") or path.endswith("embedding")
        # What no gradient reaches (the norm after the last prefix layer) moves by weight decay alone; it is zero.
        assert np.array_equal(after[path], fresh[path]) == (frozen or path == "gemma/norms/0/scale"), path
    assert not any("vision" in key for key in t.train_state())


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_not_learned(name):
    """Actions that are padding don't change the loss, unless asked for."""
    config = run_config()
    batch = batches(config, 1)[0]
    spoilt = {
        **batch,
        "actions": np.where(batch["action_is_pad"][..., None], 99.0, batch["actions"]).astype(np.float32),
    }
    t = Framework(name).trainer(config)
    assert t.evaluate(batch) != pytest.approx(0)
    # The noisy actions are inputs too, so only the loss of the last action can be compared: make nothing else depend.
    spoilt["time"] = batch["time"] = np.ones_like(batch["time"])  # pure noise: the inputs are the same
    assert t.evaluate(batch) == t.evaluate(spoilt)
    openpi = Framework(name).trainer(dataclasses.replace(config, loss_on_padding=True))
    assert openpi.evaluate(batch) < openpi.evaluate(spoilt)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_in_parts_is_the_same_step(name):
    """With unequal numbers of actions that count in the parts."""
    config = dataclasses.replace(run_config(), batch_size=4)
    batch = batches(config, 1)[0]
    whole, parts = Framework(name).trainer(config), Framework(name).trainer(dataclasses.replace(config, microbatches=2))
    for t in (whole, parts):
        t.metrics = t.update(batch)
    for key in ("loss", "grad_norm"):
        assert float(parts.metrics[key]) == pytest.approx(float(whole.metrics[key]), rel=1e-5)
    sums = parts.train_state()
    for path, value in whole.train_state().items():
        if not path.startswith("raw"):  # moments are gradients; Adam scales up what is rounding in them
            np.testing.assert_allclose(sums[path], value, atol=1e-6, err_msg=path)
    with pytest.raises(UserError, match="config.microbatches=3 doesn't divide batch_size=4"):
        dataclasses.replace(config, microbatches=3)


@pytest.mark.parametrize(("model", "compiled"), [("pi0", "unrolled"), ("insulated", "unrolled"), ("pi0", "scan")])
def test_gradients_of_layers_apart(model, compiled):
    """Flax's layers in pieces, and the prompts' rows of the embedding alone, change no gradient."""
    config = build(Train, (pi0_aloha if model == "pi0" else pi05_aloha).get_config("debug"))
    compute = Compute(compile=compiled, remat="dots")
    config = dataclasses.replace(config, batch_size=4, compute=compute, insulate=model != "pi0")
    data = batches(config, 1)[0]
    if config.insulate:
        shape = (4, config.max_action_tokens)
        data["action_tokens"] = np.random.default_rng(1).integers(0, config.model.vocab_size, shape).astype(np.int32)
        data["action_tokens_mask"] = np.ones(shape, bool)
    else:
        data["action_is_pad"][:] = False  # the parts count alike here; the test above has parts that don't
    data["tokenized_prompt"][1] = data["tokenized_prompt"][0]  # rows that are read more than once
    t = Framework("flax").trainer(dataclasses.replace(config, microbatches=2))
    (_, _), found = jax.jit(t._gradients)(t._state, data)
    whole = jax.jit(lambda trained: jax.grad(lambda w: t._loss(w, t._state.frozen, data)[0])(trained))
    expected = whole(t._state.trained)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=2e-6 * max(1, np.abs(b).max()), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", NAMES)
def test_cameras_that_no_data_set_has_are_left_out(name):
    """They are masked: the step is the same with and without them."""
    few = run_config()
    few = dataclasses.replace(few, model=dataclasses.replace(few.model, cameras=("base_0_rgb", "left_wrist_0_rgb")))
    data = dataclasses.replace(few.data, cameras=dict.fromkeys(few.model.cameras, "top"))
    batch = batches(few, 1)[0]
    batch["image_mask"]["left_wrist_0_rgb"][:] = False
    assert few.cameras == ("base_0_rgb",)
    assert set(leave_out(batch, few.cameras)["image"]) == {"base_0_rgb"}
    one, both = Framework(name).trainer(few), Framework(name).trainer(dataclasses.replace(few, data=data))
    found, expected = one.update(batch), both.update(batch)
    for key in ("loss", "grad_norm"):
        assert float(found[key]) == pytest.approx(float(expected[key]), rel=1e-5)
    batch["image_mask"]["left_wrist_0_rgb"][0] = True
    assert len(leave_out(batch, few.cameras)["image"]) == 2


@pytest.mark.parametrize("gradients", ["float32", "bfloat16"])
def test_rounded_weights_have_float32_masters(gradients):
    """torch keeps the layers' weights in bfloat16 beside the float32 ones that AdamW works on."""
    config = dataclasses.replace(
        run_config(), batch_size=4, microbatches=2, compute=Compute(dtype="bfloat16", gradients=gradients)
    )
    t = Framework("torch").trainer(config)
    for batch in batches(config, 2):
        t.update(batch)
    masters, copies = t._layout.parts, t._layout.copies
    assert {str(p.dtype) for p in masters.values()} == {"torch.float32"}
    assert "gemma.layers.0.experts.1.q.weight" in copies and "gemma.embedding" not in copies
    for name, copy in copies.items():
        assert (copy == masters[name].bfloat16()).all(), name
    fresh = dict(tables.translate(init.Fresh(config.model, 0), config.model, "flax", "torch"))
    moved = max(np.abs(masters[name].detach().numpy() - fresh[name]).max() for name in copies)
    assert 1e-5 < moved < 1e-2  # by less than bfloat16 tells apart at 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_adds_its_gradient_to_the_sum(dtype):
    """Without leaving one at the weight; autograd's own gradients otherwise."""
    generator = torch.Generator().manual_seed(0)
    linear = Linear(8, 6, bias=True).bfloat16()
    x = torch.randn(2, 3, 8, generator=generator).bfloat16().requires_grad_()
    found = {}
    for total in (None, torch.ones(6, 8, dtype=dtype)):
        linear.total = total
        for leaf in (x, linear.weight, linear.bias):
            leaf.grad = None
        linear(x).square().sum().backward()
        weight = linear.weight.grad if total is None else total
        found[total is None] = x.grad, linear.bias.grad, weight.float() + (total is None)
    assert linear.weight.grad is None
    for mine, theirs in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(mine, theirs, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("summed", [(), (0, 1, 2), (1,)])
def test_several_products_of_one_input_are_one(summed):
    """Outputs and gradients of each by itself, also where weights have sums, and one is frozen."""
    generator = torch.Generator().manual_seed(0)
    linears = [Linear(8, size, bias=True) for size in (6, 2, 3)]
    x = torch.randn(2, 3, 8, generator=generator, requires_grad=True)
    linears[2].weight.requires_grad_(False)
    leaves = [x, *(p for linear in linears for p in linear.parameters() if p.requires_grad)]
    wanted = [linear(x) for linear in linears]
    gradients = [torch.randn(y.shape, generator=generator) for y in wanted]
    expected = torch.autograd.grad(wanted, leaves, gradients)
    for i in summed:
        linears[i].total = torch.ones_like(linears[i].weight)
    found = products.several(x, linears)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    for leaf, mine, theirs in zip(
        leaves, torch.autograd.grad(found, leaves, gradients, allow_unused=True), expected, strict=True
    ):
        owner = next((linear for linear in linears if linear.weight is leaf and linear.total is not None), None)
        torch.testing.assert_close(mine if owner is None else owner.total - 1, theirs)
        assert owner is None or mine is None


def test_norm_of_gradients_of_any_dtype():
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(3, 4, generator=generator), *(torch.randn(n, generator=generator).bfloat16() for n in (5, 7))]
    wanted = sum(float(grad.double().square().sum()) for grad in grads) ** 0.5
    assert float(sharding._norm([*grads, torch.empty(0)])) == pytest.approx(wanted, rel=1e-6)
    assert sharding._norm([]) == 0


def test_products_beside_bfloat16_may_be_coarser_than_float32():
    before = torch.get_float32_matmul_precision()
    for dtype, wanted in (("float32", "highest"), ("bfloat16", "high")):
        with devices.precision(Compute(dtype=dtype)):
            assert torch.get_float32_matmul_precision() == wanted
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("gradients", ["float32", "bfloat16"])
def test_sums_of_parts_are_the_whole(gradients):
    """torch's products add up the gradients of weights in bfloat16; of a batch in one part there is nothing to add."""
    found = []
    for parts in (1, 2):
        compute = Compute(dtype="bfloat16", gradients=gradients)
        config = dataclasses.replace(run_config(), batch_size=4, microbatches=parts, compute=compute)
        t = Framework("torch").trainer(config)
        metrics = [t.update(batch) for batch in batches(config, 2)]
        found.append(([float(m[key]) for m in metrics for key in ("loss", "grad_norm")], t.train_state()))
    (losses, whole), (others, sums) = found
    # First, sums of the same numbers, rounded apart: 2^-9 over the root of how many there are. Then of weights that are
    # rounded on either side of a step between two bfloat16 numbers, 2^-8 at most.
    np.testing.assert_allclose(others[:2], losses[:2], rtol=1e-4)
    np.testing.assert_allclose(others[2:], losses[2:], rtol=2**-8)
    for name in whole:
        if name.startswith("mu/") and not name.endswith("k.bias"):  # whose gradient is rounding
            difference = np.linalg.norm(sums[name] - whole[name])
            assert difference < 0.05 * np.linalg.norm(whole[name]) + 1e-6, name


def test_gradients_that_stay_where_they_are():
    """As a recorded pass of several parts needs them: the same step."""
    compute = Compute(dtype="bfloat16", gradients="bfloat16")
    config = dataclasses.replace(run_config(), batch_size=4, microbatches=2, compute=compute)
    found = []
    for stay in (False, True):
        t = Framework("torch").trainer(config)
        if stay:
            t._gradients.stay()
        losses = [float(t.update(batch)["grad_norm"]) for batch in batches(config, 3)]
        where = {name: p.grad is not None for name, p in t._layout.parameters.items()}
        assert (
            where["action_in_proj.weight"] == stay
            and not where["gemma.embedding"]
            and not sum(where[name] for name in t._layout.copies)
        )
        found.append((losses, t.train_state()))
    assert found[0][0] == found[1][0]
    for name, value in found[0][1].items():
        np.testing.assert_array_equal(found[1][1][name], value, err_msg=name)


def test_sums_are_where_the_parameters_are():
    """Also where there is nothing to add up."""
    model = build_torch(run_config().model, Compute())  # on the meta device
    for summed in ([], ["gemma.layers.0.experts.0.q.weight"]):
        parameters = dict(model.named_parameters())
        gradients = Gradients(model, parameters, summed, torch.bfloat16, 1, sparse=True)
        assert gradients.together.device == parameters["gemma.embedding"].device


@pytest.mark.parametrize("remat", ["full", "dots", "none"])
def test_what_a_compiled_layer_keeps(remat, monkeypatch):
    """torch: its input alone, or products and attention too, or norms too; for the backward pass."""
    monkeypatch.setattr(norms, "usable", lambda x: x.requires_grad and torch.is_grad_enabled())
    config, kept = run_config().model.vision, {}
    block = Block(config, Compute(remat=remat))
    block.forward = torch.compile(block.forward, dynamic=False, backend="aot_eager_decomp_partition")
    for linear in (m for m in block.modules() if isinstance(m, Linear)):
        linear.total = torch.zeros_like(linear.weight)
    whole = [*block.parameters(), *(m.total for m in block.modules() if isinstance(m, Linear))]
    weights = {p.untyped_storage().data_ptr() for p in whole}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point() and x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // (8 * config.num_tokens)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        block(torch.ones(2, config.num_tokens, config.width, requires_grad=True)).sum().backward()
    width, rows = config.width, {"full": 0, "dots": 0, "none": 2}[remat] * [config.width]
    if remat != "full":
        rows += [3 * width, config.num_heads, width, width, config.mlp_dim]  # sums of the softmax are attention's, too
    assert sorted(kept.values()) == sorted([width, *rows])


@pytest.mark.parametrize(("name", "how"), [("flax", "graph"), ("torch", "scan"), ("torch", "graph")])
def test_what_cannot_be_compiled_is_an_error(name, how):
    with pytest.raises(UserError, match=f"config.compute.compile='{how}'"):
        Framework(name).trainer(dataclasses.replace(run_config(), compute=Compute(compile=how)))


@pytest.mark.parametrize("name", NAMES)
def test_restored_equals_never_stopped(name):
    config = run_config()
    data = batches(config, 4)
    straight = Framework(name).trainer(config)
    for batch in data:
        straight.update(batch)
    first = Framework(name).trainer(config)
    for batch in data[:2]:
        first.update(batch)
    second = Framework(name).backend.train.Trainer(config, first.weights(), "cpu")
    second.restore(2, first.train_state())
    for batch in data[2:]:
        second.update(batch)
    assert second.step == 4
    for path, value in straight.weights().items():
        np.testing.assert_array_equal(second.weights()[path], value, err_msg=path)
    for path, value in straight.train_state().items():
        np.testing.assert_array_equal(second.train_state()[path], value, err_msg=path)


def test_rows_that_no_prompt_has_read_are_known_after_a_restart():
    """torch's optimizer leaves them alone."""
    config = run_config()
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, weight_decay=1e-10))
    data, found = batches(config, 2), []
    first = Framework("torch").trainer(config)
    for batch in data:
        first.update(batch)
    second = Framework("torch").backend.train.Trainer(config, first.weights(), "cpu")
    second.restore(2, first.train_state())
    for trainer in (first, second):
        (idle,) = (slot.idle for slot in trainer._slots if slot.idle is not None)
        found.append(torch.nonzero(~idle).flatten().tolist())
    given = {int(i) for batch in data for i in batch["tokenized_prompt"].flatten()}
    read = {int(i) for batch in data for i in batch["tokenized_prompt"][batch["tokenized_prompt_mask"]]}
    assert found == [sorted(given), sorted(read)] and len(given) < config.model.vocab_size


@pytest.mark.parametrize("name", NAMES)
def test_one_step_by_hand(name):
    """Clipped AdamW and the moving average, against numpy, for one matrix."""
    config = run_config()
    batch = batches(config, 1)[0]
    path = {"flax": "action_out_proj/kernel", "torch": "action_out_proj.weight"}[name]
    t = Framework(name).trainer(config)
    before = t.weights()[path].copy()
    metrics = t.update(batch)
    state, o = t.train_state(), config.optimizer
    gradient = state[f"mu/{path}"] / (1 - o.b1)  # after one step from zero, clipped
    assert np.linalg.norm(gradient) <= o.clip_norm < float(metrics["grad_norm"])
    np.testing.assert_allclose(state[f"nu/{path}"], (1 - o.b2) * gradient**2, rtol=1e-4, atol=1e-12)
    rate = learning_rate(0, o)
    stepped = before - rate * (gradient / (np.abs(gradient) + o.eps) + o.weight_decay * before)
    np.testing.assert_allclose(state[f"raw/{path}"], stepped, atol=1e-6)
    np.testing.assert_allclose(t.weights()[path], o.ema * before + (1 - o.ema) * stepped, atol=1e-6)


def test_schedule():
    o = Optimizer()
    assert learning_rate(0, o) == pytest.approx(o.peak_lr / 1001)
    assert learning_rate(1000, o) == pytest.approx(o.peak_lr)
    assert learning_rate(30000, o) == learning_rate(99999, o) == pytest.approx(o.end_lr)
    assert all(learning_rate(s, o) > learning_rate(s + 1, o) for s in range(1000, 29999, 999))


def test_euler_times():
    for n in (1, 4, 10, 50):
        times, dt = euler_times(n)
        assert len(times) == n and times[0] == 1 and times.dtype == dt.dtype == np.float32
        np.testing.assert_allclose(times + dt, np.arange(n - 1, -1, -1) / n, atol=1e-5)
