"""Every parameter of the pi0 family on every side, one row per tensor; names are written nowhere else.

Axis letters: L layers, T patches, p q rows and columns of a patch, C colours, W vision width, M vision MLP,
N heads, H head dim, K kv heads, D width, F width of the MLP, R rank of LoRA, V vocabulary, J action dim, 1 an axis of
one.

Sides: `flax` (canonical: layers stacked on axis 0, kernels [in, out]), `torch` (per layer, [out, in]), `openpi`
(orbax; also big_vision's names), `hf` (openpi-PyTorch; LeRobot and Hugging Face PaliGemma under another root).
The axes of a row are those of one layer; "openpi" stacks layers on axis 0, as we do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.layout import OURS, Entry, Place, Row, Translated, shapes_of, side_shapes
from openpi_port.config import Gemma, Siglip
from openpi_port.strict import check

SIDES = (OURS, "torch", "openpi", "hf")

PALIGEMMA = "paligemma_with_expert.paligemma.model"
VIT = f"{PALIGEMMA}.vision_tower.vision_model"
EXPERTS = (f"{PALIGEMMA}.language_model", "paligemma_with_expert.gemma_expert.model")
EMBED_TOKENS = f"{EXPERTS[0]}.embed_tokens.weight"
LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"  # tied to EMBED_TOKENS
UNUSED_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"  # random; no computation reads it


def _row(ours: str, axes: str, openpi: tuple, hf: tuple | None) -> Row:
    """A row; the torch side follows from ours: dots, one tensor per layer, kernels transposed, called weight."""
    layered = "blocks/" in ours or "layers/" in ours
    torch = ours.replace("/", ".").replace("blocks.", "blocks.{l}.").replace("layers.", "layers.{l}.")
    torch_axes = axes
    if ours.endswith("/kernel"):
        torch, (d_in, d_out) = torch.removesuffix("kernel") + "weight", _split(axes)
        torch_axes = f"{d_out} {d_in}"
    sides = {OURS: Place(ours, axes), "torch": Place(torch, torch_axes), "openpi": Place(*openpi)}
    return Row(sides if hf is None else {**sides, "hf": Place(*hf)}, layered)


def _split(axes: str) -> list[str]:
    """The two axes of a kernel, each maybe a product in parentheses."""
    parts, depth = [""], 0
    for char in axes:
        depth += (char == "(") - (char == ")")
        if char == " " and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return parts


_IMG = "PaliGemma/img"
_BLOCK = f"{_IMG}/Transformer/encoderblock"
_HF_BLOCK = f"{VIT}.encoder.layers.{{l}}"


def _vision_norm(ours: str, openpi: str, hf: str) -> list[Row]:
    return [
        _row(f"vision/{ours}/scale", "W", (f"{openpi}/scale", "W"), (f"{hf}.weight", "W")),
        _row(f"vision/{ours}/bias", "W", (f"{openpi}/bias", "W"), (f"{hf}.bias", "W")),
    ]


def _vision_proj(ours: str, theirs: str, hf: str) -> list[Row]:
    openpi, hf = f"{_BLOCK}/MultiHeadDotProductAttention_0/{theirs}", f"{_HF_BLOCK}.self_attn.{hf}"
    ours = f"vision/blocks/attn/{ours}"
    return [
        _row(f"{ours}/kernel", "W (N H)", (f"{openpi}/kernel", "W N H"), (f"{hf}.weight", "(N H) W")),
        _row(f"{ours}/bias", "(N H)", (f"{openpi}/bias", "N H"), (f"{hf}.bias", "(N H)")),
    ]


def _dense(ours: str, axes: str, openpi: str, hf: str) -> list[Row]:
    """A Dense layer with bias that everyone stores plainly: [in, out] in Flax, [out, in] in torch."""
    d_in, d_out = axes.split()
    return [
        _row(f"{ours}/kernel", axes, (f"{openpi}/kernel", axes), (f"{hf}.weight", f"{d_out} {d_in}")),
        _row(f"{ours}/bias", d_out, (f"{openpi}/bias", d_out), (f"{hf}.bias", d_out)),
    ]


VISION = [
    _row(
        "vision/patch_embed/kernel",
        "(p q C) W",
        (f"{_IMG}/embedding/kernel", "p q C W"),
        (f"{VIT}.embeddings.patch_embedding.weight", "W C p q"),
    ),
    _row(
        "vision/patch_embed/bias",
        "W",
        (f"{_IMG}/embedding/bias", "W"),
        (f"{VIT}.embeddings.patch_embedding.bias", "W"),
    ),
    _row(
        "vision/pos_embedding",
        "T W",
        (f"{_IMG}/pos_embedding", "1 T W"),
        (f"{VIT}.embeddings.position_embedding.weight", "T W"),
    ),
    *_vision_norm("blocks/norm_attn", f"{_BLOCK}/LayerNorm_0", f"{_HF_BLOCK}.layer_norm1"),
    *_vision_proj("q", "query", "q_proj"),
    *_vision_proj("k", "key", "k_proj"),
    *_vision_proj("v", "value", "v_proj"),
    _row(
        "vision/blocks/attn/o/kernel",
        "(N H) W",
        (f"{_BLOCK}/MultiHeadDotProductAttention_0/out/kernel", "N H W"),
        (f"{_HF_BLOCK}.self_attn.out_proj.weight", "W (N H)"),
    ),
    _row(
        "vision/blocks/attn/o/bias",
        "W",
        (f"{_BLOCK}/MultiHeadDotProductAttention_0/out/bias", "W"),
        (f"{_HF_BLOCK}.self_attn.out_proj.bias", "W"),
    ),
    *_vision_norm("blocks/norm_mlp", f"{_BLOCK}/LayerNorm_1", f"{_HF_BLOCK}.layer_norm2"),
    *_dense("vision/blocks/mlp/up", "W M", f"{_BLOCK}/MlpBlock_0/Dense_0", f"{_HF_BLOCK}.mlp.fc1"),
    *_dense("vision/blocks/mlp/down", "M W", f"{_BLOCK}/MlpBlock_0/Dense_1", f"{_HF_BLOCK}.mlp.fc2"),
    *_vision_norm("norm", f"{_IMG}/Transformer/encoder_norm", f"{VIT}.post_layernorm"),
    *_dense("vision/head", "W D", f"{_IMG}/head", f"{PALIGEMMA}.multi_modal_projector.linear"),
]

EMBEDDING = [_row("gemma/embedding", "V D", ("PaliGemma/llm/embedder/input_embedding", "V D"), (EMBED_TOKENS, "V D"))]

# {e} is the expert's number, {s} openpi's suffix for it ("", "_1"), {hf} the root of its Hugging Face model.
_LAYER, _OPENPI, _HF = "gemma/layers/experts/{e}", "PaliGemma/llm/layers", "{hf}.layers.{l}"


def _heads(ours: str, letter: str, openpi: tuple) -> Row:
    hf = (f"{_HF}.self_attn.{ours}_proj.weight", f"({letter} H) D")
    return _row(f"{_LAYER}/{ours}/kernel", f"D ({letter} H)", openpi, hf)


# openpi stores keys and values in one tensor, and queries too where every query head has its own kv head.
GROUPED_HEADS = [
    _heads("q", "N", (f"{_OPENPI}/attn/q_einsum{{s}}/w", "N D H")),
    _heads("k", "K", (f"{_OPENPI}/attn/kv_einsum{{s}}/w", "K D H", (0, 2))),
    _heads("v", "K", (f"{_OPENPI}/attn/kv_einsum{{s}}/w", "K D H", (1, 2))),
]
SINGLE_HEADS = [
    _heads(name, letter, (f"{_OPENPI}/attn/qkv_einsum{{s}}/w", f"{letter} D H", (i, 3)))
    for i, (name, letter) in enumerate([("q", "N"), ("k", "K"), ("v", "K")])
]
EXPERT = [
    _row(
        f"{_LAYER}/o/kernel",
        "(N H) D",
        (f"{_OPENPI}/attn/attn_vec_einsum{{s}}/w", "N H D"),
        (f"{_HF}.self_attn.o_proj.weight", "D (N H)"),
    ),
    _row(
        f"{_LAYER}/gate/kernel",
        "D F",
        (f"{_OPENPI}/mlp{{s}}/gating_einsum", "D F", (0, 2)),
        (f"{_HF}.mlp.gate_proj.weight", "F D"),
    ),
    _row(
        f"{_LAYER}/up/kernel",
        "D F",
        (f"{_OPENPI}/mlp{{s}}/gating_einsum", "D F", (1, 2)),
        (f"{_HF}.mlp.up_proj.weight", "F D"),
    ),
    _row(
        f"{_LAYER}/down/kernel",
        "F D",
        (f"{_OPENPI}/mlp{{s}}/linear", "F D"),
        (f"{_HF}.mlp.down_proj.weight", "D F"),
    ),
]


def adapters(kernel: Row) -> tuple[Row, Row]:
    """The rows of a kernel's LoRA factors, a and b: openpi's axes on every side, and no place in Hugging Face's names.

    openpi's `q_einsum/w` has `q_einsum/lora_a`, its `linear` has `linear_lora_a`.
    """
    ours, place = kernel.sides[OURS].name.removesuffix("kernel"), kernel.sides["openpi"]
    stem = place.name.removesuffix("w") if place.name.endswith("/w") else f"{place.name}_"
    *heads, d_in, d_out = place.axes.split()
    a, b = " ".join([*heads, d_in, "R"]), " ".join([*heads, "R", d_out])
    return (
        _row(f"{ours}lora_a", a, (f"{stem}lora_a", a, place.slot), None),
        _row(f"{ours}lora_b", b, (f"{stem}lora_b", b, place.slot), None),
    )


_NORMS = [
    (f"{_LAYER}/norm_attn", f"{_OPENPI}/pre_attention_norm{{s}}", f"{_HF}.input_layernorm"),
    (f"{_LAYER}/norm_mlp", f"{_OPENPI}/pre_ffw_norm{{s}}", f"{_HF}.post_attention_layernorm"),
    ("gemma/norms/{e}", "PaliGemma/llm/final_norm{s}", "{hf}.norm"),
]
RMS_NORMS = [_row(f"{ours}/scale", "D", (f"{openpi}/scale", "D"), (f"{hf}.weight", "D")) for ours, openpi, hf in _NORMS]
ADARMS_NORMS = [  # S is three widths: scale, shift, gate
    row
    for ours, openpi, hf in _NORMS
    for row in _dense(f"{ours}/modulation", "D S", f"{openpi}/Dense_0", f"{hf}.dense")
]


def _head(name: str, axes: str) -> list[Row]:
    return _dense(name, axes, name, name)


ACTIONS = [*_head("action_in_proj", "J D"), *_head("action_out_proj", "D J")]
STATE_IN_SUFFIX = _head("state_proj", "J D")
TIME_IN_MLP = [*_head("action_time_mlp_in", "B D"), *_head("action_time_mlp_out", "D D2")]  # B is two widths
TIME_IN_ADARMS = [*_head("time_mlp_in", "D D2"), *_head("time_mlp_out", "D D2")]


def entries(config: Any) -> list[Entry]:
    """All tensors of a model, in the order of the computation.

    Args:
      config: `config.Pi0`, or a model without an action expert (pi0-FAST: no `expert`).
    """
    return [*_paligemma(config), *_expert(config)]


def paligemma_entries(config: Any) -> list[Entry]:
    """The tensors of the vision-language model alone: all but the action expert and its projections."""
    return _paligemma(config)


def _paligemma(config: Any) -> list[Entry]:
    vision, language = config.vision, config.language
    sizes = {**_vision_sizes(vision), "D": language.width}
    rows = [Entry(row, sizes, {}) for row in VISION]
    rows += [Entry(row, {"V": config.vocab_size, "D": language.width}, {}) for row in EMBEDDING]
    return rows + _gemma(language, 0, adarms=False)


def _expert(config: Any) -> list[Entry]:
    expert = getattr(config, "expert", None)
    if expert is None:
        return []
    adarms = config.time_in == "adarms"
    width = expert.width
    sizes = {"J": config.action_dim, "D": width, "D2": width, "B": 2 * width}
    rows = [*ACTIONS, *(TIME_IN_ADARMS if adarms else TIME_IN_MLP)]
    rows += STATE_IN_SUFFIX if config.state_in == "suffix" else []
    return _gemma(expert, 1, adarms=adarms) + [Entry(row, sizes, {}) for row in rows]


def _vision_sizes(vision: Siglip) -> dict[str, int]:
    patch = vision.patch_size
    return {
        "L": vision.depth, "T": vision.num_tokens, "p": patch, "q": patch, "C": 3, "W": vision.width,
        "M": vision.mlp_dim, "N": vision.num_heads, "H": vision.width // vision.num_heads,
    }  # fmt: skip


def _gemma(config: Gemma, expert: int, *, adarms: bool) -> list[Entry]:
    sizes = {
        "L": config.depth, "D": config.width, "F": config.mlp_dim, "S": 3 * config.width,
        "N": config.num_heads, "K": config.num_kv_heads, "H": config.head_dim,
    }  # fmt: skip
    if config.lora is not None:
        sizes["R"] = config.lora.rank
    kernels = lora_targets(config)
    rows = [*(row for part in kernels.values() for row in part), *(ADARMS_NORMS if adarms else RMS_NORMS)]
    rows += [row for part in kernels if config.lora_of(part) for kernel in kernels[part] for row in adapters(kernel)]
    return [Entry(row, sizes, words(expert)) for row in rows]


def words(expert: int) -> dict[str, str]:
    """What the placeholders in the names of an expert's rows stand for."""
    return {"e": str(expert), "s": f"_{expert}" if expert else "", "hf": EXPERTS[expert]}


def lora_targets(config: Gemma) -> dict[str, list[Row]]:
    """The kernels of a layer, by the target of `config.Lora` that they belong to."""
    heads = SINGLE_HEADS if config.num_heads == config.num_kv_heads else GROUPED_HEADS
    return {"attn": [*heads, EXPERT[0]], "mlp": EXPERT[1:]}


def translate(tensors: Mapping[str, Any], config: Any, source: str, target: str) -> Translated:
    """One side's tensors as another side's, lazily and strictly.

    Args:
      tensors: name -> anything with `shape`, `dtype` and numpy indexing.
      config: the model's.
      source, target: of `SIDES`.

    Returns:
      A mapping that makes each tensor when asked for it.

    Raises:
      UserError: a tensor is missing, unknown or misshapen.
    """
    rows = entries(config)
    check(shapes_of(tensors), side_shapes(rows, source), f"{source} weights")
    return Translated(rows, tensors, source, target)


def translate_state(state: Mapping[str, Any], config: Any, source: str, target: str) -> dict[str, np.ndarray]:
    """A run's moments and raw weights ("mu/NAME", "nu/NAME", "raw/NAME") under another side's names.

    Frozen parameters have none, so that only what is there is asked for.

    Raises:
      UserError: a tensor that no parameter explains, or of another shape.
    """
    out: dict[str, np.ndarray] = {}
    for part in dict.fromkeys(name.partition("/")[0] for name in state):
        have = {n.removeprefix(f"{part}/"): t for n, t in state.items() if n.startswith(f"{part}/")}
        rows = [e for e in entries(config) if all(e.spot(source, i).name in have for i in e.layers)]
        check({n: tuple(t.shape) for n, t in have.items()}, side_shapes(rows, source), f"train_state/{part}")
        out |= {f"{part}/{n}": t for n, t in Translated(rows, have, source, target).items()}
    return out
