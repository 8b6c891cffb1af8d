"""All randomness of training, drawn on the host: a pure function of (seed, global sample index, purpose).

Philox is counter-based, so any sample's numbers can be had without drawing those before it. Both frameworks get the
same noise, times and augmentations, at any number of workers or processes and after a resume.
A actions, J action dim.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

_WORD = 2**64


def generator(seed: int, index: int, purpose: str) -> np.random.Generator:
    """A generator that nobody else has: distinct (seed, index, purpose) give independent streams.

    Args:
      seed: of the run, any integer that fits 64 bits.
      index: global index of the sample in the run, counted over all epochs and processes, >= 0.
      purpose: what the numbers are for, such as "noise".

    Returns:
      A generator at the start of the stream; each stream has 2^64 blocks of four words.
    """
    # The first counter word runs within a stream, the second tells samples apart.
    counter = np.array([0, index, 0, 0], np.uint64)
    key = np.array([seed % _WORD, _purpose_key(purpose)], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@functools.cache
def _purpose_key(purpose: str) -> int:
    """64 bits of a hash that, unlike `hash`, is the same in every process."""
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def draw_noise(seed: int, index: int, shape: Sequence[int]) -> np.ndarray:
    """Standard normal noise for one sample's actions.

    Args:
      seed, index: see `generator`.
      shape: (A, J), or (R, A, J) for several draws.

    Returns:
      f32 of that shape.
    """
    return generator(seed, index, "noise").standard_normal(shape, np.float32)


def draw_delay(seed: int, index: int, most: int) -> int:
    """How many actions of a sample's chunk are given, for training-time real-time chunking (arXiv 2512.05964).

    Args:
      seed, index: see `generator`.
      most: the largest delay.

    Returns:
      An integer from 0 to `most`, each as likely as the others.
    """
    return int(generator(seed, index, "delay").integers(0, most, endpoint=True))


def draw_time(seed: int, index: int, shape: Sequence[int] = ()) -> np.ndarray:
    """Flow-matching times: Beta(1.5, 1) * 0.999 + 0.001, so in [0.001, 1]; 1 is noise, 0 is data.

    Beta(a, 1) has the distribution function x^a, so a uniform number to the power 1/a has that distribution.

    Args:
      seed, index: see `generator`.
      shape: () for one time, (R,) for several draws.

    Returns:
      f32 of that shape.
    """
    uniform = generator(seed, index, "time").random(shape)
    return np.float32(uniform ** (2.0 / 3.0) * 0.999 + 0.001)
