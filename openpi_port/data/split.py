"""Training and validation are split by episode: frames of one episode are too alike to be on both sides."""

from __future__ import annotations

import numpy as np


def split_episodes(n: int, fraction: float, seed: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Splits the numbers 0 to n - 1.

    Args:
      n: how many episodes there are.
      fraction: share for validation, 0 to below 1; above 0 it gets at least one episode, if there are two.
      seed: which ones.

    Returns:
      (training, validation), each ascending; training is never empty.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the validation share must be in [0, 1), not {fraction}")
    held_out = 0 if fraction == 0 else min(max(round(n * fraction), 1), n - 1)
    order = np.random.Generator(np.random.Philox(seed)).permutation(n)
    return tuple(sorted(map(int, order[held_out:]))), tuple(sorted(map(int, order[:held_out])))
