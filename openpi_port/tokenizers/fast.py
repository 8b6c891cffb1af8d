"""The FAST action tokenizer: a cosine transform along time, rounding, and byte-pair encoding of the coefficients.

A chunk [A, J] in about [-1, 1] becomes DCT-II coefficients (orthonormal, per dimension), times `scale`, rounded,
written row by row (the lowest frequency of every dimension first), minus `min_token`, as the characters of a
text, which a byte-level BPE compresses ("FAST: Efficient Action Tokenization", Pertsch et al. 2025). Files are
those of the Hugging Face processor that its authors published, so either side opens the other's.

Where the published processor stays silent, this one speaks: a coefficient that has no character is an error, or
is clipped and counted, and a token sequence that is no chunk is an error instead of zeros.

Axis letters: B batch, A actions (time), J dimensions, N tokens.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.fft
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from openpi_port.errors import UserError
from openpi_port.tokenizers.fast_bpe import FastBpe, byte_symbols

CONFIG = "processor_config.json"
FILES = (CONFIG, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PROCESSOR = Path(__file__).parent.parent / "assets" / "tokenizers" / "processing_action_tokenizer.py"
SHIPPED = PROCESSOR.parent  # directories of tokenizers that come with the project
PROCESSOR_CLASS = {
    "auto_map": {"AutoProcessor": "processing_action_tokenizer.UniversalActionProcessor"},
    "processor_class": "UniversalActionProcessor",
}
TOKENIZER_CONFIG = {
    "added_tokens_decoder": {},
    "clean_up_tokenization_spaces": False,  # true upstream, which drops spaces, that is coefficients, in decoding
    "model_max_length": 1000000000000000019884624838656,
    "tokenizer_class": "PreTrainedTokenizerFast",
    **PROCESSOR_CLASS,
}
SURROGATES = 0xD800  # characters from here on have no UTF-8
OutOfRange = Literal["error", "clip"]


class MalformedTokens(ValueError):
    """A token sequence that is not one whole chunk; the message says why."""


class FastTokenizer:
    """Chunks to token ids and back.

    Args:
      tokenizer_json: the BPE, as the `tokenizers` library writes it.
      scale: coefficients are multiplied by it before rounding; larger is finer and longer.
      min_token: the smallest coefficient that can be written.
      vocab_size: as asked for when fitting.
      action_dim, time_horizon: of the data it was fitted to; None for a universal one.
      tokenizer_config: content of tokenizer_config.json, kept so that saving writes back what was opened.

    Attributes:
      token_bytes: what each id stands for: UTF-8 of the coefficients' characters, in part or whole.
      clipped: how many coefficients `encode(..., out_of_range="clip")` has moved so far.
    """

    def __init__(
        self,
        tokenizer_json: str,
        scale: float,
        min_token: int,
        vocab_size: int,
        action_dim: int | None = None,
        time_horizon: int | None = None,
        tokenizer_config: str | None = None,
    ):
        self.scale, self.min_token, self.vocab_size = scale, min_token, vocab_size
        self.action_dim, self.time_horizon = action_dim, time_horizon
        self.clipped = 0
        self._json, self._tokenizer_config = tokenizer_json, tokenizer_config
        self._bpe = FastBpe(tokenizer_json)
        self.token_bytes = self._bpe.token_bytes
        have = {b[0] for b in self.token_bytes if len(b) == 1}
        self._writable = np.array([have.issuperset(chr(c).encode()) for c in range(SURROGATES)])

    def __reduce__(self):
        fields = (self.scale, self.min_token, self.vocab_size, self.action_dim, self.time_horizon)
        return FastTokenizer, (self._json, *fields, self._tokenizer_config)

    def coefficients(self, actions: np.ndarray) -> np.ndarray:
        """[B, A, J] in about [-1, 1] to rounded integers [B, A, J].

        By the published processor's own routine and in the input's precision: where a value lies on the edge
        between two integers the last bit decides, and ids must agree. (It is no slower than a matrix product.)

        Raises:
          UserError: a value is not finite.
        """
        actions = np.asarray(actions)
        if not (finite := np.isfinite(actions)).all():
            raise UserError(f"actions{np.argwhere(~finite)[0].tolist()} is not a finite number")
        return np.around(self.transform(actions)).astype(np.int64)

    def transform(self, actions: np.ndarray) -> np.ndarray:
        """The coefficients [..., A, J] before rounding."""
        return scipy.fft.dct(actions, axis=-2, norm="ortho") * self.scale

    def encode(self, actions: np.ndarray, out_of_range: OutOfRange = "error") -> list[list[int]]:
        """Token ids per chunk.

        Args:
          actions: [B, A, J], normalised to about [-1, 1].
          out_of_range: what happens to a coefficient beyond what the tokenizer was fitted to; "clip" takes the
            nearest that can be written, and counts it in `clipped`.

        Raises:
          UserError: such a coefficient, or a value that is not finite; both are named by their place.
        """
        return self.encode_coefficients(self.coefficients(actions), out_of_range)

    def encode_coefficients(self, coefficients: np.ndarray, out_of_range: OutOfRange = "error") -> list[list[int]]:
        """As `encode`, from integers [B, A, J]."""
        codes = coefficients - self.min_token
        wrong = self.beyond(coefficients)
        if wrong.any():
            if out_of_range == "error":
                b, f, j = (int(i) for i in np.argwhere(wrong)[0])
                known = np.flatnonzero(self._writable) + self.min_token
                raise UserError(
                    f"FAST: chunk {b}, dimension {j}, frequency {f}: coefficient {coefficients[b, f, j]} cannot be "
                    f"written, the tokenizer has {known[0]} to {known[-1]} ({int(wrong.sum())} such in this batch): "
                    f"fit it to these data, or allow clipping"
                )
            if not self.clipped:
                logging.getLogger(__name__).warning(
                    "FAST: %d coefficients are beyond what the tokenizer can write, the farthest is %d; moved to the "
                    "nearest (further ones are only counted)",
                    wrong.sum(),
                    coefficients[wrong][np.abs(coefficients[wrong]).argmax()],
                )
            self.clipped += int(wrong.sum())
            codes = np.where(wrong, self._nearest(codes), codes)
        return self._bpe.encode(codes.reshape(len(codes), -1))

    def beyond(self, coefficients: np.ndarray) -> np.ndarray:
        """bool [B, A, J]: which integers have no character, because the data that were fitted had none so large."""
        codes = coefficients - self.min_token
        wrong = (codes < 0) | (codes >= SURROGATES)
        if codes.size and (wrong.any() or not self._writable[: codes.max() + 1].all()):
            wrong |= ~self._writable[np.where(wrong, 0, codes)]
        return wrong

    def _nearest(self, codes: np.ndarray) -> np.ndarray:
        """The nearest code points that can be written."""
        known = np.flatnonzero(self._writable)
        above = np.clip(np.searchsorted(known, codes), 0, len(known) - 1)
        below = np.maximum(above - 1, 0)
        return np.where(np.abs(known[above] - codes) < np.abs(known[below] - codes), known[above], known[below])

    def decode(self, tokens: Sequence[Sequence[int]], horizon: int, dim: int) -> np.ndarray:
        """Token ids to chunks.

        Args:
          tokens: B sequences of ids.
          horizon, dim: A and J.

        Returns:
          float64 [B, A, J].

        Raises:
          MalformedTokens: a sequence is no chunk of this size.
        """
        coefficients = np.stack([self.decode_coefficients(ids, horizon, dim) for ids in tokens])
        return scipy.fft.idct(coefficients / self.scale, axis=-2, norm="ortho")

    def decode_coefficients(self, ids: Sequence[int], horizon: int, dim: int) -> np.ndarray:
        """One sequence of ids to integers [A, J]; raises as `decode`."""
        for place, i in enumerate(ids):
            if not 0 <= i < len(self.token_bytes):
                raise MalformedTokens(f"token {place} is {i}, outside 0..{len(self.token_bytes) - 1}")
        raw = b"".join([self.token_bytes[i] for i in ids])
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            ends = np.cumsum([len(self.token_bytes[i]) for i in ids])
            place = int(np.searchsorted(ends, error.start, side="right"))
            raise MalformedTokens(
                f"token {place} ({ids[place]}): its bytes do not continue a coefficient ({error.reason})"
            ) from error
        if len(text) != horizon * dim:
            raise MalformedTokens(
                f"{len(ids)} tokens hold {len(text)} coefficients, a chunk of {horizon} x {dim} has {horizon * dim}"
            )
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.int64)
        return (codes + self.min_token).reshape(horizon, dim)

    @classmethod
    def open(cls, path: str | os.PathLike) -> FastTokenizer:
        """Reads a processor's directory.

        Raises:
          UserError: a file or a field is missing or broken.
        """
        path = Path(path)
        try:
            config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
            inner = path / "bpe_tokenizer"  # where transformers 5 puts the tokenizer when it saves a processor
            home = inner if inner.is_dir() else path
            texts = [(home / name).read_text(encoding="utf-8") for name in FILES[1:3]]
            return cls(
                texts[0],
                config["scale"],
                config["min_token"],
                config["vocab_size"],
                config["action_dim"],
                config["time_horizon"],
                texts[1],
            )
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}); a FAST tokenizer has it") from error
        except KeyError as error:
            raise UserError(f"{path / CONFIG}: no field {error}") from error
        except Exception as error:  # the tokenizers library raises plain Exception
            raise UserError(f"{path}: no FAST tokenizer ({error})") from error

    def save(self, path: str | os.PathLike) -> None:
        """Writes a processor's directory, which `AutoProcessor.from_pretrained(..., trust_remote_code=True)` opens.

        What was opened is written back byte for byte, with the code that such a directory carries.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        config = {
            "action_dim": self.action_dim,
            "min_token": self.min_token,
            "scale": self.scale,
            "time_horizon": self.time_horizon,
            "vocab_size": self.vocab_size,
            **PROCESSOR_CLASS,
        }
        texts = (_json(config), self._json, self._tokenizer_config or _json(TOKENIZER_CONFIG), _json({}))
        for name, text in zip(FILES, texts, strict=True):
            (path / name).write_text(text, encoding="utf-8")
        shutil.copyfile(PROCESSOR, path / PROCESSOR.name)

    @classmethod
    def fit(
        cls, actions: np.ndarray, scale: float = 10, vocab_size: int = 1024, progress: bool = False
    ) -> FastTokenizer:
        """Fits the range of coefficients and the BPE.

        Unlike the published fit, the alphabet has every byte that the fitted range needs, so that a coefficient
        inside the range can be written even if no chunk had it.

        Args:
          actions: [B, A, J], normalised to about [-1, 1].
          scale: see the class.
          vocab_size: how many ids at most.
          progress: shows the library's bar.

        Raises:
          UserError: no chunks, a value that is not finite, or a vocabulary too small for the range.
        """
        actions = np.asarray(actions)
        if actions.ndim != 3 or actions.size == 0:
            raise UserError(f"FAST: nothing to fit: actions have shape {list(actions.shape)}, expected [B, A, J]")
        blank = cls(_json({"model": {"type": "BPE", "vocab": {}, "merges": []}}), scale, 0, vocab_size)
        codes = blank.coefficients(actions).reshape(len(actions), -1)
        low, high = int(codes.min()), int(codes.max())
        if high - low >= SURROGATES:
            raise UserError(f"FAST: coefficients span {high - low}: are the actions normalised?")
        symbol = {byte: text for text, byte in byte_symbols().items()}
        alphabet = sorted({symbol[b] for c in range(high - low + 1) for b in chr(c).encode()})
        if len(alphabet) >= vocab_size:
            raise UserError(f"FAST: vocab_size={vocab_size} must exceed the {len(alphabet)} bytes of the range")

        bpe = Tokenizer(BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.post_processor = processors.ByteLevel(trim_offsets=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            initial_alphabet=alphabet,
            max_token_length=10000,
            special_tokens=[],
            show_progress=progress,
        )

        def texts() -> Iterator[str]:
            for row in (codes - low).astype("<u4"):
                yield row.tobytes().decode("utf-32-le")

        bpe.train_from_iterator(texts(), trainer, length=len(codes))
        return cls(bpe.to_str(pretty=True), scale, low, vocab_size, actions.shape[2], actions.shape[1])


def load(spec: str) -> FastTokenizer:
    """The tokenizer that a config names.

    Args:
      spec: a processor's directory, the name of one that ships ("fast_aloha"), or of one on the Hugging Face hub
        ("physical-intelligence/fast"), which is fetched into the hub's cache.

    Raises:
      UserError: it can't be had, with the reason and the remedy.
    """
    place = next((p for p in (Path(spec), SHIPPED / spec) if (p / CONFIG).is_file()), None)
    if place is not None:
        return FastTokenizer.open(place)
    import huggingface_hub  # slow to import, and most runs have the files

    try:
        return FastTokenizer.open(huggingface_hub.snapshot_download(spec, allow_patterns=list(FILES)))
    except UserError:
        raise
    except Exception as error:  # of many libraries: names that are none, no network, no such repository
        shipped = ", ".join(p.parent.name for p in SHIPPED.glob(f"*/{CONFIG}"))
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--config.fast_tokenizer={spec}: no directory with a {CONFIG}, none that ships ({shipped}), and not to be "
            f"had from the Hugging Face hub ({reason}); give a directory, or fit one with experiments.fit_fast"
        ) from error


def _json(tree: dict) -> str:
    """As Hugging Face writes its configuration files."""
    return json.dumps(tree, indent=2, sort_keys=True) + "\n"
