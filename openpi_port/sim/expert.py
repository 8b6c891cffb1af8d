"""The scripted expert: way points computed from the cube's pose become clean joint targets.

    cube [x y z] -> a task's function (way points of both hands) -> end-effector simulation -> joints [T, 14]

The end-effector simulation is gym-aloha's, where each hand is welded to a free "mocap" frame and inverse
kinematics is left to the physics. What its joints did, with the commanded grippers, are the targets for the
ordinary simulation (aloha.py). A new task is one more function in PLANS.

Coordinates: world frame, metres; x from the left robot (-) to the right one (+), z up from the table. A
hand's position is the point between its finger pads. Quaternions are (w, x, y, z).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
from dm_control import mujoco
from gym_aloha import constants

from openpi_port.errors import UserError, near

OPEN, CLOSED = 1.0, 0.0
SPEED = 0.25  # m/s on average between way points; twice that at most, by the smooth start and stop
TURN = 1.2  # rad/s likewise
SETTLE = 25  # control steps
SUBSTEPS = round(constants.DT / 0.002)


@dataclasses.dataclass(frozen=True)
class Hand:
    """Where one hand should be."""

    position: tuple[float, float, float]
    quaternion: tuple[float, float, float, float]
    gripper: float  # 0 closed .. 1 open

    def at(self, x: float, y: float, z: float) -> Hand:
        """The same hand elsewhere."""
        return dataclasses.replace(self, position=(x, y, z))

    def moved(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Hand:
        """The same hand shifted."""
        return self.at(self.position[0] + x, self.position[1] + y, self.position[2] + z)

    def turned(self, axis: str, degrees: float) -> Hand:
        """The same hand with its orientation in the start pose turned about one axis of the world."""
        half = math.radians(degrees) / 2
        imaginary = {name: math.sin(half) if name == axis else 0.0 for name in "xyz"}
        return dataclasses.replace(self, quaternion=(math.cos(half), *imaginary.values()))

    def gripping(self, gripper: float) -> Hand:
        """The same hand with another gripper command."""
        return dataclasses.replace(self, gripper=gripper)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A way point of both hands, approached smoothly from the previous one."""

    left: Hand
    right: Hand
    least: int  # steps; longer where SPEED and TURN ask for it
    delicate: bool = False  # near a grasp: targets may not be disturbed much


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """What the expert would do: T control steps."""

    actions: np.ndarray  # f32 [T, 14] clean joint targets and gripper commands
    delicate: np.ndarray  # bool [T]


def pick(cube: np.ndarray, left: Hand, right: Hand) -> list[Stage]:
    """The right hand takes the cube off the table; every task in this scene begins like that.

    The hand comes from above, tilted, with its jaws parallel to the cube's sides, and closes on its centre.
    """
    x, y, z = (float(v) for v in cube[:3])
    above = right.turned("y", -60).gripping(OPEN).at(x, y, z + 0.08)
    down = above.at(x, y, z - 0.002)
    held = down.gripping(CLOSED)
    return [
        Stage(left, above, 40),
        Stage(left, down, 20, delicate=True),
        Stage(left, held, 20, delicate=True),
    ]


def transfer_cube(cube: np.ndarray, left: Hand, right: Hand) -> list[Stage]:
    """The right hand picks the cube up and gives it to the left one in the middle, which keeps it."""
    picked = pick(cube, left, right)
    held = picked[-1].right
    meet = held.at(0.0, 0.5, 0.25)
    # The left jaws close from above and below, so they miss the right ones, which hold the sides.
    waiting = left.turned("x", 90).gripping(OPEN).at(-0.10, 0.5, 0.25)
    around = waiting.at(0.0, 0.5, 0.25)
    taken = around.gripping(CLOSED)
    released = meet.gripping(OPEN)
    return [
        *picked,
        Stage(waiting, meet, 60),
        Stage(around, meet, 20, delicate=True),
        Stage(taken, meet, 20, delicate=True),
        Stage(taken, released, 15, delicate=True),
        Stage(taken.moved(x=-0.10), released.moved(x=0.10), 40),
    ]


def lift_cube(cube: np.ndarray, left: Hand, right: Hand) -> list[Stage]:
    """The right hand picks the cube up and holds it still above the table; the left hand does nothing."""
    picked = pick(cube, left, right)
    held = picked[-1].right
    return [*picked, Stage(left, held.at(0.1, 0.5, 0.2), 40)]


PLANS: dict[str, Callable[[np.ndarray, Hand, Hand], list[Stage]]] = {
    "transfer_cube": transfer_cube,
    "lift_cube": lift_cube,
}


def _steps(before: Stage, after: Stage) -> int:
    """How long a stage takes: the slower of distance and angle of either hand, at least `least`."""
    needed = float(after.least)
    for a, b in ((before.left, after.left), (before.right, after.right)):
        distance = math.dist(a.position, b.position)
        angle = 2 * math.acos(min(1.0, abs(float(np.dot(a.quaternion, b.quaternion)))))
        needed = max(needed, constants.FPS * distance / SPEED, constants.FPS * angle / TURN)
    return math.ceil(needed)


def _between(a: Hand, b: Hand, share: float) -> Hand:
    """A hand on its way: straight, with a smooth start and stop, turning about a fixed axis.

    The gripper's command changes at once: the fingers follow as fast as they can, as for an operator.
    """
    share = share * share * (3 - 2 * share)
    position = tuple(float(p + (q - p) * share) for p, q in zip(a.position, b.position, strict=True))
    qa, qb = np.array(a.quaternion), np.array(b.quaternion)
    cosine = float(qa @ qb)
    angle = math.acos(min(1.0, abs(cosine)))
    if angle > 1e-6:
        qb = qb if cosine > 0 else -qb
        qb = (math.sin((1 - share) * angle) * qa + math.sin(share * angle) * qb) / math.sin(angle)
    return Hand(position, tuple(float(v) for v in qb), b.gripper)


def _path(stages: list[Stage]) -> Iterator[tuple[Hand, Hand, bool]]:
    """Both hands at every control step after the first stage, which is where they are."""
    for before, after in zip(stages, stages[1:], strict=False):
        steps = _steps(before, after)
        for i in range(1, steps + 1):
            left, right = (_between(a, b, i / steps) for a, b in
                           ((before.left, after.left), (before.right, after.right)))  # fmt: skip
            yield left, right, after.delicate


class Expert:
    """Plans one task's demonstrations.

    Args:
      task: a key of PLANS.

    Raises:
      UserError: no plan of that name.
    """

    def __init__(self, task: str):
        if task not in PLANS:
            raise UserError(f"no scripted expert for task {task!r}; {near(task, PLANS)}")
        self._plan = PLANS[task]
        path = constants.ASSETS_DIR / "bimanual_viperx_end_effector_transfer_cube.xml"
        self._physics = mujoco.Physics.from_xml_path(str(path))
        # The model's joint friction (30 to 60 Nm) outweighs the weld that pulls the hands on MuJoCo 3. These
        # are the twelve arm joints, without the fingers.
        self._physics.model.dof_frictionloss[[*range(6), *range(8, 14)]] = 0.1

    def __call__(self, cube: np.ndarray, tail: int = 100) -> Demonstration:
        """Plans one demonstration.

        Args:
          cube: [7] the pose in which the cube is placed (m, quaternion); it may fall from there.
          tail: steps to go on at the last way point, so that labels reach past the end.

        Returns:
          The clean targets.
        """
        start = self._place(cube)
        rest = self._physics.data.qpos[16:23].copy()
        stages = [start, *self._plan(rest, start.left, start.right)]
        actions, delicate = [], []
        path = list(_path(stages))
        for left, right, careful in [*path, *[path[-1]] * tail]:
            self._drive(left, right)
            actions.append(self._targets(left, right))
            delicate.append(careful)
        return Demonstration(np.array(actions, np.float32), np.array(delicate))

    def _place(self, cube: np.ndarray) -> Stage:
        """Puts the arms at the start and lets them sag and the cube fall, which takes a moment."""
        with self._physics.reset_context():
            self._physics.data.qpos[:16] = constants.START_ARM_POSE
            self._physics.data.qpos[16:23] = cube
        start = Stage(*self._hands(), least=0)
        for _ in range(SETTLE):
            self._drive(start.left, start.right)
        return start

    def _hands(self) -> tuple[Hand, Hand]:
        """The hands where the joints have them: the mocap frames that leave both welds without tension."""
        hands = []
        for side, name in enumerate(("left", "right")):
            # A weld keeps link = mocap * (offset, turn); solve for mocap.
            offset, turn = np.split(self._physics.model.eq_data[side, 3:10], [3])
            data, link = self._physics.named.data, f"vx300s_{name}/gripper_link"
            rotation = _product(data.xquat[link], turn * (1, -1, -1, -1))
            position = data.xpos[link] - _rotate(rotation, offset)
            hands.append(Hand(tuple(map(float, position)), tuple(map(float, rotation)), CLOSED))
        return hands[0], hands[1]

    def _drive(self, left: Hand, right: Hand) -> None:
        """One control step with the hands pulled to where they should be."""
        data = self._physics.data
        for side, hand in enumerate((left, right)):
            data.mocap_pos[side] = hand.position
            data.mocap_quat[side] = hand.quaternion
            finger = constants.unnormalize_puppet_gripper_position(hand.gripper)
            data.ctrl[2 * side : 2 * side + 2] = finger, -finger
        self._physics.step(SUBSTEPS)

    def _targets(self, left: Hand, right: Hand) -> np.ndarray:
        qpos = self._physics.data.qpos
        return np.concatenate([qpos[:6], [left.gripper], qpos[8:14], [right.gripper]])


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Quaternion a * b."""
    vector = a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])
    return np.concatenate([[a[0] * b[0] - a[1:] @ b[1:]], vector])


def _rotate(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Vector v turned by quaternion q."""
    return _product(_product(q, np.concatenate([[0.0], v])), q * (1, -1, -1, -1))[1:]
