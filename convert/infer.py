"""A model's configuration from the shapes of its weights, wherever they determine it.

The weights don't say how long a chunk or a prompt is and which cameras there are; kernels stored as plain matrices
don't say how many heads share a width. Those come from the caller or from the checkpoint's own description; else from
what every published checkpoint has.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from convert import lora, tables
from openpi_port import config as config_lib
from openpi_port.config import Pi0Fast
from openpi_port.errors import UserError, near
from openpi_port.fields import build

Shapes = Mapping[str, tuple[int, ...]]
SIGLIP_HEAD_DIM = 72  # So400m/14's, the vision tower of every published checkpoint
PARTS = ("vision", "language", "expert")


def config(shapes: Shapes, side: str, described: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """The configuration of a checkpoint.

    Args:
      shapes: name -> shape of every tensor, under a side's names (`tables.SIDES`).
      side: which side's.
      described: fields of the configuration that the checkpoint's own files state, nested for vision etc.
      overrides: the same from the caller; they win. `model="pi0"`, "pi05" or "pi0_fast" says what is expected.

    Returns:
      `config.Pi0`, or `Pi0Fast` where there is no expert.

    Raises:
      UserError: an unknown field, or one that contradicts the shapes.
    """
    read = {"flax": _from_flax, "torch": _from_torch, "openpi": _from_openpi, "hf": _from_hf}[side]
    kind, overrides = overrides.get("model"), {k: v for k, v in overrides.items() if k != "model"}
    cls = config_lib.Pi0 if any(n.startswith("action_in_proj") for n in shapes) else Pi0Fast
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in overrides:
        if key not in known:
            raise UserError(f"{key}: no such field of the model; {near(key, known)}")
    hints = {part: {**_nested(described.get(part)), **_nested(overrides.get(part))} for part in PARTS if part in known}
    fields = read(shapes, hints)
    stated = {k: v for k, v in {**described, **overrides}.items() if k in known and k not in PARTS}
    if fields.get("state_in") == "prompt" and stated.get("state_in") == "none":  # the same weights
        fields["state_in"] = "none"
    for key in stated.keys() & fields.keys():
        if stated[key] != fields[key]:
            raise UserError(f"{key}={stated[key]!r} contradicts the weights, which say {fields[key]!r}")
    for part, hint in hints.items():
        alpha = _nested(hint.get("lora")).get("alpha")
        adapters = lora.config(shapes, side, fields[part], int(part == "expert"), alpha) if part != "vision" else None
        if adapters is not None:
            fields[part] = dataclasses.replace(fields[part], lora=adapters)
        _agree(part, fields[part], hint)
    if fields.get("state_in") in ("prompt", "none"):
        fields["max_token_len"] = 200  # openpi's default for pi0.5
    found = {"suffix": "pi0", "prompt": "pi05", "none": "pi05"}.get(fields.get("state_in"), "pi0_fast")
    if kind is not None and kind != found:
        raise UserError(f"model={kind!r} contradicts the weights, which are those of {found!r}")
    return build(cls, {**fields, **stated}, "model")


def _nested(value: Any) -> dict[str, Any]:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else dict(value or {})


def _agree(part: str, found: Any, hint: Mapping[str, Any]) -> None:
    for key, value in hint.items():
        if not hasattr(found, key):
            raise UserError(f"{part}.{key}: no such field; {near(key, dataclasses.asdict(found))}")
        if isinstance(value, Mapping) and getattr(found, key) is not None:
            _agree(f"{part}.{key}", getattr(found, key), value)
        elif getattr(found, key) != (tuple(value) if isinstance(value, list) else value):
            raise UserError(f"{part}.{key}={value} contradicts the weights, which say {getattr(found, key)}")


def _get(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None:
        raise UserError(f"no tensor {name} among the weights; {near(name, shapes)}")
    if len(shape) != rank:
        raise UserError(f"{name} has shape {tuple(shape)}, but {rank} axes are expected")
    return tuple(shape)


def _count(shapes: Shapes, template: str) -> int:
    """How many layers there are, from names that count them."""
    layers = 0
    while template.format(l=layers) in shapes:
        layers += 1
    if not layers:
        raise UserError(f"no tensor {template.format(l=0)} among the weights; {near(template, shapes)}")
    return layers


def _vision(
    width: int, depth: int, mlp: int, patch: int, tokens: int, heads: int | None, hint: Mapping
) -> config_lib.Siglip:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UserError(f"the position embedding has {tokens} tokens, which is no square")
    heads = heads or hint.get("num_heads") or (width // SIGLIP_HEAD_DIM if width % SIGLIP_HEAD_DIM == 0 else None)
    if heads is None:
        raise UserError(
            f"the weights don't say how many heads a vision tower of width {width} has: "
            "state it, --model.vision.num_heads=N (load_model: vision={'num_heads': N})"
        )
    return config_lib.Siglip(width, depth, mlp, heads, patch, side * patch)


def _gemma(width: int, depth: int, mlp: int, q: int, kv: int, hint: Mapping) -> config_lib.Gemma:
    """From the widths of queries and of keys; where nothing is stated, one head of keys, as in every Gemma 2B."""
    head_dim = hint.get("head_dim") or kv // hint.get("num_kv_heads", 1)
    if "num_heads" in hint:
        head_dim = q // hint["num_heads"]
    if q % head_dim or kv % head_dim:
        raise UserError(f"queries of width {q} and keys of width {kv} are no multiples of head_dim={head_dim}")
    return config_lib.Gemma(width, depth, mlp, q // head_dim, kv // head_dim, head_dim)


def _policy(shapes: Shapes, kernel: str, action_dim: int, sep: str) -> dict[str, Any]:
    """The mechanisms, from which projections there are."""
    return {
        "action_dim": action_dim,
        "state_in": "suffix" if f"state_proj{sep}{kernel}" in shapes else "prompt",
        "time_in": "adarms" if f"time_mlp_in{sep}{kernel}" in shapes else "mlp",
    }


def _from_openpi(shapes: Shapes, hints: Mapping) -> dict[str, Any]:
    img, llm = "PaliGemma/img", "PaliGemma/llm"
    block = f"{img}/Transformer/encoderblock"
    depth, width, heads, _ = _get(shapes, f"{block}/MultiHeadDotProductAttention_0/query/kernel", 4)
    patch = _get(shapes, f"{img}/embedding/kernel", 4)[0]
    tokens = _get(shapes, f"{img}/pos_embedding", 3)[1]
    mlp = _get(shapes, f"{block}/MlpBlock_0/Dense_0/kernel", 3)[2]

    def gemma(suffix: str) -> config_lib.Gemma:
        depth, mlp, width = _get(shapes, f"{llm}/layers/mlp{suffix}/linear", 3)
        _, heads, head_dim, _ = _get(shapes, f"{llm}/layers/attn/attn_vec_einsum{suffix}/w", 4)
        kv = shapes.get(f"{llm}/layers/attn/kv_einsum{suffix}/w")
        return config_lib.Gemma(width, depth, mlp, heads, heads if kv is None else kv[2], head_dim)

    fields = {
        "vision": _vision(width, depth, mlp, patch, tokens, heads, {}),
        "language": gemma(""),
        "vocab_size": _get(shapes, f"{llm}/embedder/input_embedding", 2)[0],
    }
    if "expert" in hints:
        action_dim = _get(shapes, "action_in_proj/kernel", 2)[0]
        fields |= {"expert": gemma("_1"), **_policy(shapes, "kernel", action_dim, "/")}
    return fields


def _from_hf(shapes: Shapes, hints: Mapping) -> dict[str, Any]:
    vit = tables.VIT
    width, _, patch, _ = _get(shapes, f"{vit}.embeddings.patch_embedding.weight", 4)
    tokens = _get(shapes, f"{vit}.embeddings.position_embedding.weight", 2)[0]
    depth = _count(shapes, f"{vit}.encoder.layers.{{l}}.mlp.fc1.weight")
    mlp = _get(shapes, f"{vit}.encoder.layers.0.mlp.fc1.weight", 2)[0]

    def gemma(expert: int, hint: Mapping) -> config_lib.Gemma:
        root = tables.EXPERTS[expert]
        depth = _count(shapes, f"{root}.layers.{{l}}.mlp.down_proj.weight")
        width, mlp = _get(shapes, f"{root}.layers.0.mlp.down_proj.weight", 2)
        q = _get(shapes, f"{root}.layers.0.self_attn.q_proj.weight", 2)[0]
        return _gemma(width, depth, mlp, q, _get(shapes, f"{root}.layers.0.self_attn.k_proj.weight", 2)[0], hint)

    fields = {
        "vision": _vision(width, depth, mlp, patch, tokens, None, hints["vision"]),
        "language": gemma(0, hints["language"]),
        "vocab_size": _get(shapes, tables.EMBED_TOKENS, 2)[0],
    }
    if "expert" in hints:
        action_dim = _get(shapes, "action_in_proj.weight", 2)[1]
        # The experts attend together, so what is known of one's heads holds for the other's.
        heads = {k: getattr(fields["language"], k) for k in ("num_heads", "num_kv_heads", "head_dim")}
        fields |= {"expert": gemma(1, heads), **_policy(shapes, "weight", action_dim, ".")}
    return fields


def _from_flax(shapes: Shapes, hints: Mapping) -> dict[str, Any]:
    tokens, width = _get(shapes, "vision/pos_embedding", 2)
    depth, _, mlp = _get(shapes, "vision/blocks/mlp/up/kernel", 3)
    patch = math.isqrt(_get(shapes, "vision/patch_embed/kernel", 2)[0] // 3)

    def gemma(expert: int, hint: Mapping) -> config_lib.Gemma:
        layer = f"gemma/layers/experts/{expert}"
        depth, width, mlp = _get(shapes, f"{layer}/up/kernel", 3)
        q, kv = (_get(shapes, f"{layer}/{name}/kernel", 3)[2] for name in "qk")
        return _gemma(width, depth, mlp, q, kv, hint)

    fields = {
        "vision": _vision(width, depth, mlp, patch, tokens, None, hints["vision"]),
        "language": gemma(0, hints["language"]),
        "vocab_size": _get(shapes, "gemma/embedding", 2)[0],
    }
    if "expert" in hints:
        heads = {k: getattr(fields["language"], k) for k in ("num_heads", "num_kv_heads", "head_dim")}
        action_dim = _get(shapes, "action_in_proj/kernel", 2)[0]
        fields |= {"expert": gemma(1, heads), **_policy(shapes, "kernel", action_dim, "/")}
    return fields


def _from_torch(shapes: Shapes, hints: Mapping) -> dict[str, Any]:
    """By way of the Flax names: kernels turned round, layers counted."""
    depths = {
        "blocks": _count(shapes, "vision.blocks.{l}.mlp.up.weight"),
        "layers": _count(shapes, "gemma.layers.{l}.experts.0.q.weight"),
    }
    flax = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        stacked = next((d for word, d in depths.items() if len(parts) > 2 and parts[1] == word), None)
        if stacked is not None:
            del parts[2]
        if parts[-1] == "weight":
            parts[-1], shape = "kernel", shape[::-1]
        flax["/".join(parts)] = shape if stacked is None else (stacked, *shape)
    return _from_flax(flax, hints)
