"""What serving costs, and whether it holds: a round trip with a model that takes no time, and clients that misbehave.

    python -m openpi_port.serving.benchmark overhead
    python -m openpi_port.serving.benchmark soak --clients=8 --seconds=600

Server and clients are separate processes, as in life. Exit status 1 if a reply was lost or went to another client.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from openpi_port.errors import UserError
from openpi_port.serving import codec
from openpi_port.serving.client import Client, ServerError
from openpi_port.serving.server import Options, background

ACTIONS = (50, 14)
LIMIT = 2**20  # bytes of a message, so that a fault can exceed it
SIZES = {"nonsense": 100, "too much": LIMIT + 1, "far too much": 2 * LIMIT + 1}  # of faulty messages, bytes


class Instant:
    """Answers the state it was sent, as a whole chunk, after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.metadata = {"name": "instant"}
        self._seconds = seconds

    def prepare(self, observation: Any) -> np.ndarray:
        if not isinstance(observation, dict) or not isinstance(observation.get("state"), np.ndarray):
            raise UserError("observation: no state")
        return observation["state"]

    def infer_prepared(self, states: list[np.ndarray]) -> list[dict[str, Any]]:
        time.sleep(self._seconds)
        return [{"actions": np.resize(state, ACTIONS).astype(np.float32)} for state in states]


def serve(connection: Connection, seconds: float) -> None:
    """A server process; ends when the other side hangs up."""
    with background(Instant(seconds), Options(host="127.0.0.1", port=0, max_message=LIMIT)) as url:
        connection.send(url)
        try:
            connection.recv()
        except EOFError:
            return


def round_trips(rounds: int) -> list[float]:
    """Seconds of round trips of three 224 px images, to a server in a process of its own and back."""
    with server(0.0) as url:
        return _round_trips(url, rounds)


def _round_trips(url: str, rounds: int) -> list[float]:
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    observation = {"images": {"a": image, "b": image, "c": image}, "state": np.zeros(14), "prompt": "do it"}
    times = []
    with Client(url) as client:
        for _ in range(rounds + 20):
            start = time.perf_counter()
            client.infer(observation)
            times.append(time.perf_counter() - start)
    return times[20:]


def soak(url: str, clients: int, seconds: float) -> int:
    """Clients that check every reply, while now and then one sends nonsense or hangs up."""
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(clients) as pool:
        counts = sum(pool.map(lambda number: _customer(url, number, end), range(clients)), Counter())
    print(f"{clients} clients, {seconds:g} s: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    return counts["lost"] + counts["crossed"]


def _customer(url: str, number: int, end: float) -> Counter[str]:
    """One client's life; every state it sends is its own."""
    rng, counts, serial = random.Random(number), Counter[str](), 0
    with Client(url) as client:
        while time.monotonic() < end:
            serial += 1
            if rng.random() < 0.1:
                counts[_misbehave(url, rng)] += 1
            state = np.array([number, serial], np.float32)
            try:
                actions = client.infer({"state": state, "image": np.zeros((64, 64, 3), np.uint8)})["actions"]
                counts["replies" if (actions[0, :2] == state).all() else "crossed"] += 1
                if rng.random() < 0.05:
                    client.infer({"nothing": 1})
                    counts["lost"] += 1  # an answer where an error was due
            except ServerError:
                counts["errors, as they should"] += 1
            except UserError:
                counts["lost"] += 1
    return counts


def _misbehave(url: str, rng: random.Random) -> str:
    """A fault on a connection of its own."""
    fault = rng.choice([*SIZES, "hang up"])
    try:
        with connect(url, compression=None) as connection:
            connection.recv(timeout=10)
            if fault == "hang up":
                connection.send(codec.pack({"state": np.zeros(2)}))
                connection.socket.close()
            else:
                connection.send(rng.randbytes(SIZES[fault]))
                connection.recv(timeout=10)
    except (ConnectionClosed, OSError):
        pass
    return f"faults: {fault}"


def main() -> int:
    """Starts a server and measures it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["overhead", "soak"])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600.0)
    arguments = parser.parse_args()
    if arguments.what == "overhead":
        p10, p50, p90 = 1e3 * np.percentile(round_trips(arguments.rounds), (10, 50, 90))
        print(
            f"{arguments.rounds} round trips of three 224 px images: median {p50:.2f} ms, 10% {p10:.2f} ms, "
            f"90% {p90:.2f} ms"
        )
        return 0
    with server(0.005) as url:
        return 1 if soak(url, arguments.clients, arguments.seconds) else 0


@contextlib.contextmanager
def server(delay: float) -> Iterator[str]:
    """The address of a server in a process of its own, whose model takes `delay` seconds."""
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=serve, args=(theirs, delay), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        ours.close()
        process.join(15)


if __name__ == "__main__":
    sys.exit(main())
