"""Prompts as tokens: the three formats of the pi0 family on a SentencePiece model, and where to get that model.

Axis letters: T tokens, J state dimensions.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import urllib.request
from pathlib import Path

import numpy as np
import sentencepiece

from openpi_port import host, whole
from openpi_port.errors import UserError

ASSETS = Path(__file__).parent.parent / "assets" / "tokenizers"
SHIPPED = ("small", "small_numbers")  # see train_small.py
# gs://big_vision/paligemma_tokenizer.model; the bucket is public, so plain HTTPS needs no further package
PALIGEMMA_URL = "https://storage.googleapis.com/big_vision/paligemma_tokenizer.model"
TIMEOUT_S = 30.0
GIVE = "tokenizer= (--tokenizer=, in training --config.tokenizer=) takes"

# left edges of 256 bins; a state below -1 gets bin -1, as in openpi
STATE_BINS = np.linspace(-1, 1, 257)[:-1]


class PromptTokenizer:
    """A SentencePiece model with pi0's, pi0.5's and pi0-FAST's ways of writing a prompt.

    Args:
      model: the file, or its content.

    Attributes:
      content: the model file, which checkpoints carry.
      fingerprint: SHA-256 of the model file, hexadecimal.
      vocab_size: the model's embedding table needs at least as many rows.
      truncated: how many prompts this object cut; the first one is logged.
    """

    def __init__(self, model: str | os.PathLike | bytes):
        name = "tokenizer" if isinstance(model, bytes) else f"tokenizer {os.fspath(model)}"
        remedy = f"{GIVE} paligemma, small, small_numbers or the path of a SentencePiece model"
        try:
            content = model if isinstance(model, bytes) else Path(model).read_bytes()
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror}); {remedy}") from error
        if not content:  # sentencepiece takes nothing for a model without pieces, and then crashes
            raise UserError(f"{name}: empty; {remedy}")
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise UserError(f"{name}: no SentencePiece model; {remedy}") from error
        self.truncated = 0
        self.content = content
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.vocab_size = self._pieces.vocab_size()
        self.eos_id = self._pieces.eos_id()

    def encode(
        self, prompt: str, state: np.ndarray | None, max_len: int, *, keep_underscores: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """pi0's format, or with a state pi0.5's.

        pi0: the text, then a newline encoded on its own. pi0.5: "Task: {text}, State: {bins};\\nAction: ".

        Args:
          prompt: the instruction; underscores and line breaks become spaces.
          state: [J], normalised, to write into the text; None leaves it out.
          max_len: T. Longer prompts lose their end, as in openpi; that is logged once and counted.
          keep_underscores: in pi0's format, as LeRobot does.

        Returns:
          int32 [T] padded with 0, and bool [T], true on tokens.
        """
        text = clean(prompt).replace("\n", " ")
        if state is None:
            text = prompt.strip().replace("\n", " ") if keep_underscores else text
            ids = self.encode_text(text, bos=True) + self.encode_text("\n")
        else:
            ids = self.encode_text(f"Task: {text}, State: {state_text(state)};\nAction: ", bos=True)
        ids = self.cut(ids, max_len, prompt)
        tokens = np.zeros(max_len, np.int32)
        tokens[: len(ids)] = ids
        return tokens, np.arange(max_len) < len(ids)

    def fast_prefix(self, prompt: str, state: np.ndarray, *, keep_case: bool = False) -> list[int]:
        """pi0-FAST's prompt, "Task: {text}, State: {bins};\\n".

        In lower case, and line breaks inside stay; `keep_case` keeps the case and makes spaces of them (LeRobot).
        """
        text = clean(prompt).replace("\n", " ") if keep_case else clean(prompt.lower())
        return self.encode_text(f"Task: {text}, State: {state_text(state)};\n", bos=True)

    def encode_text(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text as it stands."""
        return self._pieces.encode(text, add_bos=bos, add_eos=eos)

    def decode_text(self, ids: list[int]) -> str:
        """The text of ids; for messages."""
        return self._pieces.decode([int(i) for i in ids])

    def cut(self, ids: list[int], max_len: int, prompt: str) -> list[int]:
        """The first `max_len` ids; counts what it shortened and logs the first."""
        if len(ids) <= max_len:
            return ids
        self.truncated += 1
        if self.truncated == 1:
            logging.getLogger(__name__).warning(
                "prompt of %d tokens cut to config.model.max_token_len=%d (further ones are only counted): %.60r",
                len(ids),
                max_len,
                prompt,
            )
        return ids[:max_len]


def clean(prompt: str) -> str:
    """Without surrounding space, and with spaces for underscores (data sets name tasks like files)."""
    return prompt.strip().replace("_", " ")


def state_text(state: np.ndarray) -> str:
    """[J] in [-1, 1] as bin numbers, "127 0 255"; -1 stands for less than -1 (openpi's discretisation)."""
    return " ".join(map(str, np.digitize(state, STATE_BINS) - 1))


def load(spec: str) -> PromptTokenizer:
    """The tokenizer that a config names.

    Args:
      spec: a path; "small" or "small_numbers", which ship; or "paligemma", which is looked for in the caches of this
        project and of openpi and otherwise downloaded from its public place (4 MB).

    Raises:
      UserError: it can't be had, with the reason and the remedy.
    """
    if spec in SHIPPED:
        return PromptTokenizer(ASSETS / f"{spec}.model")
    if spec == "paligemma":
        return PromptTokenizer(_paligemma())
    return PromptTokenizer(spec)


def _paligemma() -> Path:
    """The file in a cache, after downloading it if need be."""
    root = host.cache()
    ours = root / "openpi_port" / "paligemma_tokenizer.model"
    for path in (ours, root / "openpi" / "big_vision" / "paligemma_tokenizer.model"):
        if path.is_file():
            return path
    try:
        with urllib.request.urlopen(PALIGEMMA_URL, timeout=TIMEOUT_S) as response:
            content = response.read()
        if (got := PromptTokenizer(content).vocab_size) != 257152:
            raise UserError(f"{PALIGEMMA_URL}: {got} pieces instead of 257152; {GIVE} a path")
        with whole.file(ours) as part:
            part.write_bytes(content)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"PaliGemma's tokenizer is not at {ours} and cannot be downloaded from {PALIGEMMA_URL} ({error}); "
            f"put it there; or {GIVE} its path"
        ) from error
    return ours
