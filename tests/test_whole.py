"""Directories that are written whole or not at all."""

from __future__ import annotations

import os

import pytest

from openpi_port import whole
from openpi_port.errors import UserError


def test_a_directory_is_there_whole_or_not_at_all(tmp_path):
    killed, running, foreign = (tmp_path / f".out.partial-{end}" for end in (2**22 + 1, os.getpid(), "x1"))
    for path in (killed, foreign):
        path.mkdir()
    with pytest.raises(OSError, match="full"), whole.directory(tmp_path / "out") as part:
        (part / "file").touch()
        raise OSError("full")
    assert list(tmp_path.iterdir()) == [foreign]
    with whole.directory(tmp_path / "out") as part:
        assert part == running
        (part / "file").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"out", foreign.name}
    with pytest.raises(UserError, match="exists already"), whole.directory(tmp_path / "other"):
        (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="exists already"), whole.directory(tmp_path / "out"):
        pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
