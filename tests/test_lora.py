"""LoRA: openpi's shapes and function, the same in both frameworks, carried or merged, trained alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import jobs
import numpy as np
import pytest
from conftest import ROOT
from frameworks import NAMES, Framework
from jobs import logged, run
from steps import batches
from test_tables import random_weights
from test_train_step import canonical

from configs import pi0_aloha, pi0_aloha_lora
from convert import formats, tables, target
from convert.__main__ import main
from convert.layout import OURS, side_shapes
from openpi_port import base as base_lib
from openpi_port import checkpoint, init, load_model, memory, meshes, orbax_io, safetensors_io, starting
from openpi_port.config import FROZEN, LORA_ONLY, Compute, Gemma, Lora, Pi0, Siglip, Train
from openpi_port.errors import UserError
from openpi_port.fields import build, to_dict

pytestmark = pytest.mark.usefixtures("own_caches")

TINY = Pi0(Siglip(8, 1, 8, 2, 14, 28), Gemma(8, 2, 12, 2, 1, 4), Gemma(6, 2, 10, 2, 1, 4), 16, 3, 4, 5)
LLM = "PaliGemma/llm/layers"


def adapted(targets=("attn", "mlp"), alpha: float | None = None, kv_heads: int = 1) -> Pi0:
    """A tiny model with rank 2 in the language model and 3 in the expert."""

    def gemma(config: Gemma, rank: int) -> Gemma:
        lora = Lora(rank, float(rank if alpha is None else alpha), targets)
        return dataclasses.replace(config, num_kv_heads=kv_heads, lora=lora)

    return dataclasses.replace(TINY, language=gemma(TINY.language, 2), expert=gemma(TINY.expert, 3))


def openpi_checkpoint(path, model: Pi0, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights as openpi writes them, without anything of ours; returns them."""
    weights = {n: w * np.float32(0.3) for n, w in random_weights(model, np.float32, seed).items()}
    theirs = dict(tables.translate(weights, model, OURS, "openpi"))
    orbax_io.write(path / "params", {f"params/{n}/value": t for n, t in theirs.items()})
    return theirs


def inputs(model: Pi0) -> dict:
    rng, size = np.random.default_rng(1), model.vision.image_size
    shape = (2, model.action_horizon, model.action_dim)
    return {
        "image": {c: rng.integers(0, 256, (2, size, size, 3), np.uint8) for c in model.cameras},
        "image_mask": {c: np.ones(2, bool) for c in model.cameras},
        "state": rng.standard_normal(shape[::2], np.float32),
        "tokenized_prompt": rng.integers(0, model.vocab_size, (2, model.max_token_len)).astype(np.int32),
        "tokenized_prompt_mask": np.ones((2, model.max_token_len), bool),
        "actions": rng.standard_normal(shape, np.float32),
        "noise": rng.standard_normal(shape, np.float32),
        "time": rng.uniform(0.1, 1, 2).astype(np.float32),
    }  # fmt: skip


OPTIONS = {"action_horizon": 4, "max_token_len": 5, "vision": {"num_heads": 2}}


def loss(path, backend: str, **options) -> np.ndarray:
    model = load_model(path, backend, device="cpu", **OPTIONS, **options)
    batch = inputs(model.config)
    return model.loss(batch, batch["noise"], batch["time"])


def test_shapes_are_openpis():
    model = adapted()
    shapes = side_shapes(tables.entries(model), "openpi")
    assert shapes[f"{LLM}/attn/q_einsum/lora_a"] == (2, 2, 8, 2)  # L N D R
    assert shapes[f"{LLM}/attn/q_einsum/lora_b"] == (2, 2, 2, 4)  # L N R H
    assert shapes[f"{LLM}/attn/kv_einsum_1/lora_a"] == (2, 2, 1, 6, 3)
    assert shapes[f"{LLM}/attn/kv_einsum_1/lora_b"] == (2, 2, 1, 3, 4)
    assert shapes[f"{LLM}/attn/attn_vec_einsum_1/lora_a"] == (2, 2, 4, 3)  # L N H R
    assert shapes[f"{LLM}/attn/attn_vec_einsum_1/lora_b"] == (2, 2, 3, 6)
    assert shapes[f"{LLM}/mlp/gating_einsum_lora_a"] == (2, 2, 8, 2)
    assert shapes[f"{LLM}/mlp_1/gating_einsum_lora_b"] == (2, 2, 3, 10)
    assert shapes[f"{LLM}/mlp/linear_lora_a"] == (2, 12, 2)
    assert shapes[f"{LLM}/mlp_1/linear_lora_b"] == (2, 3, 6)
    every_head = side_shapes(tables.entries(adapted(kv_heads=2)), "openpi")
    assert every_head[f"{LLM}/attn/qkv_einsum/lora_a"] == (2, 3, 2, 8, 2)


@pytest.mark.parametrize("name", NAMES)
def test_one_expert_computes_openpis_einsums(name):
    """Written out as openpi's equations, so that sums over heads can't be wrong on both sides alike."""
    framework, rng = Framework(name), np.random.default_rng(0)
    model, heads = adapted(alpha=6.0), "BTD,NDH->BTNH"
    weights = random_weights(model, np.float32)
    gemma = framework.load(model, weights).module.gemma
    layers = tables.translate(weights, model, OURS, "openpi")
    if name == "flax":
        import jax
        from flax import nnx

        graph, state = nnx.split(gemma.layers)
        expert = nnx.merge(graph, jax.tree.map(lambda p: p[1], state)).experts[1]
    else:
        expert = gemma.layers[1].experts[1]
    x, flat = rng.standard_normal((2, 3, 6), np.float32), rng.standard_normal((2, 3, 8), np.float32)

    def theirs(stem: str, part: str) -> np.ndarray:
        sep = "/" if "einsum_1" in stem and "gating" not in stem else "_"
        return layers[f"{LLM}/{stem}" + (f"{sep}{part}" if part != "w" or sep == "/" else "")][1]

    w, a, b = (theirs("attn/q_einsum_1", part) for part in ("w", "lora_a", "lora_b"))
    q = jnp.einsum(heads, x, w) + 2 * jnp.einsum("BTNL,NLH->BTNH", jnp.einsum("BTD,NDL->BTNL", x, a), b)
    np.testing.assert_allclose(framework.numpy(expert.q(framework.array(x))), q.reshape(2, 3, 8), rtol=1e-4, atol=1e-4)
    w, a, b = (theirs("attn/kv_einsum_1", part) for part in ("w", "lora_a", "lora_b"))
    kv = jnp.einsum("BSD,2KDH->2BSKH".replace("2", "C"), x, w)
    kv += 2 * jnp.einsum("CBSKL,CKLH->CBSKH", jnp.einsum("BSD,CKDL->CBSKL", x, a), b)
    for ours, there in ((expert.k, kv[0]), (expert.v, kv[1])):
        np.testing.assert_allclose(
            framework.numpy(ours(framework.array(x))), there.reshape(2, 3, 4), rtol=1e-4, atol=1e-4
        )
    w, a, b = (theirs("attn/attn_vec_einsum_1", part) for part in ("w", "lora_a", "lora_b"))
    split = flat.reshape(2, 3, 2, 4)
    o = jnp.einsum("BTNH,NHD->BTD", split, w)
    o += 2 * jnp.einsum("BTL,NLD->BTD", jnp.einsum("BTNH,NHL->BTL", split, a), b)
    np.testing.assert_allclose(framework.numpy(expert.o(framework.array(flat))), o, rtol=1e-4, atol=1e-4)
    w, a, b = (theirs("mlp_1/gating_einsum", part) for part in ("w", "lora_a", "lora_b"))
    up = x @ w[1] + 2 * (x @ a[1] @ b[1])
    np.testing.assert_allclose(framework.numpy(expert.up(framework.array(x))), up, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [("attn", "mlp"), ("attn",), ("mlp",)])
def test_merged_and_carried_are_one_function_in_both_frameworks(tmp_path, targets):
    model = adapted(targets)
    theirs = openpi_checkpoint(tmp_path, model)
    assert formats.open_checkpoint(tmp_path, **OPTIONS).model == model
    assert formats.open_checkpoint(tmp_path, merge_lora=True, **OPTIONS).model == TINY
    carried = {name: loss(tmp_path, name) for name in NAMES}
    merged = {name: loss(tmp_path, name, merge_lora=True) for name in NAMES}
    np.testing.assert_allclose(carried["flax"], carried["torch"], rtol=1e-5, atol=1e-5)
    for name in NAMES:
        np.testing.assert_allclose(merged[name], carried[name], rtol=1e-5, atol=1e-5)
    base = {n: t for n, t in theirs.items() if "lora_" not in n}
    orbax_io.write(tmp_path / "base" / "params", {f"params/{n}": t for n, t in base.items()})
    assert np.abs(loss(tmp_path / "base", "flax") - carried["flax"]).max() > 1e-3  # and they do something


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("way", [("flax", "torch"), ("torch", "flax")])
def test_there_and_back_to_the_bit(tmp_path, way, kv_heads):
    theirs = openpi_checkpoint(tmp_path / "0", adapted(kv_heads=kv_heads))
    for step, to in enumerate((*way, "openpi")):
        options = OPTIONS if step == 0 else {}
        target.write(formats.open_checkpoint(tmp_path / str(step), **options), tmp_path / str(step + 1), to)
    back = orbax_io.Arrays(tmp_path / "3" / "params")
    assert {n.removeprefix("params/") for n in back} == theirs.keys()
    for name, array in theirs.items():
        assert np.asarray(back[f"params/{name}"]).tobytes() == array.tobytes(), name


@pytest.mark.parametrize("side", ["openpi", "flax", "torch"])
def test_hugging_faces_names_want_them_merged(tmp_path, side, capsys):
    openpi_checkpoint(tmp_path / "openpi", adapted())
    if side != "openpi":
        target.write(formats.open_checkpoint(tmp_path / "openpi", **OPTIONS), tmp_path / side, side)
    flags = [str(tmp_path / side), str(tmp_path / "hf"), "--to=openpi-torch", "--quiet", "--model.vision.num_heads=2"]
    flags += ["--model.action_horizon=4", "--model.max_token_len=5"]
    assert main(flags) == 2
    assert "no place for LoRA; add it to the weights: --merge-lora" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    assert main([*flags, "--merge-lora"]) == 0
    np.testing.assert_allclose(loss(tmp_path / "hf", "torch"), loss(tmp_path / "openpi", "torch"), rtol=1e-5, atol=1e-5)


def test_scaling_travels_with_ours_and_is_refused_by_openpi(tmp_path):
    source = dataclasses.replace(
        formats_source(tmp_path), model=adapted(alpha=1.5)
    )  # alpha is nowhere in openpi's checkpoints, so that it is stated by us
    target.write(source, tmp_path / "torch", "torch")
    again = formats.open_checkpoint(tmp_path / "torch")
    assert again.model.language.lora.alpha == 1.5
    with pytest.raises(UserError, match=r"alpha=1.5 is not rank=2.*--merge-lora"):
        target.write(again, tmp_path / "openpi2", "openpi")
    merged = loss(tmp_path / "torch", "torch", merge_lora=True)
    np.testing.assert_allclose(loss(tmp_path / "torch", "flax"), merged, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"language.lora.rank=3 contradicts the weights, which say 2"):
        formats.open_checkpoint(tmp_path / "openpi", language={"lora": {"rank": 3}}, **OPTIONS)


def formats_source(tmp_path):
    openpi_checkpoint(tmp_path / "openpi", adapted())
    return formats.open_checkpoint(tmp_path / "openpi", **OPTIONS)


def lora_config(**changes) -> Train:
    config = build(Train, pi0_aloha_lora.get_config("debug"))
    optimizer = dataclasses.replace(config.optimizer, peak_lr=3e-4, warmup_steps=1, weight_decay=1e-2)
    return dataclasses.replace(config, optimizer=optimizer, batch_size=2, draws=1, **changes)


def test_only_adapters_and_what_is_not_frozen_move_alike_in_both_frameworks():
    config = lora_config()
    data, fresh = batches(config, 5), init.Fresh(config.model, 0)
    after, gradients, losses = {}, {}, {}
    for name in NAMES:
        t = Framework(name).trainer(config)
        losses[name] = [float(t.update(data[0])["loss"])]
        first = {n.removeprefix("mu/"): m for n, m in t.train_state().items() if n.startswith("mu/")}
        assert all("lora_" in n for n in first if n.startswith("gemma"))
        rest = {n: np.zeros_like(w) for n, w in t.weights().items()}
        gradients[name] = dict(tables.translate(rest | first, config.model, name, OURS))  # times 1 - b1, clipped
        losses[name] += [float(t.update(batch)["loss"]) for batch in data[1:]]
        after[name] = canonical(t, name, config)
        moved = {path for path in fresh if not np.array_equal(after[name][path], fresh[path])}
        assert all("lora_" in path for path in moved if path.startswith("gemma/"))
        still = {path for path in fresh if "lora_" in path} - moved
        assert not still, still
        assert {"action_out_proj/kernel", "vision/head/kernel"} <= moved
    np.testing.assert_allclose(losses["torch"], losses["flax"], atol=1e-4, rtol=0)
    for path in fresh:
        np.testing.assert_allclose(gradients["torch"][path], gradients["flax"][path], atol=1e-5, rtol=0, err_msg=path)
        if path != "vision/blocks/attn/k/bias":  # its gradient is rounding, which Adam scales up
            np.testing.assert_allclose(after["torch"][path], after["flax"][path], atol=1e-4, rtol=0, err_msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_are_rounded_once_where_every_use_rounds_them(name, monkeypatch):
    """Half the memory for them, and the same numbers to the bit."""
    config = lora_config(compute=Compute(dtype="bfloat16"))
    batch = batches(config, 1)[0]
    t = Framework(name).trainer(config)
    weights = canonical(t, name, config)
    bfloat16 = {path for path, w in weights.items() if w.dtype.name == "bfloat16"}
    assert "gemma/embedding" in bfloat16 and "gemma/layers/experts/1/down/kernel" in bfloat16
    assert not any("lora" in path or "norm" in path or path.startswith(("vision", "action")) for path in bfloat16)
    assert memory.plan(config).weights == sum(w.nbytes for w in weights.values())
    monkeypatch.setattr(meshes, "stored_in", lambda config, name: "float32")
    unrounded = Framework(name).trainer(config)
    assert {w.dtype.name for w in unrounded.weights().values()} == {"float32"}
    assert t.evaluate(batch) == unrounded.evaluate(batch)
    if name == "torch":  # in Flax that takes half a minute to compile
        steps = [[float(each.update(batch)["loss"]) for _ in range(2)] for each in (t, unrounded)]
        assert steps[0] == steps[1] and steps[0][0] != steps[0][1]


def base_checkpoint(directory: Path, seed: int) -> Path:
    """The debug model as openpi would save it."""
    plain = build(Train, pi0_aloha.get_config("debug")).model
    orbax_io.write(directory / "params", dict(tables.translate(init.Fresh(plain, seed), plain, OURS, "openpi")))
    (directory / "config.json").write_text(
        '{"vision": {}, "vlm": {}, "image_keys": ["base_0_rgb"], "action_horizon": 50, "max_token_len": 11}'
    )
    return directory


def test_a_checkpoint_of_adapters_finds_its_base_and_knows_it(tmp_path):
    base = base_checkpoint(tmp_path / "base", 3)
    lora = lora_config()
    options = {"model": lora.model, "frozen": ("all-but-lora",), "save": "trained", "init": str(base)}
    config = jobs.debug(pi0_aloha, tmp_path / "a", backend="torch", num_steps=4, save_every=2, keep_every=2, **options)
    path = run(config)
    weights = safetensors_io.Arrays(path / "2" / "model.safetensors")
    assert weights and all("lora_" in name for name in weights)
    assert json.loads((path / "2" / "policy.json").read_text())["format"] == 2

    straight = logged(path)
    shutil.rmtree(path / "4")
    np.testing.assert_array_equal(logged(run(config, resume=True)), straight)
    model = load_model(path / "4", "torch", device="cpu")
    batch = batches(config, 1)[0]
    trained = model.loss(batch, batch["noise"], batch["time"])
    target.write(formats.open_checkpoint(path / "4"), tmp_path / "whole", "flax")
    whole = load_model(tmp_path / "whole", "flax", device="cpu")
    np.testing.assert_allclose(whole.loss(batch, batch["noise"], batch["time"]), trained, atol=5e-5)
    before = load_model(base, "torch", device="cpu").loss(batch, batch["noise"], batch["time"])
    assert np.abs(before - trained).max() > 3e-4

    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"4 holds only what was trained; the other weights should be at .*: no such"):
        load_model(path / "4", "torch")
    base_checkpoint(tmp_path / "base", 4)
    with pytest.raises(UserError, match=r"4 was trained on other weights than .*base has now"):
        starting.point(path, config, resume=True)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_checkpoint_to_begin_with_the_seed_is_the_base(tmp_path, name):
    config = lora_config(save="trained", backend=name, frozen=("language-but-lora", "expert-but-lora"))
    begin = starting.point(tmp_path, config, resume=False)
    t = Framework(name).trainer(config)
    t.update(batches(config, 1)[0])
    some, every = t.weights(only_trained=True), t.weights()
    assert some.keys() < every.keys() and not any(n.startswith("gemma") and "lora" not in n for n in some)
    found = base_lib.complete(begin.base, config, some, name, "it")
    assert found.keys() == every.keys()
    for tensor, array in every.items():
        np.testing.assert_array_equal(np.asarray(found[tensor]), array, err_msg=tensor)


def test_what_is_frozen_has_names():
    model = build(Train, pi0_aloha_lora.get_config("debug")).model
    shapes = side_shapes(tables.entries(model), OURS)

    def trained(*names: str) -> set[str]:
        config = lora_config(frozen=names)
        assert build(Train, to_dict(config)) == config
        return {name for name in shapes if not meshes.is_frozen(config, name)}

    adapters = {name for name in shapes if "lora_" in name}
    assert trained("all-but-lora") == adapters
    assert trained("language-but-lora", "expert-but-lora") == trained(*LORA_ONLY)
    expert = trained("all-but-expert")
    assert {"gemma/layers/experts/1/q/kernel", "state_proj/bias", "gemma/norms/1/scale"} <= expert
    others = ("vision", "gemma/embedding", "gemma/norms/0", "gemma/layers/experts/0")
    assert not any(name.startswith(others) for name in expert)
    with pytest.raises(UserError, match=r"config.frozen: '\^vison' is found in no parameter's name; one is vision/"):
        memory.plan(lora_config(frozen=("^vison",)))


def test_lora_by_flags():
    def of(*flags: str) -> Train:
        code = "from experiments import flags, train\nflags.run(lambda: print(flags.config()))"
        command = [sys.executable, "-c", code, "--config=pi0_aloha:debug", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    text = of("--config.model.language.lora.rank=3", "--config.optimizer.ema=0.5")
    assert "Lora(rank=3, alpha=3.0, targets=('attn', 'mlp'))" in text and "ema=0.5" in text and "save='trained'" in text
    assert repr(FROZEN["language-but-lora"]) in text and repr(FROZEN["expert-but-lora"]) not in text


def test_a_fresh_adapter_changes_nothing_and_a_base_checkpoint_is_completed(tmp_path):
    config = lora_config()
    plain = build(Train, pi0_aloha.get_config("debug")).model
    weights = init.Fresh(plain, 3)
    directory = base_checkpoint(tmp_path / "base", 3)
    start = starting.point(tmp_path / "run", dataclasses.replace(config, init=str(directory)), resume=False)
    assert np.abs(start.weights["gemma/layers/experts/1/o/lora_a"]).max() > 0
    assert not start.weights["gemma/layers/experts/1/o/lora_b"].any()
    batch = batches(config, 1)[0]
    framework = Framework("torch")
    with_, without = framework.load(config.model, start.weights), framework.load(plain, weights)
    args = batch, batch["noise"], batch["time"]
    np.testing.assert_array_equal(with_.loss(*args), without.loss(*args))


def test_configs_and_counts():
    config = build(Train, pi0_aloha_lora.get_config("base"))
    assert (config.model.language.lora, config.model.expert.lora) == (Lora(16, 16.0), Lora(32, 32.0))
    assert config.optimizer.ema == 0 and config.frozen == LORA_ONLY
    assert build(Train, to_dict(config)) == config
    assert checkpoint.describe_difference(build(Train, to_dict(config)), config) is None
    total, trained = memory.count_params(config.model, config.frozen)
    base, _ = memory.count_params(build(Train, pi0_aloha.get_config("base")).model)
    rank_sum = {
        "language": 18 * 16 * (8 * (2048 + 256) + 2 * (2048 + 256) + 8 * (256 + 2048) + 3 * (2048 + 16384)),
        "expert": 18 * 32 * (8 * (1024 + 256) + 2 * (1024 + 256) + 8 * (256 + 1024) + 3 * (1024 + 4096)),
    }
    assert total - base == sum(rank_sum.values())
    assert sum(rank_sum.values()) < trained < base / 5  # the vision tower and projections too
    nothing = dataclasses.replace(TINY.expert, lora=Lora(0, 1.0))
    with pytest.raises(UserError, match=r"^config.model.expert: lora.rank=0, .*adapts nothing"):
        dataclasses.replace(TINY, expert=nothing)
    with pytest.raises(UserError, match=r"lora\.rnk: no such field"):
        build(Gemma, {**to_dict(TINY.language), "lora": {"rnk": 1}}, "config.model.language")


def test_a_mixture_of_adapted_and_plain_weights_is_refused(tmp_path):
    theirs = openpi_checkpoint(tmp_path / "whole", adapted())
    theirs.pop(f"{LLM}/attn/kv_einsum_1/lora_a"), theirs.pop(f"{LLM}/attn/kv_einsum_1/lora_b")
    orbax_io.write(tmp_path / "part" / "params", {f"params/{n}": t for n, t in theirs.items()})
    with pytest.raises(UserError, match=r"9 LoRA adapters .* none at .*kv_einsum_1/lora_a.*--merge-lora"):
        formats.open_checkpoint(tmp_path / "part", **OPTIONS)
    merged = formats.open_checkpoint(tmp_path / "part", merge_lora=True, **OPTIONS).canonical()
    name = "gemma/layers/experts/1/k/kernel"
    np.testing.assert_array_equal(merged[name][1], theirs[f"{LLM}/attn/kv_einsum_1/w"][1, 0, 0])
