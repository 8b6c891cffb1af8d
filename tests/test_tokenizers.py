"""Prompts to tokens: openpi's ids in all formats, the small tokenizer, and what happens when one can't be had."""

from __future__ import annotations

import json
import logging
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from openpi_port.errors import UserError
from openpi_port.tokenizers import paligemma, train_small


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden / "openpi/io/tokenizers.json").read_text())


@pytest.fixture(scope="module")
def big(shared):
    return paligemma.load(str(shared / "tokenizers/paligemma_tokenizer.model"))


@pytest.fixture(scope="module")
def small():
    return paligemma.load("small")


def test_golden_prompts(cases, big):
    assert big.vocab_size == 257152
    for case in cases:
        state = np.array(case["state"], np.float32)
        for name, given_state in (("pi0", None), ("pi05", state)):
            tokens, mask = big.encode(case["prompt"], given_state, len(case[f"{name}_tokens"]))
            assert tokens.dtype == np.int32 and mask.dtype == bool
            np.testing.assert_array_equal(tokens, case[f"{name}_tokens"], err_msg=case["prompt"])
            np.testing.assert_array_equal(mask, case[f"{name}_mask"])


def test_golden_fast_prefix(cases, big):
    for case in cases:
        prefix = big.fast_prefix(case["prompt"], np.array(case["state"], np.float32))
        assert len(prefix) == case["fast_ar_mask"].index(1)
        assert prefix == case["fast_tokens"][: len(prefix)]


def test_cleaning(small):
    def text(prompt):
        tokens, mask = small.encode(prompt, None, 40)
        return small.decode_text(tokens[mask].tolist())

    assert text(" pick_up\nthe Cube \n") == "pick up the Cube\n"
    assert "pick up\nthe cube, State: 255 -1" in small.decode_text(
        small.fast_prefix("pick_up\nthe Cube\n", np.array([1.0, -1.5]))
    )
    assert paligemma.state_text(np.array([-1.0, 0.0, 0.99999, 3.0])) == "0 128 255 255"


def test_truncation_is_counted_and_logged_once(caplog):
    tokenizer = paligemma.load("small")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            tokens, mask = tokenizer.encode("pick up the red cube", None, 4)
        tokenizer.encode("go", None, 30)
    assert tokens.shape == (4,) and mask.all() and tokenizer.truncated == 3
    assert len(caplog.records) == 1 and "max_token_len=4" in caplog.text
    full, _ = tokenizer.encode("pick up the red cube", None, 30)
    np.testing.assert_array_equal(tokens, full[:4])


@pytest.mark.parametrize("name, whole, size", [("small", (), 512), ("small_numbers", train_small.NUMBERS, 769)])
def test_small_is_what_the_script_makes(name, whole, size):
    tokenizer = paligemma.load(name)
    assert train_small.train(whole) == tokenizer.content
    assert len(tokenizer.content) < 20_000 and tokenizer.vocab_size == size


def test_every_number_of_a_state_is_a_token():
    tokenizer = paligemma.load("small_numbers")
    prompts = [tokenizer.fast_prefix("Transfer cube", np.full(14, x)) for x in np.linspace(-1.1, 1, 300)]
    assert {len(p) for p in prompts} == {23} and len({p[7] for p in prompts}) == 257


def test_small_has_paligemmas_special_ids_and_short_prompts(small):
    pieces = small._pieces
    assert (pieces.pad_id(), pieces.eos_id(), pieces.bos_id(), pieces.unk_id()) == (0, 1, 2, 3)
    tokens, mask = small.encode("Transfer cube", None, 11)
    assert mask.sum() <= 11 and tokens[0] == 2 and small.truncated == 0
    assert all(len(small.encode_text(t)) == 1 for t in train_small.SYMBOLS)
    _, mask = small.encode("Transfer cube", np.linspace(-1, 1, 14), 200)
    assert mask.sum() <= 48


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁")))
def test_small_loses_no_text(text):
    tokenizer = paligemma.load("small")
    ids = tokenizer.encode_text(text)
    assert 3 not in ids and tokenizer.decode_text(ids) == text


def test_fingerprint_and_pickling(small, tmp_path):
    again = pickle.loads(pickle.dumps(small))  # worker processes get a copy
    assert again.fingerprint == small.fingerprint and len(small.fingerprint) == 64
    assert again.encode_text("cube") == small.encode_text("cube")


def test_a_tokenizer_that_is_none_is_named(tmp_path):
    for name, content in (("absent", None), ("broken", b"not a model"), ("empty", b"")):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.*--tokenizer=, in training --config.tokenizer="):
            paligemma.load(str(path))


def test_paligemma_comes_from_a_cache_or_its_public_place(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(paligemma, "PALIGEMMA_URL", (tmp_path / "nowhere").as_uri())
    with pytest.raises(UserError, match="openpi_port/paligemma_tokenizer.model.*--config.tokenizer="):
        paligemma.load("paligemma")
    monkeypatch.setattr(paligemma, "PALIGEMMA_URL", (paligemma.ASSETS / "small.model").as_uri())
    with pytest.raises(UserError, match="512 pieces instead of 257152"):
        paligemma.load("paligemma")
    assert not list(tmp_path.rglob("*.model")) and not list(tmp_path.rglob("*.part"))

    monkeypatch.setattr(
        paligemma, "PALIGEMMA_URL", (shared / "tokenizers/paligemma_tokenizer.model").resolve().as_uri()
    )
    first = paligemma.load("paligemma")
    monkeypatch.setattr(paligemma, "PALIGEMMA_URL", (tmp_path / "nowhere").as_uri())
    assert paligemma.load("paligemma").fingerprint == first.fingerprint
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["paligemma_tokenizer.model"]
