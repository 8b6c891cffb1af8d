"""Opens any supported checkpoint as a model of either framework."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

from openpi_port.backends import NAMES, Backend
from openpi_port.config import Compute, Dtype
from openpi_port.errors import UserError, near

if TYPE_CHECKING:
    from openpi_port.pi_flax.infer import FastModel, Model


def load_model(
    path: str | os.PathLike[str],
    backend: Literal["flax", "torch"] = "flax",
    dtype: Dtype = "float32",
    device: str | None = None,
    **overrides: Any,
) -> Model | FastModel:
    """Opens a checkpoint: ours, openpi's (JAX or PyTorch), LeRobot's; local, `gs://` or `hf://`.

    Sizes come from the weights' shapes, the rest from the checkpoint's own description.

    Args:
      path: the directory, or a weight file in it.
      backend: the framework that computes; any checkpoint opens in either.
      dtype: of weights and matrix products.
      device: "cpu", "gpu", "tpu" in Flax, "cpu", "cuda:1" in torch; None takes the best there is.
      **overrides: fields of `config.Pi0` or `config.Pi0Fast` that neither weights nor description determine
        (`action_horizon=16`, `positions="contiguous"`); `model="pi0"`, `"pi05"` or `"pi0_fast"` says what is expected;
        `merge_lora=True` adds LoRA's adapters to the weights that they adapt, which computes faster.

    Returns:
      A model whose `loss(batch, noise, time)` and `sample_actions(batch, noise, num_steps=10)` take and return numpy;
      of pi0-FAST one with `loss(batch)` and `decode(batch, max_steps, temperature, rng)`.

    Raises:
      UserError: no checkpoint there, or one that doesn't fit.
    """
    from convert import formats, tables

    if backend not in NAMES:
        raise UserError(f"backend={backend!r}; {near(str(backend), NAMES)}")
    source = formats.open_checkpoint(os.fspath(path), **overrides)
    weights = tables.translate(source.tensors, source.model, source.side, backend)
    return Backend(backend).infer.load(source.model, weights, Compute(dtype=dtype), device)
