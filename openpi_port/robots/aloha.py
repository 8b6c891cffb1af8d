"""Real ALOHA (2 x ViperX): into the joint space that the published pi0 weights were trained in.

There, two joints of each arm turn the other way, and the gripper's state is an angle between encoder counts
2405 and 3110 of 4096 with the zero at 2048, that is 0.5476 to 1.6296 rad, scaled to [0, 1]. ALOHA reports the
gripper's opening (linear, scaled to [0, 1]) and is commanded by the gripper's joint angle (scaled to [0, 1]
over another range). The constants are those of ALOHA's own code and of openpi's adaptor.

Axis letters: A actions, J = 14 dimensions: left arm 0..5, left gripper 6, right arm 7..12, right gripper 13.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from openpi_port.config import Data
from openpi_port.robots.aloha_sim import ACTION_DIM, DELTA, STATE_DIM
from openpi_port.transforms import Dims, Sample, Transform

__all__ = ["ACTION_DIM", "CAMERAS", "DELTA", "HDF5_CAMERAS", "HDF5_STATE", "STATE_DIM", "AdaptToPi", "steps"]

# model camera -> key of a LeRobot recording of ALOHA (config.data.cameras)
CAMERAS = {
    "base_0_rgb": "observation.images.cam_high",
    "left_wrist_0_rgb": "observation.images.cam_left_wrist",
    "right_wrist_0_rgb": "observation.images.cam_right_wrist",
}

# the same in ALOHA's own HDF5 episodes, whose state is "observations/qpos" (config.data.state)
HDF5_CAMERAS = {
    "base_0_rgb": "observations/images/cam_high",
    "left_wrist_0_rgb": "observations/images/cam_left_wrist",
    "right_wrist_0_rgb": "observations/images/cam_right_wrist",
}
HDF5_STATE = "observations/qpos"

SIGNS = np.array([1, -1, -1, 1, 1, 1, 1] * 2, np.float32)
GRIPPERS = [6, 13]

CLOSED, OPEN = 0.01844, 0.05800  # m, opening of the puppet's gripper
ARM, HORN = 0.036, 0.022  # m, the gripper's linkage
PI_CLOSED, PI_OPEN = 0.5476, 1.6296  # rad, the gripper's state as pi0 knows it
JOINT_CLOSED, JOINT_OPEN = -0.6213, 1.4910  # rad, the gripper's command as ALOHA scales it


def steps(data: Data) -> tuple[Transform, ...]:
    """The check of sizes, then the change of space."""
    return (Dims(STATE_DIM, ACTION_DIM), AdaptToPi())


@dataclasses.dataclass(frozen=True)
class AdaptToPi:
    """Joint signs and gripper maps, of the state and of the actions."""

    def forward(self, sample: Sample) -> Sample:
        """ALOHA's space to pi0's."""
        out = {**sample, "state": _map_grippers(sample["state"] * SIGNS, opening_to_pi)}
        if "actions" in sample:
            out["actions"] = _map_grippers(sample["actions"] * SIGNS, command_to_pi)
        return out

    def inverse(self, sample: Sample) -> Sample:
        """pi0's space to ALOHA's."""
        out = {**sample, "actions": _map_grippers(sample["actions"], command_from_pi) * SIGNS}
        if "state" in sample:
            out["state"] = _map_grippers(sample["state"], opening_from_pi) * SIGNS
        return out


def opening_to_pi(opening: np.ndarray) -> np.ndarray:
    """The gripper's opening in [0, 1] to its angle in [0, 1] of pi0's range, by the linkage's law of cosines.

    Openings that the linkage cannot reach get the angle at its end.
    """
    x = opening * (OPEN - CLOSED) + CLOSED
    sine = (HORN**2 + x**2 - ARM**2) / (2 * HORN * x)
    return (np.arcsin(np.clip(sine, -1.0, 1.0)) - PI_CLOSED) / (PI_OPEN - PI_CLOSED)


def opening_from_pi(angle: np.ndarray) -> np.ndarray:
    """Inverse of `opening_to_pi`: the positive root of x^2 - 2 HORN sin(angle) x + HORN^2 - ARM^2 = 0."""
    reach = HORN * np.sin(angle * (PI_OPEN - PI_CLOSED) + PI_CLOSED)
    x = reach + np.sqrt(reach**2 + ARM**2 - HORN**2)
    return (x - CLOSED) / (OPEN - CLOSED)


def command_to_pi(command: np.ndarray) -> np.ndarray:
    """ALOHA's gripper command in [0, 1] to pi0's action, an angle in rad from pi0's closed position."""
    return command * (JOINT_OPEN - JOINT_CLOSED) + JOINT_CLOSED - PI_CLOSED


def command_from_pi(angle: np.ndarray) -> np.ndarray:
    """Inverse of `command_to_pi`."""
    return (angle + PI_CLOSED - JOINT_CLOSED) / (JOINT_OPEN - JOINT_CLOSED)


def _map_grippers(x: np.ndarray, law: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A copy of x [..., J] with the grippers mapped; of x's dtype."""
    x = np.array(x)
    x[..., GRIPPERS] = law(x[..., GRIPPERS])
    return x
