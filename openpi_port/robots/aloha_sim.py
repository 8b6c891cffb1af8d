"""ALOHA in simulation (gym-aloha): 2 x (6 joints, gripper), in radians and the simulator's own gripper unit.

Policies trained from scratch need no conversion. Real ALOHA robots, and checkpoints of openpi, use `aloha`.
"""

from __future__ import annotations

from openpi_port.config import Data
from openpi_port.transforms import Dims, Transform

STATE_DIM = 14
ACTION_DIM = 14

# Joints relative to the state, grippers absolute: openpi's choice for its weights (config.data.delta).
DELTA = ((True,) * 6 + (False,)) * 2


def steps(data: Data) -> tuple[Transform, ...]:
    """Only the check that this is a bimanual ALOHA."""
    return (Dims(STATE_DIM, ACTION_DIM),)
