"""The command: every pair of formats there and back to the byte, whole or not at all, one line for a mistake."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from frameworks import opened
from hypothesis import HealthCheck, given, settings

from convert import __main__ as command
from convert import formats, tables, target
from convert.layout import OURS
from convert.source import Source
from openpi_port import safetensors_io
from openpi_port.checkpoint import NORM_STATS, TRAIN_STATE
from openpi_port.errors import UserError
from tests.test_tables import models, random_weights, same

GOLDEN = {
    "openpi": "openpi/{}",
    "openpi-torch": "openpi/{}/openpi_pytorch",
    "lerobot": "lerobot/{}/pretrained",
    "lerobot 0.6": "lerobot/{}/pretrained_v062",
}
PAIRS = [
    (kind, name, to)
    for kind in ("pi0", "pi05", "pi0_fast")
    for name, to in itertools.product(GOLDEN, target.SIDES)
    if (kind, name) != ("pi0_fast", "openpi-torch")
]


def files(path: Path) -> dict[str, str]:
    """Hash of every file below a directory."""
    return {
        str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in path.rglob("*") if f.is_file()
    }


def hashes(source: Source) -> dict[str, str]:
    """Hash of every canonical tensor."""
    weights = source.canonical()
    return {n: f"{weights.dtypes[n]} {hashlib.sha256(weights[n].tobytes()).hexdigest()}" for n in weights}


@pytest.mark.parametrize(("kind", "name", "to"), PAIRS)
def test_there_and_back_is_the_same_policy_to_the_bit(golden, tmp_path, kind, name, to):
    path = golden / GOLDEN[name].format(kind)
    source = formats.open_checkpoint(path)
    target.write(source, tmp_path / "there", to)
    there = formats.open_checkpoint(tmp_path / "there")
    assert there.format == to
    assert there.model == source.model
    target.write(there, tmp_path / "back", source.format)
    back = formats.open_checkpoint(tmp_path / "back")
    assert hashes(source) == hashes(there) == hashes(back)
    assert source.settings.items() <= back.settings.items()
    if source.format != "openpi":  # whose files hold times and random names
        before, after = files(path), files(tmp_path / "back")
        before.pop("report.json", None)  # not the checkpoint's, but of those who made it
        assert before.items() <= after.items()
    if source.norm_stats:
        assert _numbers(source.norm_stats) == _numbers(there.norm_stats) == _numbers(back.norm_stats)


def _numbers(stats) -> dict:
    return {k: [getattr(s, f).tolist() for f in ("mean", "std", "q01", "q99")] for k, s in stats.items()}


# Tours through all formats: the one of stride k goes from format i to i + k. As their number is prime, the strides
# together go from every format to every other, each way once.
@pytest.mark.parametrize("stride", range(1, len(target.SIDES)))
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(models(most_layers=2))
def test_every_pair_of_formats_for_any_architecture(tmp_path, stride, model):
    tour = [list(target.SIDES)[i * stride % len(target.SIDES)] for i in range(len(target.SIDES) + 1)]
    weights = random_weights(model, ml_dtypes.bfloat16)
    source = Source("flax", tmp_path, OURS, weights, model)
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        for number, to in enumerate(tour):
            path = Path(folder, str(number))
            target.write(source, path, to)
            source = formats.open_checkpoint(path)
            assert (source.format, source.model) == (to, model)
            assert same(dict(source.canonical()), weights)


def test_the_command_prints_what_became_what(golden, tmp_path, capsys):
    assert command.main([str(golden / "openpi/pi05/openpi_pytorch"), str(tmp_path / "out"), "--to=flax"]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"gemma_expert.model.layers.\{0..2\}.self_attn.k_proj.weight +gemma/layers/experts/1/k/kernel", out
    )
    assert "[32, 32] -> [3, 32, 32]" in out
    assert "tied: the output head is the token embedding" in out
    assert "unused head" in out
    assert "288,680 parameters" in out
    policy = json.loads((tmp_path / "out/policy.json").read_text())
    assert policy["model"]["time_in"] == "adarms"
    assert (tmp_path / "out" / NORM_STATS).exists()


def test_without_a_target_the_command_only_looks(golden, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main([str(golden / "openpi/pi0"), "--to=lerobot"]) == 0
    assert "model.paligemma" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to=opnpi"], "--to=opnpi: did you mean openpi"),
        ([], "required: --to"),
        (["--to=flax", "--fast"], "--fast: no such argument"),
        (["--to=flax", "--model.acton_dim=3"], "acton_dim: no such field.*action_dim"),
        (["--to=flax", "--model.vision.num_heads=4"], "num_heads=4 contradicts the weights, which say 2"),
        (["--to=flax", "--model.vision.heads=4"], "vision.heads: no such field"),
    ],
)
def test_mistakes_are_one_line_and_status_2(golden, tmp_path, capsys, arguments, words):
    assert command.main([str(golden / "openpi/pi0"), str(tmp_path / "out"), *arguments]) == 2
    message = capsys.readouterr().err
    assert re.search(words, message)
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(golden, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").touch()
    assert command.main([str(golden / "openpi/pi0"), str(tmp_path / "out"), "--to=torch"]) == 2
    said = capsys.readouterr()
    assert "exists already" in said.err and not said.out  # before the table
    assert (tmp_path / "out/precious").exists()
    assert command.main([str(golden / "openpi/pi0"), str(tmp_path / "no/out"), "--to=torch"]) == 2
    assert "no directory" in capsys.readouterr().err


@pytest.mark.parametrize("to", target.SIDES)
def test_a_disk_that_fills_leaves_nothing(golden, tmp_path, monkeypatch, to):
    before = files(golden / "openpi/pi0")
    written = []

    def full(num_bytes):
        written.append(num_bytes)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="the disk is full"):
        target.write(formats.open_checkpoint(golden / "openpi/pi0"), tmp_path / "out", to, full)
    assert not list(tmp_path.iterdir())
    assert files(golden / "openpi/pi0") == before


def test_too_little_room_is_found_before_writing(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match="1.1 MB needed, 0.0 MB free"):
        target.write(formats.open_checkpoint(golden / "openpi/pi0"), tmp_path / "out", "flax")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_conversion_leaves_no_half_made_directory(golden, tmp_path, number):
    program = (
        "import time, sys; from convert import __main__, target\n"
        "real = target.safetensors_io.write\n"
        "def slow(path, tensors, metadata=None, progress=None):\n"
        "    def stop(n): print('half', flush=True); time.sleep(60)\n"
        "    real(path, tensors, metadata, stop)\n"
        "target.safetensors_io.write = slow\n"
        f"sys.exit(__main__.main([{str(golden / 'openpi/pi0')!r}, {str(tmp_path / 'out')!r}, '--to=torch', '--quiet']))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "half\n"
    assert list(tmp_path.iterdir())
    process.send_signal(number)
    process.wait(10)
    assert not (tmp_path / "out").exists()
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert not list(tmp_path.iterdir())
    target.write(formats.open_checkpoint(golden / "openpi/pi0"), tmp_path / "out", "torch")  # tidies up after a kill
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_lerobots_files_are_renewed_when_they_no_longer_hold(golden, tmp_path):
    target.write(formats.open_checkpoint(golden / "lerobot/pi0/pretrained"), tmp_path / "ours", "torch")
    stats = json.loads((tmp_path / "ours" / NORM_STATS).read_text())
    stats["norm_stats"]["state"]["mean"][0] += 1
    (tmp_path / "ours" / NORM_STATS).write_text(json.dumps(stats))
    target.write(formats.open_checkpoint(tmp_path / "ours"), tmp_path / "back", "lerobot")
    back = formats.open_checkpoint(tmp_path / "back")
    assert back.norm_stats["state"].mean.tolist() == stats["norm_stats"]["state"]["mean"]
    (state,) = (tmp_path / "back").glob("policy_preprocessor*.safetensors")
    assert safetensors_io.Arrays(state)["observation.state.mean"][0] == np.float32(
        stats["norm_stats"]["state"]["mean"][0]
    )


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_what_is_written_for_lerobot_has_the_fields_of_lerobots_own(golden, tmp_path, kind):
    """A policy that never was in LeRobot gets the same files as one that was, but for training settings."""
    target.write(formats.open_checkpoint(golden / "openpi" / kind), tmp_path / "out", "lerobot")
    theirs = golden / "lerobot" / kind / "pretrained"
    own, want = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "out", theirs))
    assert own.keys() <= want.keys()
    for field in ("type", "chunk_size", "max_action_dim", "normalization_mapping", "image_resolution", "dtype"):
        assert own[field] == want[field]
    for processor in ("policy_preprocessor.json", "policy_postprocessor.json"):
        own, want = (json.loads((p / processor).read_text())["steps"] for p in (tmp_path / "out", theirs))
        assert [s["registry_name"] for s in own] == [s["registry_name"] for s in want]
        assert [s["config"].keys() for s in own] == [s["config"].keys() for s in want]
        assert [s.get("state_file") for s in own] == [s.get("state_file") for s in want]


def test_what_lerobot_can_not_express_is_said(golden, tmp_path, capsys):
    target.write(formats.open_checkpoint(golden / "openpi/pi0"), tmp_path / "ours", "flax")
    policy = json.loads((tmp_path / "ours/policy.json").read_text())
    policy["data"] = {"robot": "aloha", "norm": "zscore", "delta": [True]}
    policy["tokenizer"] = {"spec": "small", "sha256": ""}
    (tmp_path / "ours/policy.json").write_text(json.dumps(policy))
    assert command.main([str(tmp_path / "ours"), "--to=lerobot"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("robots/aloha.py", "differences to the state", "'small'"))
    assert command.main([str(golden / "lerobot/pi0/pretrained"), "--to=lerobot"]) == 0
    assert "around the policy" not in capsys.readouterr().out


def test_training_state_goes_along(golden, tmp_path):
    source = formats.open_checkpoint(golden / "openpi/pi0")
    target.write(source, tmp_path / "flax", "flax")
    moments = random_weights(source.model, np.float32, seed=1)
    frozen = [n for n in moments if n.startswith("vision/")]
    state = {f"mu/{n}": t for n, t in moments.items() if n not in frozen}
    (tmp_path / "flax" / TRAIN_STATE).mkdir()
    target.orbax_io.write(tmp_path / "flax" / TRAIN_STATE / "params", state)
    target.write(formats.open_checkpoint(tmp_path / "flax"), tmp_path / "torch", "torch")
    moved = safetensors_io.Arrays(tmp_path / "torch" / TRAIN_STATE / "model.safetensors")
    want = tables.translate(moments, source.model, "flax", "torch")
    assert moved.keys() == {f"mu/{n}" for n in want if not n.startswith("vision.")}
    for name in moved:
        np.testing.assert_array_equal(moved[name], want[name.removeprefix("mu/")])
    target.write(formats.open_checkpoint(tmp_path / "torch"), tmp_path / "back", "flax")
    back = target.orbax_io.Arrays(tmp_path / "back" / TRAIN_STATE / "params")
    assert back.keys() == state.keys()
    assert all(np.array_equal(np.asarray(back[n]), state[n]) for n in state)


def test_memory_stays_far_below_the_size_of_the_model(tmp_path):
    """Half a gigabyte of weights, of which no tensor is larger than 50 MB, in 200 MB beyond the imports."""
    program = f"""
import pathlib, resource
import numpy as np
from convert import formats, tables, target
from convert.layout import OURS, side_shapes
from convert.source import Source
from openpi_port import config
g = lambda w: config.Gemma(w, 12, 1024, 4, 1, 64)
model = config.Pi0(config.Siglip(64, 1, 64, 2, 14), g(1024), g(256), 8000, 8)
shapes = side_shapes(tables.entries(model), OURS)
weights = {{n: np.broadcast_to(np.float32(1), s) for n, s in shapes.items()}}
root = pathlib.Path({str(tmp_path)!r})
source = Source('flax', root, OURS, weights, model)
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
target.write(source, root / 'a', 'torch')
target.write(formats.open_checkpoint(root / 'a'), root / 'b', 'openpi')
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024, target.num_bytes(source.canonical()) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    used, size = map(float, done.stdout.split())
    assert used < size, (used, size)


def test_converting_imports_no_framework(golden, tmp_path):
    program = (
        "import sys; from convert import __main__\n"
        f"__main__.main([{str(golden / 'openpi/pi0')!r}, {str(tmp_path / 'out')!r}, '--to=torch', '--quiet'])\n"
        "assert not {'jax', 'flax', 'torch', 'orbax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_rounding_is_asked_for(golden, tmp_path):
    """`--dtype=bfloat16` rounds every tensor once, and only then."""
    source = golden / "openpi" / "pi0"
    assert command.main([str(source), str(tmp_path / "rounded"), "--to=torch", "--dtype=bfloat16", "--quiet"]) == 0
    weights, _ = opened(source)
    rounded, _ = opened(tmp_path / "rounded")
    for name, value in weights.items():
        assert rounded[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(rounded[name], value.astype(ml_dtypes.bfloat16))
    assert command.main([str(source), "--to=torch", "--dtype=float8", "--quiet"]) == 2
