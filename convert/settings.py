"""What belongs to a policy beside its weights, read from a checkpoint's JSON files.

A foreign checkpoint that we write carries our `policy.json` too: what the format itself can't express (the heads of a
plain matrix, cameras, the robot's steps). Other readers ignore the file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openpi_port import safetensors_io
from openpi_port.checkpoint import FAST_TOKENIZER, POLICY, TOKENIZER
from openpi_port.errors import UserError

UNUSED = "unused.safetensors"
HORIZON = "action_horizon"
LEROBOT = "lerobot"  # the folder in which LeRobot's own files travel through other formats
PALIGEMMA_TOKENIZER = {"spec": "paligemma", "sha256": ""}  # of every published policy; the file is not ours to ship
# openpi's names for the parts of a model, in files that describe sizes.
PARTS = {"vision": "vision", "vlm": "language", "action_expert": "expert"}


@dataclasses.dataclass(frozen=True)
class Stated:
    """What files say: fields of the model (nested for its parts), and the policy's other settings."""

    model: Mapping[str, Any]
    policy: Mapping[str, Any]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
      UserError: the file is no JSON object.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, OSError) as e:
        raise UserError(f"{path}: not readable as JSON ({e})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(tree).__name__}")
    return tree


def read(path: Path) -> Stated:
    """Our `policy.json`, else a description of sizes in a `config.json`, here or one level up."""
    policy = read_json(path / POLICY)
    if policy:
        return Stated(policy.get("model", {}), {k: v for k, v in policy.items() if k != "model"})
    model: dict[str, Any] = {}
    for folder in (path.parent, path):
        model |= sizes(read_json(folder / "config.json"))
    return Stated(model, {})


def without_base(stated: Stated) -> Stated:
    """The same of a checkpoint whose frozen weights have been joined to it: what is made of it holds all."""
    policy = {key: value for key, value in stated.policy.items() if key != "base"}
    return Stated(stated.model, {**policy, "train": {**policy["train"], "save": "all"}})


def of_openpi(stated: Stated, model: Any) -> dict[str, Any]:
    """The policy's settings where openpi wrote the checkpoint: its habits, and nothing about the robot.

    "assumed" names the fields of the model that neither files nor weights say and a policy can't do without.
    """
    if stated.policy:
        return dict(stated.policy)
    zscore = getattr(model, "state_in", None) == "suffix"
    return {
        "data": {"norm": "zscore" if zscore else "quantile"},
        "semantics": "openpi",
        "tokenizer": PALIGEMMA_TOKENIZER,
        "assumed": [field for field in (HORIZON,) if field not in stated.model],
    }


def sizes(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of our model in a description that uses openpi's words; empty where it is something else."""
    if not all(isinstance(tree.get(part), Mapping) for part in ("vision", "vlm")):
        return {}
    fields = {ours: tree[theirs] for theirs, ours in PARTS.items() if theirs in tree}
    fields |= {k: tree[k] for k in ("action_horizon", "max_token_len", "vocab_size", "action_dim") if k in tree}
    if "image_keys" in tree:
        fields["cameras"] = tuple(tree["image_keys"])
    return fields


def read_files(path: Path) -> dict[str, Path]:
    """Files that travel with the weights as they are: tokenizers of ours, or one that LeRobot 0.6 saved."""
    found = [path / TOKENIZER]
    found += [f for folder in ("tokenizer", FAST_TOKENIZER, LEROBOT) for f in (path / folder).glob("*")]
    found += (path / "assets").glob("**/norm_stats.json")
    return {str(file.relative_to(path)): file for file in found if file.is_file()}


def read_unused(path: Path) -> dict[str, Any]:
    """Tensors that an earlier conversion set aside because nothing computes with them."""
    file = path / UNUSED
    return dict(safetensors_io.Arrays(file).stored) if file.exists() else {}
