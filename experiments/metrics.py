"""Numbers of a run, to `metrics.jsonl` and tensorboard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from openpi_port import whole


class Metrics:
    """Appends to the files of a run; a resumed run drops what was logged after the step it goes on from.

    Args:
      run: the run's directory; None in a process that leaves the writing to another.
      start_step: the step that the run goes on from.
    """

    def __init__(self, run: Path | None, start_step: int) -> None:
        self._file = self._board = None
        if run is None:
            return
        from tensorboardX import SummaryWriter  # takes 2 s, which a mistyped flag need not wait for

        run.mkdir(parents=True, exist_ok=True)
        path = run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start_step]
        whole.write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, **values: float) -> None:
        """Logs numbers under their names."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()
