"""Which OpenGL MuJoCo renders with; dm_control settles that for good when imported, so this comes first.

MUJOCO_GL as the user set it is kept. Unset, egl and osmesa are tried in that order, each in a process of its
own because a failure inside this one can't be undone; dm_control alone takes glfw, which needs a display.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys

from openpi_port.errors import UserError

BACKENDS = ("egl", "osmesa")  # both headless; egl uses a GPU where there is one, osmesa runs anywhere
OFF = "off"
_OFF_NAMES = ("0", "off", "disable", "disabled", "false", "no", "n")  # those that dm_control knows
_INSTALL = "neither egl nor osmesa works here; `apt-get install libosmesa6` (renders on the CPU) or `libegl1` (GPU)"

# With mujoco alone, because dm_control takes another second to import. glfw without a display does not raise
# before the last step.
_PROBE = """
import mujoco
from mujoco.{0} import GLContext
context = GLContext(8, 8)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100)
print("made", flush=True)
"""


@functools.cache
def works(backend: str) -> bool:
    """Whether an OpenGL context can be made here.

    Args:
      backend: "egl", "osmesa" or "glfw", the modules that mujoco has for it.

    Returns:
      True where a context was made, in a process of its own.
    """
    env = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
    command = [sys.executable, "-c", _PROBE.format(backend)]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return False
    return "made" in done.stdout  # not the status: drivers may fail while they clean up at exit


@functools.cache
def choose() -> str:
    """Settles MUJOCO_GL for this process and its children.

    Returns:
      What the user had set (not tried), else "egl" or "osmesa", else "off": physics works without rendering.
    """
    given = os.environ.get("MUJOCO_GL", "").strip().lower()
    if given:
        return OFF if given in _OFF_NAMES else given
    os.environ["MUJOCO_GL"] = next((name for name in BACKENDS if works(name)), OFF)
    return os.environ["MUJOCO_GL"]


def require() -> str:
    """The backend that renders.

    Raises:
      UserError: nothing renders, or not with what MUJOCO_GL says; tells what to install or set.
    """
    backend = choose()
    if backend != OFF and works(backend):
        return backend
    better = next((name for name in BACKENDS if works(name)), None)
    remedy = f"set MUJOCO_GL={better}" if better else _INSTALL
    raise UserError(f"no OpenGL for the camera pictures (MUJOCO_GL={os.environ['MUJOCO_GL']}): {remedy}")
