"""`python -m convert.parity`: its verdicts, its page, its batches, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from traces import TOLERANCE

from configs import pi0_aloha
from convert import formats, parity, parity_batch, parity_page, parity_rows
from openpi_port.checkpoint import Policy
from openpi_port.config import Train
from openpi_port.errors import UserError
from openpi_port.fields import build


@pytest.fixture(scope="module")
def checkpoint(golden):
    return golden / "openpi" / "pi05"


def command(*args: str) -> int:
    return parity.main([*map(str, args), "--backend-a=torch", "--backend-b=torch", "--device=cpu"])


def test_command(checkpoint, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert command(checkpoint, checkpoint / "openpi_pytorch", "--batch=golden", f"--out={page}") == 0
    out = capsys.readouterr().out
    for stage in set(parity_rows.STAGES) - {"decode"}:
        assert re.search(rf"^{stage}: \d+ tensors agree$", out, re.MULTILINE), stage
    assert page.read_text().count("data:image/png;base64,") == 4


def test_command_finds_a_difference(checkpoint, tmp_path, capsys):
    """One weight of one layer in a copy of the checkpoint."""
    from openpi_port.pi_torch import weights as weights_io

    source = formats.open_checkpoint(checkpoint / "openpi_pytorch")
    changed = dict(source.to("torch"))
    name = "gemma.layers.1.experts.0.up.weight"
    changed[name] = changed[name] + np.float32(0.05)
    weights_io.write_params(tmp_path / "model.safetensors", changed)
    described = formats.open_checkpoint(checkpoint).model
    (tmp_path / "policy.json").write_text(json.dumps({"format": 1, "model": dataclasses.asdict(described)}))
    page = tmp_path / "page.html"
    assert command(checkpoint, tmp_path, "--parts=forward", f"--out={page}") == 1
    out = capsys.readouterr().out
    assert "first tensor beyond tolerance: layers/01/language/mlp" in out
    assert re.search(r"layers/01/language/mlp .*<- first", out)
    assert "<tr class='first beyond'><td>layers/01/language/mlp</td>" in page.read_text()


def test_gradients_of_rounded_weights(checkpoint):
    """Weights in bfloat16 have gradients in float32 where that is compared."""
    source = formats.open_checkpoint(checkpoint / "openpi_pytorch").rounded("bfloat16")
    side = parity.Side(source, "torch", device="cpu")
    ((_, gradients),) = side.traced(parity_batch.golden(source.model), ["gradients"])
    assert any((grad != grad.astype("bfloat16")).any() for _, grad in gradients)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--parts=gradient"], "gradients"),
        (["--batch-size=0"], "--batch-size=0"),
        (["--batch=dataset"], "use --batch=random"),
        (["--batch=golden", "--model.max_token_len=20"], "max_token_len 16"),
        (["--nonsense=1"], "--nonsense=1: no such argument"),
        (["--dtype=float16"], "float16"),
    ],
)
def test_command_mistakes(checkpoint, capsys, args, message):
    assert command(checkpoint, checkpoint, *args) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_batch_of_the_checkpoints_own_data(tmp_path):
    train = build(Train, pi0_aloha.get_config("debug"))
    policy = Policy(train, step=0, framework="torch", tokenizer_sha256="").to_json()
    (tmp_path / "policy.json").write_text(json.dumps(policy))
    source = SimpleNamespace(path=tmp_path, settings=policy, model=train.model, norm_stats=None)
    batch, again = (parity_batch.make("dataset", source, size=2, seed=0) for _ in range(2))
    random = parity_batch.random(train.model, 2, seed=0)
    assert {k: v.shape for k, v in batch.items() if k not in ("image", "image_mask")} == {
        k: v.shape for k, v in random.items() if k not in ("image", "image_mask")
    }
    assert {k: v.shape for k, v in batch["image"].items()} == {k: v.shape for k, v in random["image"].items()}
    np.testing.assert_array_equal(batch["noise"], again["noise"])
    assert np.abs(batch["state"]).max() < 20  # normalised


def test_different_architectures(golden, capsys):
    assert command(golden / "openpi" / "pi0", golden / "openpi" / "pi05") == 2
    assert "different architectures: " in capsys.readouterr().err


def test_different_habits_of_pi0_fast(golden, capsys):
    """Where the weights don't say how tokens are numbered, the command must."""
    sides = (golden / "openpi/pi0_fast", golden / "lerobot/pi0_fast/pretrained")
    assert command(*sides, "--model.max_token_len=16", "--model.missing_cameras=masked") == 2
    assert "positions is openpi and contiguous" in capsys.readouterr().err
    assert command(golden / "openpi/pi0", golden / "openpi/pi0_fast") == 2
    assert "different architectures: Pi0 and Pi0Fast" in capsys.readouterr().err


def test_not_finite_is_beyond_tolerance():
    x = np.array([1.0, np.nan], np.float32)
    assert not parity_rows.compare("a/b", x, x, TOLERANCE).ok
    assert not parity_rows.compare("a/b", x[:1], x[:1] + np.float32(2e-4), TOLERANCE).ok
    assert not parity_rows.compare("a/b", x, x[:1], TOLERANCE).ok
    assert parity_rows.compare("a/b", 0 * x[:1], 0 * x[:1], TOLERANCE).ok
    with pytest.raises(UserError, match="not the same architecture"):
        list(parity_rows.compare_traces([("a", x)], [("b", x)], TOLERANCE, np.ones((1, 1), bool)))


def test_page_of_part_of_a_report():
    """Without masks and trajectories there are no pictures of them."""
    row = parity_rows.compare("gradients/w", np.ones(3, np.float32), np.zeros(3, np.float32), TOLERANCE)
    html = parity_page.page(parity.Report("<a>", "b", "float32", TOLERANCE, "random", [row], {}))
    assert html.count("data:image/png") == 1 and "&lt;a&gt;" in html and "diverges at gradients/w" in html
