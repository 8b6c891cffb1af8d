"""What opening any checkpoint gives: its tensors where they lie, the model's configuration, and what belongs to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy the name "bfloat16")
import numpy as np

from convert import tables
from convert.layout import OURS, Entry, Translated, side_shapes
from openpi_port.checkpoint import NORM_STATS
from openpi_port.normalize import NormStats
from openpi_port.strict import check


class _Rounded:
    """A tensor on disk that is rounded when it is read."""

    def __init__(self, tensor: Any, dtype: np.dtype) -> None:
        self._tensor, self.dtype, self.shape = tensor, dtype, tuple(tensor.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self._tensor[index]).astype(self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[...].astype(dtype or self.dtype)


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
      format: "flax", "torch", "openpi", "openpi-torch", "lerobot", "paligemma" or "big_vision".
      path: where it lies.
      side: whose names and layout `tensors` have (`tables.SIDES`).
      tensors: name -> array on disk.
      model: the model's configuration.
      rules: name in the file -> the rule by which a tensor has no place of its own (tied, unused).
      unused: tensors that no computation reads, under the names of side "hf"; carried so that nothing is lost.
      norm_stats: of state and actions; None where the format holds none.
      asset_id: the name that openpi gives the data set of the statistics.
      settings: further settings of the policy, as `policy.json` holds them (see `settings.py`).
      train_state: what a resume needs beside the weights, of our own checkpoints: "part/name" -> array.
      files: what travels along as it is (the tokenizer): name -> file.
    """

    format: str
    path: Path
    side: str
    tensors: Mapping[str, Any]
    model: Any
    _: dataclasses.KW_ONLY
    rules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    norm_stats: NormStats | None = None
    asset_id: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train_state: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @property
    def is_policy(self) -> bool:
        """Whether it knows actions; PaliGemma, which a policy can start from, doesn't."""
        return self.format not in ("paligemma", "big_vision")

    @property
    def assets(self) -> list[str]:
        """The names of the data sets whose statistics lie in `assets/`."""
        parts = [Path(name).parts for name in sorted(self.files)]
        return ["/".join(p[1:-1]) for p in parts if p[0] == "assets" and p[-1] == NORM_STATS]

    @property
    def entries(self) -> list[Entry]:
        """The table for this model; for a vision-language model alone, only what it has."""
        return tables.entries(self.model)

    def to(self, side: str) -> Translated:
        """The tensors on another side, made when asked for.

        Raises:
          UserError: a missing, unknown or misshapen tensor.
        """
        entries = self.entries
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        check(shapes, side_shapes(entries, self.side), str(self.path))
        return Translated(entries, self.tensors, self.side, side)

    def rounded(self, dtype: str) -> Source:
        """The same policy in another precision, to deploy; the state of training, which wants all digits, stays behind.

        Args:
          dtype: "bfloat16" or "float32".
        """
        tensors = {name: _Rounded(tensor, np.dtype(dtype)) for name, tensor in self.tensors.items()}
        unused = {name: _Rounded(tensor, np.dtype(dtype)) for name, tensor in self.unused.items()}
        return dataclasses.replace(self, tensors=tensors, unused=unused, train_state={})

    def start_of(self, model: Any) -> Translated:
        """What a vision-language model gives to a policy that is to be trained.

        Args:
          model: `config.Pi0` or `Pi0Fast`, with the same vision tower and language model.

        Returns:
          Canonical weights of the part that is here; the policy's others start fresh.

        Raises:
          UserError: the parts differ in size.
        """
        language = dataclasses.replace(model.language, lora=None)  # adapters start fresh
        entries = tables.paligemma_entries(dataclasses.replace(model, language=language))
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        check(shapes, side_shapes(entries, self.side), str(self.path))
        return Translated(entries, self.tensors, self.side, OURS)

    def canonical(self) -> Translated:
        """The tensors under our Flax names."""
        return self.to(OURS)
