"""The one definition of who may attend to whom; works on numpy, jax and torch arrays alike.

B batch, S tokens of the whole sequence, T queries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # numpy, jax or torch: only indexing, comparison, arithmetic, `&` and `cumsum` are used

UNSEEN = 1 << 30  # the block of a key that nobody may see


class Blocks(NamedTuple):
    """A mask by its structure: a query sees the keys of its own block and of the blocks before it.

    Attributes:
      queries: int [B, T], each query's block; None where every query sees every key but the `UNSEEN` ones, which is
        what fused attention does best.
      keys: int [B, S], each key's block, or `UNSEEN`.
    """

    queries: Array | None
    keys: Array


def blocks(valid: Array, starts_block: Array | None) -> Blocks:
    """The structure of `attention_mask`, which needs no [B, S, S] array.

    Padding queries see what valid ones of their block see: nobody reads what becomes of them, and a row without any
    key is what fused kernels disagree on.

    Args:
      valid: bool [B, S], False for padding and empty cameras.
      starts_block: bool or integer [B, S], true where a token opens a new block; None for one block.
    """
    block = valid.cumsum(1) * 0 if starts_block is None else (starts_block > 0).cumsum(1)
    return Blocks(None if starts_block is None else block, block * valid + ~valid * UNSEEN)


def dense(mask: Blocks) -> Array:
    """The same as bool [B, T, S]; [B, 1, S] where all queries see the same keys."""
    if mask.queries is None:
        return mask.keys[:, None, :] < UNSEEN
    return mask.keys[:, None, :] <= mask.queries[:, :, None]


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
