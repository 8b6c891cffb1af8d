"""The machine that this process is on: how much memory there is for it, and where the user's caches are."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")
PROCESS = Path("/proc/self/cgroup")


def cache() -> Path:
    """The user's cache directory: $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def memory() -> int:
    """Bytes that this process may use: the machine's, or what its container or its job is given (Linux's cgroups)."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_limits()])


def _limits() -> list[int]:
    """Those of the process's groups and of all that these are in; in a container its own is seen as the outermost."""
    found = []
    for line in PROCESS.read_text().splitlines() if PROCESS.exists() else []:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root, name = (CGROUPS / "memory", "memory.limit_in_bytes") if kinds else (CGROUPS, "memory.max")
        group = PurePosixPath(path.lstrip("/"))
        for file in (root / part / name for part in (group, *group.parents)):
            try:
                words = file.read_text().strip()
            except OSError:  # not seen from here
                continue
            if words.isdigit():  # else "max"
                found.append(int(words))
    return found
