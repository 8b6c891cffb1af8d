"""How much memory there is for this process, in a container or a job too."""

from __future__ import annotations

import os

import pytest
from frameworks import NAMES

from openpi_port import host
from openpi_port.backends import Backend

GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Writes what Linux would show: where the process is, and limits by file."""
    monkeypatch.setattr(host, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(host, "PROCESS", tmp_path / "self")
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * GIB // 4096}.get)

    def write(process: str, **limits: str) -> None:
        (tmp_path / "self").write_text(process)
        for place, words in limits.items():
            file = tmp_path / "cgroup" / place.replace("__", "/").replace("memory_max", "memory.max")
            file = file.with_name(file.name.replace("_limit", ".limit_in_bytes"))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{words}\n")

    return write


def test_a_machine_without_limits(groups):
    assert host.memory() == 64 * GIB  # no cgroups at all
    groups("0::/user.slice/session-1.scope\n", user__memory_max="max", memory_max="max")
    assert host.memory() == 64 * GIB


def test_a_container_is_smaller_than_its_machine(groups):
    groups("0::/\n", memory_max=str(8 * GIB))
    assert host.memory() == 8 * GIB


def test_a_job_within_a_job(groups):
    """The smallest of all that the process is in counts; what belongs to others doesn't."""
    groups(
        "0::/slurm/job_1/step_0\n",
        slurm__job_1__step_0__memory_max="max",
        slurm__job_1__memory_max=str(16 * GIB),
        slurm__job_2__memory_max=str(1 * GIB),
        slurm__memory_max=str(32 * GIB),
    )
    assert host.memory() == 16 * GIB


def test_the_older_files(groups):
    """One hierarchy for each kind; without a limit there is a number beyond all memory."""
    groups("4:cpuset,memory:/docker/7\n3:cpu:/docker/7\n0::/\n", memory__docker__7__memory_limit=str(4 * GIB))
    assert host.memory() == 4 * GIB
    groups("4:memory:/docker/7\n", memory__docker__7__memory_limit=str(2**63 - 4096))
    assert host.memory() == 64 * GIB


@pytest.mark.parametrize("name", NAMES)
def test_of_a_cpu(groups, name):
    groups("0::/\n", memory_max=str(8 * GIB))
    device = Backend(name).device
    assert device.describe(device.find("cpu"))[1] == 8 * GIB
