"""A policy behind a websocket, in the words of openpi-client: metadata first, then one reply per observation.

    client -> msgpack {"images": ..., "state": ..., "prompt": ...}
    server -> msgpack {"actions": f32 [A, D], "policy_timing": {...}, "server_timing": {...}}, or text: what was wrong

    bytes -> codec.unpack -> Policy.prepare (in a thread) -> batcher -> Policy.infer_prepared (in one thread) -> bytes

One client's mistake reaches that client alone, and its connection stays. /healthz and /metrics answer plain HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import http
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from websockets.asyncio.server import Server as WebsocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from openpi_port.errors import UserError
from openpi_port.policy import Policy
from openpi_port.serving import codec
from openpi_port.serving.batcher import Batcher
from openpi_port.serving.metrics import Metrics

LOG = logging.getLogger(__name__)
GOING_AWAY = 1001  # a close code of RFC 6455


@dataclasses.dataclass(frozen=True)
class Options:
    """How a server behaves.

    Attributes:
      host, port: where it listens; port 0 takes a free one.
      api_key: what clients must send as `Authorization: Api-Key ...`; None lets everybody in.
      max_message: bytes of one request. A larger one gets an error; one of more than twice as many is not read to its
        end, so its connection closes (code 1009).
      max_clients: connections at once; further ones get HTTP 503.
      max_batch: requests in one pass of the model.
      wait_s: how long a request may wait for others while the model is idle.
      timeout_s: for one inference, waiting included, and for sending one reply to a slow client.
      grace_s: for requests under way when the server is told to stop.
    """

    host: str = "0.0.0.0"
    port: int = 8000
    api_key: str | None = None
    max_message: int = 32 * 2**20
    max_clients: int = 64
    max_batch: int = 8
    wait_s: float = 0.002
    timeout_s: float = 30.0
    grace_s: float = 10.0


class Server:
    """Serves one policy; made and used within one event loop.

    Args:
      policy: to serve; warmed up already.
      options: see there.
    """

    def __init__(self, policy: Policy, options: Options) -> None:
        self._policy, self._options = policy, options
        self._metrics = Metrics()
        self._metadata = codec.pack(policy.metadata)
        self._busy = 0
        self._stopping = False
        self._server: WebsocketServer | None = None
        self._batcher: Batcher | None = None

    async def start(self) -> int:
        """Begins to listen.

        Returns:
          The port.

        Raises:
          UserError: the port is taken or not allowed.
        """
        options = self._options
        self._batcher = Batcher(
            self._policy.infer_prepared, lambda: self._metrics.clients, self._metrics,
            max_batch=options.max_batch, wait_s=options.wait_s,
        )  # fmt: skip
        try:
            self._server = await serve(
                self._client, options.host, options.port, process_request=self._admit, compression=None,
                max_size=2 * options.max_message, max_queue=2, open_timeout=10, close_timeout=2, ping_interval=20,
                ping_timeout=20, logger=_quiet_logger(),
            )  # fmt: skip
        except OSError as error:
            await self._batcher.close()
            raise _cannot_listen(options.host, options.port, error) from None
        return self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Lets the requests under way finish, then says goodbye to all clients."""
        self._stopping = True
        self._server.close(close_connections=False)
        end = time.monotonic() + self._options.grace_s
        while self._busy and time.monotonic() < end:
            await asyncio.sleep(0.005)
        goodbyes = [ws.close(GOING_AWAY, "the server shuts down") for ws in list(self._server.connections)]
        await asyncio.gather(*goodbyes, return_exceptions=True)
        await self._batcher.close()
        await self._server.wait_closed()

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Plain HTTP, and who may become a client."""
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        key = self._options.api_key
        if key is not None:
            given = request.headers.get_all("Authorization")
            if not (len(given) == 1 and hmac.compare_digest(given[0].encode(), f"Api-Key {key}".encode())):
                return connection.respond(http.HTTPStatus.UNAUTHORIZED, "Authorization: Api-Key ... is needed\n")
        if request.path == "/metrics":
            response = connection.respond(http.HTTPStatus.OK, self._metrics.text())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "text/plain; version=0.0.4; charset=utf-8"
            return response
        if self._metrics.clients >= self._options.max_clients:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "too many clients\n")
        return None

    async def _client(self, connection: ServerConnection) -> None:
        """The whole conversation with one client."""
        metrics = self._metrics
        metrics.clients += 1
        metrics.connections += 1
        total: float | None = None
        try:
            await self._send(connection, self._metadata)
            async for message in connection:
                if self._stopping:
                    break
                start = time.perf_counter()
                self._busy += 1
                try:
                    reply = await self._answer(message, total)
                    await self._send(connection, reply)
                finally:
                    self._busy -= 1
                total = time.perf_counter() - start
                metrics.request_seconds.add(total)
        except ConnectionClosed:
            pass  # also when a message was too large
        except TimeoutError:
            metrics.errors["slow_reader"] += 1
            connection.transport.abort()
        finally:
            metrics.clients -= 1

    async def _send(self, connection: ServerConnection, reply: str | bytes) -> None:
        async with asyncio.timeout(self._options.timeout_s):
            await connection.send(reply)

    async def _answer(self, message: str | bytes, previous: float | None) -> str | bytes:
        """A reply with actions, or the text of an error."""
        start = time.perf_counter()
        try:
            if isinstance(message, str):
                raise UserError("requests are binary msgpack, this one is text")
            if len(message) > self._options.max_message:
                limit = self._options.max_message
                raise UserError(
                    f"{len(message)} bytes, more than the server takes ({limit}; --max_message_mb): send smaller images"
                )
            sample = await asyncio.to_thread(self._prepare, message)
            async with asyncio.timeout(self._options.timeout_s):
                result = await self._batcher(sample)
        except UserError as error:
            self._metrics.errors["request"] += 1
            return f"error: {error}"
        except TimeoutError:
            self._metrics.errors["timeout"] += 1
            limit = self._options.timeout_s
            return f"error: no answer within {limit:g} s (--timeout_s): too many ask, or the model is slower"
        except Exception as error:  # a fault of ours must not end the conversation, nor tell the client our secrets
            LOG.exception("a request failed")
            self._metrics.errors["internal"] += 1
            return f"error: internal ({type(error).__name__}); the server's log has the details"
        self._metrics.requests += 1
        timing = {"infer_ms": (time.perf_counter() - start) * 1e3}
        if previous is not None:
            timing["prev_total_ms"] = previous * 1e3
        return codec.pack({**result, "server_timing": timing})

    def _prepare(self, message: bytes) -> Any:
        return self._policy.prepare(codec.unpack(message))


def _quiet_logger() -> logging.Logger:
    """The library logs a traceback whenever a port scanner hangs up; that is no news."""
    logger = logging.getLogger(f"{__name__}.websockets")
    logger.setLevel(logging.CRITICAL)
    return logger


@contextlib.contextmanager
def background(policy: Policy, options: Options) -> Iterator[str]:
    """A server in a thread of its own, for tests and notebooks.

    Yields:
      Its address, "ws://127.0.0.1:PORT".
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server", daemon=True)
    thread.start()

    def wait(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    async def make() -> tuple[Server, int]:
        server = Server(policy, options)
        return server, await server.start()

    try:
        server, port = wait(make())
        try:
            yield f"ws://127.0.0.1:{port}"
        finally:
            wait(server.stop())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def require_port(host: str, port: int) -> None:
    """Raises UserError where `Server.start` couldn't listen: before a model is loaded that takes a minute."""
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(address)
    except OSError as error:
        raise _cannot_listen(host, port, error) from None


def _cannot_listen(host: str, port: int, error: OSError) -> UserError:
    return UserError(f"can't listen on {host}:{port} ({error.strerror}); --port= takes another one")
