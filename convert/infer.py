"""A model's configuration from the shapes of its weights, wherever they determine it.

The weights don't say how long a chunk or a prompt is, which cameras there are and, in per-matrix layouts, how
many heads share a width. Those come from the checkpoint's own description or from the caller; else from openpi's
defaults.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from openpi_port import config as config_lib
from openpi_port.errors import UserError, near

Shapes = Mapping[str, tuple[int, ...]]
SIGLIP_HEAD_DIM = 72  # of So400m/14, the vision tower of every published checkpoint


def from_openpi(shapes: Shapes) -> dict[str, Any]:
    """Model fields from openpi's names (orbax, big_vision); see `finish` for the rest.

    Args:
      shapes: name -> shape, names starting with "PaliGemma/" and "action_in_proj/" etc.
    """
    img, llm = "PaliGemma/img", "PaliGemma/llm"
    block = f"{img}/Transformer/encoderblock"
    depth, width, heads, _ = _get(shapes, f"{block}/MultiHeadDotProductAttention_0/query/kernel", 4)
    patch = _get(shapes, f"{img}/embedding/kernel", 4)[0]
    tokens = _get(shapes, f"{img}/pos_embedding", 3)[1]
    mlp = _get(shapes, f"{block}/MlpBlock_0/Dense_0/kernel", 3)[2]
    fields = {
        "vision": _vision(width, depth, mlp, heads, patch, tokens),
        "language": _openpi_gemma(shapes, ""),
        "vocab_size": _get(shapes, f"{llm}/embedder/input_embedding", 2)[0],
    }
    if f"{llm}/layers/mlp_1/linear" in shapes:
        adarms = f"{llm}/final_norm_1/Dense_0/kernel" in shapes
        fields |= {"expert": _openpi_gemma(shapes, "_1"), **_policy(shapes, "kernel", adarms)}
    return fields


def _openpi_gemma(shapes: Shapes, suffix: str) -> config_lib.Gemma:
    layers = "PaliGemma/llm/layers"
    depth, mlp, width = _get(shapes, f"{layers}/mlp{suffix}/linear", 3)
    _, heads, head_dim, _ = _get(shapes, f"{layers}/attn/attn_vec_einsum{suffix}/w", 4)
    kv = shapes.get(f"{layers}/attn/kv_einsum{suffix}/w")
    return config_lib.Gemma(width, depth, mlp, heads, heads if kv is None else kv[2], head_dim)


def _policy(shapes: Shapes, kernel: str, adarms: bool, sep: str = "/") -> dict[str, Any]:
    """The mechanisms and the action dim, from which projections there are."""
    action_in = _get(shapes, f"action_in_proj{sep}{kernel}", 2)
    return {
        "action_dim": action_in[0] if kernel == "kernel" else action_in[1],
        "state_in": "suffix" if f"state_proj{sep}{kernel}" in shapes else "prompt",
        "time_in": "adarms" if adarms else "mlp",
    }


def _vision(width: int, depth: int, mlp: int, heads: int, patch: int, tokens: int) -> config_lib.Siglip:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UserError(f"the position embedding has {tokens} tokens, which is no square")
    return config_lib.Siglip(width, depth, mlp, heads, patch, side * patch)


def _get(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None:
        raise UserError(f"no tensor {name} among the weights; {near(name, shapes)}")
    if len(shape) != rank:
        raise UserError(f"{name} has shape {tuple(shape)}, but {rank} axes are expected")
    return tuple(shape)


def finish(fields: Mapping[str, Any], described: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """The configuration: what the weights say, completed by a description and overruled by the caller.

    Args:
      fields: from the shapes.
      described: fields of `config.Pi0` that the checkpoint's own files state.
      overrides: fields of `config.Pi0` that the caller states; a nested mapping for `vision` etc.

    Returns:
      `config.Pi0`.

    Raises:
      UserError: an unknown field, or one that the weights contradict.
    """
    from_prompt = fields.get("state_in") == "prompt"
    merged = {"max_token_len": 200 if from_prompt else 48, **described, **fields}
    known = {f.name for f in dataclasses.fields(config_lib.Pi0)}
    for key, value in overrides.items():
        if key not in known:
            raise UserError(f"{key}: no such field of the model; {near(key, known)}")
        if isinstance(value, Mapping) and key in merged:
            merged[key] = dataclasses.replace(merged[key], **value)
        else:
            merged[key] = value
    return config_lib.build(config_lib.Pi0, merged, "model")
