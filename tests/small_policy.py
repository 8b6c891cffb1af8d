"""A small random checkpoint of a real-ALOHA policy, for tests of what surrounds a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from convert import tables
from openpi_port import checkpoint, init
from openpi_port.backends import Backend
from openpi_port.config import Data, Gemma, Pi0, Pi0Fast, Siglip, Train
from openpi_port.normalize import Stats
from openpi_port.robots import aloha
from openpi_port.tokenizers import paligemma

ALOHA = {c: aloha.CAMERAS[c] for c in ("base_0_rgb", "left_wrist_0_rgb")}
HORIZON, ACTION_DIM = 4, 32
SMALL = {"depth": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
MODEL = Pi0(
    vision=Siglip(width=32, depth=1, mlp_dim=32, num_heads=2, patch_size=16, image_size=32),
    language=Gemma(width=32, mlp_dim=32, **SMALL),
    expert=Gemma(width=32, mlp_dim=32, **SMALL),
    vocab_size=512,
    action_dim=ACTION_DIM,
    action_horizon=HORIZON,
    max_token_len=12,
)
FAST = Pi0Fast(
    vision=MODEL.vision,
    language=MODEL.language,
    vocab_size=1152,
    action_horizon=HORIZON,
    max_token_len=120,
    cameras=MODEL.cameras,
)


def make_checkpoint(path: Path, model: Pi0 | Pi0Fast = MODEL, **data: Any) -> Path:
    """Writes a torch checkpoint: two cameras of three, delta actions, statistics that are not trivial."""
    path.mkdir(parents=True)
    settings = Data(**{"repo_id": "none", "robot": "aloha", "cameras": ALOHA, "delta": aloha.DELTA, **data})
    tokenizer = paligemma.load("small")
    names = {"tokenizer": "small", "fast_tokenizer": "fast_aloha"}
    config = Train(name="small", model=model, data=settings, backend="torch", **names)
    policy = checkpoint.Policy(config, 20, "torch", tokenizer.fingerprint)
    rng = np.random.default_rng(0)
    stats = {key: Stats(mean=rng.normal(size=14), std=rng.uniform(0.5, 2, 14)) for key in ("state", "actions")}
    weights = tables.translate(init.Fresh(model, 0), model, "flax", "torch")

    Backend("torch").weights.write_params(path / "model.safetensors", dict(weights))
    checkpoint.describe(path, policy, {"": stats}, tokenizer.content)
    return path


def observation_of(seed: int, prompt: str = "lift it") -> dict[str, Any]:
    """What openpi's ALOHA client sends."""
    rng = np.random.default_rng(seed)
    images = {k.rpartition(".")[2]: rng.integers(0, 256, (24, 32, 3), dtype=np.uint8) for k in ALOHA.values()}
    return {"images": images, "state": rng.uniform(0, 1, 14), "prompt": prompt}
