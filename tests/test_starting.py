"""Where a run begins: the weights that `--config.init=` gives, and those that start fresh."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

import jobs
import numpy as np
import pytest
from frameworks import batch_of, opened

from configs import pi0_aloha
from convert import formats, layout, tables
from openpi_port import base, init, loading, orbax_io, starting
from openpi_port.backends import NAMES, Backend
from openpi_port.config import Train
from openpi_port.errors import UserError


def config_for(out: Path, **changes) -> Train:
    return jobs.debug(pi0_aloha, out, **changes)


def test_checkpoint_of_another_model(golden, tmp_path):
    config = config_for(tmp_path, init=str(golden / "openpi" / "pi0"))
    with pytest.raises(UserError, match="is of another model: vision is"):
        starting.point(tmp_path / "run", config, resume=False)


@pytest.mark.parametrize("backend", NAMES)
def test_start_from_an_openpi_checkpoint(golden, tmp_path, backend):
    """`--config.init=` takes openpi's orbax directory; the trainer's loss is then openpi's."""
    path = golden / "openpi" / "pi0"
    _, model = opened(path)
    config = config_for(tmp_path, init=str(path), model=model, backend=backend)
    point = starting.point(tmp_path / "run", config, resume=False)
    batch = batch_of(path)
    batch["action_is_pad"] = np.zeros(batch["actions"].shape[:2], bool)
    loss = Backend(backend).train.Trainer(config, point.weights, "cpu").evaluate(batch)
    assert loss == pytest.approx(np.load(path / "outputs_float32.npz")["loss"].mean(), abs=1e-4)


@pytest.mark.parametrize("backend", NAMES)
def test_every_stored_chunk_is_decoded_once(golden, tmp_path, monkeypatch, backend):
    """JAX on one device stores all layers of a tensor, gate and up together, in one chunk: 2.4 GB of a base model."""
    decoded = collections.Counter()
    open_ = orbax_io.Arrays.open

    def counted(self, path, context=None):
        decoded[path] += context is not None  # which keeps the chunk, until another tensor is asked for
        return open_(self, path, context)

    monkeypatch.setattr(orbax_io.Arrays, "open", counted)
    path = golden / "openpi" / "pi0"
    loading.fill(formats.open_checkpoint(path), backend, "float32", "cpu")
    config = config_for(tmp_path, init=str(path), model=opened(path)[1], backend=backend, frozen=("",), save="trained")
    assert sum(decoded.values()) > 10 and max(decoded.values()) == 1, decoded.most_common(3)
    decoded.clear()
    weights = starting.weights(config)
    base.of(config, weights)
    assert sum(decoded.values()) > 10 and max(decoded.values()) == 1, decoded.most_common(3)
    decoded.clear()
    module = Backend(backend)
    begun = tables.translate(weights, config.model, layout.OURS, backend)
    module.weights.load(module.infer.build(config.model, config.compute), begun)
    assert sum(decoded.values()) > 10 and max(decoded.values()) == 1, decoded.most_common(3)


@pytest.mark.parametrize("backend", NAMES)
def test_fresh_weights_are_drawn_once(tmp_path, monkeypatch, backend):
    drawn = collections.Counter()
    draw = init.draw
    monkeypatch.setattr(init, "draw", lambda name, *rest: (drawn.update([name]), draw(name, *rest))[1])
    point = starting.point(tmp_path / "run", config_for(tmp_path, backend=backend), resume=False)
    assert not drawn
    assert sum(tensor.size for tensor in point.weights.values()) > 100_000
    assert max(drawn.values()) == 1, drawn.most_common(3)


@pytest.mark.parametrize("kind", ["pi0", "pi05", "pi0_fast"])
def test_start_from_paligemma(golden, tmp_path, kind):
    """`--config.init=` takes vision and language from it; an expert and its projections start as in a fresh run."""
    given, _ = opened(golden / "openpi" / "pi0_fast")  # which is a PaliGemma
    source = formats.open_checkpoint(golden / "openpi" / "pi0_fast")
    theirs = {name.replace("PaliGemma", "params"): np.asarray(t) for name, t in source.tensors.items()}
    np.savez(tmp_path / "pt.npz", **theirs)
    _, model = opened(golden / "openpi" / kind)
    if kind == "pi0_fast":  # PaliGemma has no habits that a run could contradict
        model = dataclasses.replace(model, positions="contiguous")
    config = config_for(tmp_path, init=str(tmp_path / "pt.npz"), model=model, draws=1)
    weights, fresh = starting.weights(config), init.Fresh(model, config.seed)
    assert weights.keys() == fresh.keys()
    for name in weights:
        np.testing.assert_array_equal(weights[name], (given if name in given else fresh)[name])
    expert = sum(name not in given for name in weights)
    assert (expert == 0) == (kind == "pi0_fast")
    with pytest.raises(UserError, match=r"pt.npz: the tensors don't fit the model.*embedding"):
        starting.weights(dataclasses.replace(config, model=dataclasses.replace(model, vocab_size=100)))
