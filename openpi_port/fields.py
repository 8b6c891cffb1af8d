"""Between frozen dataclasses and nested mappings (ConfigDict, JSON), strictly: every mistake names its field."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from openpi_port.errors import UserError, near


def build(cls: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """Turns nested mappings into a frozen dataclass, strictly.

    Args:
      cls: the dataclass.
      values: its fields; nested dataclasses as mappings. Anything with `items()`, such as a ConfigDict.
      where: how messages name this level ("config", "config.data", ...).

    Returns:
      An instance of `cls`.

    Raises:
      UserError: an unknown or missing field, or a value of the wrong type; the message names the field.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    kwargs = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"{where}.{key}: no such field; {near(key, fields)}")
        kwargs[key] = _convert(hints[key], value, f"{where}.{key}")
    missing = [
        f"{where}.{f.name}"
        for f in fields.values()
        if f.name not in kwargs and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{', '.join(missing)}: no value given")
    return cls(**kwargs)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Checks one value against its type hint; tuples come from any sequence, floats from ints."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)
    if args and all(dataclasses.is_dataclass(a) for a in args):
        return value if isinstance(value, args) else build(_closest(args, value), value, where)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where}={value!r}: {near(str(value), map(str, args))}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise UserError(f"{where}={value!r}: expected a sequence")
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return {k: _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if type(None) in args:
        inner = next(a for a in args if a is not type(None))
        if dataclasses.is_dataclass(inner) and hasattr(value, "items"):  # a part that may be absent
            value = {name: field for name, field in value.items() if field is not None} or None
        return None if value is None else _convert(inner, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where}={value!r}: expected {hint.__name__}, got {type(value).__name__}")
    return value


def _closest(classes: Sequence[type], values: Mapping[str, Any]) -> type:
    """The dataclass whose fields these are, as nearly as possible."""
    given = set(values.keys())
    return min(classes, key=lambda cls: len(given ^ {f.name for f in dataclasses.fields(cls)}))


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested plain containers, ready for JSON; `build` reads it back."""
    return dataclasses.asdict(config)
