"""The attention backends at the shapes of pi0, forward and backward; `experiments.bench --only=attention`.

B batch, T queries, S keys, N heads, K kv heads, H head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from openpi_port.backends import Backend
from openpi_port.config import Compute, Pi0
from openpi_port.errors import UserError
from openpi_port.masks import UNSEEN, Blocks


class Case(NamedTuple):
    """One use of attention.

    Attributes:
      shape: B, T, S, N, K, H.
      mask: None where there is none.
    """

    shape: tuple[int, int, int, int, int, int]
    mask: Blocks | None


def cases(model: Pi0, batch_size: int) -> dict[str, Case]:
    """Vision, prefix and suffix in training, and prefix and suffix of one robot; some prompts are short."""
    vision, language = model.vision, model.language
    heads = (language.num_heads, language.num_kv_heads, language.head_dim)
    eyes = (vision.num_tokens, vision.num_tokens, vision.num_heads, vision.num_heads, vision.width // vision.num_heads)
    found = {f"vision x{batch_size}": Case((batch_size * len(model.cameras), *eyes), None)}
    for size in (batch_size, 1):
        valid = np.arange(model.prefix_len) < model.prefix_len - np.arange(size)[:, None] % (model.max_token_len // 2)
        keys = np.where(valid, 0, UNSEEN)
        seen = np.concatenate([keys, np.ones((size, model.suffix_len), int)], 1)
        shape = (size, model.prefix_len, model.prefix_len, *heads)
        found[f"prefix x{size}"] = Case(shape, Blocks(None, keys))
        shape = (size, model.suffix_len, model.prefix_len + model.suffix_len, *heads)
        found[f"suffix x{size}"] = Case(shape, Blocks(np.ones((size, model.suffix_len), int), seen))
    return found


def measure(model: Pi0, batch_size: int, backend: Backend, dtype: str, repeat: int) -> dict[str, float | str]:
    """Median milliseconds by case and backend; what a device doesn't have is left out, what fails is named."""
    rows: dict[str, float | str] = {}
    for name in backend.attention.BACKENDS:
        try:
            compute = Compute(dtype=dtype, attention=name)
            backend.attention.resolve(compute, backend.device.find(None))
        except UserError as error:
            print(error)
            continue
        for case, (shape, mask) in cases(model, batch_size).items():
            try:
                forward, both = backend.attention_times.measure(shape, mask, compute, repeat)
            except (RuntimeError, NotImplementedError) as error:  # a kernel that doesn't take these shapes
                rows[f"attention/{case}/{name}"] = f"fails: {str(error).strip().splitlines()[0][:60]}"
                continue
            rows[f"attention/{case}/{name}/forward_ms"] = 1e3 * forward
            rows[f"attention/{case}/{name}/with_backward_ms"] = 1e3 * both
    return rows
