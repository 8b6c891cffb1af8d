"""Any data set whose state and actions need no conversion: everything comes from the config."""

from __future__ import annotations

from openpi_port.config import Data
from openpi_port.transforms import Transform

STATE_DIM = None
ACTION_DIM = None


def steps(data: Data) -> tuple[Transform, ...]:
    """None."""
    return ()
