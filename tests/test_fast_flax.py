"""Pieces of the prepared path that only Flax has: inputs in one piece, shapes that programs share."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_policy import MODEL

from experiments.bench_parts import random_batch
from openpi_port import batch as batches
from openpi_port.pi_flax.fast import flow, options, prepare, transfer


def test_inputs_in_one_piece():
    rng = np.random.default_rng(0)
    tree = flow.Inputs(
        images=rng.integers(0, 256, (1, 1, 3, 3, 3), np.uint8),
        prompt=np.array([[3, -1, 2**31 - 1]], np.int32)[:, ::-1],  # not contiguous
        order=None,
        length=np.array([7], np.int32),
        noise=rng.standard_normal((1, 2, 3), np.float32),
    )
    flat, layout = transfer.pack(tree)
    back = jax.jit(transfer.unpack, static_argnums=1)(flat, layout)
    assert flat.dtype == np.uint8 and hash(layout) == hash(transfer.pack(tree)[1])
    jax.tree.map(np.testing.assert_array_equal, tree, back)
    assert back.prompt.dtype == jnp.int32 and back.images.dtype == jnp.uint8


@pytest.mark.parametrize(("align", "lengths"), [(8, [16, 24, 24]), (128, [24, 24, 24])])
def test_prompts_of_one_tile_share_a_shape(align, lengths):
    """Twelve image tokens, and prompts that `trim` cuts to about a third, two thirds and the whole of twelve."""
    found = []
    for used in (1, 8, 12):
        batch = random_batch(MODEL, 2)
        batch["tokenized_prompt_mask"] = np.arange(12) < np.array([[1], [used]])
        trimmed = batches.trim(batch, MODEL)
        trimmed["tokenized_prompt"] = trimmed["tokenized_prompt"][:, : max(4, used)]
        trimmed["tokenized_prompt_mask"] = trimmed["tokenized_prompt_mask"][:, : max(4, used)]
        inputs = prepare._observe(trimmed, MODEL, flow.Options(align=align))
        assert inputs.length.tolist() == [13, 12 + used]
        found.append(12 + inputs.prompt.shape[1])
    assert found == lengths


def test_programs_are_kept_for_accelerators_alone(monkeypatch, tmp_path):
    kept = {}
    monkeypatch.setattr(jax.config, "update", kept.__setitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    where = jax.config.jax_compilation_cache_dir
    options.keep_programs(SimpleNamespace(platform="cpu"))
    options.keep_programs(SimpleNamespace(platform="gpu"))
    if where:  # the tests have a cache of their own, which is left alone
        assert not kept
    else:
        assert kept["jax_compilation_cache_dir"] == str(tmp_path / "openpi_port" / "jax")
