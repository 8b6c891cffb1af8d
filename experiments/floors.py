"""The least that inference can take on a device: operations and bytes from the shapes, over the rates of the device.

T tokens, D width, F width of the MLP, N heads, K kv heads, H head dim.
"""

from __future__ import annotations

from typing import NamedTuple

from openpi_port.config import Gemma, Pi0, Pi0Fast, Siglip


class Work(NamedTuple):
    """What a part must do at least: every weight read once, nothing computed that nobody sees."""

    operations: float
    bytes: float

    def seconds(self, rates: tuple[float, float]) -> float:
        """The larger of the two times at (operations, bytes) a second."""
        return max(self.operations / rates[0], self.bytes / rates[1])


def inference(model: Pi0 | Pi0Fast, cameras: int, prompt: int, *, item: int = 2) -> dict[str, Work]:
    """Work of the parts of a chunk at batch 1.

    Args:
      model: the architecture.
      cameras: how many there are.
      prompt: tokens of the prompt.
      item: bytes of a number.

    Returns:
      "vision" and "prefix", and "step" (an Euler step) or "token".
    """
    tokens = cameras * model.vision.num_tokens + prompt
    language = model.language
    last = 2 * language.num_kv_heads * language.head_dim * language.width  # of whose layer only keys and values count
    full = language.depth - 1
    attention = 4 * tokens**2 * language.num_heads * language.head_dim
    parts = {
        "vision": _vision(model.vision, cameras, language.width, item),
        "prefix": Work(
            full * (2 * tokens * _layer(language) + attention) + 2 * tokens * last,
            item * (full * _layer(language) + last),
        ),
    }
    if isinstance(model, Pi0):
        rows, expert, name = model.suffix_len, model.expert, "step"
    else:
        rows, expert, name = 1, language, "token"
    keys = tokens + rows
    cache = 2 * keys * expert.num_kv_heads * expert.head_dim
    seen = 4 * rows * keys * expert.num_heads * expert.head_dim
    parts[name] = Work(
        expert.depth * (2 * rows * _layer(expert) + seen), item * expert.depth * (_layer(expert) + cache)
    )
    return parts


def _layer(gemma: Gemma) -> int:
    """Weights of one layer."""
    heads = (2 * gemma.num_heads + 2 * gemma.num_kv_heads) * gemma.head_dim
    return gemma.width * (heads + 3 * gemma.mlp_dim)


def _vision(vision: Siglip, cameras: int, out: int, item: int) -> Work:
    layer = 4 * vision.width**2 + 2 * vision.width * vision.mlp_dim
    ends = vision.width * (3 * vision.patch_size**2 + out)
    tokens = vision.num_tokens
    seen = 4 * tokens**2 * vision.width
    return Work(
        cameras * (2 * tokens * (vision.depth * layer + ends) + vision.depth * seen),
        item * (vision.depth * layer + ends),
    )
