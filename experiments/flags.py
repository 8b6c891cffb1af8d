"""`--config=NAME[:SIZE] --config.field=value ...` to the frozen dataclasses, for every program here.

NAME is a file of `configs/` without `.py`, or a path. Without a SIZE, the largest that the device can train is taken.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from openpi_port import memory, meshes
from openpi_port.backends import Backend
from openpi_port.config import SIZES, Train
from openpi_port.errors import UserError, guarded, near
from openpi_port.fields import build

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "NAME[:SIZE] of configs/, or a path; then --config.field=value"
)


def config() -> Train:
    """The run that the command line asks for."""
    if CONFIG.value is None:
        raise UserError(f"--config= names no run: NAME[:SIZE] of configs/; known: {', '.join(_known())}")
    return build(Train, CONFIG.value)


def run(main: Callable[[], int | None]) -> None:
    """Parses the command line and runs a program.

    User errors, and files' troubles, are one line and exit status 2; a Ctrl-C that the program doesn't take is 130.
    """

    def without_arguments(argv: Sequence[str]) -> int | None:
        if len(argv) > 1:
            raise UserError(f"{argv[1]!r}: no such argument; flags start with --")
        return main()

    logging.set_verbosity(logging.WARNING)  # the frameworks' notes about absent devices are no news
    sys.exit(guarded(lambda: app.run(without_arguments, flags_parser=_parse)))


def _parse(argv: Sequence[str]) -> list[str]:
    for module in (__name__, "experiments.policy_flags"):  # so that --help shows their flags too
        for flag in flags.FLAGS.flags_by_module_dict().get(module, ()):
            flags.FLAGS.register_key_flag_for_module(argv[0], flag)
    try:
        return flags.FLAGS(_resolve(list(argv)))
    except SystemExit:  # --help, which is no failure
        sys.exit(0)
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error


def _resolve(argv: list[str]) -> list[str]:
    """Replaces a bare config name by its path, and adds the size where none is given."""
    argv = [part for i, arg in enumerate(argv) for part in _join(argv, i, arg)]
    given = [i for i, arg in enumerate(argv) if arg.startswith("--config=")]
    if len(given) > 1:
        raise UserError(f"{' '.join(argv[i] for i in given)}: one config at a time")
    if not given:
        return argv
    (at,) = given
    name, _, size = argv[at].removeprefix("--config=").partition(":")
    path = Path(name) if name.endswith(".py") else CONFIGS / f"{name}.py"
    if not path.exists():
        raise UserError(f"--config={name}: no file {path.name} in configs/; {near(name, _known())}")
    argv += _with_lora(argv, path)
    override = next((arg.split("=", 1)[1] for arg in argv if arg.startswith("--config.model.size=")), None)
    if size and override and size != override:
        raise UserError(f"--config={name}:{size} and --config.model.size={override} disagree; give one")
    size = size or override or _largest(argv, path)
    if size not in SIZES:
        raise UserError(f"--config={name}:{size}: no such size; {near(size, SIZES)}")
    argv[at] = f"--config={path}:{size}"
    _check_fields(path, size, argv)
    return argv


def _known() -> list[str]:
    """The names of the files of `configs/`."""
    return sorted(p.stem for p in CONFIGS.glob("*.py") if "get_config" in p.read_text() and p.stem != "edge")


def _with_lora(argv: Sequence[str], path: Path) -> list[str]:
    """What goes with LoRA where flags alone ask for it: only adapters and projections are trained, without average."""
    asked = [re.match(r"--config\.model\.(language|expert)\.lora\.", arg) for arg in argv]
    parts = sorted({found[1] for found in asked if found}, reverse=True)
    if not parts:
        return []
    fields = _fields(path, "base").model
    if any("lora" in fields.get(part, {}) and fields[part].lora.rank is not None for part in ("language", "expert")):
        return []
    frozen = "".join(f"'{part}-but-lora'," for part in parts)
    extra = [f"--config.frozen=({frozen})", "--config.optimizer.ema=0.0", "--config.save=trained"]
    extra = [arg for arg in extra if not any(given.startswith(arg.partition("=")[0] + "=") for given in argv)]
    sys.argv += extra  # where config_flags looks for what is overridden
    print(f"LoRA, therefore {' '.join(extra)}" if extra else "LoRA", flush=True)
    return extra


def _fields(path: Path, size: str) -> ConfigDict:
    """The fields of a config file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(size)


def _check_fields(path: Path, size: str, argv: Sequence[str]) -> None:
    """Refuses an override of a field that the config doesn't have."""
    fields = _fields(path, size)
    for arg in argv:
        if not arg.startswith("--config."):
            continue
        node, where = fields, "config"
        for key in arg.partition("=")[0].split(".")[1:]:
            if not isinstance(node, ConfigDict) or key not in node:
                known = node if isinstance(node, ConfigDict) else [f"{where} has no fields"]
                raise UserError(f"--{where}.{key}: no such field; {near(key, known)}")
            node, where = node[key], f"{where}.{key}"


def _join(argv: list[str], i: int, arg: str) -> list[str]:
    """`--config NAME` and `-config=NAME` as `--config=NAME`."""
    if i and argv[i - 1] in ("--config", "-config"):
        return []
    if arg in ("--config", "-config"):
        if i + 1 == len(argv):
            raise UserError("--config needs a name: one of configs/")
        return [f"--config={argv[i + 1]}"]
    arg = re.sub(r"^--?model\.", "--model=", arg)  # fields of a checkpoint's model, see policy_flags
    return ["-" + arg if re.match(r"-config[.=]", arg) else arg]


def _largest(argv: list[str], path: Path) -> str:
    """`base` if the device holds its training state, else `mini`; says which and why."""
    _check_fields(path, "base", argv)
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    values([argv[0], f"--config={path}:base", *(arg for arg in argv if arg.startswith("--config."))])
    base = build(Train, holder.value)
    backend = Backend(base.backend)
    index, count = backend.sharding.join()  # before any device is looked at
    device = backend.device.find(None)
    kind, (name, room) = backend.device.kind(device), backend.device.describe(device)
    shape = meshes.shape(base.mesh, backend.device.count(), count, base.batch_size)
    need = memory.plan(memory.settle(memory.written(base, kind), shape, room), shape).total
    size = "base" if need <= memory.SPARED[base.backend] * room else "mini"
    if index == 0:
        print(
            f"size {size}: training base needs {need / memory.GIB:.0f} GiB, {name} has {room / memory.GIB:.0f} GiB "
            f"(--config.model.size= overrides)"
        )
    return size
