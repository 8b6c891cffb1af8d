"""LeRobot's `save_pretrained` directories: `model.safetensors`, `config.json` and the processors with their statistics.

Read: 0.4 and 0.6. Written: what both open. LeRobot's config names sizes ("gemma_2b") that say nothing about heads, so
our `policy.json` lies beside it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import huggingface, infer, settings
from convert.source import Source
from openpi_port import safetensors_io
from openpi_port.config import Pi0, Pi0Fast
from openpi_port.errors import UserError, near
from openpi_port.normalize import NormStats, Stats, load_norm_stats
from openpi_port.tokenizers.fast_sequence import RESERVED

ROOT = "model."
TYPES = ("pi0", "pi05", "pi0_fast")
STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
NORMS = {"MEAN_STD": "zscore", "QUANTILES": "quantile"}
PROCESSORS = ("policy_preprocessor", "policy_postprocessor")
NORMALIZERS = ("normalizer_processor", "unnormalizer_processor")
HABITS = {"positions": "contiguous", "missing_cameras": "masked"}  # of pi0-FAST; openpi's are others
TOKENIZER = "google/paligemma-3b-pt-224"
FAST_TOKENIZER = "physical-intelligence/fast"


def open_(path: Path, tensors: Mapping[str, Any], overrides: Mapping[str, Any]) -> Source:
    """Opens a directory whose tensors are loaded; see `formats.open_checkpoint`."""
    own = settings.read_json(path / "config.json")
    if not own:
        raise UserError(f"{path}: a LeRobot policy's weights, but no config.json beside them")
    if own.get("type") not in TYPES:
        raise UserError(f"{path / 'config.json'}: type={own.get('type')!r}; {near(str(own.get('type')), TYPES)}")
    stated = settings.read(path)
    bare = {name.removeprefix(ROOT): tensor for name, tensor in tensors.items()}
    theirs, rules, unused = huggingface.untie(bare, path)
    fields = {**HABITS, **model_fields(own), **stated.model}
    model = infer.config(huggingface.shapes(theirs), "hf", fields, overrides)
    stats = read_stats(path)
    policy = dict(stated.policy) or {"data": data_fields(own, path, model), **semantics(own)}
    files = {**settings.read_files(path), **{f"{settings.LEROBOT}/{f.name}": f for f in own_files(path)}}
    return Source(
        "lerobot", path, "hf", theirs, model, rules=rules, unused=unused, norm_stats=stats,
        asset_id=policy.get("asset_id", "lerobot"), settings=policy, files=files,
    )  # fmt: skip


def own_files(path: Path) -> list[Path]:
    """LeRobot's files beside the weights: config.json, the processors and their statistics."""
    return [path / "config.json", *sorted(path.glob("policy_p*processor*"))]


def model_fields(own: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says about the model; cameras get openpi's names, in LeRobot's order."""
    names = {"chunk_size": "action_horizon", "tokenizer_max_length": "max_token_len", "max_action_dim": "action_dim"}
    fields = {ours: own[theirs] for theirs, ours in names.items() if theirs in own}
    cameras = camera_names(own)
    if cameras:
        fields["cameras"] = tuple(cameras)
    return fields


def camera_names(own: Mapping[str, Any]) -> dict[str, str]:
    """Model camera -> LeRobot's feature. A feature with a model camera's name keeps it; others fill what is free."""
    model = Pi0Fast if own.get("type") == "pi0_fast" else Pi0
    free = list(model.__dataclass_fields__["cameras"].default)
    features = [k for k, v in (own.get("input_features") or {}).items() if v.get("type") == "VISUAL"]
    short = {feature: feature.removeprefix(IMAGES) for feature in features}
    free = [camera for camera in free if camera not in short.values()]
    taken = model.__dataclass_fields__["cameras"].default
    return {name if name in taken else (free.pop(0) if free else name): feature for feature, name in short.items()}


def data_fields(own: Mapping[str, Any], path: Path, model: Any) -> dict[str, Any]:
    """config.json's part of our `config.Data`: keys of the data set and the normalisation."""
    mapping = own.get("normalization_mapping", {})
    norms = {mapping.get(kind, "MEAN_STD") for kind in ("STATE", "ACTION")}
    if len(norms) > 1 or not norms <= NORMS.keys():
        raise UserError(
            f"{path / 'config.json'}: normalization_mapping={mapping}: state and action must both be one of "
            f"{', '.join(NORMS)}"
        )
    renamed = {new: old for old, new in _rename_map(path).items()}
    cameras = {c: f for c, f in camera_names(own).items() if not f.startswith(f"{IMAGES}empty_camera")}
    fields = {
        "robot": "lerobot",
        "cameras": {camera: renamed.get(feature, feature) for camera, feature in cameras.items()},
        "state": renamed.get(STATE, STATE),
        "actions": ACTION,
        "norm": NORMS[norms.pop()],
        "prompt_style": semantics(own)["semantics"],
    }
    if own.get("use_relative_actions"):
        fields["delta"] = _relative(own, path)
    return fields


def _relative(own: Mapping[str, Any], path: Path) -> tuple[bool, ...]:
    names, kept = own.get("action_feature_names"), own.get("relative_exclude_joints") or []
    if not names:
        raise UserError(f"{path / 'config.json'}: use_relative_actions, but action_feature_names doesn't say which")
    return tuple(not any(word in name for word in kept) for name in names)


def semantics(own: Mapping[str, Any]) -> dict[str, Any]:
    """Which system's habits the policy was trained with; 0.6 has fields that 0.4 has not."""
    system = "lerobot-0.6" if "use_relative_actions" in own else "lerobot-0.4"
    about = {"semantics": system, "tokenizer": settings.PALIGEMMA_TOKENIZER}
    if own.get("type") == "pi0_fast":
        if own.get("fast_skip_tokens", RESERVED) != RESERVED:
            raise UserError(f"config.json: fast_skip_tokens={own['fast_skip_tokens']}: only {RESERVED} is known")
        about["train"] = {"fast_tokenizer": own.get("action_tokenizer_name", FAST_TOKENIZER)}
    return about


def _steps(path: Path, processor: str) -> list[dict[str, Any]]:
    return settings.read_json(path / f"{processor}.json").get("steps", [])


def _rename_map(path: Path) -> dict[str, str]:
    for step in _steps(path, PROCESSORS[0]):
        if step.get("registry_name") == "rename_observations_processor":
            return step["config"].get("rename_map", {})
    return {}


def read_stats(path: Path) -> NormStats | None:
    """Statistics from the processors, or from an exact norm_stats.json beside them that rounds to the same."""
    found: dict[str, np.ndarray] = {}
    for processor in PROCESSORS:
        for step in _steps(path, processor):
            if step.get("registry_name") in NORMALIZERS and step.get("state_file"):
                found |= dict(safetensors_io.Arrays(path / step["state_file"]))
    groups = {"state": STATE, "actions": ACTION}
    if not all(f"{theirs}.mean" in found for theirs in groups.values()):
        return None
    stats = {ours: _stats(found, theirs) for ours, theirs in groups.items()}
    if (path / "norm_stats.json").exists():
        exact = load_norm_stats(path / "norm_stats.json")
        if all(_rounds_to(exact[k], stats[k]) for k in groups):
            return exact
    return stats


def _stats(found: Mapping[str, np.ndarray], group: str) -> Stats:
    def get(name: str) -> np.ndarray | None:
        array = found.get(f"{group}.{name}")
        return None if array is None else np.asarray(array, np.float64)

    count = get("count")
    values = {name: get(name) for name in ("mean", "std", "q01", "q99", "min", "max")}
    return Stats(**values, **({} if count is None else {"count": int(count.ravel()[0])}))


def _rounds_to(exact: Stats, rounded: Stats) -> bool:
    for name in ("mean", "std", "q01", "q99"):
        a, b = getattr(exact, name), getattr(rounded, name)
        if (a is None) != (b is None) or (a is not None and not np.array_equal(np.float32(a), np.float32(b))):
            return False
    return True


def inexpressible(source: Source) -> list[str]:
    """What a policy does that LeRobot's processors can't: whoever runs it there must do it around the policy."""
    data, tokenizer = source.settings.get("data", {}), source.settings.get("tokenizer") or {}
    notes = []
    if data.get("robot", "lerobot") != "lerobot":
        notes.append(f"the steps of openpi_port/robots/{data['robot']}.py")
    carried = any(name.startswith(f"{settings.LEROBOT}/") for name in source.files)
    if any(data.get("delta", ())) and not carried:
        notes.append("actions as differences to the state")
    if tokenizer.get("spec", "paligemma") != "paligemma":
        notes.append(f"the tokenizer {tokenizer['spec']!r} (its processors name PaliGemma's)")
    if getattr(source.model, "state_in", None) == "none":
        notes.append("prompts without the state")
    return notes


def write_files(path: Path, source: Source, precision: str) -> None:
    """Writes config.json and the processors: those that came with the policy where they still hold, else new ones."""
    carried = [f for name, f in source.files.items() if name.startswith(f"{settings.LEROBOT}/")]
    if carried and _still_holds(carried[0].parent, source):
        for file in carried:
            shutil.copyfile(file, path / file.name)
        return
    _write_new(path, source, precision)


def _still_holds(path: Path, source: Source) -> bool:
    """Whether LeRobot's files say what the checkpoint says: it may have been edited or trained on since."""
    fields = model_fields(settings.read_json(path / "config.json"))
    if any(getattr(source.model, key, value) != value for key, value in fields.items()):
        return False
    stats = read_stats(path)
    if stats is None or source.norm_stats is None:
        return stats is None and source.norm_stats is None
    return all(_rounds_to(source.norm_stats[key], stats[key]) for key in ("state", "actions"))


def _write_new(path: Path, source: Source, precision: str) -> None:
    config = _new_config(source, precision)
    _write_json(path / "config.json", config)
    for processor, steps in zip(PROCESSORS, _new_steps(source, config), strict=True):
        for number, step in enumerate(steps):
            if step["registry_name"] in NORMALIZERS and source.norm_stats:
                step["state_file"] = f"{processor}_step_{number}_{step['registry_name']}.safetensors"
                safetensors_io.write(path / step["state_file"], _stat_tensors(source.norm_stats))
        _write_json(path / f"{processor}.json", {"name": processor, "steps": steps})


def _cameras(source: Source) -> Mapping[str, str]:
    """Model camera -> key of the data set; what the policy doesn't say has LeRobot's names."""
    named = source.settings.get("data", {}).get("cameras")
    return named or {camera: IMAGES + camera for camera in source.model.cameras}


def _new_config(source: Source, precision: str) -> dict[str, Any]:
    """config.json of a policy that LeRobot has not seen yet."""
    model = source.model
    kind = "pi0_fast" if not hasattr(model, "expert") else "pi05" if model.time_in == "adarms" else "pi0"
    dims = {key: len(stats.mean) for key, stats in (source.norm_stats or {}).items()}
    norm = source.settings.get("data", {}).get("norm", "zscore" if kind == "pi0" else "quantile")
    lerobot_norm = next(theirs for theirs, ours in NORMS.items() if ours == norm)
    cameras = _cameras(source)
    empty = [camera for camera in model.cameras if camera not in cameras]
    size = model.vision.image_size
    visual = {"type": "VISUAL", "shape": [3, size, size]}
    features: dict[str, Any] = {f"{IMAGES}{camera}": visual for camera in model.cameras if camera in cameras}
    features[STATE] = {"type": "STATE", "shape": [dims.get("state", model.action_dim)]}
    features |= {f"{IMAGES}empty_camera_{i}": visual for i in range(len(empty))}
    return {
        "type": kind,
        "n_obs_steps": 1,
        "input_features": features,
        "output_features": {ACTION: {"type": "ACTION", "shape": [dims.get("actions", model.action_dim)]}},
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": precision,
        "chunk_size": model.action_horizon,
        "n_action_steps": model.action_horizon,
        "max_state_dim": model.action_dim,
        "max_action_dim": model.action_dim,
        "image_resolution": [size, size],
        "empty_cameras": len(empty),
        "tokenizer_max_length": model.max_token_len,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": lerobot_norm, "ACTION": lerobot_norm},
    }


def _new_steps(source: Source, config: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The steps of the two processors that go with such a config.json: before the policy, and after it."""
    rename = {theirs: IMAGES + camera for camera, theirs in _cameras(source).items() if theirs != IMAGES + camera}
    state = source.settings.get("data", {}).get("state", STATE)
    if state != STATE:
        rename[state] = STATE
    outputs, norm_map = config["output_features"], config["normalization_mapping"]
    features = {**config["input_features"], **outputs}
    tokenize = _step(
        "tokenizer_processor",
        max_length=config["tokenizer_max_length"],
        task_key="task",
        padding_side="right",
        padding="max_length",
        truncation=True,
        tokenizer_name=TOKENIZER,
    )
    device = _step("device_processor", device="cpu", float_dtype=None)
    normalize = _step("normalizer_processor", eps=1e-8, features=features, norm_map=norm_map)
    actions = _step(
        "action_tokenizer_processor",
        trust_remote_code=True,
        max_action_tokens=256,
        action_tokenizer_name=FAST_TOKENIZER,
    )
    write_state = _step(f"{config['type']}_prepare_state_tokenizer_processor_step")
    middle = {
        "pi0": [_step("pi0_new_line_processor"), tokenize, device, normalize],
        "pi05": [normalize, write_state, tokenize, device],
        "pi0_fast": [normalize, write_state, tokenize, actions, device],
    }[config["type"]]
    start = [_step("rename_observations_processor", rename_map=rename), _step("to_batch_processor")]
    unnormalize = _step("unnormalizer_processor", eps=1e-8, features=outputs, norm_map=norm_map)
    return [*start, *middle], [unnormalize, device]


def _step(name: str, **config: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": config}


def _stat_tensors(stats: NormStats) -> dict[str, np.ndarray]:
    tensors = {}
    for ours, theirs in {"state": STATE, "actions": ACTION}.items():
        for name in ("mean", "std", "q01", "q99", "min", "max"):
            value = getattr(stats[ours], name)
            if value is not None:
                tensors[f"{theirs}.{name}"] = np.asarray(value, np.float32)
        if stats[ours].count is not None:
            tensors[f"{theirs}.count"] = np.asarray([stats[ours].count], np.float32)
    return tensors


def _write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
