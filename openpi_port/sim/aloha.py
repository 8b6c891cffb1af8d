"""The two-armed ALOHA in simulation, one object for collecting data and for evaluating a policy.

It is gym-aloha's scene and reward (dm_control on MuJoCo), driven in two other ways: only the camera that
policies use is rendered, at their resolution and without shadows or multisampling (15 times faster than
gym-aloha's own observation), and joint targets are not clipped to its +-1 box, which would cut real ones.

State and action are gym-aloha's [14]: left arm 6 joints (rad), left gripper (0 closed .. 1 open), then right.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from dm_control import _render, mujoco
from dm_control.rl import control
from dm_control.rl.control import PhysicsError
from gym_aloha import constants
from gym_aloha.tasks import sim as gym_tasks
from gym_aloha.utils import sample_box_pose

from openpi_port.errors import UserError
from openpi_port.sim import aloha_tasks, expert, gl
from openpi_port.sim.aloha_tasks import JOINTS, SUCCESS
from openpi_port.sim.simulation import Diverged

CAMERA = "top"
_LEFT_FINGER = "vx300s_left/10_left_gripper_finger"
_RIGHT_FINGER = "vx300s_right/10_right_gripper_finger"


class TransferCube(gym_tasks.TransferCubeTask):
    """gym-aloha's task and reward with the cube given from outside and no rendering in the observation."""

    instruction = aloha_tasks.INSTRUCTIONS["transfer_cube"]
    cube_pose: np.ndarray  # [7] position (m) and quaternion (w, x, y, z); set before every reset

    def initialize_episode(self, physics: mujoco.Physics) -> None:
        """Puts the arms at gym-aloha's start pose and the cube at cube_pose."""
        with physics.reset_context():
            physics.data.qpos[:16] = constants.START_ARM_POSE
            physics.data.ctrl[:] = constants.START_ARM_POSE
            physics.data.qpos[16:23] = self.cube_pose

    def get_observation(self, physics: mujoco.Physics) -> dict[str, Any]:
        """The joints alone: AlohaSim renders."""
        return collections.OrderedDict(qpos=self.get_qpos(physics))

    @classmethod
    def reached(cls, touching: set[str], height: float) -> bool:
        """Whether the reward is SUCCESS.

        Args:
          touching: names of the geoms that touch the cube.
          height: of the cube's centre, m.
        """
        return _LEFT_FINGER in touching and "table" not in touching


class LiftCube(TransferCube):
    """The right arm picks the cube up and holds it; the left arm keeps out of it."""

    instruction = aloha_tasks.INSTRUCTIONS["lift_cube"]
    height = 0.12  # m, of the cube's centre above the table

    def get_reward(self, physics: mujoco.Physics) -> int:
        """1 touched by the right gripper, 2 off the table, 4 held above `height` by that gripper alone."""
        touching = contacts(physics, "red_box")
        if _RIGHT_FINGER not in touching:
            return 0
        if "table" in touching:
            return 1
        return SUCCESS if self.reached(touching, physics.data.qpos[18]) else 2

    @classmethod
    def reached(cls, touching: set[str], height: float) -> bool:
        """See TransferCube."""
        return _RIGHT_FINGER in touching and not touching & {"table", _LEFT_FINGER} and height >= cls.height


TASKS: dict[str, type[TransferCube]] = {"transfer_cube": TransferCube, "lift_cube": LiftCube}


def contacts(physics: mujoco.Physics, geom: str) -> set[str]:
    """Names of the geoms that touch one geom now."""
    pairs = physics.data.contact.geom
    at = physics.model.name2id(geom, "geom")
    return {physics.model.id2name(g, "geom") for g in pairs[(pairs == at).any(axis=1)].flat if g != at}


def find_task(name: str) -> type[TransferCube]:
    """The task of a name.

    Raises:
      UserError: no such task.
    """
    aloha_tasks.check(name)
    return TASKS[name]


class AlohaSim:
    """One simulated robot at 50 control steps per second; a context manager that frees the renderer.

    Args:
      task: a key of TASKS.
      image_size: height and width of the rendered picture, pixels.
      render: False leaves the pictures out of the observation and needs no OpenGL.

    A picture takes longer than a control step, so only `observe` makes one.

    Raises:
      UserError: unknown task, or no OpenGL while pictures are wanted.
    """

    def __init__(self, task: str = "transfer_cube", image_size: int = 224, render: bool = True):
        self._name, self._task = task, find_task(task)()
        self._expert: expert.Expert | None = None
        self._image_size = image_size
        self._render = render
        if render and gl.require() != _render.BACKEND:
            raise UserError(
                f"dm_control renders with {_render.BACKEND}, not {gl.require()}, because it was imported before "
                f"openpi_port.sim: set MUJOCO_GL={gl.require()} or import openpi_port.sim first"
            )
        path = constants.ASSETS_DIR / "bimanual_viperx_transfer_cube.xml"
        self._physics = mujoco.Physics.from_xml_path(str(path))
        # Read when the renderer is made, so they have to be set before the first picture.
        self._physics.model.vis.quality.shadowsize = 0
        self._physics.model.vis.quality.offsamples = 0
        self._env = control.Environment(self._physics, self._task, control_timestep=constants.DT)

    @property
    def instruction(self) -> str:
        """What a policy is told to do."""
        return self._task.instruction

    @property
    def cube(self) -> np.ndarray:
        """f64 [7] the cube's position (m) and quaternion (w, x, y, z) now; not in the observation."""
        return self._physics.data.qpos[16:23].copy()

    @property
    def state(self) -> np.ndarray:
        """f32 [14] joints (rad) and grippers (0..1) now."""
        return self._task.get_qpos(self._physics).astype(np.float32)

    @property
    def hold(self) -> np.ndarray:
        """[14] the joints where they are."""
        return self.state

    @property
    def fulfilled(self) -> str | None:
        """Which task's goal is reached now, whatever was asked for; no state is the goal of two."""
        touching, height = contacts(self._physics, "red_box"), self._physics.data.qpos[18]
        return next((name for name, task in TASKS.items() if task.reached(touching, height)), None)

    def reset(self, seed: int) -> None:
        """Starts an episode with the cube where gym-aloha puts it for a seed.

        Args:
          seed: of the cube's position, as in gym-aloha's reset.
        """
        self._task.cube_pose = sample_box_pose(seed)
        self._env.reset()

    def observe(self) -> dict[str, Any]:
        """What a policy gets to see now: {"images": {"top": uint8 [H,W,3]} (when rendering), "state": f32 [14]}."""
        images = {}
        if self._render:
            size = self._image_size
            images[CAMERA] = self._physics.render(height=size, width=size, camera_id=CAMERA)
        return {"images": images, "state": self.state}

    def picture(self, observation: Mapping[str, Any] | None) -> np.ndarray:
        """uint8 [H,W,3] for people, rendered unless an observation of now is given."""
        return (observation or self.observe())["images"][CAMERA]

    def step(self, action: np.ndarray) -> int:
        """Drives the joints towards targets for one control step (20 ms).

        Args:
          action: [14] joint targets (rad) and gripper commands (0..1), not clipped to the environment's box.

        Returns:
          The reward, 0..4; SUCCESS is 4.

        Raises:
          UserError: an action of another shape, or not finite (MuJoCo would diverge from it).
          Diverged: the physics gave up.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (len(JOINTS),) or not np.isfinite(action).all():
            raise UserError(f"the simulation takes {len(JOINTS)} finite joint targets, got {action!r}")
        try:
            return int(self._env.step(action).reward)
        except PhysicsError as error:
            raise Diverged from error

    def expert(self) -> Iterator[np.ndarray]:
        """The scripted expert's targets for the cube where it is now."""
        self._expert = self._expert or expert.Expert(self._name)
        yield from self._expert(self.cube).actions

    def close(self) -> None:
        """Frees the renderer; without it dm_control complains at the interpreter's exit."""
        self._physics.free()

    def __enter__(self) -> AlohaSim:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
