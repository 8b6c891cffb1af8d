"""The server and its client: openpi-client's and ours, batching, limits, faults, restarts."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import commands
import numpy as np
import pytest
from conftest import ROOT
from small_policy import ACTION_DIM, HORIZON, make_checkpoint, observation_of
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect
from websockets.sync.server import serve as serve_sync

from openpi_port import Policy, UserError
from openpi_port.rng import draw_noise
from openpi_port.serving import codec
from openpi_port.serving.client import Client, ServerError
from openpi_port.serving.server import Options, background

LOCAL = {"host": "127.0.0.1", "port": 0}


class Echo:
    """A policy that answers its state, takes `seconds` for a pass, and can't bear the state 13."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.metadata = {"name": "echo", "size": 3}
        self.seconds = seconds
        self.batches: list[int] = []

    def prepare(self, observation):
        if not isinstance(observation, dict) or "state" not in observation:
            raise UserError("observation: no 'state'")
        return float(np.asarray(observation["state"]).ravel()[0])

    def infer_prepared(self, samples):
        time.sleep(self.seconds)
        self.batches.append(len(samples))
        if 13 in samples:
            raise RuntimeError("unlucky")
        return [{"actions": np.full((4, 2), x, np.float32)} for x in samples]

    def infer(self, observation):
        return self.infer_prepared([self.prepare(observation)])[0]


def state(value):
    return {"state": np.array([value], np.float32)}


def first(result):
    return float(result["actions"][0, 0])


@contextlib.contextmanager
def serving(policy=None, **options):
    with background(policy or Echo(), Options(**{**LOCAL, **options})) as url:
        yield url


def get(url, path, **headers):
    request = urllib.request.Request(url.replace("ws:", "http:") + path, headers=headers)
    return urllib.request.urlopen(request, timeout=5).read().decode()


# With the real policy and the real openpi-client


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return Policy.from_pretrained(make_checkpoint(tmp_path_factory.mktemp("serving") / "20"), "torch", device="cpu")


def test_the_real_openpi_client(openpi_client, policy):
    from openpi_client.action_chunk_broker import ActionChunkBroker

    observation = {**observation_of(0), "noise": draw_noise(0, 0, (HORIZON, ACTION_DIM))}
    want = policy.infer(observation)["actions"]
    with serving(policy, api_key="secret") as url:
        port = int(url.rpartition(":")[2])
        client = openpi_client.WebsocketClientPolicy("127.0.0.1", port, api_key="secret")
        assert client.get_server_metadata() == policy.metadata
        result = client.infer(observation)
        np.testing.assert_allclose(result["actions"], want, atol=1e-6)
        assert set(result) == {"actions", "policy_timing", "server_timing"}
        broker = ActionChunkBroker(client, action_horizon=2)
        for step in range(2):
            np.testing.assert_allclose(broker.infer(observation)["actions"], want[step], atol=1e-6)
        with pytest.raises(RuntimeError, match="wrong robot"):
            client.infer({**observation, "state": np.zeros(3)})
        assert client.infer(observation)["server_timing"]["prev_total_ms"] > 0
        client._ws.close()


def test_our_client_asks_openpi_s_server(openpi_client):
    """A server as openpi's speaks: packed by openpi's own module, a traceback as text, then the end."""
    theirs = openpi_client.msgpack_numpy

    def handler(connection):
        connection.send(theirs.packb({"reset_pose": [0.0]}))
        for message in connection:
            observation = theirs.unpackb(message)
            if "state" not in observation:
                connection.send("Traceback (most recent call last): KeyError")
                connection.close(1011, "Internal server error")
            else:
                connection.send(theirs.packb({"actions": np.stack([observation["state"]] * 2), "server_timing": {}}))

    with serve_sync(handler, "127.0.0.1", 0, compression=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Client(f"127.0.0.1:{server.socket.getsockname()[1]}", patience_s=5) as client:
            assert client.metadata == {"reset_pose": [0.0]}
            assert first(client.infer(state(3))) == 3
            with pytest.raises(ServerError, match="KeyError"):
                client.infer({"prompt": "x"})
            assert first(client.infer(state(4))) == 4  # on a new connection
        server.shutdown()


# The server


@pytest.mark.parametrize(
    "message", ["text", b"\xc1", codec.pack({"prompt": "x"}), codec.pack([]), codec.pack(state(13))]
)
def test_an_error_is_for_one_request_alone(message):
    with serving() as url, Client(url) as other, connect(url, compression=None) as connection:
        connection.recv()
        connection.send(message)
        reply = connection.recv(timeout=5)
        assert isinstance(reply, str) and reply.startswith("error: ") and "unlucky" not in reply
        assert first(other.infer(state(2))) == 2
        connection.send(codec.pack(state(5)))
        assert first(codec.unpack(connection.recv(timeout=5))) == 5


def test_many_clients_share_passes_and_get_their_own_answers():
    echo = Echo(seconds=0.02)
    with serving(echo, max_batch=4, wait_s=0.05) as url, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(url)) for _ in range(6)]
        with ThreadPoolExecutor(6) as pool:
            for turn in range(5):
                values = [100 * turn + i for i in range(6)]
                asked = pool.map(lambda c, v: first(c.infer(state(v))), clients, values)
                assert list(asked) == values
        text = get(url, "/metrics")
    assert sum(echo.batches) == 30 and max(echo.batches) <= 4 and len(echo.batches) < 20
    assert "openpi_port_requests_total 30" in text and "openpi_port_clients 6" in text
    assert f"openpi_port_infer_seconds_count {len(echo.batches)}" in text
    assert 'openpi_port_batch_size_bucket{le="+Inf"}' in text


def test_one_client_alone_never_waits_for_others():
    with serving(wait_s=5.0) as url, Client(url) as client:
        start = time.perf_counter()
        client.infer(state(1))
        assert time.perf_counter() - start < 2


def test_the_wait_for_others_is_bounded():
    with serving(wait_s=0.1) as url, Client(url) as client, Client(url):
        start = time.perf_counter()
        client.infer(state(1))
        assert 0.08 < time.perf_counter() - start < 2


def test_who_is_to_blame_fails_alone_in_a_pass():
    with (
        serving(Echo(0.02), wait_s=0.2, timeout_s=3) as url,
        Client(url) as good,
        Client(url) as bad,
        ThreadPoolExecutor(2) as pool,
    ):
        wrong, right = pool.submit(bad.infer, state(13)), pool.submit(good.infer, state(1))
        assert first(right.result()) == 1
        with pytest.raises(ServerError, match="internal"):
            wrong.result()


def test_the_loop_is_free_while_the_model_computes():
    with serving(Echo(seconds=1.0)) as url, Client(url) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.infer, state(1))
        time.sleep(0.1)
        start = time.perf_counter()
        assert get(url, "/healthz") == "OK\n"
        assert time.perf_counter() - start < 0.5 and not answer.done()
        assert first(answer.result()) == 1


def test_a_slow_answer_is_an_error_after_the_timeout():
    too_late = pytest.raises(ServerError, match="no answer within")
    with serving(Echo(seconds=0.5), timeout_s=0.1) as url, Client(url) as client, too_late:
        client.infer(state(1))


def test_large_messages_get_an_error_and_huge_ones_end_only_their_own_connection():
    with serving(max_message=10_000) as url, Client(url) as other:
        with pytest.raises(UserError, match="more than the server takes"):
            Client(url).infer({"state": np.zeros(10_000)})
        with pytest.raises(ServerError, match="more than the server takes"):
            other.infer({"state": np.zeros(1_500)})
        with connect(url, compression=None, max_size=None) as connection:
            connection.recv()
            connection.send(b"\0" * 10_001)
            assert "10001 bytes" in connection.recv(timeout=5)
            connection.send(b"\0" * 20_001)
            with pytest.raises(ConnectionClosedError, match="1009"):
                connection.recv(timeout=5)
        assert first(other.infer(state(1))) == 1


def test_api_key():
    with serving(api_key="secret") as url:
        for key in (None, "other"):
            with pytest.raises(UserError, match="API key"):
                Client(url, api_key=key, patience_s=2)
        assert first(Client(url, api_key="secret").infer(state(1))) == 1
        assert get(url, "/healthz") == "OK\n"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(url, "/metrics")
        assert "openpi_port_connections_total 1" in get(url, "/metrics", Authorization="Api-Key secret")


def test_too_many_clients_are_turned_away():
    with serving(max_clients=1) as url, Client(url), pytest.raises(UserError, match="HTTP 503"):
        Client(url, patience_s=0.3)


def test_raw_sockets_do_no_harm():
    with serving() as url:
        port = int(url.rpartition(":")[2])
        for junk in (b"", b"\0" * 1000, b"GET / HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\nA: " + b"b" * 100_000):
            with socket.create_connection(("127.0.0.1", port)) as raw, contextlib.suppress(OSError):
                raw.sendall(junk)
        assert first(Client(url).infer(state(1))) == 1


def test_stopping_answers_what_is_under_way():
    with ThreadPoolExecutor(1) as pool:
        with serving(Echo(seconds=0.5)) as url:
            client = Client(url, patience_s=0.2)
            answer = pool.submit(client.infer, state(1))
            time.sleep(0.2)
        assert first(answer.result()) == 1
        with pytest.raises(UserError, match="no server there"):
            client.infer(state(2))


def test_a_taken_port_is_one_line():
    with serving() as url, pytest.raises(UserError, match="--port="), serving(port=int(url.rpartition(":")[2])):
        pass


# The client


def test_the_client_outlives_a_restart():
    with serving() as url:
        client = Client(url, patience_s=20)
        assert first(client.infer(state(1))) == 1
        port = int(url.rpartition(":")[2])
    later = threading.Event()

    def restart():
        with serving(port=port):
            later.wait(20)

    timer = threading.Timer(0.3, restart)
    timer.start()
    try:
        assert first(client.infer(state(2))) == 2
        client.close()
    finally:
        later.set()
        timer.join()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:1"])
def test_no_server_is_one_line(url):
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1: no"):
        Client(url, patience_s=0.2)


# The command


def test_the_command_serves_and_ends_on_sigterm(tmp_path):
    path = make_checkpoint(tmp_path / "20")
    command = [sys.executable, "-m", "experiments.serve", f"--checkpoint={path}", "--backend=torch", "--port=0"]
    command += ["--host=127.0.0.1", "--max_batch=1", "--device=cpu", '--metadata={"reset_pose": [0, -1.5]}']
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OPENPI_PORT_API_KEY": "k"}
    )
    try:
        line = next(line for line in process.stdout if line.startswith("serving on "))
        with Client(line.split()[2].rstrip(","), api_key="k") as client:
            assert client.metadata["reset_pose"] == [0, -1.5] and client.metadata["action_horizon"] == HORIZON
            assert client.infer(observation_of(0))["actions"].shape == (HORIZON, 14)
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0
    finally:
        process.kill()
        process.stdout.close()


def test_the_command_without_a_checkpoint_is_one_line():
    done = commands.run("experiments.serve")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --checkpoint=") and done.stderr.count("\n") == 1


def test_the_command_looks_at_the_port_before_it_opens_a_model():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = commands.run("experiments.serve", "--checkpoint=none", "--host=127.0.0.1", f"--port={port}")
    assert done.returncode == 2 and re.match(rf"error: can't listen on 127.0.0.1:{port} .*--port=", done.stderr)


def test_help_names_the_flags_that_programs_share():
    done = commands.run("experiments.serve", "--help")
    assert done.returncode == 0
    assert all(f"--{flag}:" in done.stdout for flag in ("port", "checkpoint", "backend"))


def test_no_reply_is_lost_or_crossed_among_faults():
    done = commands.run("openpi_port.serving.benchmark", "soak", "--clients=4", "--seconds=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "replies" in done.stdout and "crossed" not in done.stdout and "lost" not in done.stdout
