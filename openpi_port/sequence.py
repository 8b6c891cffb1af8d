"""What a training sample's sequence is made of, in numpy, for people to look at: blocks, who sees whom, positions.

The models build theirs in pi_*/pi0.py, pi0_fast.py and insulated.py; the tests compare.

S tokens of the whole sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from openpi_port.config import Pi0Fast, Train
from openpi_port.masks import attention_mask, positions

Kind = Literal["image", "prompt", "padding", "state", "tokens", "actions"]


@dataclasses.dataclass(frozen=True)
class Block:
    """Neighbouring tokens of one purpose: `stop - start` of them; "tokens" are actions in the words of FAST."""

    name: str
    kind: Kind
    start: int
    stop: int

    @property
    def place(self) -> slice:
        """Where it lies in the sequence."""
        return slice(self.start, self.stop)


@dataclasses.dataclass(frozen=True, eq=False)
class Sequence:
    """One sample's sequence.

    Attributes:
      blocks: in order, without a gap and none of them empty.
      valid: bool [S], False for padding and empty cameras.
      mask: bool [S, S], query (axis 0) may see key (axis 1).
      positions: int [S], for the rotary embedding.
    """

    blocks: tuple[Block, ...]
    valid: np.ndarray
    mask: np.ndarray
    positions: np.ndarray


def build(config: Train, sample: Mapping[str, Any]) -> Sequence:
    """The sequence of a training sample.

    Args:
      config: the run.
      sample: what the transforms made, without a batch axis.
    """
    model, fast = config.model, isinstance(config.model, Pi0Fast)
    text = np.asarray(sample["tokenized_prompt_mask"], bool)
    used = int(text.sum())
    prompt = used - int(np.sum(sample["token_ar_mask"])) if fast else used
    parts: list[tuple[str, Kind, int, bool]] = [  # the last: whether they are seen
        *((name, "image", model.vision.num_tokens, bool(sample["image_mask"][name])) for name in model.cameras),
        ("prompt", "prompt", prompt, True),
        ("action tokens", "tokens", used - prompt, True),
        ("padding", "padding", len(text) - used, False),
    ]
    if config.insulate:  # nothing follows the last token, so it is not fed
        given = int(np.sum(sample["action_tokens_mask"][:-1]))
        parts += [("action tokens", "tokens", given, True)]
        parts += [("padding of the tokens", "padding", len(sample["action_tokens_mask"]) - 1 - given, False)]
    if not fast:
        parts += [("state", "state", 1, True)] if model.state_in == "suffix" else []
        parts += [("actions", "actions", model.action_horizon, True)]
    blocks, start = [], 0
    for name, kind, size, _ in parts:
        if size:
            blocks.append(Block(name, kind, start, start + size))
            start += size
    valid = np.concatenate([np.full(size, seen) for _, _, size, seen in parts])
    starts = np.concatenate([_starts(kind, size) for _, kind, size, _ in parts])
    mask = attention_mask(valid[None], starts[None])[0]
    numbers = positions(valid[None])[0]
    if fast and model.positions == "openpi":
        numbers = np.arange(len(valid))
    if config.insulate:
        actions, tokens = blocks[-1].place, slice(model.prefix_len, blocks[-1].start)
        mask[actions, tokens] = False  # they don't exist when actions are sampled
        numbers[actions] = numbers[model.prefix_len - 1] + 1 + np.arange(model.action_horizon)
    return Sequence(tuple(blocks), valid, mask, numbers)


def _starts(kind: Kind, size: int) -> np.ndarray:
    """Where new blocks of attention begin: tokens are causal, the suffix does not belong to the prefix."""
    starts = np.zeros(size, bool)
    starts[: size if kind == "tokens" else kind in ("state", "actions")] = True
    return starts
