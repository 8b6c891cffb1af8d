"""What is written whole or not at all, and what a program says of a full disk and of other mistakes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from openpi_port import whole
from openpi_port.errors import UserError, guarded


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


def test_a_file_stays_as_it_was_where_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "new" / "page.html"
    whole.write_text(path, "first")

    def full(self, text, encoding):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        whole.write_text(path, "second")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("x.json: no"), 2, "error: x.json: no\n"),
        (OSError(errno.ENOSPC, "No space left"), 2, "error: the disk is full; make room, or write elsewhere\n"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, "error: a/b: Permission denied\n"),
        (KeyboardInterrupt(), 130, "error: nothing was written\n"),
        (None, 0, ""),
    ],
)
def test_what_a_program_says(capsys, error, status, words):
    def program():
        if error is not None:
            raise error

    assert guarded(program, "nothing was written") == status
    assert capsys.readouterr().err == words


def test_other_errors_keep_their_traceback():
    def program():
        raise OSError(errno.EPIPE, "broken")

    with pytest.raises(OSError, match="broken"):
        guarded(program)


def test_free(tmp_path):
    for name in ("run_4.0", "run_4.0_2", "run_4.0_3"):
        assert whole.free(tmp_path / "run_4.0") == tmp_path / name
        (tmp_path / name).mkdir()
