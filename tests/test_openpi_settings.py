"""What openpi's checkpoints don't say of themselves: asked for where it matters, and stated on every way in."""

from __future__ import annotations

import json
import shutil

import commands
import numpy as np
import pytest
from conftest import ROOT
from frameworks import NAMES, opened

from configs import pi05_libero
from convert import __main__ as command
from convert import formats, lerobot
from openpi_port import Policy, UserError, loading, starting, transforms
from openpi_port.config import Train
from openpi_port.fields import build, to_dict

ROBOT = {"robot": "libero", "tokenizer": "small", "data": {"cameras": {"base_0_rgb": "observation/image"}}}


@pytest.fixture
def published(golden, tmp_path):
    """A checkpoint as openpi publishes them: weights and statistics, and not a word more."""
    path = tmp_path / "pi05_libero"
    for part in ("params", "assets"):
        shutil.copytree(golden / "openpi" / "pi05" / part, path / part)
    file = next(path.glob("assets/*/norm_stats.json"))
    stats = json.loads(file.read_text())
    for key, dims in (("state", 8), ("actions", 7)):
        group = stats["norm_stats"][key]
        stats["norm_stats"][key] = {name: (values * 8)[:dims] for name, values in group.items()}
    file.write_text(json.dumps(stats))
    return path


def observation(seed: int) -> dict:
    state = np.random.default_rng(seed).uniform(-1, 1, 8).astype(np.float32)
    return {"observation/image": np.zeros((224, 224, 3), np.uint8), "observation/state": state, "prompt": "put it down"}


def test_a_policy_asks_how_long_a_chunk_is(published, tmp_path, capsys):
    with pytest.raises(UserError, match=r"does not say its action_horizon: .*--model.action_horizon="):
        loading.open_parts(published, **ROBOT)
    assert loading.open_parts(published, **ROBOT, action_horizon=10).source.model.action_horizon == 10
    assert command.main([str(published), str(tmp_path / "unsaid"), "--to=torch"]) == 0
    assert "action_horizon=50 is assumed" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not say its action_horizon"):  # nor does what was made of it
        loading.open_parts(tmp_path / "unsaid", **ROBOT)
    said = ["--model.action_horizon=10", "--model.state_in=none"]
    assert command.main([str(published), str(tmp_path / "said"), "--to=flax", *said]) == 0
    assert "assumed" not in capsys.readouterr().out
    model = loading.open_parts(tmp_path / "said", **ROBOT).source.model
    assert (model.action_horizon, model.state_in, model.max_token_len) == (10, "none", 200)


def test_without_the_state_a_prompt_is_the_instruction(published):
    tokens = {}
    for state_in in ("none", "prompt"):
        parts = loading.open_parts(published, **ROBOT, action_horizon=10, state_in=state_in)
        steps = transforms.pipeline(parts.data, parts.source.model, parts.source.norm_stats, parts.tokenizer)
        for seed in (0, 1):
            tokens[state_in, seed] = transforms.forward(steps, observation(seed))["tokenized_prompt"]
    np.testing.assert_array_equal(tokens["none", 0], tokens["none", 1])
    np.testing.assert_array_equal(tokens["none", 0], parts.tokenizer.encode("put it down", None, 200)[0])
    assert (tokens["prompt", 0] != tokens["prompt", 1]).any() and (tokens["prompt", 0] != tokens["none", 0]).any()


@pytest.mark.parametrize("backend", NAMES)
def test_nothing_of_the_state_reaches_the_model(published, backend):
    policy = Policy.from_pretrained(published, backend, **ROBOT, action_horizon=10, state_in="none")
    noise = np.zeros(policy.noise_shape, np.float32)
    one, other = (policy.infer(observation(seed), noise)["actions"] for seed in (0, 1))
    assert one.shape == (10, 7)
    np.testing.assert_array_equal(one, other)


def test_the_flags_say_the_same(published):
    given = [f"--checkpoint={published}", "--robot=libero", "--tokenizer=small", "--out=/dev/null"]
    done = commands.run("experiments.inspect", *given)
    assert done.returncode == 2 and "--model.action_horizon=" in done.stderr
    wrong = commands.run("experiments.inspect", *given, "--model.acton_horizon=10")
    assert wrong.returncode == 2 and "action_horizon" in wrong.stderr


def test_training_without_the_state_begins_with_weights_that_saw_it(golden):
    _, model = opened(golden / "openpi" / "pi05")
    assert model.state_in == "prompt"
    config = pi05_libero.get_config("debug")
    assert config.model.state_in == "none" and config.model.action_horizon == 10
    fields = to_dict(build(Train, config)) | {
        "model": to_dict(model) | {"state_in": "none"}, "init": str(golden / "openpi" / "pi05")
    }  # fmt: skip
    weights = starting.weights(build(Train, fields))
    assert set(weights) == set(opened(golden / "openpi" / "pi05")[0])


def test_lerobot_cannot_say_it(published):
    source = formats.open_checkpoint(published, action_horizon=10, state_in="none")
    assert "prompts without the state" in lerobot.inexpressible(source)
    with pytest.raises(UserError, match="state_in='none' contradicts the weights, which say 'suffix'"):
        formats.open_checkpoint(ROOT / "tests/golden/openpi/pi0", state_in="none")
