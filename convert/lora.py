"""LoRA in a checkpoint: adapters are carried, or added to the weights that they adapt.

N heads, H head dim, D width, R rank. The difference that an adapter makes is `alpha / rank * a @ b` for every head,
with one exception: openpi's output projection is the einsums BTNH,NHR->BTR and BTR,NRD->BTD, so that both factors are
summed over heads on their own, and head n's weight changes by `a[n] @ sum(b)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from einops import rearrange

from convert import tables
from convert.layout import OURS, Entry, Row, side_shapes
from convert.source import Source
from openpi_port.config import Lora
from openpi_port.errors import UserError, near

EXPERTS = ("language", "expert")


def config(shapes: Mapping[str, Any], side: str, gemma: Any, expert: int, alpha: float | None = None) -> Lora | None:
    """The adapters of an expert, from the shapes of its weights.

    Args:
      shapes: name -> shape of every tensor on a side.
      side: which.
      gemma: the expert's `config.Gemma`.
      expert: its number.
      alpha: where it is known; else the rank, as in openpi.
    """
    ranks = {}
    for target, kernels in tables.lora_targets(gemma).items():
        for kernel in kernels:
            name = _entry(tables.adapters(kernel)[0], expert).spot(side, 0).name if side != "hf" else None
            if name in shapes:
                ranks[target] = shapes[name][-1]
    if not ranks:
        return None
    rank = next(iter(ranks.values()))
    return Lora(rank, float(rank if alpha is None else alpha), tuple(ranks))


def check(source: Source) -> Source:
    """The source itself.

    Raises:
      UserError: only some weights of attention or of an MLP have adapters, which no model of ours can carry.
    """
    have = [name for name in source.tensors if name.endswith("lora_a")]
    if not have:
        return source
    lacking = [n for n in side_shapes(source.entries, source.side) if "lora_" in n and n not in source.tensors]
    if lacking:
        raise UserError(
            f"{source.path}: {len(have)} LoRA adapters ({have[0]}, ...), but none at {lacking[0]}; "
            "such a mixture can only be added to the weights: --merge-lora (load_model: merge_lora=True)"
        )
    return source


def merge(source: Source) -> Source:
    """The same policy without adapters: they are added to the weights when those are read.

    Training's state, which is that of the adapters, stays behind.

    Raises:
      UserError: half of an adapter is missing.
    """
    tensors = dict(source.tensors)
    models = {}
    for expert, part in enumerate(EXPERTS):
        gemma = getattr(source.model, part, None)
        if gemma is None or gemma.lora is None:
            continue
        models[part] = dataclasses.replace(gemma, lora=None)
        for kernels in tables.lora_targets(gemma).values():
            for kernel in kernels:
                for w, a, b in _names(kernel, expert, gemma.depth, source.side):
                    if a in tensors:
                        if b not in tensors:
                            raise UserError(f"{source.path}: {a} is there, but no {b}; {near(b, tensors)}")
                        factors = tensors.pop(a), tensors.pop(b)
                        tensors[w] = _Merged(tensors[w], *factors, kernel, source.side, gemma.lora.scaling)
    if not models:
        return source
    model = dataclasses.replace(source.model, **models)
    return dataclasses.replace(source, tensors=tensors, model=model, train_state={})


def refuse_scaled(model: Any) -> None:
    """Stops what openpi would compute otherwise: its MLP doesn't scale adapters, its configs have alpha = rank.

    Raises:
      UserError: a model whose alpha is not its rank.
    """
    for part in EXPERTS:
        lora = getattr(getattr(model, part, None), "lora", None)
        if lora is not None and lora.scaling != 1:
            raise UserError(
                f"{part}.lora: alpha={lora.alpha} is not rank={lora.rank}, which openpi can't express; "
                "add the adapters to the weights: --merge-lora"
            )


class _Merged:
    """A weight with its adapter added, made when indexed (by layer and slot, as `layout.Entry.spot` does)."""

    def __init__(self, w: Any, a: Any, b: Any, kernel: Row, side: str, scaling: float) -> None:
        self._w, self._a, self._b, self._scaling = w, a, b, scaling
        self._pattern = f"... {kernel.sides['openpi'].axes} -> ... {kernel.sides[side].axes}"
        self._sum = kernel.sides[OURS].name.endswith("/o/kernel")
        self.shape, self.dtype = tuple(w.shape), np.dtype(w.dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        w, a, b = (np.asarray(x[index], np.float32) for x in (self._w, self._a, self._b))
        if self._sum:
            b = b.sum(-3, keepdims=True)
        return (w + self._scaling * rearrange(a @ b, self._pattern)).astype(self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[...].astype(dtype or self.dtype)


def _names(kernel: Row, expert: int, depth: int, side: str) -> Iterator[tuple[str, str, str]]:
    """The names of a weight and of its factors on a side; one triple per tensor there, stacked or per layer."""
    rows = [_entry(row, expert) for row in (kernel, *tables.adapters(kernel))]
    yield from dict.fromkeys(tuple(row.spot(side, layer).name for row in rows) for layer in range(depth))


def _entry(row: Row, expert: int) -> Entry:
    return Entry(row, {}, tables.words(expert))
