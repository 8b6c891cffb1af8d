"""safetensors with Hugging Face names: openpi-PyTorch, LeRobot and PaliGemma.

Their tensors differ from one another only in the root of the names and in which of two tied tables is stored. Rules,
by name:

- tied: PaliGemma's output head is its token embedding; one of the two is stored, or both with equal numbers.
- unused head: pi0 and pi0.5 score no tokens. The expert's `lm_head` is random and read by no computation, and so is
  PaliGemma's where it was stored untied and has drifted. Both are carried beside the weights, not in them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert import infer, openpi, settings, tables
from convert.layout import Translated
from convert.source import Source
from openpi_port import safetensors_io
from openpi_port.errors import UserError, near

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
TIED = "tied: the output head is the token embedding"
UNUSED_RULE = "unused head: no computation reads it; carried in " + settings.UNUSED
PADDING = "padding: rows beyond the vocabulary, added to make its size round"
VOCAB = 257152
PADDED_VOCAB = 257216

# Roots of PaliGemma's names, before and after transformers 4.52, and ours.
PALIGEMMA_ROOTS = [
    (r"^language_model\.model\.", "language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^model\.", ""),
    (r"^(?!lm_head)", "model."),
    (r"^", "paligemma_with_expert.paligemma."),
]


def load(path: str | Path) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The tensors of a file or of a directory (one file or shards), and the header's metadata.

    Raises:
      UserError: nothing of the kind, a pickle, a missing shard or a damaged file.
    """
    path = Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    if path.is_dir() and not file.exists() and (path / INDEX).exists():
        return safetensors_io.tensors(file), {}
    if file.suffix in PICKLES:
        raise UserError(f"{file}: a pickle can run code and is never opened; save the weights as safetensors")
    arrays = safetensors_io.Arrays(file)
    return arrays.stored, arrays.metadata


def kind(names: Mapping[str, Any]) -> str | None:
    """Which format the names of the tensors show: "torch", "openpi-torch", "lerobot", "paligemma", or None."""
    starts = {
        "gemma.embedding": "torch",
        "paligemma_with_expert.": "openpi-torch",
        "model.paligemma_with_expert.": "lerobot",
        "language_model.": "paligemma",
        "model.language_model.": "paligemma",
    }
    return next((found for start, found in starts.items() if any(n.startswith(start) for n in names)), None)


def open_(path: str | Path, *, asset: str | None = None, **overrides: Any) -> Source:
    """Opens any of the three; see `formats.open_checkpoint`."""
    path = Path(path)
    tensors, _ = load(path)
    folder = path if path.is_dir() else path.parent
    found = kind(tensors)
    from convert import lerobot  # which uses this module

    # LeRobot also opens, and people publish, its directories with openpi's names.
    kind_stated = settings.read_json(folder / "config.json").get("type")
    if found == "lerobot" or (found == "openpi-torch" and kind_stated in lerobot.TYPES):
        return lerobot.open_(folder, tensors, overrides)
    if found == "openpi-torch":
        return open_openpi_torch(folder, tensors, asset, overrides)
    if found == "paligemma":
        return open_paligemma(folder, tensors, overrides)
    raise UserError(f"{path}: no names of PaliGemma or of a pi0 policy in it, but {', '.join(list(tensors)[:3])}, ...")


def open_openpi_torch(
    path: Path, tensors: Mapping[str, Any], asset: str | None, overrides: Mapping[str, Any]
) -> Source:
    """openpi-PyTorch: `model.safetensors`, `config.json` with action_dim and action_horizon, maybe `assets/`."""
    stated, own = settings.read(path), settings.read_json(path / "config.json")
    horizon = {settings.HORIZON: own[settings.HORIZON]} if settings.HORIZON in own else {}
    stated = dataclasses.replace(stated, model={**stated.model, **horizon})
    theirs, rules, unused = untie(tensors, path)
    model = infer.config(shapes(theirs), "hf", stated.model, overrides)
    # openpi's converter puts them one level up.
    folder = path if (path / "assets").is_dir() else path.parent
    asset_id, stats = openpi.read_assets(folder, asset)
    return Source(
        "openpi-torch", path, "hf", theirs, model, rules=rules, unused=unused, norm_stats=stats, asset_id=asset_id,
        settings=settings.of_openpi(stated, model), files=settings.read_files(path),
    )  # fmt: skip


def open_paligemma(path: Path, tensors: Mapping[str, Any], overrides: Mapping[str, Any]) -> Source:
    """PaliGemma as Hugging Face publishes it: everything but an action expert."""
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in PALIGEMMA_ROOTS:
            name = re.sub(old, new, name)
        renamed[name] = tensor
    theirs, rules, unused = untie(renamed, path, scored=True)
    table = theirs.get(tables.EMBED_TOKENS)
    if table is not None and table.shape[0] == PADDED_VOCAB:
        theirs[tables.EMBED_TOKENS] = table[:VOCAB]
        rules[tables.EMBED_TOKENS] = PADDING
    model = infer.config(shapes(theirs), "hf", {}, overrides)
    return Source("paligemma", path, "hf", theirs, model, rules=rules, unused=unused)


def shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def untie(
    tensors: Mapping[str, Any], path: Path, scored: bool | None = None
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Settles which table is the embedding and sets unused heads aside.

    Args:
      tensors: under the names of side "hf".
      path: for messages.
      scored: whether the model scores tokens, so that the head matters; None: where there is no expert.

    Returns:
      The tensors that remain, the rule for each that doesn't, and the unused ones.

    Raises:
      UserError: the model scores tokens and its head is not its embedding.
    """
    theirs, rules, unused = dict(tensors), {}, {}
    if scored is None:
        scored = not any(name.startswith("action_in_proj") for name in theirs)
    if tables.UNUSED_HEAD in theirs:
        unused[tables.UNUSED_HEAD] = theirs.pop(tables.UNUSED_HEAD)
        rules[tables.UNUSED_HEAD] = UNUSED_RULE
    head = theirs.pop(tables.LM_HEAD, None)
    if head is not None:
        if tables.EMBED_TOKENS not in theirs:
            theirs[tables.EMBED_TOKENS] = head
            rules[tables.LM_HEAD] = TIED
        elif same(head, theirs[tables.EMBED_TOKENS]):
            rules[tables.LM_HEAD] = TIED
        elif scored:
            raise UserError(
                f"{path}: lm_head and embed_tokens differ, but pi0-FAST and PaliGemma tie them, and so do we: "
                "the model was trained with its head untied and can't be converted"
            )
        else:
            unused[tables.LM_HEAD] = head
            rules[tables.LM_HEAD] = UNUSED_RULE
    if tables.EMBED_TOKENS not in theirs:
        raise UserError(f"{path}: no token embedding ({tables.EMBED_TOKENS}); {near(tables.EMBED_TOKENS, theirs)}")
    return theirs, rules, unused


def same(a: np.ndarray, b: np.ndarray, rows: int = 16384) -> bool:
    """Whether two arrays are equal to the bit; in slices, because they may be memory maps of gigabytes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(a[i : i + rows].tobytes() == b[i : i + rows].tobytes() for i in range(0, a.shape[0], rows))


class Written(Mapping[str, Any]):
    """The tensors of a file to be written: the model's under a root, with the tie and the unused heads settled.

    Args:
      weights: the model's, under the names of side "hf".
      unused: heads that were set aside; the expert's is written as zeros where there is none.
      root: in front of all names.
      untied: whether to store the embedding twice, as LeRobot 0.6 does.
    """

    def __init__(self, weights: Translated, unused: Mapping[str, Any], root: str, *, untied: bool) -> None:
        self._weights = weights
        dtype = weights.dtypes[tables.EMBED_TOKENS]
        self._extra: dict[str, Any] = {}
        if any(name.startswith("action_in_proj") for name in weights):
            vocab = weights.shapes[tables.EMBED_TOKENS][0]
            width = weights.shapes["action_in_proj.bias"][0]
            self._extra[tables.UNUSED_HEAD] = np.broadcast_to(np.zeros((), dtype), (vocab, width))
        self._extra |= {n: a for n, a in unused.items() if n in (tables.UNUSED_HEAD, tables.LM_HEAD)}
        # Stored once, under the head's name, as openpi-PyTorch and LeRobot 0.4 do and LeRobot 0.6 reads; or twice.
        untied = untied or tables.LM_HEAD in unused
        tied = {} if untied else {tables.EMBED_TOKENS: tables.LM_HEAD}
        self._names = {root + tied.get(name, name): name for name in weights} | {root + n: n for n in self._extra}
        if untied and tables.LM_HEAD not in unused:
            self._names[root + tables.LM_HEAD] = tables.EMBED_TOKENS
        self.metadata = {root + name: root + alias for name, alias in tied.items()} or {"format": "pt"}
        self.shapes = {out: self._lookup("shapes", name) for out, name in self._names.items()}
        self.dtypes = {out: self._lookup("dtypes", name) for out, name in self._names.items()}

    def _lookup(self, what: str, name: str) -> Any:
        if name in self._extra:
            return getattr(self._extra[name], what.removesuffix("s"))
        return getattr(self._weights, what)[name]

    def __getitem__(self, out: str) -> np.ndarray:
        name = self._names[out]
        return np.asarray(self._extra[name]) if name in self._extra else self._weights[name]

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def precision(weights: Translated) -> str:
    """The dtype that most of the weights have, as configs name it."""
    dtypes = list(weights.dtypes.values())
    return "bfloat16" if dtypes.count(np.dtype(ml_dtypes.bfloat16)) * 2 > len(dtypes) else "float32"
