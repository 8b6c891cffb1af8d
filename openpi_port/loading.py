"""Opens any supported checkpoint: as a model of either framework, or as all that a policy is made of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from openpi_port import checkpoint, robots
from openpi_port.backends import NAMES, Backend
from openpi_port.config import Compute, Data, Dtype, Pi0, Pi0Fast
from openpi_port.errors import UserError, near
from openpi_port.fields import build
from openpi_port.tokenizers import fast, paligemma
from openpi_port.tokenizers.fast_sequence import FastSequence

if TYPE_CHECKING:
    from convert.source import Source
    from openpi_port.pi_flax.infer import FastModel, Model

_FROM_ROBOT = ("state", "actions", "delta")  # what a robot's file may say beside its cameras, in capitals


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
    from convert import formats

    check_backend(backend)
    return fill(formats.open_checkpoint(os.fspath(path), **overrides), backend, dtype, device)


def check_backend(name: str) -> None:
    """Raises UserError where there is no such framework."""
    if name not in NAMES:
        raise UserError(f"backend={name!r}; {near(str(name), NAMES)}")


def fill(source: Source, backend: str, dtype: Dtype, device: str | None) -> Model | FastModel:
    """An opened checkpoint as a model; see `load_model`.

    Raises:
      UserError: its tensors don't fit, or there is no such device or dtype.
    """
    from convert import tables

    if dtype not in get_args(Dtype):
        raise UserError(f"dtype={dtype!r}: {near(str(dtype), get_args(Dtype))}")
    modules = Backend(backend)
    try:
        modules.device.describe(modules.device.find(device))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"device={device!r} is not here for {backend}: {' '.join(str(error).split())[:150]}") from None
    weights = tables.translate(source.tensors, source.model, source.side, backend)
    return modules.infer.load(source.model, weights, Compute(dtype=dtype), device)


class Parts(NamedTuple):
    """What belongs to a policy, without a framework: the opened checkpoint, the way to its robot, the tokenizer."""

    source: Source
    data: Data
    tokenizer: paligemma.PromptTokenizer | FastSequence


def open_parts(
    path: str | os.PathLike[str],
    default_prompt: str | None = None,
    robot: str | None = None,
    data: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    **overrides: Any,
) -> Parts:
    """All that `Policy.from_pretrained` opens but the model; its arguments and errors."""
    from convert import formats

    source = formats.open_checkpoint(os.fspath(path), **overrides)
    if not isinstance(source.model, Pi0 | Pi0Fast):
        raise UserError(f"{path}: a {type(source.model).__name__} is no policy; those are pi0, pi0.5 and pi0-FAST")
    if assumed := source.settings.get("assumed"):
        field = assumed[0]
        raise UserError(
            f"{path}: the checkpoint does not say its {field}: give {field}= (--model.{field}=); docs/checkpoints.md "
            f"has those of openpi's published ones"
        )
    if source.norm_stats is None:
        choose = f"choose with asset= (--asset=) among {', '.join(source.assets)}" if source.assets else ""
        raise UserError(
            f"{path}: no statistics of state and actions; {choose or 'put norm_stats.json into the directory'}"
        )
    return Parts(source, _data(source, robot, data, default_prompt), _tokenizer(source, tokenizer))


def _data(source: Source, robot: str | None, given: Mapping[str, Any] | None, prompt: str | None) -> Data:
    """The checkpoint's description, what the robot's file adds, and what the caller says, in rising order."""
    fields: dict[str, Any] = {"repo_id": "", **source.settings.get("data", {})}
    if robot is not None:
        module = robots.load(robot)
        fields["robot"] = robot
        # A robot may have names for a model with other cameras too (DROID's for pi0-FAST).
        maps = [m for m in (getattr(module, n, None) for n in ("CAMERAS", "FAST_CAMERAS")) if m]
        fits = [m for m in maps if set(m) <= set(source.model.cameras)]
        names = {"cameras": fits[0] if fits else None, **{f: getattr(module, f.upper(), None) for f in _FROM_ROBOT}}
        fields |= {field: value for field, value in names.items() if value is not None}
    fields |= given or {}
    if prompt is not None:
        fields["prompt"] = prompt
    missing = [f for f in ("robot", "cameras") if f not in fields]
    if missing:
        raise UserError(
            f"{source.path}: the checkpoint does not say what robot it is for ({' and '.join(missing)} unknown): give "
            f"robot= (one of {', '.join(robots.names())}), or data={{'robot': ..., 'cameras': {{...}}}}"
        )
    return build(Data, fields, "data")


def _tokenizer(source: Source, given: str | None) -> paligemma.PromptTokenizer | FastSequence:
    """The checkpoint's own, else the given or the named one; never another than it was trained with."""
    stated = source.settings.get("tokenizer") or {"spec": "paligemma"}
    file = source.files.get("tokenizer.model")
    name = str(file or given or stated["spec"])
    tokenizer = paligemma.load(name)
    wanted = stated.get("sha256")
    if wanted and tokenizer.fingerprint != wanted:
        raise UserError(
            f"{name}: not the tokenizer of this policy (SHA-256 {tokenizer.fingerprint[:12]}..., "
            f"policy.json has {wanted[:12]}...)"
        )
    if tokenizer.vocab_size > source.model.vocab_size:
        raise UserError(
            f"{source.path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {source.model.vocab_size}"
        )
    if isinstance(source.model, Pi0):
        return tokenizer
    own = source.path / checkpoint.FAST_TOKENIZER
    named = source.settings.get("train", {}).get("fast_tokenizer", "physical-intelligence/fast")
    return FastSequence(tokenizer, fast.load(str(own) if own.is_dir() else named), source.model.vocab_size)
