"""The byte-pair encoding inside FAST, over many texts at once: the library's ids, several times as fast.

A chunk is one long "word", mostly zeros, and the library walks through its bytes pair by pair with a priority
queue. In a BPE as training leaves it, a merge is only ever followed by later merges (checked below). So all texts
may take merge 0 together, then merge 1, and so on, each in a few operations on one flat array. The first merges
join the zeros and leave a fraction of the symbols; the library does the rest, on texts whose letters are the
tokens so far. A text that this cannot do exactly goes to the library as it is.

Axis letters: B texts, L characters.
"""

from __future__ import annotations

import json
import unicodedata

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE

SWEEPS = 64  # merges done on the flat array; 32 to 96 measured best on the universal tokenizer
LETTER = 0x10000  # token i is the character LETTER + i in the texts that the library finishes
LAST_PLAIN = 0x250  # letters up to here are old, so every version of Unicode agrees on what is one
END, NONE = -2, -1  # in the flat array: the end of a text, and nothing


def byte_symbols() -> dict[str, int]:
    """The character that a byte-level BPE writes for each byte: printable ones themselves, others 256 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class FastBpe:
    """Encodes rows of characters to ids.

    Args:
      tokenizer_json: a byte-level BPE as the `tokenizers` library writes it.

    Attributes:
      token_bytes: the bytes of each id.
    """

    def __init__(self, tokenizer_json: str):
        self._library = Tokenizer.from_str(tokenizer_json)
        model = json.loads(tokenizer_json)["model"]
        vocab: dict[str, int] = model["vocab"]
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        symbols = byte_symbols()
        table = [b""] * (max(vocab.values(), default=-1) + 1)
        for text, i in vocab.items():
            table[i] = bytes(symbols[c] for c in text)
        self.token_bytes = tuple(table)

        rank = {a + b: r for r, (a, b) in enumerate(merges)}
        ascending = len(rank) == len(merges) and all(
            rank.get(part, -1) < r for r, pair in enumerate(merges) for part in pair
        )
        # What a letter enters the flat array as: its bytes' ids, or one id and NONE, or NONE twice if it can't.
        self._enter = np.full((LAST_PLAIN, 2), NONE, np.int16 if len(table) < 2**15 else np.int32)
        if ascending:
            self._find_letters(vocab, merges, rank)
            self._split_merges(vocab, merges)
        self._enter_or_end = np.concatenate([self._enter, [[END, NONE]]]).astype(self._enter.dtype)

    def _find_letters(self, vocab: dict, merges: list, rank: dict) -> None:
        """Letters enter as one token at once, if no merge before theirs can take their bytes apart."""
        symbol = {byte: text for text, byte in byte_symbols().items()}
        taken_left, taken_right = {}, {}  # the earliest merge that takes a byte to its right, or to its left
        for r, (a, b) in enumerate(merges):
            taken_left.setdefault(a, r)
            taken_right.setdefault(b, r)
        never = len(merges)
        for code in range(LAST_PLAIN):
            text = "".join(symbol[b] for b in chr(code).encode())
            if not unicodedata.category(chr(code)).startswith("L") or not all(t in vocab for t in text):
                continue  # only letters are never split into words by the library
            whole = len(text) == 1 or (
                rank.get(text, never) <= min(taken_right.get(text[0], never), taken_left.get(text[1], never))
                and rank.get(text, never) < min(SWEEPS, never)
            )
            self._enter[code] = (vocab[text], NONE) if whole else [vocab[t] for t in text]

    def _split_merges(self, vocab: dict, merges: list) -> None:
        """The early merges for the flat array, and a library tokenizer that begins after them."""
        first = "".join(merges[0]) if merges else ""
        codes = np.flatnonzero((self._enter[:, 0] == vocab.get(first, END)) & (self._enter[:, 1] == NONE))
        self._zero = int(codes[0]) if len(codes) else NONE  # the letter that merge 0 makes, and
        self._doubled = [vocab[first]] if len(codes) else []  # what 1, 2, 4, ... of it become, ...
        while self._doubled and len(self._doubled) < len(merges):
            half, other = merges[len(self._doubled)]  # ... while the next merges double it
            if half != other or vocab[half] != self._doubled[-1]:
                break
            self._doubled.append(vocab[half + other])
        early = merges[len(self._doubled) : SWEEPS]
        self._sweeps = [(vocab[a], vocab[b], vocab[a + b]) for a, b in early]
        made_late = {a + b for a, b in merges[SWEEPS:]}
        names = {t: chr(LETTER + i) for t, i in vocab.items() if t not in made_late}
        renamed = []
        for a, b in merges[SWEEPS:]:
            renamed.append((names[a], names[b]))
            names[a + b] = names[a] + names[b]
        self._finish = Tokenizer(BPE(vocab={name: vocab[t] for t, name in names.items()}, merges=renamed))

    def encode(self, rows: np.ndarray) -> list[list[int]]:
        """Ids per row.

        Args:
          rows: int [B, L], code points below the surrogates, all of whose bytes are in the vocabulary.
        """
        quick = (self._enter[:, 0] != NONE)[np.minimum(rows, LAST_PLAIN - 1)] & (rows < LAST_PLAIN)
        quick = quick.all(axis=1)
        if quick.all():
            return self._swept(rows)
        out: list[list[int]] = [[]] * len(rows)
        for part, encoded in (
            (np.flatnonzero(quick), self._swept(rows[quick]) if quick.any() else []),
            (np.flatnonzero(~quick), self._plain(rows[~quick])),
        ):
            for i, row in zip(part, encoded, strict=True):
                out[i] = row
        return out

    def _plain(self, rows: np.ndarray) -> list[list[int]]:
        """By the library alone."""
        texts = [row.tobytes().decode("utf-32-le") for row in np.ascontiguousarray(rows, "<u4")]
        return [e.ids for e in self._library.encode_batch_fast(texts, add_special_tokens=False)]

    def _swept(self, rows: np.ndarray) -> list[list[int]]:
        """The early merges on one flat array, the rest by the library."""
        x = self._join_zeros(rows)
        for a, b, merged in self._sweeps:
            at = np.flatnonzero(x[:-1] == a)
            at = at[x[at + 1] == b]
            if a == b:
                at = _every_second_of_a_run(at)
            if len(at):
                x[at] = merged
                keep = np.ones(len(x), bool)
                keep[at + 1] = False
                x = x[keep]
        text = (x.astype(np.int32) + LETTER).astype("<u4").tobytes().decode("utf-32-le")
        texts = text.split(chr(LETTER + END))[:-1]
        return [e.ids for e in self._finish.encode_batch_fast(texts, add_special_tokens=False)]

    def _join_zeros(self, rows: np.ndarray) -> np.ndarray:
        """The flat array after merge 0 and the doublings that follow it, one entry per remaining symbol.

        Pairs are taken from the left, so n zeros become as many of the longest as fit, then one each of the
        shorter ones that n's binary digits name.
        """
        codes = np.full((len(rows), rows.shape[1] + 1), LAST_PLAIN)  # the last column ends a text
        codes[:, :-1] = rows
        codes = codes.reshape(-1)
        at = np.flatnonzero(codes != self._zero)
        zeros = np.diff(at, prepend=-1) - 1  # how many come before each other letter
        doublings = len(self._doubled)
        symbols = np.empty((len(at), doublings + 2), self._enter.dtype)
        times = np.ones((len(at), doublings + 2), np.int32)
        for place, power in enumerate(reversed(range(doublings))):
            symbols[:, place] = self._doubled[power]
            times[:, place] = zeros >> power if place == 0 else (zeros >> power) & 1
        symbols[:, doublings:] = self._enter_or_end[codes[at]]
        times[:, -1] = symbols[:, -1] != NONE
        return np.repeat(symbols.reshape(-1), times.reshape(-1))


def _every_second_of_a_run(at: np.ndarray) -> np.ndarray:
    """Of rising indices, the first, third, ... of every run of neighbours: pairs are taken from the left."""
    if len(at) == 0:
        return at
    index = np.arange(len(at))
    starts = np.maximum.accumulate(np.where(np.diff(at, prepend=at[0] - 2) != 1, index, 0))
    return at[(index - starts) % 2 == 0]
