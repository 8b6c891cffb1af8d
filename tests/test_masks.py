"""Properties of the attention mask and positions, equal in numpy, jax and torch."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from openpi_port.masks import attention_mask, positions

rows = st.integers(1, 12).flatmap(
    lambda n: st.tuples(arrays(bool, (2, n)), arrays(bool, (2, n)))
)  # valid, starts_block


@given(rows)
@settings(deadline=None, max_examples=60)
def test_by_definition(case):
    """Query i sees key j if both are valid and j's block is not after i's."""
    valid, starts = case
    mask = attention_mask(valid, starts)
    for b, (v, s) in enumerate(zip(valid, starts, strict=True)):
        for i in range(len(v)):
            for j in range(len(v)):
                cut_between = s[i + 1 : j + 1].any()
                assert mask[b, i, j] == (v[i] and v[j] and not cut_between)


@given(rows)
@settings(deadline=None, max_examples=30)
def test_same_in_all_three(case):
    for function, inputs in ((attention_mask, case), (positions, case[:1])):
        want = function(*inputs)
        np.testing.assert_array_equal(function(*map(jnp.asarray, inputs)), want)
        np.testing.assert_array_equal(function(*map(torch.from_numpy, inputs)), want)


@given(rows)
@settings(deadline=None, max_examples=60)
def test_positions_count_valid_tokens(case):
    valid, _ = case
    for v, p in zip(valid, positions(valid), strict=True):
        assert list(p[v]) == list(range(v.sum()))


@given(rows, st.integers(0, 4))
@settings(deadline=None, max_examples=40)
def test_padding_changes_nothing(case, extra):
    """Appended padding neither sees nor is seen, and leaves the rest as it was."""
    valid, starts = case
    n = valid.shape[1]
    padded = attention_mask(np.pad(valid, ((0, 0), (0, extra))), np.pad(starts, ((0, 0), (0, extra))))
    np.testing.assert_array_equal(padded[:, :n, :n], attention_mask(valid, starts))
    assert not padded[:, n:].any() and not padded[:, :, n:].any()


def test_pi0_blocks():
    """Prefix of 2, state, actions of 2: the picture in pi0.py."""
    valid = np.ones((1, 5), bool)
    starts = np.array([[0, 0, 1, 1, 0]])
    want = ["11000", "11000", "11100", "11111", "11111"]
    np.testing.assert_array_equal(attention_mask(valid, starts)[0], np.array([list(map(int, r)) for r in want], bool))
