"""What is known of ALOHA's simulated tasks without loading OpenGL.

OpenGL on the CPU (OSMesa) and Triton bring an LLVM each, and a process that loads them in this order crashes. So what
evaluates a policy asks here, and leaves OpenGL to the simulations' own processes.
"""

from __future__ import annotations

from gym_aloha import constants

from openpi_port.errors import UserError, near
from openpi_port.sim.simulation import About, Panel

FPS = constants.FPS
JOINTS = tuple(constants.JOINTS)
SUCCESS = 4  # gym-aloha's own highest reward; the other tasks here keep to it
INSTRUCTIONS = {"transfer_cube": "Transfer cube", "lift_cube": "Lift the cube with the right arm and hold it"}


def check(task: str) -> None:
    """Raises UserError where there is no such task."""
    if task not in INSTRUCTIONS:
        raise UserError(f"no simulated task {task!r}; {near(task, INSTRUCTIONS)}")


def about(task: str) -> About:
    """See `simulation.about`."""
    check(task)
    arms = [
        Panel(f"{side} arm (rad)", *[{JOINTS[i].replace("_", " "): i for i in dims}] * 2)
        for side, dims in (("left", range(6)), ("right", range(7, 13)))
    ]
    grippers = Panel("grippers (1 is open)", *[{"left gripper": 6, "right gripper": 13}] * 2)
    return About(
        instruction=INSTRUCTIONS[task],
        fps=FPS,
        success=SUCCESS,
        max_steps=400,
        after=50,
        replan=25,
        arms=(*range(6), *range(7, 13)),
        panels=(*arms, grippers),
    )
