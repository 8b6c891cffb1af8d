"""Tokens as people read them: pieces of text, bins of the state, and what action tokens stand for."""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.inspect_subject import Sample, Subject
from openpi_port.sequence import Kind
from openpi_port.tokenizers.fast_sequence import FastSequence
from openpi_port.tokenizers.paligemma import PromptTokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
    """One token.

    Attributes:
      id: in the model's vocabulary.
      text: with spaces and line breaks that show.
      kind: whose colour it has.
      about: more, for who points at it.
    """

    id: int
    text: str
    kind: Kind
    about: str = ""


def prompt_pieces(subject: Subject, sample: Sample) -> list[Piece]:
    """The text, with the state's bins and action tokens in their own colours."""
    ids = sample.model["tokenized_prompt"][sample.model["tokenized_prompt_mask"]]
    scored = sample.model.get("token_ar_mask", np.zeros(len(ids)))[: len(ids)] > 0
    pieces, read = [], ""
    for i, causal in zip(map(int, ids), scored, strict=True):
        piece = _action(subject.tokens, i) if causal and subject.tokens else None
        if piece is None:
            text = subject.tokenizer.decode_text([i])
            in_state = "State:" in read and ";" not in (read + text).partition("State:")[2]
            read += text
            kind: Kind = "tokens" if causal else "state" if in_state else "prompt"
            piece = Piece(i, _visible(subject.tokenizer, i, text, bos=int(ids[0])), kind)
        pieces.append(piece)
    return pieces


def action_pieces(subject: Subject, sample: Sample) -> list[Piece]:
    """The tokens that knowledge insulation adds; none otherwise."""
    if "action_tokens" not in sample.model:
        return []
    ids = sample.model["action_tokens"][sample.model["action_tokens_mask"]]
    return [
        _action(subject.tokens, i)
        or Piece(i, _visible(subject.tokenizer, i, subject.tokenizer.decode_text([i])), "tokens")
        for i in map(int, ids)
    ]


def _action(tokens: FastSequence, i: int) -> Piece | None:
    """An action token; None for text."""
    k = tokens.first_id - i
    if not 0 <= k < len(tokens.fast.token_bytes):
        return None
    count = len(tokens.fast.token_bytes[k].decode(errors="replace"))
    return Piece(i, f"a{k}", "tokens", f": action token {k} stands for {count} coefficient{'s' * (count != 1)}")


def _visible(tokenizer: PromptTokenizer, i: int, text: str, bos: int | None = None) -> str:
    """A piece of text with marks for what can't be seen."""
    if i == tokenizer.eos_id:
        return "⟨eos⟩"
    if not text:
        return "⟨bos⟩" if i == bos else "⟨empty⟩"
    return text.replace(" ", "␣").replace("\n", "⏎")
