"""The checkpoint directory, which describes itself, and how it gets to disk whole or not at all.

RUN/STEP/policy.json         what the policy is: model, data and transform settings, tokenizer, framework, step
         norm_stats.json     statistics of state and actions, in openpi's format
         assets/NAME/norm_stats.json   of the other data sets of a mixture
         tokenizer.model     the SentencePiece model of the prompt
         fast_tokenizer/     of actions (pi0-FAST, knowledge insulation), as a Hugging Face processor
         params/             weights (orbax) in Flax
         model.safetensors   weights in torch (of several processes: model-00001-of-00002.safetensors ... and an index)
         train_state/        what else a resume needs: Adam's moments, raw weights beside averaged ones
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from openpi_port.base import Base
from openpi_port.config import Train
from openpi_port.errors import UserError
from openpi_port.fields import build, to_dict
from openpi_port.normalize import NormStats, load_norm_stats, save_norm_stats

FORMAT, PARTIAL = 1, 2  # the second needs its base
POLICY, NORM_STATS, TOKENIZER, TRAIN_STATE = "policy.json", "norm_stats.json", "tokenizer.model", "train_state"
FAST_TOKENIZER = "fast_tokenizer"
DONE, FAILED = "done", "failed"  # marks of the processes that write together


@dataclasses.dataclass(frozen=True)
class Policy:
    """What `policy.json` says.

    Attributes:
      train: the run, with model, data and transform settings.
      step: optimizer steps done.
      framework: "flax" or "torch", which wrote the weights.
      tokenizer_sha256: of the tokenizer that lies beside it.
      base: where the other weights are, of a checkpoint that holds only what was trained.
    """

    train: Train
    step: int
    framework: str
    tokenizer_sha256: str
    base: Base | None = None

    def to_json(self) -> dict[str, Any]:
        """Nested plain containers; `model` and `data` stand at the top, where other readers look."""
        train = to_dict(self.train)
        return {
            "format": FORMAT if self.base is None else PARTIAL,
            "framework": self.framework,
            "step": self.step,
            "model": train.pop("model"),
            "data": train.pop("data"),
            "tokenizer": {"spec": train.pop("tokenizer"), "sha256": self.tokenizer_sha256},
            "train": train,
            **({} if self.base is None else {"base": dataclasses.asdict(self.base)}),
        }


def read_policy(path: Path) -> Policy:
    """Reads `policy.json` of a checkpoint directory that a training run wrote.

    Raises:
      UserError: absent, not readable, of a newer format, or with fields that this version doesn't know.
    """
    file = path / POLICY
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if tree["format"] > PARTIAL:
            raise UserError(
                f"{file}: format {tree['format']} is newer than this version's {PARTIAL}; upgrade openpi_port"
            )
        tokenizer = tree["tokenizer"]
        train = {**tree["train"], "model": tree["model"], "data": tree["data"], "tokenizer": tokenizer["spec"]}
        base = Base(**tree["base"]) if "base" in tree else None
        return Policy(build(Train, train, "train"), tree["step"], tree["framework"], tokenizer["sha256"], base)
    except FileNotFoundError:
        raise UserError(f"{file}: not there; is {path} a checkpoint of this project?") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a policy description ({type(error).__name__}: {error})") from None


def steps(run: Path) -> list[int]:
    """The steps of which a run directory holds a finished checkpoint, ascending."""
    return sorted(int(p.name) for p in run.glob("[0-9]*") if p.name.isdigit() and (p / POLICY).exists())


def describe(directory: Path, policy: Policy, stats: Mapping[str, NormStats], tokenizer: bytes) -> None:
    """Writes what the weights are and how they are used; `policy.json`, which makes it a checkpoint, comes last.

    Args:
      directory: where the weights are.
      policy: what it is.
      stats: of every data set, "" for the deployed robot's.
      tokenizer: its file's content.
    """
    for name, group in stats.items():
        save_norm_stats(directory / norm_stats_file(name), group)
    (directory / TOKENIZER).write_bytes(tokenizer)
    (directory / POLICY).write_text(json.dumps(policy.to_json(), indent=1) + "\n", encoding="utf-8")


def norm_stats_file(name: str) -> Path:
    """Where in a checkpoint the statistics of a data set of the run lie: "" for the deployed robot's, else its name."""
    return Path("assets", name, NORM_STATS) if name else Path(NORM_STATS)


def read_norm_stats(path: Path, train: Train) -> dict[str, NormStats]:
    """Statistics of all data sets of the run that wrote a checkpoint, by name."""
    return {name: load_norm_stats(path / norm_stats_file(name)) for name in train.datasets}


class Saver:
    """Writes checkpoints of a run in the background, one at a time, and prunes old ones.

    A checkpoint is written beside its place and renamed when it is complete, so that a kill or a full disk leaves
    the ones before untouched and never half a one. Of several processes each writes its part into the same directory
    (on a file system that they share) and leaves a mark when it lies on the disk; the first does the rest.

    Args:
      run: the run's directory.
      keep_every: checkpoints at multiples of it stay; of the others only the latest does.
      process: this process's number, and how many there are.
    """

    def __init__(self, run: Path, keep_every: int, process: tuple[int, int] = (0, 1)) -> None:
        self._run, self._keep_every = run, keep_every
        self._index, self._count = process
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if self._index == 0:
            self._run.mkdir(parents=True, exist_ok=True)
            for left_over in self._run.glob(".*.tmp"):
                shutil.rmtree(left_over, ignore_errors=True)

    def save(
        self, step: int, fill: Callable[[Path], None], seal: Callable[[Path], None] = lambda directory: None
    ) -> None:
        """Starts writing; waits for the checkpoint before to be finished.

        Args:
          step: names the checkpoint.
          fill: writes this process's part into a directory; called in another thread.
          seal: writes what comes last, when all parts are there; called likewise, in the first process.

        Raises:
          UserError: the checkpoint before could not be written.
        """
        self.wait()
        self._thread = threading.Thread(target=self._save, args=(step, fill, seal), name=f"save-{step}")
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
          UserError: the checkpoint could not be written; what was there before still is.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is None:
            return
        if isinstance(error, OSError) or any(words in str(error) for words in ("No space left", "ENOSPC")):
            reason = "the disk is full" if getattr(error, "errno", errno.ENOSPC) == errno.ENOSPC else error
            have = ", ".join(map(str, steps(self._run))) or "none"
            raise UserError(
                f"{self._run}: the checkpoint could not be written ({reason}); finished ones: {have}"
            ) from error
        raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Finishes what is being written, unless other processes may be gone that would have to help."""
        if self._count == 1 or kind is None or issubclass(kind, UserError):
            self.wait()

    def _save(self, step: int, fill: Callable[[Path], None], seal: Callable[[Path], None]) -> None:
        part = self._run / f".{step}.tmp"
        try:
            if self._index == 0:
                part.mkdir()
            else:
                _until(part.exists)
            fill(part)
            _sync(part)
            if self._index:
                self._mark(part, self._index, DONE).touch()
                return
            self._collect(part)
            seal(part)
            _sync(part)
            part.rename(self._run / str(step))
            _sync(self._run)
            self._prune(step)
        except BaseException as error:  # handed over to the training thread by `wait`
            self._error = error
            if self._index == 0:
                shutil.rmtree(part, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    self._mark(part, self._index, FAILED).touch()

    def _collect(self, part: Path) -> None:
        """Waits for the others' marks and removes them."""
        for index in range(1, self._count):
            done, failed = self._mark(part, index, DONE), self._mark(part, index, FAILED)
            _until(lambda done=done, failed=failed: done.exists() or failed.exists())
            if failed.exists():
                raise UserError(f"{part}: process {index} could not write its part; it says why")
            done.unlink()

    def _mark(self, part: Path, index: int, word: str) -> Path:
        return part / f".{index}.{word}"

    def _prune(self, latest: int) -> None:
        for step in steps(self._run):
            if step != latest and step % self._keep_every:
                going = self._run / f".{step}.tmp"  # so that what a kill leaves of it doesn't look finished
                (self._run / str(step)).rename(going)
                shutil.rmtree(going)


def _until(condition: Callable[[], bool]) -> None:
    """Waits for other processes, as long as this one's training goes on."""
    while not condition():
        if not threading.main_thread().is_alive():
            raise UserError("the training ended before all processes had written their part of the checkpoint")
        time.sleep(0.1)


def _sync(directory: Path) -> None:
    """Asks the system to put a directory's files on the disk, so that a rename never outruns its content."""
    for path in [*directory.glob("**/*"), directory]:
        with contextlib.suppress(FileNotFoundError):  # another process's, under a name that was temporary
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def describe_difference(saved: Train, wanted: Train) -> str | None:
    """The first field in which a run cannot be continued because it would be another run; None if there is none."""
    free = {"num_steps", "out", "log_every", "save_every", "keep_every", "eval_every", "eval_batches", "init"}
    free |= {"backend", "microbatches", "mesh.data", "mesh.fsdp", "mesh.min_size"}
    free |= {f"compute.{field}" for field in ("remat", "attention", "compile", "gradients")}
    of_data = ("repo_id", "root", "cache_gb", "num_workers", "norm_stats")
    places = ("data", *(f"mixture.{name}" for name in wanted.mixture))
    free |= {f"{place}.{field}" for place in places for field in of_data}
    a, b = _flat(to_dict(saved)), _flat(to_dict(wanted))
    for key in {**a, **b}:
        if key not in free and a.get(key) != b.get(key):
            return f"config.{key} is {b.get(key)!r}, was {a.get(key)!r}"
    return None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out
