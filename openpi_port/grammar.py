"""Which tokens may come next, so that decoding can only end in a whole chunk of actions.

A FAST token stands for some bytes of UTF-8, and a coefficient is one character, so a token may begin or end within a
coefficient. What has been written so far matters only through two numbers: how many coefficients are left, and the
state of a small automaton.

    "Action: "  (fed at once)  ->  between  <->  within a character (7 states)
                                     |  "|"
                                     v
                                   closing  --<eos>-->  done

A table says for every such pair how many tokens are still needed at least. A token is allowed if what is needed after
it fits into the steps that are left; so there is no dead end, and no cut at the last step. The models look everything
up in a few arrays, for a whole batch at once.

B batch, K tokens that can occur, N tokens of "Action: ", R coefficients, S states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from openpi_port.errors import UserError
from openpi_port.rng import generator
from openpi_port.tokenizers.fast_sequence import FastSequence

EOS = 1  # ends a sequence, in PaliGemma's vocabulary and in the small one
NEVER = 2**30  # more steps than anyone has

# States within a character, by what the next byte may be (Unicode 15, table 3-7), and the state after it. 0 is between
# characters; leaving to it completes a character.
_TAIL = (0x80, 0xBF)
_WITHIN = {1: (_TAIL, 0), 2: (_TAIL, 1), 3: (_TAIL, 2), 4: ((0xA0, 0xBF), 1), 5: ((0x80, 0x9F), 1),
           6: ((0x90, 0xBF), 2), 7: ((0x80, 0x8F), 2)}  # fmt: skip
_LEAD = [(0x00, 0x7F, 0), (0xC2, 0xDF, 1), (0xE0, 0xE0, 4), (0xE1, 0xEC, 2), (0xED, 0xED, 5), (0xEE, 0xEF, 2),
         (0xF0, 0xF0, 6), (0xF1, 0xF3, 3), (0xF4, 0xF4, 7)]  # fmt: skip
_TEXT_STATES = 8


class Grammar(NamedTuple):
    """Arrays of one framework or of numpy; decoding begins with R coefficients left, in state 0.

    Attributes:
      lead: int32 [N], ids that are fed before anything is chosen.
      ids: int32 [K], ascending: the tokens that can occur.
      count: int32 [S, K], how many coefficients a token completes.
      after: int32 [S, K], the state after a token; the last state is that of no return.
      to_go: int32 [R + 1, S], the fewest tokens that end the sequence.
    """

    lead: Any
    ids: Any
    count: Any
    after: Any
    to_go: Any


def build(sequence: FastSequence, horizon: int, action_dim: int) -> Grammar:
    """The grammar of "Action: " + tokens of horizon * action_dim coefficients + "|" + end of sequence.

    Args:
      sequence: the tokenizers.
      horizon, action_dim: of the chunk.

    Raises:
      UserError: the text tokenizer's end of sequence is not 1.
    """
    if sequence.text.eos_id != EOS:
        raise UserError(f"the text tokenizer's end of sequence is {sequence.text.eos_id}; pi0-FAST needs {EOS}")
    closing = [*sequence.end_ids, EOS]
    tokens = sequence.fast.token_bytes
    ids = np.array([*(sequence.first_id - k for k in range(len(tokens))), *closing], np.int32)
    done = _TEXT_STATES + len(closing) - 1
    lost = done + 1
    count = np.zeros((lost + 1, len(ids)), np.int32)
    after = np.full((lost + 1, len(ids)), lost, np.int32)
    for state in range(_TEXT_STATES):
        for k, text in enumerate(tokens):
            count[state, k], after[state, k] = _read(text, state, lost)
    for i in range(len(closing)):
        before = 0 if i == 0 else _TEXT_STATES + i - 1
        after[before, len(tokens) + i] = _TEXT_STATES + i
    order = np.argsort(ids, kind="stable")  # as in the whole vocabulary, so that a draw picks the same token
    count, after = count[:, order], after[:, order]
    lead = np.array(sequence.prompt_ids, np.int32)
    return Grammar(lead, ids[order], count, after, _fewest(count, after, horizon * action_dim, done))


def _read(text: bytes, state: int, lost: int) -> tuple[int, int]:
    """Characters completed by a token's bytes, and the state after them."""
    count = 0
    for byte in text:
        if state == 0:
            state = next((to for low, high, to in _LEAD if low <= byte <= high), lost)
        else:
            (low, high), to = _WITHIN[state]
            state = to if low <= byte <= high else lost
        if state == lost:
            break
        count += state == 0
    return (0, lost) if state == lost or not text else (count, state)


def _fewest(count: np.ndarray, after: np.ndarray, total: int, done: int) -> np.ndarray:
    """Shortest ways to the end, [total + 1, S], by the number of coefficients left."""
    states = len(count)
    source = np.broadcast_to(np.arange(states)[:, None], count.shape)
    edges = np.stack([source, count, after], axis=-1).reshape(-1, 3)
    source, step, to = np.unique(edges[edges[:, 2] < states - 1], axis=0).T
    out = np.full((total + 1, states), NEVER, np.int32)
    out[0, done] = 0
    for left in range(total + 1):
        usable = step <= left
        s, n, t = source[usable], step[usable], to[usable]
        while True:  # tokens that complete nothing lead from state to state
            row = out[left].copy()
            np.minimum.at(row, s, np.minimum(out[left - n, t] + 1, NEVER))
            if np.array_equal(row, out[left]):
                break
            out[left] = row
    return out


def check(
    grammar: Grammar | None, max_steps: int, temperature: float, rng: int | np.random.Generator, batch_size: int
) -> np.ndarray | None:
    """Checks what a model is asked to decode, and draws for it.

    Returns:
      See `draws`; None where the temperature is 0.

    Raises:
      UserError: a temperature below 0, or no chunk can be written in that many tokens.
    """
    if temperature < 0 or max_steps < 1:
        raise UserError(f"temperature={temperature} and max_steps={max_steps}: at least 0 and 1 are needed")
    if grammar is not None:
        needed = len(grammar.lead) + int(grammar.to_go[-1, 0])
        if needed >= NEVER:
            raise UserError("the FAST tokenizer has no tokens that make a chunk of this size")
        if needed > max_steps:
            raise UserError(f"max_steps={max_steps}: a chunk takes at least {needed} tokens")
    return draws(rng, batch_size, max_steps) if temperature else None


def draws(rng: int | np.random.Generator, batch_size: int, max_steps: int) -> np.ndarray:
    """One uniform number per step and sample, the same for both frameworks.

    Args:
      rng: a seed, from which sample i gets a stream of its own whatever the batch; or a generator.
      batch_size: B.
      max_steps: steps.

    Returns:
      float32 [B, max_steps] in [0, 1), and far enough from 1 that a sum of probabilities exceeds it.
    """
    if isinstance(rng, np.random.Generator):
        drawn = rng.random((batch_size, max_steps), np.float32)
    else:
        drawn = np.stack([generator(rng, i, "decode").random(max_steps, np.float32) for i in range(batch_size)])
    return np.minimum(drawn, np.float32(1 - 2**-20))


def until_end(tokens: Sequence[int]) -> list[int]:
    """Generated tokens up to the end of sequence, without it."""
    tokens = [int(t) for t in tokens]
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens
