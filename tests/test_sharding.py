"""A run over several devices and processes is the run on one: the rules, the curves, the state."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from spread import config, train

from openpi_port import meshes
from openpi_port.config import Mesh
from openpi_port.errors import UserError

QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def test_rule():
    axis = meshes.axis
    assert axis((18, 2048, 16384), 8, 2**18) == 2
    assert axis((18, 2049, 9), 9, 2**18) == 0 and axis((257152, 2048), 8, 2**18) == 0
    assert axis((18, 2048), 8, 2**18) is None and axis((513, 1025), 2, 2**18) is None
    assert axis((18, 2048, 16384), 1, 2**18) is None


def test_shape_of_the_mesh():
    assert meshes.shape(Mesh(), 8, 1, 32) == (8, 1)
    assert meshes.shape(Mesh(fsdp=4), 8, 2, 32) == (2, 4)
    assert meshes.shape(Mesh(data=1, fsdp=2), 8, 1, 2) == (1, 2)  # some of the devices of one process
    with pytest.raises(UserError, match=r"data=1 times fsdp=2 is 2 devices, this run has 8 in 2 processes"):
        meshes.shape(Mesh(data=1, fsdp=2), 8, 2, 32)
    with pytest.raises(UserError, match=r"is 16 devices, this run has 8"):
        meshes.shape(Mesh(data=2, fsdp=8), 8, 1, 32)
    with pytest.raises(UserError, match=r"config.batch_size=12 is no multiple of the 8 devices"):
        meshes.shape(Mesh(), 8, 1, 12)
    with pytest.raises(UserError, match=r"fsdp=0"):
        Mesh(fsdp=0)


def test_writers_share_the_bytes():
    owners = meshes.owners({"a": 5, "b": 4, "c": 3, "d": 3, "e": 1}, 2)
    assert owners == {"a": 0, "b": 1, "c": 1, "d": 0, "e": 1}
    assert set(meshes.owners({"a": 5, "b": 4}, 1).values()) == {0}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", **variables}


def two_processes(backend: str, directory: Path, meshes_: list[str], devices: int = 1) -> None:
    """Runs `spread.py` in two processes; each says what went wrong, if it did."""
    command = [str(ROOT / "tests" / "spread.py"), backend, str(directory), *meshes_]
    if backend == "torch":
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
        commands = [([sys.executable, *launcher, *command], environment())]
    else:
        flags = f"{QUICK_COMPILE} --xla_force_host_platform_device_count={devices}"
        join = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": flags}
        commands = [([sys.executable, *command], environment(**join, JAX_PROCESS_ID=str(i))) for i in range(2)]
    started = [
        subprocess.Popen(c, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c, env in commands
    ]
    for process in started:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


# 2 JAX processes with 4 devices each, of which each holds a quarter of the state; 2 torch processes.
@pytest.mark.parametrize(
    ("backend", "wanted"), [("flax", ["data=2,fsdp=4"]), ("torch", ["data=2,fsdp=1", "data=1,fsdp=2"])]
)
def test_the_curve_of_one_device(tmp_path, backend, wanted):
    losses, trainer = train(backend, Mesh(data=1))
    state = trainer.weights() | trainer.train_state()
    two_processes(backend, tmp_path, wanted, devices=4)
    for i in range(len(wanted)):
        for process in range(2):
            curve = json.loads((tmp_path / f"{i}.{process}.json").read_text())
            np.testing.assert_allclose(curve, losses, rtol=2e-5, atol=1e-4)
        parts = [dict(np.load(tmp_path / f"{i}.{process}.npz")) for process in range(2)]
        sizes = [sum(array.nbytes for array in part.values()) for part in parts]
        assert not parts[0].keys() & parts[1].keys() and 0.6 < sizes[0] / sizes[1] < 1.6
        whole = {name.replace("|", "/"): array for name, array in (parts[0] | parts[1]).items()}
        assert whole.keys() == state.keys()
        for name, array in whole.items():
            # The moments agree; in the weights Adam makes a whole step of what is rounding in a gradient.
            atol = 1e-5 if name.startswith(("mu/", "nu/")) else 1e-3
            np.testing.assert_allclose(array, state[name], atol=atol, rtol=0, err_msg=name)


def test_no_more_devices_than_there_are():
    with pytest.raises(UserError, match=r"config.mesh: data=3 times fsdp=1 is 3 devices"):
        train("torch", Mesh(data=3))
    assert config(Mesh()).mesh.data == -1
