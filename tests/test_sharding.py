"""A run over several devices and processes is the run on one: the rules, the curves, the state."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jobs
import numpy as np
import pytest
from conftest import QUICK_COMPILE, ROOT
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jobs import logged, run
from spread import config, train

from configs import pi0_aloha
from openpi_port import checkpoint, meshes
from openpi_port.backends import NAMES, Backend
from openpi_port.config import Mesh
from openpi_port.errors import UserError
from openpi_port.pi_flax.train import _once


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
    """Runs `spread.py` in two processes; each says what went wrong, if it did.

    On a busy machine one compiles so much longer than the other that gloo gives up; then both find in the cache what
    they need and try again.
    """
    outputs, late = _try_two(backend, directory, meshes_, devices)
    if late:
        outputs, late = _try_two(backend, directory, meshes_, devices)
    assert not outputs, outputs


def _try_two(backend: str, directory: Path, meshes_: list[str], devices: int) -> tuple[str, bool]:
    """What they printed, if they failed, and whether that was for waiting too long."""
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
    outputs = [process.communicate(timeout=300)[0] for process in started]
    if not any(process.returncode for process in started):
        return "", False
    return "\n".join(outputs), re.search(r"time(d )?out|deadline", "\n".join(outputs), re.IGNORECASE) is not None


# 2 JAX processes with 4 devices each, of which four share the state, or each has a copy; 2 torch processes.
@pytest.mark.parametrize(
    ("backend", "wanted"),
    [
        ("flax", ["data=2,fsdp=4", "data=8,fsdp=1"]),
        ("torch", ["data=2,fsdp=1,microbatches=2", "data=1,fsdp=2,microbatches=2"]),
    ],
)
def test_the_curve_of_one_device(tmp_path, backend, wanted):
    losses, trainer = train(backend, Mesh(data=1))
    state = trainer.weights() | trainer.train_state()
    adapters = ["data=1,fsdp=2,adapters=1"] if backend == "torch" else []
    two_processes(backend, tmp_path, [*wanted, *adapters], devices=4)
    if backend == "torch":  # else NCCL warns
        assert [(tmp_path / f"left.{i}").read_text() for i in range(2)] == ["True", "True"]
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
    if adapters:  # frozen weights in bfloat16 are split beside float32 ones; here that rounds differently
        alone, _ = train(backend, Mesh(data=1), adapters=True)
        curve = json.loads((tmp_path / f"{len(wanted)}.0.json").read_text())
        np.testing.assert_allclose(curve, alone, rtol=0.01)


def test_what_belongs_to_a_row_is_added_up_by_one_device():
    """Flax: for a GPU does it in any order, and copies of the weights would drift apart; torch's is in test_adamw."""
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    whole = NamedSharding(mesh, PartitionSpec())
    rng = np.random.default_rng(0)
    where, rows = rng.integers(0, 5, 40).astype(np.int32), rng.standard_normal((40, 6)).astype(np.float32)
    once = lambda where, rows: _once(where, rows, 70, whole)  # noqa: E731
    numbers, sums = (np.asarray(x) for x in jax.jit(once)(where, rows))
    np.testing.assert_array_equal(numbers, [0, 1, 2, 3, 4, *[70] * 35])
    for row in range(5):
        np.testing.assert_allclose(sums[row], rows[where == row].sum(0), atol=1e-5)
    steps = jax.make_jaxpr(once)(where, rows).eqns
    spec = [step.params["sharding"].spec for step in steps if step.primitive.name == "sharding_constraint"]
    assert spec == [PartitionSpec(None, ("data", "fsdp"))] * 2 + [PartitionSpec()]


def test_no_more_devices_than_there_are():
    with pytest.raises(UserError, match=r"config.mesh: data=3 times fsdp=1 is 3 devices"):
        train("torch", Mesh(data=3))
    assert config(Mesh()).mesh.data == -1


@pytest.mark.usefixtures("own_caches")
def test_killed_in_a_step_torchrun_goes_on_and_one_process_takes_over(tmp_path):
    """Step 1 in one process, 2 to 4 in two (killed once in step 3), 5 in one: the curve of one that went through."""
    straight = run(jobs.debug(pi0_aloha, tmp_path / "a", backend="torch", num_steps=5))
    run(jobs.debug(pi0_aloha, tmp_path / "b", backend="torch", num_steps=1))
    flags = ["--config=pi0_aloha:debug", "--config.backend=torch", "--config.batch_size=2", "--config.num_steps=4"]
    flags += ["--config.optimizer.peak_lr=3e-4", "--config.log_every=1", "--config.save_every=1"]
    flags += ["--config.eval_every=100", "--config.eval_batches=1", f"--config.out={tmp_path / 'b'}"]
    flags += ["--config.mesh.fsdp=2", "--config.mesh.min_size=1024", "--resume"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    command = [sys.executable, *launcher, f"--master-port={free_port()}", str(ROOT / "tests" / "spread_cli.py")]
    done = subprocess.run([*command, *flags], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "failed (exitcode: " in done.stderr and "Traceback" not in done.stderr
    moved = run(jobs.debug(pi0_aloha, tmp_path / "b", backend="torch", num_steps=5), resume=True)
    np.testing.assert_allclose(logged(moved), logged(straight), rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", NAMES)
def test_parts_written_by_two_processes_are_one_checkpoint(tmp_path, backend):
    weights = Backend(backend).weights
    arrays = {f"gemma/{i}/kernel": np.full((i + 1, 3), i, np.float32) for i in range(5)}
    arrays["gemma/scale"] = np.float32([1, 2]).astype("bfloat16")
    owners = meshes.owners({name: array.nbytes for name, array in arrays.items()}, 2)
    savers = [checkpoint.Saver(tmp_path, 10, (i, 2)) for i in range(2)]

    def fill(index: int, directory: Path) -> None:
        mine = {name: array for name, array in arrays.items() if owners[name] == index}
        weights.write_params(directory / weights.PARAMS, mine, (index, 2))

    def seal(directory: Path) -> None:
        weights.seal_params(directory / weights.PARAMS, 2)
        (directory / checkpoint.POLICY).write_text("{}")

    for index in (1, 0):
        savers[index].save(3, partial(fill, index), seal)
    for saver in savers:
        saver.wait()
    assert checkpoint.steps(tmp_path) == [3] and not list((tmp_path / "3").glob(".*"))
    read = weights.read_params(tmp_path / "3" / weights.PARAMS)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.asarray(read[name]).tobytes() == array.tobytes() and read[name].dtype == array.dtype
    if backend == "flax":
        import orbax.checkpoint as ocp

        tree = ocp.PyTreeCheckpointer().restore(tmp_path / "3" / "params")
        np.testing.assert_array_equal(tree["gemma"]["4"]["kernel"], arrays["gemma/4/kernel"])


def test_a_part_that_fails_leaves_no_checkpoint(tmp_path):
    savers = [checkpoint.Saver(tmp_path, 10, (i, 2)) for i in range(2)]

    def fill(index: int, directory: Path) -> None:
        if index == 1:
            with open("/dev/full", "wb", buffering=0) as file:
                file.write(b"x")

    for index in (0, 1):
        savers[index].save(3, partial(fill, index))
    with pytest.raises(UserError, match="the disk is full"):
        savers[1].wait()
    with pytest.raises(UserError, match="process 1 could not write its part"):
        savers[0].wait()
    assert list(tmp_path.iterdir()) == []
