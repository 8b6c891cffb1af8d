"""UR5 with a parallel gripper: 6 joints and the gripper, for state and actions alike.

The keys are those of the observations that openpi's clients send.
"""

from __future__ import annotations

from openpi_port.config import Data
from openpi_port.transforms import Dims, Transform

STATE_DIM = 7
ACTION_DIM = 7

# what to put into config.data.cameras, .state and .actions
CAMERAS = {
    "base_0_rgb": "base_rgb",
    "left_wrist_0_rgb": "wrist_rgb",
}
STATE = "joints,gripper"
ACTIONS = "actions"
# joints relative to the state, the gripper absolute (config.data.delta)
DELTA = (True,) * 6 + (False,)


def steps(data: Data) -> tuple[Transform, ...]:
    """Only the check of sizes: the units are the model's already."""
    return (Dims(STATE_DIM, ACTION_DIM),)
