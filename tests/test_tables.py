"""The tables: complete, invertible to the bit for any architecture, and strict."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import tables
from convert.infer import Pi0Fast
from convert.layout import OURS, Translated, num_elements, side_shapes
from openpi_port import config as config_lib
from openpi_port import pi_flax, pi_torch
from openpi_port.errors import UserError
from openpi_port.pi_flax import pi0 as flax_pi0
from openpi_port.pi_flax import weights as flax_weights
from openpi_port.pi_torch import pi0 as torch_pi0
from openpi_port.pi_torch import weights as torch_weights

assert pi_flax and pi_torch


@st.composite
def models(draw: st.DrawFn, most_layers: int = 3):
    """Small models of all three kinds, with any number of kv heads and heads * head_dim != width."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2]))
    depth, head_dim = draw(st.integers(1, most_layers)), draw(st.sampled_from([2, 4]))

    def gemma() -> config_lib.Gemma:
        width, mlp = draw(st.sampled_from([4, 6, 10])), draw(st.sampled_from([3, 8]))
        return config_lib.Gemma(width, depth, mlp, heads, kv_heads, head_dim)

    vit_heads = draw(st.sampled_from([1, 3]))
    vision = config_lib.Siglip(vit_heads * 2, draw(st.integers(1, 2)), 5, vit_heads, 2, 2 * draw(st.integers(1, 3)))
    if draw(st.booleans()):
        return Pi0Fast(vision, gemma(), 7)
    state_in, time_in = draw(st.sampled_from([("suffix", "mlp"), ("prompt", "adarms"), ("suffix", "adarms")]))
    return config_lib.Pi0(vision, gemma(), gemma(), 7, 3, 4, 5, state_in=state_in, time_in=time_in)


def random_weights(model, dtype, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = side_shapes(tables.entries(model), OURS)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


@settings(max_examples=25, deadline=None)
@given(models(), st.sampled_from([np.float32, ml_dtypes.bfloat16]), st.permutations(tables.SIDES))
def test_any_way_round_comes_back_to_the_bit(model, dtype, sides):
    weights = random_weights(model, dtype)
    here, side = weights, OURS
    for target in [*sides, OURS]:
        here, side = dict(tables.translate(here, model, side, target)), target
    assert same(here, weights)


@settings(max_examples=15, deadline=None)
@given(models())
def test_no_name_is_used_twice_and_every_element_has_a_place(model):
    shapes = {side: side_shapes(tables.entries(model), side) for side in tables.SIDES}
    assert len({num_elements(s) for s in shapes.values()}) == 1
    for side in tables.SIDES:
        spots = [(spot := entry.spot(side, i)).name + str(spot.index) for entry in tables.entries(model)
                 for i in entry.layers]  # fmt: skip
        assert len(spots) == len(set(spots))


@settings(max_examples=8, deadline=None)
@given(models().filter(lambda model: isinstance(model, config_lib.Pi0)))
def test_the_models_have_exactly_the_names_of_the_tables(model):
    abstract = nnx.eval_shape(lambda: flax_pi0.Pi0(model, config_lib.Compute()))
    assert flax_weights.shapes(abstract) == side_shapes(tables.entries(model), OURS)
    with torch.device("meta"):
        meta = torch_pi0.Pi0(model, config_lib.Compute())
    assert torch_weights.shapes(meta) == side_shapes(tables.entries(model), "torch")


def base(**mechanisms) -> config_lib.Pi0:
    vision, language, expert = (x["base"] for x in (config_lib.SIGLIP, config_lib.LANGUAGE, config_lib.EXPERT))
    return config_lib.Pi0(vision, language, expert, **mechanisms)


@pytest.mark.parametrize(
    ("mechanisms", "count"),
    [({}, 3_238_048_528), ({"state_in": "prompt", "time_in": "adarms"}, 3_353_433_872)],
    ids=["pi0", "pi05"],
)
def test_full_size_names_shapes_and_counts_without_allocating(mechanisms, count):
    model = base(**mechanisms)
    for side in tables.SIDES:
        assert num_elements(side_shapes(tables.entries(model), side)) == count
    abstract = nnx.eval_shape(lambda: flax_pi0.Pi0(model, config_lib.Compute()))
    assert flax_weights.shapes(abstract) == side_shapes(tables.entries(model), OURS)
    with torch.device("meta"):
        meta = torch_pi0.Pi0(model, config_lib.Compute())
    assert torch_weights.shapes(meta) == side_shapes(tables.entries(model), "torch")


def test_full_size_shapes_on_the_foreign_sides():
    openpi = side_shapes(tables.entries(base()), "openpi")
    assert openpi["PaliGemma/llm/layers/mlp/gating_einsum"] == (18, 2, 2048, 16384)
    assert openpi["PaliGemma/llm/layers/attn/kv_einsum_1/w"] == (18, 2, 1, 1024, 256)
    assert openpi["PaliGemma/img/embedding/kernel"] == (14, 14, 3, 1152)
    hf = side_shapes(tables.entries(base()), "hf")
    assert hf["paligemma_with_expert.gemma_expert.model.layers.17.self_attn.o_proj.weight"] == (1024, 2048)
    assert hf[f"{tables.VIT}.encoder.layers.26.mlp.fc1.weight"] == (4304, 1152)
    fast = Pi0Fast(config_lib.SIGLIP["base"], config_lib.LANGUAGE["base"])
    assert round(num_elements(side_shapes(tables.entries(fast), OURS)) / 1e9, 3) == 2.923


DEBUG = config_lib.Pi0(
    config_lib.Siglip(4, 1, 8, 2, 2, 4), config_lib.Gemma(4, 2, 8, 2, 1, 4), config_lib.Gemma(6, 2, 8, 2, 1, 4), 9, 3
)


def test_heads_and_slots_land_where_openpi_puts_them():
    """Spelled out by hand, so that an error in the pattern language can't hide behind its own inverse."""
    weights = random_weights(DEBUG, np.float32)
    openpi = tables.translate(weights, DEBUG, OURS, "openpi")
    k = weights["gemma/layers/experts/1/k/kernel"]
    np.testing.assert_array_equal(openpi["PaliGemma/llm/layers/attn/kv_einsum_1/w"][1, 0, 0], k[1])
    q = weights["gemma/layers/experts/0/q/kernel"]  # [L, D, N * H] to [L, N, D, H]
    np.testing.assert_array_equal(openpi["PaliGemma/llm/layers/attn/q_einsum/w"][1, 1], q[1][:, 4:8])
    up = weights["gemma/layers/experts/0/up/kernel"]
    np.testing.assert_array_equal(openpi["PaliGemma/llm/layers/mlp/gating_einsum"][:, 1], up)
    hf = tables.translate(weights, DEBUG, OURS, "hf")
    patch = weights["vision/patch_embed/kernel"].reshape(2, 2, 3, 4)  # row, column, colour, width
    conv = hf[f"{tables.VIT}.embeddings.patch_embedding.weight"]
    np.testing.assert_array_equal(conv[3, 2, 1, 0], patch[1, 0, 2, 3])
    o = weights["gemma/layers/experts/1/o/kernel"]
    np.testing.assert_array_equal(hf[f"{tables.EXPERTS[1]}.layers.1.self_attn.o_proj.weight"], o[1].T)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("vision/norm/scale"), "missing vision/norm/scale"),
        (lambda w: w.update({"vision/norm/scales": w.pop("vision/norm/scale")}), "did you mean vision/norm/scales"),
        (lambda w: w.update({"extra": np.zeros(1)}), "unknown extra"),
        (lambda w: w.update({"gemma/embedding": np.zeros((9, 5))}), r"gemma/embedding is \(9, 5\), not \(9, 4\)"),
    ],
)
def test_every_tensor_is_accounted_for(change, words):
    weights = random_weights(DEBUG, np.float32)
    change(weights)
    with pytest.raises(UserError, match=words):
        tables.translate(weights, DEBUG, OURS, "torch")
    with pytest.raises(UserError, match=words):
        flax_weights.load(nnx.eval_shape(lambda: flax_pi0.Pi0(DEBUG, config_lib.Compute())), weights)


def test_dtypes_that_would_be_mixed_in_one_tensor_are_an_error():
    weights = random_weights(DEBUG, np.float32)
    name = "gemma/layers/experts/0/k/kernel"
    weights[name] = weights[name].astype(ml_dtypes.bfloat16)
    there = tables.translate(weights, DEBUG, OURS, "torch")["gemma.layers.0.experts.0.k.weight"]
    assert there.dtype == ml_dtypes.bfloat16
    with pytest.raises(UserError, match=r"kv_einsum.*bfloat16.*float32"):
        tables.translate(weights, DEBUG, OURS, "openpi")


def test_tensors_are_made_only_when_asked_for():
    class Counting(dict):
        asked = 0

        def __getitem__(self, name):
            Counting.asked += 1
            return super().__getitem__(name)

    weights = Counting(random_weights(DEBUG, np.float32))
    Counting.asked = 0
    lazy = Translated(tables.entries(DEBUG), weights, OURS, "torch")
    Counting.asked = 0  # the dtypes were looked at
    assert lazy["gemma.embedding"].shape == (9, 4)
    assert Counting.asked == 1


def test_both_backends_hold_what_they_were_given():
    for dtype in (np.float32, ml_dtypes.bfloat16):
        weights = random_weights(DEBUG, dtype)
        model = nnx.eval_shape(lambda: flax_pi0.Pi0(DEBUG, config_lib.Compute()))
        assert same(flax_weights.arrays(flax_weights.load(model, weights)), weights)
        theirs = tables.translate(weights, DEBUG, OURS, "torch")
        with torch.device("meta"):
            meta = torch_pi0.Pi0(DEBUG, config_lib.Compute())
        theirs = {name: array.copy() for name, array in theirs.items()}
        given = {name: array.copy() for name, array in theirs.items()}
        model = torch_weights.load(meta, given)
        for array in given.values():
            array[...] = 0
        assert same(torch_weights.arrays(model), theirs)  # in memory of their own
