"""Batches are a pure function of seed and step: for any number of workers and processes, and after a resume."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openpi_port.augment import augment
from openpi_port.data.loader import Part, _Ahead, eval_batches, train_batches
from openpi_port.errors import UserError
from openpi_port.rng import draw_noise, draw_time, generator

ROOT = Path(__file__).resolve().parent.parent
ROWS, ACTIONS, DIM = 11, 3, 4


@dataclasses.dataclass(frozen=True)
class Rows:
    """A data set whose sample says which row it is; `bad` raises, `slow` takes its time (s)."""

    count: int = ROWS
    bad: int = -1
    slow: float = 0.0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> dict[str, Any]:
        time.sleep(self.slow)
        if row == self.bad:
            raise UserError(f"data/video.mp4: row {row} is damaged")
        return {
            "image": {"base_0_rgb": image(row), "left_wrist_0_rgb": np.zeros((16, 16, 3), np.uint8)},
            "image_mask": {"base_0_rgb": np.bool_(True), "left_wrist_0_rgb": np.bool_(False)},
            "state": np.full(DIM, row, np.float32),
            "actions": np.full((ACTIONS, DIM), row, np.float32),
            "pid": np.int64(os.getpid()),
        }


@dataclasses.dataclass(frozen=True)
class Twice:
    """A step."""

    def forward(self, sample: dict[str, Any]) -> dict[str, Any]:
        return {**sample, "twice": 2 * sample["actions"][0, 0]}


def image(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, (16, 16, 3), np.uint8)


def batches(count: int, dataset: Any = None, **changes: Any) -> list[dict[str, Any]]:
    part = {key: changes.pop(key) for key in ("augment", "state_noise") if key in changes}
    arguments = {"batch_size": 4, "seed": 3, "action_dim": DIM, "action_horizon": ACTIONS} | changes
    loader = train_batches([Part(dataset or Rows(), (Twice(),), **part)], **arguments)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def assert_equal(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for key in one:
        if isinstance(one[key], dict):
            assert_equal(one[key], other[key])
        elif key != "pid":
            assert one[key].dtype == other[key].dtype
            np.testing.assert_array_equal(one[key], other[key])


@pytest.fixture(scope="module")
def first_eight() -> list[dict[str, Any]]:
    return batches(8)


def test_every_leaf_is_what_seed_and_index_say(first_eight):
    rows = []
    for step, batch in enumerate(first_eight):
        for place in range(4):
            index = 4 * step + place
            row = int(batch["actions"][place, 0, 0])
            rows.append(row)
            np.testing.assert_array_equal(batch["noise"][place], draw_noise(3, index, (ACTIONS, DIM)))
            assert batch["time"][place] == draw_time(3, index)
            assert batch["twice"][place] == 2 * row
            expected = augment({"base_0_rgb": image(row)}, "default", generator(3, index, "augment"))
            np.testing.assert_array_equal(batch["image"]["base_0_rgb"][place], expected["base_0_rgb"])
            assert not batch["image"]["left_wrist_0_rgb"].any(), "what the robot lacks stays black"
    for epoch in range(2):
        assert sorted(rows[epoch * ROWS : (epoch + 1) * ROWS]) == list(range(ROWS)), "each row once an epoch"
    assert rows[:ROWS] != rows[ROWS : 2 * ROWS] and rows[:ROWS] != list(range(ROWS))
    assert first_eight[0]["time"].dtype == np.float32 and first_eight[0]["noise"].dtype == np.float32
    assert type(first_eight[0]["noise"]) is np.ndarray


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(first_eight, num_workers):
    got = batches(7, num_workers=num_workers, start_step=1)
    for one, other in zip(first_eight[1:], got, strict=True):
        assert_equal(one, other)
    pids = {int(p) for batch in got for p in batch["pid"]}
    assert len(pids) == num_workers and os.getpid() not in pids
    assert type(got[0]["noise"]) is np.ndarray


def test_resume_goes_on_exactly(first_eight):
    for start in (1, 5):
        for one, other in zip(first_eight[start:], batches(8 - start, start_step=start), strict=True):
            assert_equal(one, other)


def test_far_into_a_run_costs_no_more_than_its_start():
    start = time.perf_counter()
    batches(1, start_step=10**9)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("count", [2, 4])
def test_shards_of_processes_make_the_global_batch(first_eight, count):
    shards = [batches(8, process_index=i, process_count=count) for i in range(count)]
    for step, whole in enumerate(first_eight):
        for key in ("actions", "noise", "time"):
            np.testing.assert_array_equal(np.concatenate([s[step][key] for s in shards]), whole[key])
    late = batches(1, process_index=1, process_count=count, start_step=6)[0]
    assert_equal(late, shards[1][6])


def test_seeds_and_kinds_differ(first_eight):
    other = batches(1, seed=4)[0]
    assert not np.array_equal(other["noise"], first_eight[0]["noise"])
    plain = batches(1, augment="none")[0]
    np.testing.assert_array_equal(plain["noise"], first_eight[0]["noise"])
    for place in range(4):
        row = int(plain["actions"][place, 0, 0])
        np.testing.assert_array_equal(plain["image"]["base_0_rgb"][place], image(row))


def test_batch_must_divide_among_processes():
    with pytest.raises(UserError, match=r"batch_size=4 must be a positive multiple of the 3"):
        batches(1, process_count=3)


def test_validation_is_always_the_same():
    def read(**changes: Any) -> list[dict[str, Any]]:
        arguments = {"batch_size": 4, "seed": 0, "action_dim": DIM, "action_horizon": ACTIONS, "num_batches": 5}
        return list(eval_batches(Part(Rows(), ()), **(arguments | changes)))

    one, other = read(), read()
    assert len(one) == 2, "eleven rows have two batches of four"
    for a, b in zip(one, other, strict=True):
        assert_equal(a, b)
    rows = np.concatenate([b["actions"][:, 0, 0] for b in one])
    assert len(set(rows)) == 8 and (np.diff(rows) > 0).all() and rows.max() >= 9, "spread over the data set"
    np.testing.assert_array_equal(one[0]["image"]["base_0_rgb"][0], image(0))
    assert len(read(batch_size=32)) == 1 and len(read(num_batches=1)) == 1
    halves = [read(process_index=i, process_count=2) for i in range(2)]
    for step, whole in enumerate(one):
        np.testing.assert_array_equal(np.concatenate([h[step]["noise"] for h in halves]), whole["noise"])


# Faults


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_data_is_the_same_line_from_a_worker(num_workers):
    with pytest.raises(UserError) as error:
        batches(4, Rows(bad=5), num_workers=num_workers)
    assert str(error.value) == "data/video.mp4: row 5 is damaged"


def test_a_killed_worker_is_reported():
    loader = train_batches(
        [Part(Rows(slow=0.005), ())], batch_size=4, seed=0, action_dim=DIM, action_horizon=ACTIONS, num_workers=1
    )
    os.kill(int(next(loader)["pid"][0]), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"a data worker died \(killed, most likely because memory ran out\)"):
        for _ in range(1000):
            next(loader)
    assert time.monotonic() - start < 20
    loader.close()


SCRIPT = """
    import os, signal, sys, time
    sys.path.insert(0, {tests!r})
    from openpi_port.data.loader import Part, train_batches
    from test_loader import Rows

    def main():
        parts = [Part(Rows(slow=0.01), ())]
        loader = train_batches(parts, batch_size=2, seed=0, action_dim=1, action_horizon=1, num_workers=1)
        pids = {{int(next(loader)["pid"][0]) for _ in range(4)}}
        print(*pids, flush=True)
        {end}

    if __name__ == "__main__":
        main()
"""


def run(tmp_path: Path, end: str) -> tuple[subprocess.Popen, list[int]]:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(tests=str(ROOT / "tests"), end=end))
    process = subprocess.Popen(
        [sys.executable, str(script)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    return process, [int(pid) for pid in process.stdout.readline().split()]


def assert_gone(pids: list[int]) -> None:
    assert len(pids) == 1
    deadline = time.monotonic() + 15
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"workers {alive} are still there"
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes under /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, number):
    process, pids = run(tmp_path, "time.sleep(60)")
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C reaches all processes of the terminal
    else:
        process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode != 0
    assert_gone(pids)
    if number == signal.SIGINT:
        assert stderr.count("Traceback") == 1, f"only the parent speaks:\n{stderr}"


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes under /proc")
def test_a_program_that_forgets_to_close_ends_quietly(tmp_path):
    process, pids = run(tmp_path, "global kept; kept = loader")
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0 and stderr == ""
    assert_gone(pids)


def test_closed_in_its_own_thread():
    """As by a collection of garbage, which may happen in any thread: it can't wait for itself."""
    ready, ended = threading.Event(), threading.Event()

    def samples() -> Iterator[dict[str, Any]]:
        ready.wait(10)
        ahead.close()
        try:
            yield {"x": np.zeros(1)}
        finally:
            ended.set()

    ahead = _Ahead(samples())
    ready.set()
    assert ended.wait(3)
    with pytest.raises(StopIteration):
        ahead.take()


def test_draws_come_with_every_sample():
    batch = batches(1, draws=3)[0]
    assert batch["noise"].shape == (4, 3, ACTIONS, DIM) and batch["time"].shape == (4, 3)
    np.testing.assert_array_equal(batch["time"][1], draw_time(3, 1, (3,)))
    assert len(np.unique(batch["time"])) == 12


def test_state_noise_only_where_asked():
    noise = np.zeros(DIM, np.float32)
    noise[0] = 0.1
    plain, noisy = batches(2), batches(2, state_noise=noise)
    for one, other in zip(plain, noisy, strict=True):
        difference = other["state"] - one["state"]
        assert (difference[:, 0] != 0).all() and not difference[:, 1:].any()
        np.testing.assert_array_equal(one["noise"], other["noise"])
    assert_equal(noisy[1], batches(1, state_noise=noise, start_step=1)[0])
