"""Between the frozen dataclasses that configs are written in and the ConfigDict that flags can override."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from openpi_port.config import Train


def to_edge(config: Train) -> ConfigDict:
    """A ConfigDict with the same fields; one that is None still knows its type, an absent part (LoRA) its fields."""
    return ConfigDict(_open(config))


def _open(config: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(type(config))
    return {f.name: _value(hints[f.name], getattr(config, f.name)) for f in dataclasses.fields(config)}


def _value(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _open(value)
    args = typing.get_args(hint)
    if value is None:
        inner = next(a for a in args if a is not type(None))
        if dataclasses.is_dataclass(inner):
            return {name: _value(part | None, None) for name, part in typing.get_type_hints(inner).items()}
        return config_dict.placeholder(typing.get_origin(inner) or inner)
    if isinstance(value, Mapping):
        return {k: _value(args[1], v) for k, v in value.items()}
    return value
