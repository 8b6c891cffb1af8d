"""Counter-based randomness: a pure function of seed, index and purpose, with the right distributions."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_port.rng import draw_noise, draw_time, generator

PINNED_INTEGERS = [3931927349, 2391566931, 829316249]
PINNED_NOISE = [-0.92581105, 0.68600935, 0.33016294, -0.82231528]
PINNED_TIME = 0.69525838

PURPOSES = ("noise", "time", "augment")


def test_values_are_pinned():
    """A change here changes every run's batches: resumed runs would no longer equal uninterrupted ones."""
    np.testing.assert_array_equal(generator(7, 3, "noise").integers(0, 2**32, 3), PINNED_INTEGERS)
    np.testing.assert_allclose(draw_noise(7, 3, (2, 2)).ravel(), PINNED_NOISE, rtol=1e-6)
    np.testing.assert_allclose(draw_time(7, 3), PINNED_TIME, rtol=1e-6)


def test_same_in_another_process():
    code = "from openpi_port.rng import draw_noise; print(draw_noise(5, 11, (2, 3)).tobytes().hex())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == draw_noise(5, 11, (2, 3)).tobytes().hex()


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(-5, 2**64 - 1), st.integers(0, 2**63), st.sampled_from(PURPOSES)),
    st.tuples(st.integers(-5, 2**64 - 1), st.integers(0, 2**63), st.sampled_from(PURPOSES)),
)
def test_streams_differ_unless_their_names_are_equal(a, b):
    one, other = (generator(*name).integers(0, 2**63, 4) for name in (a, b))
    same = (a[0] % 2**64, *a[1:]) == (b[0] % 2**64, *b[1:])
    assert np.array_equal(one, other) == same


def test_neighbouring_samples_are_uncorrelated():
    noise = np.stack([draw_noise(0, i, (50, 4)).ravel() for i in range(400)]).astype(np.float64)
    assert abs(np.mean(noise[1:] * noise[:-1])) < 5 / np.sqrt(noise.size)
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size)
    assert abs(noise.var() - 1) < 5 * np.sqrt(2 / noise.size)
    assert draw_noise(0, 0, (50, 4)).dtype == np.float32


def test_time_is_beta():
    """Against the distribution function of Beta(1.5, 1): x^1.5 (Kolmogorov-Smirnov)."""
    n = 5000
    times = np.sort([draw_time(1, i) for i in range(n)])
    assert times[0] >= 0.001 and times[-1] <= 1.0
    expected = ((times.astype(np.float64) - 0.001) / 0.999) ** 1.5
    assert np.abs(expected - np.arange(1, n + 1) / n).max() < 1.63 / np.sqrt(n)  # 1 % level
    assert draw_time(1, 0).dtype == np.float32 and draw_time(1, 0).shape == ()
    assert draw_time(1, 0, (3,))[0] == draw_time(1, 0)  # the first of several draws
