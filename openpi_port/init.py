"""Fresh weights, drawn on the host: a run from scratch starts the same in both frameworks, to the bit."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from convert import layout, tables
from openpi_port.config import Pi0

# What a parameter starts as, by the end of its path; the first pattern that is found decides. The weights of
# AdaRMS start at zero, so that every layer of the expert starts as the identity (as in DiT and openpi). So does the
# second factor of LoRA, so that a fresh adapter changes nothing (openpi draws both factors with deviation 0.01).
_ZEROS = re.compile(r"modulation/|bias$|lora_b$|^gemma/.*scale$")
_ONES = re.compile(r"^vision/.*scale$")


class Fresh(Mapping[str, np.ndarray]):
    """Canonical weights of a model (by Flax path), each drawn when asked for.

    Kernels and the first factors of LoRA are normal with variance 1 / fan-in; embeddings with variance 1 / width, so
    that the token embeddings times sqrt(width) have unit variance. Every tensor has a generator of its own, keyed by
    seed and path.
    """

    def __init__(self, config: Pi0, seed: int) -> None:
        self.shapes = layout.side_shapes(tables.entries(config), layout.OURS)
        self.dtypes = dict.fromkeys(self.shapes, np.dtype(np.float32))
        self._seed = seed

    def __getitem__(self, name: str) -> np.ndarray:
        return draw(name, self.shapes[name], self._seed)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # Mapping's own would draw the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """One parameter.

    Args:
      name: its Flax path.
      shape: of the whole tensor, layers included.
      seed: of the run.

    Returns:
      float32, of that shape.
    """
    if _ONES.search(name):
        return np.ones(shape, np.float32)
    if _ZEROS.search(name):
        return np.zeros(shape, np.float32)
    fan_in = shape[-2] if name.endswith(("kernel", "lora_a")) else shape[-1]
    if name.endswith("o/lora_a"):  # [L, N, H, R]: its inputs are all heads
        fan_in *= shape[-3]
    key = np.array([seed, zlib.crc32(name.encode())], np.uint64)
    values = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, np.float32)
    values *= np.float32(1.0 / math.sqrt(fan_in))
    return values
