"""--checkpoint and what else decides how a policy is opened, for every program that runs one."""

from __future__ import annotations

import json
from typing import Any

from absl import flags

from convert import arguments
from openpi_port import Policy
from openpi_port.backends import share_cores
from openpi_port.errors import UserError

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "directory, gs://... or hf://user/name")
BACKEND = flags.DEFINE_enum("backend", "flax", ["flax", "torch"], "the framework that computes")
DEVICE = flags.DEFINE_string("device", None, "cpu, gpu, tpu (flax), cuda:1 (torch); default: the best there is")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of weights and matrix products")
ROBOT = flags.DEFINE_string("robot", None, "a file of openpi_port/robots; for checkpoints that don't name one")
DATA = flags.DEFINE_string("data", None, 'JSON of config.Data\'s fields that are to differ: {"cameras": {...}}')
TOKENIZER = flags.DEFINE_string("tokenizer", None, "paligemma, small or a path, for checkpoints that bring none")
PROMPT = flags.DEFINE_string("prompt", None, "instruction for observations that bring none")
MODEL = flags.DEFINE_multi_string(
    "model", [], "--model.FIELD=VALUE: of the model, what neither weights nor files say (action_horizon, state_in)"
)
ASSET = flags.DEFINE_string(
    "asset", None, "which of several data sets: their statistics in openpi's assets/, their robot in a mixture of ours"
)
FAST = flags.DEFINE_bool("fast", False, "prepare the model for fast inference; computes the same")
FLOAT8 = flags.DEFINE_bool("float8", False, "as --fast, with products in float8: faster, less exact, torch only")
NUM_STEPS = flags.DEFINE_integer("num_steps", 10, "Euler steps per chunk", 1)


def checkpoint() -> str:
    """What --checkpoint= names.

    Raises:
      UserError: nothing.
    """
    if CHECKPOINT.value is None:
        raise UserError("--checkpoint= names no policy: give a directory, gs://... or hf://user/name")
    return CHECKPOINT.value


def policy() -> Policy:
    """The policy that the command line asks for.

    Raises:
      UserError: see `Policy.from_pretrained`.
    """
    path = checkpoint()
    if FAST.value:
        share_cores()
    opened = Policy.from_pretrained(
        path,
        BACKEND.value,
        device=DEVICE.value,
        dtype=DTYPE.value,
        num_steps=NUM_STEPS.value,
        **parts(),
    )
    if FAST.value or FLOAT8.value:
        opened.optimize(float8=FLOAT8.value)
    about = opened.metadata
    print(
        f"{path}: {about['robot']}, chunks of {about['action_horizon']} actions, {BACKEND.value}",
        flush=True,
    )
    return opened


def parts() -> dict[str, Any]:
    """What decides everything but the model's computation; arguments of `openpi_port.loading.open_parts`."""
    fields = arguments.overrides([f"--model.{field}" for field in MODEL.value], "this program")
    given = {"robot": ROBOT.value, "data": data(), "tokenizer": TOKENIZER.value, "default_prompt": PROMPT.value}
    return {**fields, **given, **({} if ASSET.value is None else {"asset": ASSET.value})}


def data() -> dict[str, Any] | None:
    """What --data says."""
    return json_object(DATA)


def json_object(flag: flags.FlagHolder[str | None]) -> dict[str, Any] | None:
    """The JSON that a flag holds; None where it isn't given.

    Raises:
      UserError: no JSON, or no object.
    """
    if flag.value is None:
        return None
    try:
        fields = json.loads(flag.value)
    except ValueError as error:
        raise UserError(f"--{flag.name}={flag.value}: no JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"--{flag.name}={flag.value}: expected a JSON object")
    return fields
