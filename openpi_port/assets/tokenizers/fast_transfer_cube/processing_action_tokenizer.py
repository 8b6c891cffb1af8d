"""The code beside a saved FAST tokenizer: lets `AutoProcessor.from_pretrained(path, trust_remote_code=True)` open it.

Needs transformers, numpy and scipy only. The names are those of the published processor.
"""

import numpy as np
from scipy.fft import dct, idct
from transformers import PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin


class UniversalActionProcessor(ProcessorMixin):
    """Chunks [B, A, J] of actions in about [-1, 1] to token ids, and back."""

    attributes = ["bpe_tokenizer"]  # noqa: RUF012 (transformers reads it from the class)
    bpe_tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        bpe_tokenizer: PreTrainedTokenizerFast,
        scale: float = 10,
        vocab_size: int = 1024,
        min_token: int = 0,
        action_dim: int | None = None,
        time_horizon: int | None = None,
    ):
        self.scale, self.vocab_size, self.min_token = scale, vocab_size, min_token
        self.action_dim, self.time_horizon = action_dim, time_horizon
        super().__init__(bpe_tokenizer)

    def __call__(self, action_chunk: np.ndarray) -> list[list[int]]:
        """[A, J] or [B, A, J] to ids per chunk."""
        chunks = np.asarray(action_chunk)
        chunks = chunks[None] if chunks.ndim == 2 else chunks
        codes = np.around(dct(chunks, axis=1, norm="ortho") * self.scale).astype(int) - self.min_token
        if (codes < 0).any():
            raise ValueError(f"coefficient {codes.min() + self.min_token} is below min_token={self.min_token}")
        texts = ["".join(map(chr, row)) for row in codes.reshape(len(codes), -1)]
        return [self.bpe_tokenizer(text)["input_ids"] for text in texts]

    def decode(self, tokens, *, time_horizon: int | None = None, action_dim: int | None = None) -> np.ndarray:
        """Ids per chunk to [B, A, J]; sizes default to those that the tokenizer was fitted to."""
        shape = (time_horizon or self.time_horizon, action_dim or self.action_dim)
        if None in shape:
            raise ValueError("this tokenizer is universal: pass time_horizon and action_dim")
        rows = []
        for ids in tokens:
            text = self.bpe_tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            rows.append(np.reshape([ord(c) for c in text], shape) + self.min_token)
        return idct(np.stack(rows) / self.scale, axis=1, norm="ortho")
