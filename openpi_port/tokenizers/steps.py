"""The steps that write words, states and actions as tokens (see openpi_port/transforms.py for what a step is).

Axis letters: A actions (horizon), J dimensions of state or action, T tokens of the prompt, N of the actions.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import numpy as np

from openpi_port.tokenizers.fast_sequence import FastSequence
from openpi_port.tokenizers.paligemma import PromptTokenizer

if TYPE_CHECKING:
    from openpi_port.transforms import Sample


@dataclasses.dataclass(frozen=True)
class TokenizePrompt:
    """The prompt, and for pi0.5 the state in it, as tokens.

    Attributes:
      tokenizer: makes them.
      max_len: T.
      state_in: "prompt" writes the normalised state into the text; otherwise that is the instruction alone.
      style: see `config.Data.prompt_style`.
      padded_dim: how far "lerobot-0.4" pads the state.
    """

    tokenizer: PromptTokenizer
    max_len: int
    state_in: Literal["suffix", "prompt", "none"]
    style: Literal["openpi", "lerobot-0.4", "lerobot-0.6"] = "openpi"
    padded_dim: int = 0

    def forward(self, sample: Sample) -> Sample:
        """Replaces "prompt" by "tokenized_prompt" int32 [T] and "tokenized_prompt_mask" bool [T]."""
        out = dict(sample)
        state = sample["state"] if self.state_in == "prompt" else None
        if state is not None and self.style == "lerobot-0.4":
            state = np.pad(state, (0, self.padded_dim - len(state)))
        keep = self.style != "openpi"
        tokens, mask = self.tokenizer.encode(out.pop("prompt"), state, self.max_len, keep_underscores=keep)
        return {**out, "tokenized_prompt": tokens, "tokenized_prompt_mask": mask}

    def inverse(self, sample: Sample) -> Sample:
        """Nothing: actions are not in the prompt."""
        return sample


@dataclasses.dataclass(frozen=True)
class TokenizeFast:
    """Prompt, state and actions as one sequence of tokens, for pi0-FAST.

    Attributes:
      sequence: makes and reads it.
      max_len: T.
      horizon, action_dim: A and J of the chunk that tokens decode to.
      lerobot_dim: writes the sequence as LeRobot does, with the state padded to so many dims; 0 writes openpi's.
    """

    sequence: FastSequence
    max_len: int
    horizon: int
    action_dim: int
    lerobot_dim: int = 0

    def forward(self, sample: Sample) -> Sample:
        """Adds "tokenized_prompt", "tokenized_prompt_mask", "token_ar_mask", "token_loss_mask", all [T], and what
        training loses of the actions (`FastSequence.encode`).

        The actions stay for the loader to look at; the model reads them from the tokens.
        """
        out, state = dict(sample), sample["state"]
        if self.lerobot_dim:
            state = np.pad(state, (0, self.lerobot_dim - len(state)))
        prompt, actions, lerobot = out.pop("prompt"), out.get("actions"), self.lerobot_dim > 0
        return {**out, **self.sequence.encode(prompt, state, actions, self.max_len, lerobot=lerobot)}

    def inverse(self, sample: Sample) -> Sample:
        """The model's "tokens" [N] to "actions" [A, J]; a sample that has actions keeps them."""
        if "actions" in sample:
            return sample
        out = dict(sample)
        tokens = np.asarray(out.pop("tokens"))
        return {**out, "actions": self.sequence.decode_actions(tokens, self.horizon, self.action_dim)}


@dataclasses.dataclass(frozen=True)
class TokenizeActions:
    """The actions as tokens beside themselves, for knowledge insulation.

    Attributes:
      sequence: makes them.
      max_len: N.
    """

    sequence: FastSequence
    max_len: int

    def forward(self, sample: Sample) -> Sample:
        """Adds "action_tokens" int32 [N], "action_tokens_mask" bool [N] and "actions_clipped" int32 []."""
        return {**sample, **self.sequence.encode_actions(sample["actions"], self.max_len)}

    def inverse(self, sample: Sample) -> Sample:
        """Nothing: the actions come from the flow."""
        return sample
