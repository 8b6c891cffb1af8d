"""The ranges that numbers of a configuration must lie in, and the one line that says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from openpi_port.errors import UserError


class Range(NamedTuple):
    """What is allowed: in words, and as a test that NaN does not pass."""

    words: str
    holds: Callable[[float], bool]


COUNT = Range("1 or more", lambda x: x >= 1)
FROM_ZERO = Range("0 or more", lambda x: 0 <= x < math.inf)
POSITIVE = Range("a number above 0", lambda x: 0 < x < math.inf)
SHARE = Range("from 0 to below 1", lambda x: 0 <= x < 1)


def check(where: str, config: Any, allowed: Range, *fields: str) -> None:
    """Looks at some fields of a dataclass.

    Args:
      where: how the message names it ("config.optimizer").
      config: the dataclass.
      allowed: where its values must lie.
      fields: which ones.

    Raises:
      UserError: naming the first field that is elsewhere.
    """
    for field in fields:
        if not allowed.holds(value := getattr(config, field)):
            raise UserError(f"{where}.{field}={value}: {allowed.words}")
