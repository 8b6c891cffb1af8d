"""Which OpenGL MuJoCo renders with. dm_control settles that for good when it is first imported, so this comes before.

MUJOCO_GL as the user set it is kept. Unset, egl and osmesa are tried in that order, each in a process of its own
because a failure inside this one can't be undone; dm_control alone would take glfw, which needs a display.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys

from openpi_port.errors import UserError

BACKENDS = ("egl", "osmesa")  # egl uses a GPU where there is one; osmesa is slower and runs anywhere
OFF = "off"

# In one line of mujoco alone: dm_control takes another second to import.
_PROBE = "from mujoco.{0} import GLContext; GLContext(8, 8).make_current(); print('made', flush=True)"


@functools.cache
def works(backend: str) -> bool:
    """Whether a headless OpenGL context can be made here.

    Args:
      backend: "egl" or "osmesa".

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
    """Settles MUJOCO_GL for this process and its children; call it before dm_control is imported.

    Returns:
      "egl", "osmesa", whatever the user had set, or "off" where nothing renders (physics works all the same).
    """
    given = os.environ.get("MUJOCO_GL", "").strip().lower()
    if given in BACKENDS:
        return given if works(given) else OFF
    if given:
        return OFF if given in ("0", "off", "disable", "disabled", "false", "no", "n") else given
    backend = next((name for name in BACKENDS if works(name)), OFF)
    os.environ["MUJOCO_GL"] = backend
    return backend


def require() -> str:
    """The backend that renders.

    Raises:
      UserError: nothing renders here; says what to install or set.
    """
    given = os.environ.get("MUJOCO_GL", "")
    backend = choose()
    if backend != OFF:
        return backend
    remedy = "`apt-get install libosmesa6` (renders on the CPU) or `apt-get install libegl1` (GPU)"
    if given and given != OFF:
        raise UserError(f"MUJOCO_GL={given} does not render here: unset it to have egl and osmesa tried, or {remedy}")
    raise UserError(f"no OpenGL for the camera pictures (neither MUJOCO_GL=egl nor MUJOCO_GL=osmesa works): {remedy}")
