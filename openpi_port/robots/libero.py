"""LIBERO (a simulated Franka arm): state is position, axis-angle and two fingers, actions 6 and the gripper.

The keys are those of the observations that openpi's clients send.
"""

from __future__ import annotations

from openpi_port.config import Data
from openpi_port.transforms import Dims, Transform

STATE_DIM = 8
ACTION_DIM = 7

# what to put into config.data.cameras, .state and .actions
CAMERAS = {
    "base_0_rgb": "observation/image",
    "left_wrist_0_rgb": "observation/wrist_image",
}
STATE = "observation/state"
ACTIONS = "actions"
RLDS_ACTIONS = "action"  # of the RLDS version (modified_libero_rlds), whose other names are those above


def steps(data: Data) -> tuple[Transform, ...]:
    """Only the check of sizes: the units are the model's already."""
    return (Dims(STATE_DIM, ACTION_DIM),)
