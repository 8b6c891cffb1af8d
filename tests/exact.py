"""pi0-FAST in float64 and numpy, to tell rounding from mistakes: how far from the truth is a float32 result?

What the model defines in float32 stays there, since both frameworks and openpi share it: an image's value in [-1, 1],
and the angle of a rotation (at position 800 its last bit alone moves the golden logits by 3e-4).

B batch, T queries, S keys, N heads, K kv heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import rearrange

from openpi_port.config import Gemma, Pi0Fast

Weights = Mapping[str, np.ndarray]


def embed_images(weights: Weights, config: Pi0Fast, images: Mapping[str, np.ndarray]) -> np.ndarray:
    """uint8 images of all cameras to float64 [B, T, D]."""
    w = _scope(weights, "vision")
    vision, out = config.vision, []
    for camera in config.cameras:
        x = images[camera].astype(np.float32) / np.float32(255) * np.float32(2) - np.float32(1)
        p = vision.patch_size
        x = rearrange(x.astype(np.float64), "B (h p) (w q) c -> B (h w) (p q c)", p=p, q=p)
        x = _linear(w, "patch_embed", x) + w["pos_embedding"]
        for i in range(vision.depth):
            layer = {k: v[i] for k, v in _scope(w, "blocks").items()}
            y = _layer_norm(layer, "norm_attn", x)
            q, k, v = (
                rearrange(_linear(layer, f"attn/{n}", y), "B T (N H) -> B T N H", N=vision.num_heads) for n in "qkv"
            )
            x = x + _linear(layer, "attn/o", _attend(q * q.shape[-1] ** -0.5, k, v, True))
            y = _layer_norm(layer, "norm_mlp", x)
            x = x + _linear(layer, "mlp/down", _gelu(_linear(layer, "mlp/up", y)))
        out.append(_linear(w, "head", _layer_norm(w, "norm", x)))
    return np.concatenate(out, 1)


def embed_tokens(weights: Weights, tokens: np.ndarray) -> np.ndarray:
    """int [B, T] to float64 [B, T, D]."""
    table = weights["gemma/embedding"].astype(np.float64)
    return table[tokens] * table.shape[1] ** 0.5


def logits(weights: Weights, config: Gemma, x: np.ndarray, positions: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Scores float64 [B, T, V] of embedded tokens [B, T, D] at positions [B, T] under a mask [B, T, T]."""
    w = _scope(weights, "gemma")
    for i in range(config.depth):
        layer = {k: v[i] for k, v in _scope(w, "layers/experts/0").items()}
        y = _rms_norm(layer, "norm_attn", x)
        q, k, v = (rearrange(_linear(layer, n, y), "B T (N H) -> B T N H", H=config.head_dim) for n in "qkv")
        q, k = _rotate(q, positions) * config.head_dim**-0.5, _rotate(k, positions)
        k, v = (np.repeat(a, config.num_heads // config.num_kv_heads, 2) for a in (k, v))
        x = x + _linear(layer, "o", _attend(q, k, v, mask[:, None]))
        y = _rms_norm(layer, "norm_mlp", x)
        x = x + _linear(layer, "down", _gelu(_linear(layer, "gate", y)) * _linear(layer, "up", y))
    return _rms_norm(w, "norms/0", x) @ w["embedding"].T


def _scope(weights: Weights, name: str) -> dict[str, np.ndarray]:
    """The weights under a name, in float64."""
    return {k.removeprefix(f"{name}/"): np.float64(v) for k, v in weights.items() if k.startswith(f"{name}/")}


def _linear(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{name}/kernel"] + w.get(f"{name}/bias", 0)


def _layer_norm(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * w[f"{name}/scale"] + w[f"{name}/bias"]


def _rms_norm(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * (1 + w[f"{name}/scale"])


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: Any) -> np.ndarray:
    """Queries [B, T, N, H] come scaled; returns [B, T, N * H]."""
    q, k, v = (rearrange(a, "B T N H -> B N T H") for a in (q, k, v))
    scores = np.where(mask, q @ np.swapaxes(k, 2, 3), -1e38)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return rearrange(scores / scores.sum(-1, keepdims=True) @ v, "B N T H -> B T (N H)")


def _rotate(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    wavelength = np.float32(10_000.0 ** (np.arange(half) * (2.0 / x.shape[-1])))
    angle = np.float64(positions[..., None, None].astype(np.float32) / wavelength)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)
