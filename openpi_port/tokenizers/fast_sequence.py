"""pi0-FAST's sequence: prompt, discretised state and action tokens, with the masks that training needs.

    Task: {text}, State: {bins};\\n   Action: {action tokens}|<eos>   padding
    attention among themselves        causal, and scored by the loss   masked

LeRobot begins what is causal with one more <bos>, which is not scored; in decoding it ends the prompt.

Action id k is the text vocabulary's id `vocab_size - 1 - 128 - k`: the last 128 are PaliGemma's special tokens.
Axis letters: T tokens, A actions, J dimensions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from openpi_port.errors import UserError
from openpi_port.tokenizers.fast import FastTokenizer, MalformedTokens
from openpi_port.tokenizers.paligemma import PromptTokenizer

RESERVED = 128


class FastSequence:
    """Builds and reads sequences.

    Args:
      text: of the prompt.
      fast: of the actions.
      vocab_size: rows of the model's embedding table, whose end holds the action tokens; at least
        `text.vocab_size` for PaliGemma's, and enough for both where the text tokenizer is small.
      allow_truncation: cuts sequences whose actions do not fit, counts them in `truncated_actions` and logs the
        first, as openpi does for all; otherwise that is an error.
      out_of_range: see FastTokenizer.encode.

    Raises:
      UserError: action tokens would fall onto pieces of the small text tokenizer.
    """

    def __init__(
        self,
        text: PromptTokenizer,
        fast: FastTokenizer,
        vocab_size: int = 257152,
        *,
        allow_truncation: bool = False,
        out_of_range: str = "error",
    ):
        self.text, self.fast, self.vocab_size = text, fast, vocab_size
        self.allow_truncation, self.out_of_range = allow_truncation, out_of_range
        self.truncated_actions = 0
        self.first_id = vocab_size - 1 - RESERVED  # of action token 0; further ones count down
        self.bos = text.encode_text("", bos=True)
        self.prompt_ids = text.encode_text("Action: ")
        self.end_ids = text.encode_text("|")
        last = self.first_id - len(fast.token_bytes) + 1
        # PaliGemma's 257,152 pieces end with 1,152 reserved ones; openpi lets rarer text pieces go below those.
        if last < max([*self.prompt_ids, *self.end_ids, text.eos_id]) or (
            text.vocab_size < 10_000 and last < text.vocab_size
        ):
            raise UserError(
                f"vocab_size={vocab_size} has no room for {len(fast.token_bytes)} action tokens beside "
                f"{text.vocab_size} text pieces: needs {text.vocab_size + len(fast.token_bytes) + RESERVED}"
            )

    def encode(
        self, prompt: str, state: np.ndarray, actions: np.ndarray | None, max_len: int, *, lerobot: bool = False
    ) -> dict[str, np.ndarray]:
        """One sequence.

        Args:
          prompt: the instruction.
          state: [J], normalised.
          actions: [A, J], normalised; None ends the sequence after the prompt, for the model to go on.
          max_len: T.
          lerobot: writes it as LeRobot does, but for the padding that LeRobot leaves between prompt and actions: it is
            masked and not counted there, so nothing depends on it.

        Returns:
          "tokenized_prompt" int32, "tokenized_prompt_mask" bool, "token_ar_mask" int32 (1 on what is causal) and
          "token_loss_mask" bool, each [T]; with actions also what was lost: "actions_clipped" int32 [], coefficients
          that were moved into the tokenizer's range, and "actions_cut" bool [], whether tokens did not fit.

        Raises:
          UserError: the actions do not fit, unless truncation is allowed; or a coefficient is out of range.
        """
        prefix = self.text.fast_prefix(prompt, state, keep_case=lerobot)
        bos, lost = self.bos if lerobot else [], {}
        if actions is None:
            ids = self.text.cut(prefix, max_len - len(bos), prompt) + bos
        else:
            chunk, clipped = self._chunk(actions)
            ids = [*prefix, *bos, *self.prompt_ids, *chunk]
            lost = {"actions_clipped": clipped, "actions_cut": np.bool_(len(ids) > max_len)}
            if len(ids) > max_len:
                self._count_truncation(len(prefix), len(ids), max_len)
        used, start = min(len(ids), max_len), max_len if actions is None else min(len(prefix), max_len)
        tokens = np.zeros(max_len, np.int32)
        tokens[:used] = ids[:used]
        place = np.arange(max_len)
        postfix = (place >= start) & (place < used)
        return {
            "tokenized_prompt": tokens,
            "tokenized_prompt_mask": place < used,
            "token_ar_mask": postfix.astype(np.int32),
            "token_loss_mask": postfix & (place >= start + len(bos)),
            **lost,
        }

    def encode_actions(self, actions: np.ndarray, max_len: int) -> dict[str, np.ndarray]:
        """The actions alone, to follow a prompt that ends in "Action: ", as pi0.5's does.

        Args:
          actions: [A, J], normalised.
          max_len: N.

        Returns:
          "action_tokens" int32 [N], the chunk, "|", end of sequence and zeros; "action_tokens_mask" bool [N], true on
          tokens; "actions_clipped" int32 [], as `encode`.

        Raises:
          UserError: they do not fit; or a coefficient is out of range.
        """
        ids, clipped = self._chunk(actions)
        if len(ids) > max_len:
            raise UserError(
                f"FAST: {len(ids)} action tokens do not fit into config.max_action_tokens={max_len}: raise it"
            )
        tokens = np.zeros(max_len, np.int32)
        tokens[: len(ids)] = ids
        mask = np.arange(max_len) < len(ids)
        return {"action_tokens": tokens, "action_tokens_mask": mask, "actions_clipped": clipped}

    def decode_actions(self, tokens: Sequence[int], horizon: int, dim: int) -> np.ndarray:
        """What the model generated to a chunk.

        Args:
          tokens: [N], from "Action: " (which may be missing) to "|"; what follows "|" is ignored.
          horizon, dim: A and J.

        Returns:
          float64 [A, J], normalised.

        Raises:
          MalformedTokens: it is no chunk, with the token that is wrong.
        """
        ids = [int(i) for i in tokens]
        lead = len(self.prompt_ids)
        start = lead if ids[:lead] == self.prompt_ids else 0
        end = next((i for i in range(start, len(ids)) if ids[i : i + len(self.end_ids)] == self.end_ids), None)
        if end is None:
            raise MalformedTokens(f"no '|' ends the actions within {len(ids)} tokens: {ids[:8]}...")
        chunk = [self.first_id - i for i in ids[start:end]]
        for place, k in enumerate(chunk):
            if not 0 <= k < len(self.fast.token_bytes):
                raise MalformedTokens(f"token {start + place} ({ids[start + place]}) is no action token")
        return self.fast.decode([chunk], horizon, dim)[0]

    def _chunk(self, actions: np.ndarray) -> tuple[list[int], np.int32]:
        """[A, J] to the chunk, "|" and end of sequence, and how many coefficients had to be clipped."""
        coefficients = self.fast.coefficients(actions[None])
        chunk = self.fast.encode_coefficients(coefficients, self.out_of_range)[0]
        clipped = np.int32(self.fast.beyond(coefficients).sum())
        return [*(self.first_id - k for k in chunk), *self.end_ids, self.text.eos_id], clipped

    def _count_truncation(self, prefix: int, needed: int, max_len: int) -> None:
        message = (
            f"FAST: {needed} tokens ({prefix} of prompt and state, {needed - prefix} of actions) do not fit into "
            f"config.model.max_token_len={max_len}"
        )
        if not self.allow_truncation:
            raise UserError(f"{message}: raise it, fit a coarser tokenizer, or cut with --config.allow_truncation=True")
        self.truncated_actions += 1
        if self.truncated_actions == 1:
            logging.getLogger(__name__).warning("%s; cut (further ones are only counted)", message)
