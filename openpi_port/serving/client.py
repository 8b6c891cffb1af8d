"""A robot's side of the connection: asks this project's server, or openpi's, and survives its restarts.

with Client("ws://gpu-box:8000") as policy:
    actions = policy.infer({"images": {"top": image}, "state": state, "prompt": "Transfer cube"})["actions"]
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Mapping
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from openpi_port.errors import UserError
from openpi_port.serving import codec

TOO_BIG = 1009  # RFC 6455's code of a message above the limit


class ServerError(RuntimeError):
    """The server answered that this request is wrong; asking again would not help."""


class Client:
    """A policy that lives elsewhere. One request at a time; threads take turns.

    A lost connection is made again and the observation sent again, which is safe because inference has no effects.

    Args:
      url: "ws://host:port" or "wss://..."; a bare "host:port" gets "ws://".
      api_key: what the server asks for.
      patience_s: how long a server may be away, at the start and later.
      timeout_s: for one answer; a server that is silent for longer counts as away.

    Attributes:
      metadata: what the server said about its policy.

    Raises:
      UserError: no server within `patience_s`, a wrong address or key.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, patience_s: float = 60.0, timeout_s: float = 60.0
    ) -> None:
        self._url = url if "://" in url else f"ws://{url}"
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else {}
        self._patience_s, self._timeout_s = patience_s, timeout_s
        self._lock = threading.Lock()
        self._connection: ClientConnection | None = None
        self._open = contextlib.ExitStack()  # ends the connection
        self.metadata: dict[str, Any] = {}
        with self._lock:
            self._connect(time.monotonic() + patience_s)

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """One observation to one chunk; see `Policy.infer`.

        Raises:
          ServerError: the server says what is wrong with the observation.
          UserError: the server stayed away for `patience_s`, or the message is too large for it.
        """
        message = codec.pack(dict(observation))
        with self._lock:
            end = time.monotonic() + self._patience_s
            while True:
                try:
                    if self._connection is None:
                        self._connect(end)
                    self._connection.send(message)
                    reply = self._connection.recv(timeout=self._timeout_s)
                    break
                except ConnectionClosed as error:
                    self._drop()
                    if error.rcvd is not None and error.rcvd.code == TOO_BIG:
                        raise UserError(
                            f"{self._url}: {len(message)} bytes are more than the server takes "
                            f"(its --max_message_mb); send smaller images"
                        ) from None
                    self._pause(end, "closed the connection")
                except (TimeoutError, OSError) as error:
                    self._drop()
                    self._pause(end, str(error) or "does not answer")
        if isinstance(reply, str):
            raise ServerError(reply)
        return codec.unpack(reply)

    def reset(self) -> None:
        """Nothing: a server keeps no episode. Here because openpi's policies have it."""

    def close(self) -> None:
        """Says goodbye."""
        with self._lock:
            self._drop()

    def _connect(self, end: float) -> None:
        wait = 0.05
        while True:
            try:
                opening = connect(
                    self._url, compression=None, max_size=None, additional_headers=self._headers, open_timeout=10
                )
                self._connection = self._open.enter_context(opening)
                self.metadata = codec.unpack(self._connection.recv(timeout=self._timeout_s))
                return
            except InvalidURI as error:
                raise UserError(f"{self._url}: no address of a server ({error}); expected ws://host:port") from None
            except InvalidStatus as error:
                status = error.response.status_code
                if status == 401:
                    raise UserError(f"{self._url}: the server wants another API key") from None
                reason = f"answers HTTP {status}"
            except (OSError, InvalidHandshake, ConnectionClosed, EOFError) as error:
                reason = str(error) or type(error).__name__
            self._drop()
            self._pause(end, reason, wait)
            wait = min(2 * wait, 2.0)

    def _pause(self, end: float, reason: str, wait: float = 0.05) -> None:
        """Sleeps a random part of `wait`, so that a fleet doesn't come back all at once."""
        if time.monotonic() + wait >= end:
            raise UserError(f"{self._url}: no server there for {self._patience_s:g} s ({reason})") from None
        time.sleep(wait * random.uniform(0.5, 1.0))

    def _drop(self) -> None:
        self._connection = None
        with contextlib.suppress(OSError, ConnectionClosed):
            self._open.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
