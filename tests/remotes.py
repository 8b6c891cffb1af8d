"""The Hugging Face hub and Google's storage, as far as fetching a checkpoint goes, on this machine.

The clients that the project uses ask them as they ask the real ones: HF_ENDPOINT and STORAGE_EMULATOR_HOST say where.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import google_crc32c

COMMIT = "a" * 40


@dataclasses.dataclass
class Remote:
    """One of the two; what a test sets decides how it behaves.

    Attributes:
      root: what it holds: the repository's files, or a folder for every bucket.
      url: where it answers.
      asked: path, query and headers of every request, in order.
      allowed: whether a request may have what it asks for, by its headers.
      sends: what is sent of a content, from the place in the file on; shorter, and the connection breaks there.
    """

    root: Path
    url: str = ""
    asked: list[tuple[str, dict[str, str]]] = dataclasses.field(default_factory=list)
    allowed: Callable[[Any], bool] = lambda headers: True
    sends: Callable[[str, int, bytes], bytes] = lambda name, start, content: content

    def files(self) -> dict[str, Path]:
        """Name -> file of all that it holds."""
        return {str(f.relative_to(self.root)): f for f in sorted(self.root.rglob("*")) if f.is_file()}


class Answer(http.server.BaseHTTPRequestHandler):
    """What both have in common."""

    protocol_version = "HTTP/1.1"
    remote: Remote

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        """As GET, without the content."""
        self.do_GET()

    def send(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        """Answers; a dictionary of headers goes along."""
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def send_json(self, tree: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Answers a question."""
        self.send(json.dumps(tree).encode(), {"Content-Type": "application/json", **(headers or {})}, status)

    def send_file(self, name: str, file: Path, headers: dict[str, str]) -> None:
        """Answers with a file, or with the part of it that is asked for."""
        content = file.read_bytes()
        start, end = 0, len(content)
        if span := self.headers.get("Range"):
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, end) if last else end
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
        self.send_response(206 if span else 200)
        for key, value in {**headers, "Content-Length": str(end - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            sent = self.remote.sends(name, start, content[start:end])
            self.wfile.write(sent)
            self.close_connection = len(sent) < end - start


class Hub(Answer):
    """The hub: one repository, user/pi, with a branch main."""

    def do_GET(self) -> None:
        """The list of files, or one of them."""
        self.remote.asked.append((self.path, dict(self.headers)))
        path = urlsplit(self.path).path
        files = self.remote.files()
        if not path.removeprefix("/api/models").startswith("/user/pi/") and path != "/api/models/user/pi":
            return self.send_json({}, 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if "/tree/" in path:
            return self.send_json(
                [{"type": "file", "path": n, "size": f.stat().st_size, "oid": n} for n, f in files.items()]
            )
        if path.startswith("/api/models/"):
            if path.endswith("/revision/old"):
                return self.send_json({}, 404, {"X-Error-Code": "RevisionNotFound"})
            return self.send_json({"id": "user/pi", "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]})
        name = unquote(path.partition(f"/resolve/{COMMIT}/")[2])
        if not self.remote.allowed(self.headers):
            return self.send_json({}, 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        if name not in files:
            return self.send_json({}, 404, {"X-Error-Code": "EntryNotFound"})
        tag = hashlib.sha256(files[name].read_bytes()).hexdigest()
        return self.send_file(name, files[name], {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})


class Storage(Answer):
    """Google's: buckets, listed and read through the JSON API."""

    def do_GET(self) -> None:
        """A listing, what is known of an object, or its content."""
        self.remote.asked.append((self.path, dict(self.headers)))
        url = urlsplit(self.path)
        bucket, name = _names(url.path)
        query = dict(parse_qsl(url.query))
        if not self.remote.allowed(self.headers):
            words = "Anonymous caller does not have storage.objects.list access to the bucket."
            return self.send_json({"error": {"code": 401, "message": words}}, 401)
        files = {n.partition("/")[2]: f for n, f in self.remote.files().items() if n.partition("/")[0] == bucket}
        if not name:
            prefix = query.get("prefix", "")
            items = [_object(bucket, n, f) for n, f in files.items() if n.startswith(prefix)]
            return self.send_json({"kind": "storage#objects", "items": items})
        if name not in files:
            return self.send_json({"error": {"code": 404, "message": f"No such object: {bucket}/{name}"}}, 404)
        if query.get("alt") != "media":
            return self.send_json(_object(bucket, name, files[name]))
        return self.send_file(name, files[name], {})


def _names(path: str) -> tuple[str, str]:
    """Bucket and object of a request."""
    bucket, _, rest = path.partition("/b/")[2].partition("/")
    return bucket, unquote(rest.removeprefix("o").removeprefix("/"))


def _object(bucket: str, name: str, file: Path) -> dict[str, str]:
    checksum = google_crc32c.Checksum(file.read_bytes())
    about = {"kind": "storage#object", "bucket": bucket, "name": name, "size": str(file.stat().st_size)}
    return {**about, "crc32c": base64.b64encode(checksum.digest()).decode(), "generation": str(file.stat().st_mtime_ns)}


@contextlib.contextmanager
def serving(kind: type[Answer], root: Path) -> Iterator[Remote]:
    """One of them, answering while the block runs."""
    remote = Remote(root)
    handler = type(kind.__name__, (kind,), {"remote": remote})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    remote.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield remote
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
