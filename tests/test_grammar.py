"""The grammar of whole chunks: exactly what decodes is allowed, nothing leads nowhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_fast import written

from openpi_port import grammar as grammars
from openpi_port.errors import UserError
from openpi_port.grammar import EOS
from openpi_port.tokenizers import fast, paligemma
from openpi_port.tokenizers.fast import FastTokenizer
from openpi_port.tokenizers.fast_sequence import FastSequence

VOCAB = 1152


@pytest.fixture(scope="module")
def text():
    return paligemma.load("small")


@pytest.fixture(scope="module")
def sequence(text):
    return FastSequence(text, fast.load("fast_aloha"), VOCAB)


def allowed(grammar, left: int, at: int, steps: int) -> np.ndarray:
    """Columns that may follow; the formula of the models in numpy."""
    rest = left - grammar.count[at]
    return np.flatnonzero((rest >= 0) & (grammar.to_go[np.maximum(rest, 0), grammar.after[at]] < steps))


def walk(grammar, rng: np.random.Generator, max_steps: int) -> list[int]:
    """A sequence that takes any allowed token at every step."""
    out, left, at = list(grammar.lead), len(grammar.to_go) - 1, 0
    while not out or out[-1] != EOS:
        columns = allowed(grammar, left, at, max_steps - len(out))
        assert len(columns), f"dead end after {len(out)} tokens, {left} coefficients left, state {at}"
        column = rng.choice(columns)
        left, at = left - grammar.count[at, column], grammar.after[at, column]
        out.append(int(grammar.ids[column]))
    return out


@pytest.mark.parametrize("shape", [(50, 14), (10, 7), (1, 1)])
def test_whatever_is_allowed_is_a_chunk(sequence, shape):
    """Random walks, also where every step counts."""
    grammar = grammars.build(sequence, *shape)
    shortest = len(grammar.lead) + int(grammar.to_go[-1, 0])
    rng = np.random.default_rng(0)
    for max_steps in [shortest, shortest + 1, shortest + 20, 1000] * 5:
        tokens = walk(grammar, rng, max_steps)
        assert len(tokens) <= max_steps and tokens[-1] == EOS
        chunk = sequence.decode_actions(grammars.until_end(tokens), *shape)
        assert chunk.shape == shape and np.isfinite(chunk).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(6, 3), (4, 5)]))
def test_every_chunk_is_allowed(sequence, seed, shape):
    """What the tokenizer writes is never forbidden, if there is room for it."""
    grammar = grammars.build(sequence, *shape)
    actions = np.random.default_rng(seed).uniform(-0.4, 0.4, shape)
    tokens = written(sequence, actions)
    np.testing.assert_array_equal(tokens[: len(grammar.lead)], grammar.lead)
    left, at = len(grammar.to_go) - 1, 0
    for place in range(len(grammar.lead), len(tokens)):
        columns = allowed(grammar, left, at, len(tokens) - place)
        column = next(c for c in columns if grammar.ids[c] == tokens[place])
        left, at = left - grammar.count[at, column], grammar.after[at, column]
    assert (left, grammar.to_go[left, at]) == (0, 0)


def tokenizer_of(pieces: list[bytes]) -> FastTokenizer:
    """A tokenizer of these tokens; only their bytes matter here."""
    tokenizer = fast.load("fast_aloha")
    tokenizer.token_bytes = tuple(pieces)
    return tokenizer


def count_ways(pieces: list[bytes], total: int, num_tokens: int) -> int:
    """By brute force: sequences of so many pieces, none empty, that are `total` characters of UTF-8."""
    pieces = [p for p in pieces if p]
    texts = [b""]
    for _ in range(num_tokens):
        texts = [t + p for t in texts for p in pieces]
    ways = 0
    for text in texts:
        try:
            ways += len(text.decode()) == total
        except UnicodeDecodeError:
            continue
    return ways


@pytest.mark.parametrize(
    "pieces",
    [
        [b"a", b"bb", b"\xc3", b"\xa9", b"\xa9\xc3"],  # é in two halves, and a token that ends one and begins another
        [b"\xe2", b"\x82", b"\xac", b"\xe2\x82", b"\xac\xe2", b"x"],
        [b"\xed", b"\xa0", b"\x80", b"\xe0", b"\x9f", b"\xc0", b"q"],  # surrogates and overlong forms are no characters
        [b"\xf0", b"\x90", b"\x8f", b"\x80", b"\xf4", b""],
    ],
)
def test_partial_characters(text, pieces):
    """As many sequences as brute force finds, whatever is left and in the right number of steps."""
    sequence = FastSequence(text, tokenizer_of(pieces), VOCAB)
    closing = len(sequence.end_ids) + 1
    for total in (1, 2, 3):
        grammar = grammars.build(sequence, total, 1)
        fewest = next((n for n in range(6) if count_ways(pieces, total, n)), None)
        if fewest is None:
            assert grammar.to_go[-1, 0] >= 6 + closing
        else:
            assert grammar.to_go[-1, 0] == fewest + closing
        for num_tokens in range(1, 5):
            assert count_paths(grammar, total, num_tokens + closing) == count_ways(pieces, total, num_tokens)


def count_paths(grammar, total: int, num_tokens: int) -> int:
    """Sequences of exactly so many tokens that the grammar allows and that end."""
    states = {(total, 0): 1}
    for step in range(num_tokens):
        after: dict = {}
        for (left, at), ways in states.items():
            for column in allowed(grammar, left, at, num_tokens - step):
                key = (left - int(grammar.count[at, column]), int(grammar.after[at, column]))
                after[key] = after.get(key, 0) + ways
        states = after
    return sum(ways for (left, at), ways in states.items() if grammar.to_go[left, at] == 0)


def test_too_few_steps(sequence):
    grammar = grammars.build(sequence, 50, 14)
    needed = len(grammar.lead) + int(grammar.to_go[-1, 0])
    with pytest.raises(UserError, match=f"at least {needed} tokens"):
        grammars.check(grammar, needed - 1, 0.0, 0, 1)
    assert grammars.check(grammar, needed, 0.0, 0, 1) is None
    with pytest.raises(UserError, match="temperature"):
        grammars.check(None, 10, -1.0, 0, 1)


def test_no_way_at_all(text):
    grammar = grammars.build(FastSequence(text, tokenizer_of([b"\xc3"]), VOCAB), 2, 2)
    with pytest.raises(UserError, match="no tokens"):
        grammars.check(grammar, 1000, 0.0, 0, 1)


def test_draws():
    """A sample's draws depend on the seed and its place alone; a generator moves on."""
    few, many = grammars.draws(3, 2, 10), grammars.draws(3, 5, 20)
    np.testing.assert_array_equal(few, many[:2, :10])
    assert few.dtype == np.float32 and (few >= 0).all() and (few < 1).all()
    assert not np.array_equal(few, grammars.draws(4, 2, 10))
    rng = np.random.default_rng(0)
    assert not np.array_equal(grammars.draws(rng, 1, 5), grammars.draws(rng, 1, 5))


def test_until_end():
    assert grammars.until_end(np.array([5, 6, EOS, 0, 0])) == [5, 6]
    assert grammars.until_end([5, 6]) == [5, 6]
