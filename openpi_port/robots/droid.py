"""DROID (one Franka arm): 7 joint positions and the gripper in, 7 joint velocities and the gripper out.

The keys are those of the observations that openpi's clients send.
"""

from __future__ import annotations

from openpi_port.config import Data
from openpi_port.transforms import Dims, Transform

STATE_DIM = 8
ACTION_DIM = 8

# what to put into config.data.cameras, .state and .actions
CAMERAS = {
    "base_0_rgb": "observation/exterior_image_1_left",
    "left_wrist_0_rgb": "observation/wrist_image_left",
}
STATE = "observation/joint_position,observation/gripper_position"
ACTIONS = "actions"
# the same in DROID's own RLDS data set, whose names of cameras and state are those above
RLDS_VELOCITIES = "action_dict/joint_velocity,action_dict/gripper_position"
RLDS_POSITIONS = "action_dict/joint_position,action_dict/gripper_position"  # with config.data.delta=POSITION_DELTA
RLDS_TASK = "language_instruction,language_instruction_2,language_instruction_3"
POSITION_DELTA = (True,) * 7 + (False,)
# pi0-FAST was trained with other names for the same two; its third camera, base_1_rgb, is black
FAST_CAMERAS = {
    "base_0_rgb": "observation/exterior_image_1_left",
    "wrist_0_rgb": "observation/wrist_image_left",
}


def steps(data: Data) -> tuple[Transform, ...]:
    """Only the check of sizes: the units are the model's already."""
    return (Dims(STATE_DIM, ACTION_DIM),)
