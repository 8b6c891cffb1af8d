"""Reading every format: golden checkpoints agree to the bit, damaged and foreign ones say what is wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from frameworks import opened

from convert import formats, tables, target
from convert.layout import OURS, side_shapes
from convert.source import Source
from openpi_port import loading, orbax_io, safetensors_io
from openpi_port.errors import UserError
from openpi_port.normalize import load_norm_stats

KINDS = ("pi0", "pi05", "pi0_fast")
FOREIGN = [
    (kind, path)
    for kind in KINDS
    for path in (f"openpi/{kind}/openpi_pytorch", f"lerobot/{kind}/pretrained", f"lerobot/{kind}/pretrained_v062")
    if (kind, path) != ("pi0_fast", "openpi/pi0_fast/openpi_pytorch")
]


def arrays(weights) -> dict[str, np.ndarray]:
    return {name: np.array(weights[name]) for name in weights}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes() for n in a)


@pytest.mark.parametrize(("kind", "path"), FOREIGN)
def test_every_golden_checkpoint_is_the_same_function(golden, kind, path):
    reference, model = opened(golden / "openpi" / kind)
    weights, other = opened(golden / path)
    assert same(arrays(weights), arrays(reference))
    for field in ("vision", "language", "vocab_size", "action_dim", "action_horizon"):
        assert getattr(other, field) == getattr(model, field)


@pytest.mark.parametrize("kind", KINDS)
def test_openpi_opens_from_the_directory_or_from_params_with_sizes_from_the_shapes(golden, tmp_path, kind):
    described = json.loads((golden / "openpi" / kind / "config.json").read_text())
    shutil.copytree(golden / "openpi" / kind / "params", tmp_path / "params")
    for path in (tmp_path, tmp_path / "params"):
        _, model = opened(path, action_horizon=10)
        assert vars(model.vision) == described["vision"]
        assert vars(model.language) == {**described["vlm"], "lora": None}
        assert (model.vocab_size, model.action_horizon) == (512, 10)
        assert model.max_token_len == {"pi0": 48, "pi05": 200, "pi0_fast": 250}[kind]
        if kind != "pi0_fast":
            assert vars(model.expert) == {**described["action_expert"], "lora": None}
            assert (model.state_in, model.time_in) == (("suffix", "mlp") if kind == "pi0" else ("prompt", "adarms"))


def test_policies_keep_their_statistics_settings_and_semantics(golden):
    source = formats.open_checkpoint(golden / "openpi/pi0")
    stated = json.loads((golden / "openpi/pi0/assets/golden_robot/norm_stats.json").read_text())["norm_stats"]
    assert source.asset_id == "golden_robot"
    assert source.norm_stats["state"].mean.tolist() == stated["state"]["mean"]
    for kind, norm in (("pi0", "zscore"), ("pi05", "quantile")):
        for version, system in (("pretrained", "lerobot-0.4"), ("pretrained_v062", "lerobot-0.6")):
            source = formats.open_checkpoint(golden / "lerobot" / kind / version)
            assert source.settings["data"]["norm"] == norm
            assert source.settings["data"]["cameras"] == {
                "base_0_rgb": "observation.images.base_0_rgb", "left_wrist_0_rgb": "observation.images.left_wrist_0_rgb"
            }  # fmt: skip
            assert source.settings["semantics"] == system
            assert source.model.cameras == ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
            assert [len(source.norm_stats[k].mean) for k in ("state", "actions")] == [6, 7]


def test_stored_by_us_orbax_restores_it_and_so_does_openpi(golden, tmp_path):
    target.write(formats.open_checkpoint(golden / "openpi/pi0"), tmp_path / "out", "openpi")
    before = ocp.PyTreeCheckpointer().restore(
        golden / "openpi/pi0/params",
        ocp.args.PyTreeRestore(restore_args=_numpy_args(golden / "openpi/pi0/params")),
    )
    after = ocp.PyTreeCheckpointer().restore(tmp_path / "out/params")
    # openpi's own loader strips "value" from the leaves of its training checkpoints and asks for every leaf by type.
    before = jax.tree.map(lambda leaf: leaf["value"], before, is_leaf=lambda node: set(node) == {"value"})
    jax.tree.map(np.testing.assert_array_equal, before, after)
    as_openpi = ocp.PyTreeCheckpointer().restore(
        tmp_path / "out/params", ocp.args.PyTreeRestore(restore_args=_numpy_args(tmp_path / "out/params"))
    )
    jax.tree.map(np.testing.assert_array_equal, before, as_openpi)


def _numpy_args(path: Path):
    metadata = ocp.PyTreeCheckpointer().metadata(path)
    tree = getattr(metadata, "item_metadata", metadata)
    tree = getattr(tree, "tree", tree)
    return jax.tree.map(lambda _: ocp.ArrayRestoreArgs(restore_type=np.ndarray), tree)


def test_orbax_written_by_orbax_in_all_its_layouts_is_read(tmp_path):
    tree = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.ones(2, ml_dtypes.bfloat16)}
    for i, layout in enumerate(({"use_ocdbt": True}, {"use_ocdbt": False}, {"use_zarr3": True})):
        path = tmp_path / str(i)
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**layout)).save(path, tree)
        read = orbax_io.Arrays(path)
        assert set(read) == {"a/b", "c"}
        np.testing.assert_array_equal(np.asarray(read["a/b"]), tree["a"]["b"])
        assert read["c"].dtype == ml_dtypes.bfloat16


def test_safetensors_agree_with_the_official_library_byte_for_byte(tmp_path):
    tensors = {"b": torch.randn(3, 2).bfloat16(), "a": torch.randn(4), "c": torch.arange(3)}
    safetensors.torch.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    read = safetensors_io.Arrays(tmp_path / "theirs")
    assert read["b"].dtype == ml_dtypes.bfloat16
    safetensors_io.write(tmp_path / "ours", dict(read), read.metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def damaged(tmp_path: Path, golden: Path, change) -> Path:
    path = tmp_path / "pretrained"
    shutil.copytree(golden / "lerobot/pi0/pretrained", path)
    shutil.copyfile(golden / "lerobot/pi0/config.json", tmp_path / "config.json")
    change(path)
    return path


def _cut(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def _garble(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:20] + b"#" + data[21:])


def _edit(**changes):
    def change(path: Path) -> None:
        own = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**own, **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_cut, "model.safetensors: cut off"),
        (lambda p: (p / "model.safetensors").write_bytes(b"abc"), "no safetensors file, or cut off"),
        (lambda p: (p / "model.safetensors").write_bytes(b""), "no safetensors file, or cut off"),
        (_garble, "header is damaged"),
        (lambda p: torch.save({}, p / "model.safetensors"), "pickle.*never opened"),
        (lambda p: (p / "model.safetensors").rename(p / "model.bin"), "model.bin is a pickle.*never opened"),
        (lambda p: (p / "config.json").unlink(), "no config.json"),
        (lambda p: (p / "config.json").write_text("{"), "config.json: not readable as JSON"),
        (_edit(type="smolvla"), "type='smolvla'"),
        (_edit(max_action_dim=7), "action_dim=7 contradicts the weights, which say 8"),
        (_edit(normalization_mapping={"STATE": "MIN_MAX", "ACTION": "MIN_MAX"}), "normalization_mapping"),
        (_edit(use_relative_actions=True), "action_feature_names"),
    ],
)
def test_damage_is_named_in_one_line(tmp_path, golden, change, words):
    path = damaged(tmp_path, golden, change)
    with pytest.raises(UserError, match=words) as error:
        formats.open_checkpoint(path).canonical()
    assert "\n" not in str(error.value)


def test_safetensors_on_a_system_that_reserves_no_space(tmp_path, monkeypatch):
    """A Mac."""
    monkeypatch.delattr("os.posix_fallocate", raising=False)
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(0, np.int8)}
    safetensors_io.write(tmp_path / "x.safetensors", tensors)
    assert same(safetensors_io.Arrays(tmp_path / "x.safetensors"), tensors)


def test_an_interrupted_array_is_written_to_its_end(tmp_path, monkeypatch):
    """A Ctrl-C comes while tensorstore writes: nothing may appear after what there is has been removed."""
    finished = []

    class Slow:
        def __init__(self, future):
            self.future, self.asked = future, 0

        def result(self):
            self.asked += 1
            if self.asked == 1:
                raise KeyboardInterrupt
            finished.append(self.future.result())

    open_ = orbax_io.ts.open
    monkeypatch.setattr(orbax_io.ts, "open", lambda *args, **kwargs: Slow(open_(*args, **kwargs)))
    with pytest.raises(KeyboardInterrupt):
        orbax_io.write(tmp_path / "params", {"a": np.zeros((2, 3, 4), np.float32)})
    assert len(finished) == 1


def test_damage_in_orbax_names_the_array(tmp_path, golden):
    shutil.copytree(golden / "openpi/pi0/params", tmp_path / "params")
    file = max((tmp_path / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(2000) + data[len(data) // 2 + 2000 :])
    with pytest.raises(UserError, match=r"params: can't read params\.PaliGemma") as error:
        dict(formats.open_checkpoint(tmp_path).canonical())
    assert "\n" not in str(error.value)


def test_a_wrong_directory_gets_a_hint(golden, tmp_path):
    with pytest.raises(UserError, match=r"did you mean .*openpi/pi0"):
        formats.open_checkpoint(golden / "openpi")
    with pytest.raises(UserError, match="no such file"):
        formats.open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="expected params/"):
        formats.open_checkpoint(tmp_path)


def test_heads_that_the_weights_do_not_show_are_asked_for(golden, tmp_path):
    shutil.copytree(golden / "openpi/pi0/openpi_pytorch", tmp_path / "alone")
    with pytest.raises(UserError, match=r"--model.vision.num_heads"):
        formats.open_checkpoint(tmp_path / "alone")
    assert formats.open_checkpoint(tmp_path / "alone", vision={"num_heads": 2}).model.language.num_heads == 4


def test_lerobot_with_openpis_names_is_lerobot(golden, tmp_path):
    shutil.copytree(golden / "lerobot/pi0/pretrained", tmp_path / "it")
    tensors = safetensors_io.Arrays(tmp_path / "it/model.safetensors")
    bare = {name.removeprefix("model."): np.array(tensors[name]) for name in tensors}
    (tmp_path / "it/model.safetensors").unlink()
    safetensors_io.write(tmp_path / "it/model.safetensors", bare)
    source = formats.open_checkpoint(tmp_path / "it", vision={"num_heads": 2})
    assert source.format == "lerobot"
    assert source.norm_stats is not None


def test_an_untied_head_is_kept_where_unused_and_refused_where_used(golden, tmp_path):
    for kind in ("pi0", "pi0_fast"):
        path = tmp_path / kind
        shutil.copytree(golden / "lerobot" / kind / "pretrained_v062", path)
        tensors = dict(safetensors_io.Arrays(path / "model.safetensors"))
        name = f"model.{tables.LM_HEAD}"
        tensors[name] = tensors[name] + 1
        (path / "model.safetensors").unlink()
        safetensors_io.write(path / "model.safetensors", tensors)
        heads = {"vision": {"num_heads": 2}}
        if kind == "pi0_fast":
            with pytest.raises(UserError, match="lm_head and embed_tokens differ"):
                formats.open_checkpoint(path, **heads)
        else:
            source = formats.open_checkpoint(path, **heads)
            assert "unused head" in source.rules[tables.LM_HEAD]
            np.testing.assert_array_equal(source.unused[tables.LM_HEAD], tensors[name])


def test_lora_is_merged_on_request_and_never_dropped(golden, tmp_path):
    rng = np.random.default_rng(0)
    tree = {name: np.asarray(array) for name, array in orbax_io.Arrays(golden / "openpi/pi05/params").items()}
    before = tree["params/PaliGemma/llm/layers/attn/q_einsum/w"]
    a, b = rng.standard_normal((3, 4, 64, 2), np.float32), rng.standard_normal((3, 4, 2, 32), np.float32)
    q_einsum = "params/PaliGemma/llm/layers/attn/q_einsum"
    tree |= {f"{q_einsum}/lora_a": a, f"{q_einsum}/lora_b": b}
    linear = tree["params/PaliGemma/llm/layers/mlp/linear"]
    a2, b2 = rng.standard_normal((3, 128, 2), np.float32), rng.standard_normal((3, 2, 64), np.float32)
    tree |= {"params/PaliGemma/llm/layers/mlp/linear_lora_a": a2, "params/PaliGemma/llm/layers/mlp/linear_lora_b": b2}
    orbax_io.write(tmp_path / "params", tree)
    with pytest.raises(UserError, match="2 LoRA adapters .* --merge-lora"):
        formats.open_checkpoint(tmp_path)
    weights = formats.open_checkpoint(tmp_path, merge_lora=True).canonical()
    merged = (before + a @ b).transpose(0, 2, 1, 3).reshape(3, 64, 128)
    np.testing.assert_allclose(weights["gemma/layers/experts/0/q/kernel"], merged, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(weights["gemma/layers/experts/0/down/kernel"], linear + a2 @ b2, rtol=1e-5, atol=1e-5)


def test_base_checkpoints_with_statistics_of_many_robots_open(golden, tmp_path):
    shutil.copytree(golden / "openpi/pi0/params", tmp_path / "params")
    for robot in ("trossen", "droid"):
        shutil.copytree(golden / "openpi/pi0/assets/golden_robot", tmp_path / "assets" / robot)
    source = formats.open_checkpoint(tmp_path)
    assert source.norm_stats is None
    assert {"assets/droid/norm_stats.json", "assets/trossen/norm_stats.json"} <= set(source.files)
    assert formats.open_checkpoint(tmp_path, asset="droid").asset_id == "droid"
    with pytest.raises(UserError, match=r"'droit'; did you mean droid"):
        formats.open_checkpoint(tmp_path, asset="droit")


@pytest.mark.parametrize("to", target.SIDES)
def test_statistics_of_many_robots_can_still_be_chosen_after_a_conversion(golden, tmp_path, to):
    base = tmp_path / "base"
    shutil.copytree(golden / "openpi/pi0/params", base / "params")
    for robot in ("trossen", "lab/ur5e"):
        shutil.copytree(golden / "openpi/pi0/assets/golden_robot", base / "assets" / robot)
    heads = {"vision": {"num_heads": 2}, "action_horizon": 10}
    target.write(formats.open_checkpoint(base, **heads), tmp_path / to, to)
    with pytest.raises(UserError, match=r"choose with asset= \(--asset=\) among lab/ur5e, trossen"):
        loading.open_parts(tmp_path / to, robot="lerobot", tokenizer="small")
    stats = load_norm_stats(golden / "openpi/pi0/assets/golden_robot/norm_stats.json")
    chosen = formats.open_checkpoint(tmp_path / to, asset="lab/ur5e")
    assert chosen.asset_id == "lab/ur5e"
    np.testing.assert_array_equal(chosen.norm_stats["state"].mean, stats["state"].mean)
    with pytest.raises(UserError, match="no statistics of 'ur6e'"):
        formats.open_checkpoint(tmp_path / to, asset="ur6e")
    target.write(chosen, tmp_path / "again", to)  # with one chosen, another still can be
    assert formats.open_checkpoint(tmp_path / "again", asset="trossen").asset_id == "trossen"


@pytest.fixture
def paligemma(golden) -> Source:
    """The golden pi0-FAST, which is a PaliGemma."""
    return formats.open_checkpoint(golden / "openpi/pi0_fast")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_big_vision_npz(tmp_path, paligemma, compressed, dtype):
    theirs = {n.replace("PaliGemma", "params"): np.asarray(t).astype(dtype) for n, t in paligemma.tensors.items()}
    (np.savez_compressed if compressed else np.savez)(tmp_path / "pt.npz", **theirs)
    source = formats.open_checkpoint(tmp_path / "pt.npz")
    assert source.format == "big_vision"
    assert source.model.language == paligemma.model.language
    want = {n: t.astype(dtype) for n, t in arrays(paligemma.canonical()).items()}
    assert same(arrays(source.canonical()), want)


def test_big_vision_never_unpickles(tmp_path):
    np.savez(tmp_path / "evil.npz", **{"params/img/x": np.array([{}], object)})
    with pytest.raises(UserError, match="pickle"):
        formats.open_checkpoint(tmp_path / "evil.npz")
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive:
        archive.writestr("params/img/x.npy", b"nothing")
    with pytest.raises(UserError, match="no .npz, cut off"):
        formats.open_checkpoint(tmp_path / "cut.npz")
    (tmp_path / "no.npz").write_bytes(b"abc")
    with pytest.raises(UserError, match="no .npz, cut off"):
        formats.open_checkpoint(tmp_path / "no.npz")


@pytest.mark.parametrize("names", ["before 4.52", "since 4.52"])
@pytest.mark.parametrize("sharded", [False, True])
def test_paligemma_of_hugging_face(tmp_path, paligemma, names, sharded):
    tensors = {}
    for name, tensor in paligemma.to("hf").items():
        name = name.removeprefix("paligemma_with_expert.paligemma.")
        if names == "before 4.52":
            name = name.removeprefix("model.").replace("language_model.", "language_model.model.")
        tensors[name] = np.ascontiguousarray(tensor)
    if sharded:
        half = len(tensors) // 2
        shards = {n: f"model-{1 + (i >= half)}.safetensors" for i, n in enumerate(tensors)}
        for file in set(shards.values()):
            safetensors.numpy.save_file({n: t for n, t in tensors.items() if shards[n] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    else:
        safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    source = formats.open_checkpoint(tmp_path, vision={"num_heads": 2})
    assert source.format == "paligemma"
    assert same(arrays(source.canonical()), arrays(paligemma.canonical()))
    if sharded:
        (tmp_path / "model-2.safetensors").unlink()
        with pytest.raises(UserError, match=r"model-2.safetensors: No such file"):
            formats.open_checkpoint(tmp_path)


def test_what_a_vision_language_model_lacks_for_pi0_is_the_expert(paligemma, golden):
    pi0 = formats.open_checkpoint(golden / "openpi/pi0").model
    lacking = side_shapes(tables.entries(pi0), OURS).keys() - paligemma.canonical().keys()
    assert {name.split("/")[0] for name in lacking} == {
        "gemma", "action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out", "state_proj"
    }  # fmt: skip
    assert all("experts/1" in name or "norms/1" in name for name in lacking if name.startswith("gemma"))
    assert same(arrays(paligemma.start_of(pi0)), arrays(paligemma.canonical()))
    other = dataclasses.replace(pi0, vocab_size=100)
    with pytest.raises(UserError, match=r"input_embedding is \(512, 64\), not \(100, 64\)"):
        paligemma.start_of(other)
