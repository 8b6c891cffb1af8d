"""A pi0-FAST small enough for a thousand decodes, and what it reads."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from openpi_port import grammar as grammars
from openpi_port.config import Gemma, Pi0Fast, Siglip
from openpi_port.grammar import Grammar
from openpi_port.tokenizers import fast, paligemma
from openpi_port.tokenizers.fast_sequence import FastSequence

TINY = Pi0Fast(
    vision=Siglip(width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=16, image_size=32),
    language=Gemma(width=32, depth=1, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=16),
    vocab_size=1152,
    action_dim=5,
    action_horizon=6,
    max_token_len=20,
    cameras=("base_0_rgb",),
)


def batch_of_prompts(size: int, model: Pi0Fast = TINY) -> dict[str, Any]:
    """Noise, with prompts of many lengths; of several cameras the first alone is there."""
    rng = np.random.default_rng(0)
    length = rng.integers(3, model.max_token_len + 1, (size, 1))
    return {
        "image": {c: rng.integers(0, 256, (size, 32, 32, 3), np.uint8) for c in model.cameras},
        "image_mask": {c: np.full(size, i == 0) for i, c in enumerate(model.cameras)},
        "tokenized_prompt": rng.integers(2, 512, (size, model.max_token_len)).astype(np.int32),
        "tokenized_prompt_mask": np.arange(model.max_token_len) < length,
    }


@functools.cache
def sequence() -> FastSequence:
    """The tokenizers that ship."""
    return FastSequence(paligemma.load("small"), fast.load("fast_aloha"), TINY.vocab_size)


def grammar() -> Grammar:
    """Of whole chunks."""
    return grammars.build(sequence(), TINY.action_horizon, TINY.action_dim)


def written(sequence: FastSequence, actions: np.ndarray) -> list[int]:
    """[A, J] to what a model should write of them: "Action: ", the chunk, "|" and end of sequence."""
    encoded = sequence.encode_actions(actions, 1000)
    return [*sequence.prompt_ids, *encoded["action_tokens"][encoded["action_tokens_mask"]].tolist()]
