"""How checkpoints get to disk: whole or not at all, whatever happens to the disk or the process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from openpi_port import checkpoint
from openpi_port.errors import UserError


def finished(directory: Path) -> None:
    (directory / checkpoint.POLICY).write_text("{}")


def test_full_disk_keeps_what_was_there(tmp_path):
    saver = checkpoint.Saver(tmp_path, keep_every=100)
    saver.save(1, finished)
    saver.wait()

    def fill(directory: Path) -> None:
        (directory / "weights").symlink_to("/dev/full")  # the kernel's own ENOSPC
        with open(directory / "weights", "wb") as file:
            file.write(b"x" * 1_000_000)

    saver.save(2, fill)
    with pytest.raises(UserError, match="the disk is full.*finished ones: 1"):
        saver.wait()
    assert checkpoint.steps(tmp_path) == [1] and [p.name for p in tmp_path.iterdir()] == ["1"]


def test_a_disk_that_is_really_full(tmp_path):
    """Both writers on a file system of 2 MB, of which the first checkpoint takes half."""
    code = f"""
import pathlib, subprocess
import numpy as np
from openpi_port import checkpoint, orbax_io, safetensors_io
from openpi_port.errors import UserError
disk = pathlib.Path({str(tmp_path)!r})
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], check=True)
noise = np.random.default_rng(0).standard_normal(250_000, np.float32)
for write, name in ((orbax_io.write, "params"), (safetensors_io.write, "model.safetensors")):
    run = disk / name
    saver = checkpoint.Saver(run, keep_every=1)
    for step in (1, 2):
        def fill(directory):
            write(directory / name, {{f"gemma/{{i}}": noise * (i + 1) for i in range(step)}})
            (directory / checkpoint.POLICY).write_text("{{}}")
        saver.save(step, fill)
        try:
            saver.wait()
        except UserError as error:
            print(name, step, error)
    assert [p.name for p in run.iterdir()] == ["1"], list(run.iterdir())
    subprocess.run(["rm", "-r", run], check=True)
"""
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no file system can be made here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["params", "2"], ["model.safetensors", "2"]], done.stdout
    assert all("could not be written (the disk is full); finished ones: 1" in line for line in lines), done.stdout


def test_kill_while_saving_leaves_no_half_checkpoint(tmp_path):
    code = f"""
import os, pathlib
from openpi_port import checkpoint
saver = checkpoint.Saver(pathlib.Path({str(tmp_path)!r}), keep_every=100)
def fill(directory):
    (directory / "half").write_text("x")
    os.kill(os.getpid(), 9)
saver.save(7, fill)
saver.wait()
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert checkpoint.steps(tmp_path) == [] and [p.name for p in tmp_path.iterdir()] == [".7.tmp"]
    saver = checkpoint.Saver(tmp_path, keep_every=100)
    assert list(tmp_path.iterdir()) == []
    saver.save(7, finished)
    saver.wait()
    assert checkpoint.steps(tmp_path) == [7]


def test_old_checkpoints_are_pruned(tmp_path):
    saver = checkpoint.Saver(tmp_path, keep_every=4)
    for step in range(1, 7):
        saver.save(step, finished)
    saver.wait()
    assert checkpoint.steps(tmp_path) == [4, 6]


def test_killed_while_pruning_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    saver = checkpoint.Saver(tmp_path, keep_every=100)
    saver.save(1, finished)
    saver.wait()

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(f"{path} is only half gone")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        saver.save(2, finished)
        with pytest.raises(UserError, match="half gone"):
            saver.wait()
    assert checkpoint.steps(tmp_path) == [2]
