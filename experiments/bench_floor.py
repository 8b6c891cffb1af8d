"""The least time that a part can take, from its shapes and from what the device was measured to do.

Every part is counted as the operations that its matrix products need (a multiplication and an addition are two) and
the bytes that it must move (each weight read once, each activation that outlives a layer written and read once). The
larger of the two times is the floor. What a kernel could keep on the chip is not counted.

B batch, C cameras, T prompt tokens, S tokens of the prefix, A rows of the suffix, D width, F width of the MLP, N heads,
K kv heads, H head dim, L layers.
"""

from __future__ import annotations

import dataclasses

from openpi_port.config import Gemma, Pi0, Pi0Fast, Siglip, Train
from openpi_port.memory import count_params

SIZES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the device does at best, measured.

    Attributes:
      bytes: per second, read and written.
      operations: per second, in products of large matrices of the dtype.
    """

    bytes: float
    operations: float


@dataclasses.dataclass(frozen=True)
class Work:
    """What a part must do; `a + b` and `n * a` are one after another."""

    operations: float = 0
    bytes: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.bytes + other.bytes)

    def __rmul__(self, times: float) -> Work:
        return Work(times * self.operations, times * self.bytes)

    def seconds(self, rates: Rates) -> float:
        """The floor."""
        return max(self.operations / rates.operations, self.bytes / rates.bytes)


def vision(config: Siglip, out: int, images: int, size: int) -> Work:
    """Images to tokens of width `out`; weights of `size` bytes each."""
    tokens, width = images * config.num_tokens, config.width
    layer = product(tokens, width, 4 * width + 2 * config.mlp_dim, size)
    attention = Work(4 * tokens * config.num_tokens * width)
    ends = product(tokens, 3 * config.patch_size**2, width, size) + product(tokens, width, out, size)
    return config.depth * (layer + attention) + ends


def layers(config: Gemma, rows: int, keys: int, size: int, depth: int | None = None) -> Work:
    """`rows` tokens through the layers, seeing `keys` keys (their own included), which are read once a layer."""
    width, heads, kv_heads = config.width, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = product(rows, width, 2 * heads + 2 * kv_heads + 3 * config.mlp_dim, size)
    attention = Work(4 * rows * keys * heads, 2 * keys * kv_heads * size)
    return (config.depth if depth is None else depth) * (weights + attention)


def prefix(config: Gemma, tokens: int, size: int, *, float8: bool = False) -> Work:
    """Keys and values of images and prompt: whole layers but the last, of which only those two are needed.

    MLPs in float8 have half the bytes, and count half the operations, because two take the time of one.
    """
    whole = config.depth - 1
    last = product(tokens, config.width, 2 * config.num_kv_heads * config.head_dim, size)
    saved = 0.5 * whole * float8 * product(tokens, config.width, 3 * config.mlp_dim, size)
    return layers(config, tokens, tokens, size, whole) + last + -1 * saved


def euler_step(config: Pi0, prefix_tokens: int, size: int) -> Work:
    """One Euler step of one sample, with all that depends on the time alone computed before."""
    rows, width = config.action_horizon, config.expert.width
    ends = product(rows, config.action_dim, 2 * width, size)
    mix = product(rows, width, width, size) if config.time_in == "mlp" else Work()
    return layers(config.expert, rows, prefix_tokens + config.suffix_len, size) + ends + mix


def token(config: Pi0Fast, keys: int, size: int, *, float8: bool = False) -> Work:
    """One generated token of one sample, chosen from the whole vocabulary; MLPs in float8 as in `prefix`."""
    language = config.language
    saved = 0.5 * language.depth * float8 * product(1, language.width, 3 * language.mlp_dim, size)
    return layers(language, 1, keys, size) + product(1, language.width, config.vocab_size, size) + -1 * saved


def training_step(config: Train) -> tuple[Work, Work]:
    """Forward and backward pass of a batch without recomputation, and the optimizer's pass over its state.

    They can't overlap: clipping needs the whole gradient. The optimizer reads weight, gradient, both moments and the
    average (all float32), and writes all but the gradient.
    """
    model, size = config.model, SIZES[config.compute.dtype]
    text = model.max_token_len + (config.max_action_tokens if config.insulate else 0)
    tokens = len(model.cameras) * model.vision.num_tokens + text
    forward = vision(model.vision, model.language.width, len(model.cameras), 0)
    forward += layers(model.language, tokens, tokens, 0)
    if isinstance(model, Pi0):
        forward += config.draws * layers(model.expert, model.suffix_len, tokens + model.suffix_len, 0)
    elif isinstance(model, Pi0Fast):
        forward += product(text, model.language.width, model.vocab_size, 0)
    total, trained = count_params(model, config.frozen)
    arrays = 9 if config.optimizer.ema else 7
    return 3 * config.batch_size * forward + Work(0, 3 * total * size), Work(0, arrays * 4 * trained)


def product(rows: int, inner: int, outer: int, size: int) -> Work:
    """A product with weights [inner, outer] of `size` bytes each."""
    return Work(2 * rows * inner * outer, inner * outer * size)
