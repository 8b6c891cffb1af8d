"""Programs of the project as a user starts them, each in a process of its own, without importing the frameworks anew.

Importing JAX, torch and grain takes longer than most of what a test asks of a program. So a helper process imports them
once, and forks for every program; what the project itself does on import is done in the fork.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds until a program that hangs is killed


def run(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS` in the project's directory, with these variables beside the present ones."""
    with tempfile.TemporaryDirectory() as directory:
        out, err = Path(directory, "out"), Path(directory, "err")
        request = {"argv": [module, *arguments], "env": {**os.environ, **environment}, "files": [str(out), str(err)]}
        helper = _helper()
        helper.stdin.write(json.dumps(request) + "\n")
        helper.stdin.flush()
        code = int(helper.stdout.readline())
        return subprocess.CompletedProcess(request["argv"], code, out.read_text(), err.read_text())


@functools.cache
def _helper() -> subprocess.Popen[str]:
    helper = subprocess.Popen(
        [sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(helper.communicate)  # which closes its input, and so ends it
    return helper


def _serve() -> str | None:
    """Forks for every request; returns the module to run in a fork, and None at the end."""
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            return _become(**request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def _become(argv: list[str], env: dict[str, str], files: list[str]) -> str:
    """Makes of a fork what `python -m` would have made."""
    signal.alarm(PATIENCE)
    os.environ.clear()
    os.environ.update(env)
    for descriptor, (path, how) in enumerate(zip(["/dev/null", *files], "rww", strict=True)):
        with open(path, how) as file:
            os.dup2(file.fileno(), descriptor)
    sys.argv, sys.path[0] = argv, str(ROOT)
    return argv[0]


if __name__ == "__main__":
    for name in ("av", "flax.nnx", "grain.experimental", "optax", "orbax.checkpoint", "pyarrow.parquet", "torch"):
        importlib.import_module(name)
    gc.freeze()  # or every fork would copy all of it to collect its garbage
    if module := _serve():
        runpy.run_module(module, run_name="__main__", alter_sys=True)
