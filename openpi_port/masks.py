"""The one definition of who may attend to whom; works on numpy, jax and torch arrays alike.

B batch, S tokens of the whole sequence, T queries.
"""

from __future__ import annotations

from typing import Any

Array = Any  # numpy, jax or torch: only indexing, comparison, `&` and `cumsum` are used


def attention_mask(valid: Array, starts_block: Array) -> Array:
    """Block-causal attention: a token sees its own block and the blocks before it.

    `starts_block` cuts the sequence into blocks: 0 0 0 1 0 is a prefix of three tokens that see one another and a
    suffix of two that see everything; all ones is causal attention. (big_vision's `make_attn_mask`.)

    Args:
      valid: bool [B, S], False for padding and empty cameras.
      starts_block: bool or integer [B, S], true where a token opens a new block.

    Returns:
      bool [B, S, S]: query (axis 1) may see key (axis 2).
    """
    block = (starts_block > 0).cumsum(1)
    sees = block[:, None, :] <= block[:, :, None]
    return sees & valid[:, None, :] & valid[:, :, None]


def positions(valid: Array) -> Array:
    """Positions for the rotary embedding: padding is not counted, valid tokens are numbered from 0.

    Args:
      valid: bool [B, S].

    Returns:
      int [B, S]; a padding token repeats the number before it (-1 at the front).
    """
    return valid.cumsum(1) - 1
