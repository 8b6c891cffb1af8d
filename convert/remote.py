"""Checkpoints at a URL: fetched once into a cache, whole or not at all; an interrupted download goes on where it was.

`hf://` is huggingface_hub's work, with its own cache and resumption. Everything else is listed and read through fsspec:

    CACHE/HASH/NAME                 a checkpoint, complete
              .NAME.partial/        one that is being fetched, or whose fetching was interrupted
              .NAME.listing.json    what the partial one is made of: a file that has changed since is fetched anew
              .NAME.lock            held by the process that fetches; others wait for it
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import fnmatch
import hashlib
import json
import logging
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from tqdm import tqdm

from openpi_port import host, whole
from openpi_port.errors import UserError

WANTED = ["*.json", "*.safetensors", "*.model", "*.npz", "*params/*", "*assets/*"]
STREAMS = 8  # files at once
ALONE = "file"  # what the URL of a single file lists
PIECE = 2**24  # bytes of one request; an interruption waits for those under way
IDENTITY = ("etag", "ETag", "generation", "md5Hash", "crc32c", "mtime", "created")  # what tells a file from another
GOOGLE = "https://storage.googleapis.com"
PATIENCE_S = 10.0  # for a host to be there
SILENCE_S = 60.0  # within a download, before the request is made again


def cache() -> Path:
    """Where fetched checkpoints are kept: $OPENPI_PORT_CACHE, or openpi_port in the user's cache directory."""
    return Path(os.environ.get("OPENPI_PORT_CACHE") or host.cache() / "openpi_port")


def fetch(path: str | Path) -> Path:
    """A local path for a path or URL.

    Args:
      path: a local path, also as `file://`; `hf://user/name[/folder or file][@revision]`, through huggingface_hub
        (HF_ENDPOINT, HF_TOKEN and HF_HOME apply); or any URL that fsspec knows (`gs://`, `s3://`).

    Raises:
      UserError: not reachable, not there, not allowed, no room, or a package for the protocol is missing.
    """
    url = str(path)
    if "://" not in url:
        return Path(path).expanduser()
    if url.startswith("file://"):
        return Path(url2pathname(urlsplit(url).path))
    place, at, revision = url.partition("@") if url.startswith("hf://") else (url, "", "")
    place = place.rstrip("/")
    if place.endswith("/params") and place.count("/") > 3:  # as openpi's configs say it: assets/ lie beside
        return fetch(place.removesuffix("/params") + at + revision) / "params"
    return _hub(place, revision) if url.startswith("hf://") else _fsspec(place)


def _hub(url: str, revision: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    parts = url.removeprefix("hf://").split("/")
    if len(parts) < 2:
        raise UserError(f"{url}: expected hf://user/name, maybe with /folder and @revision")
    repo, inside = "/".join(parts[:2]), "/".join(parts[2:])
    wanted = [inside, *(f"{inside}/{pattern}" for pattern in WANTED)] if inside else WANTED
    try:
        local = Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted))
    except errors.GatedRepoError:
        reason = f"{repo} is gated: accept its terms on its page, then set HF_TOKEN or run `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = f"{repo} has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        reason = f"there is no {repo}, or it is private: set HF_TOKEN or run `hf auth login`"
    except errors.LocalEntryNotFoundError as e:
        cause = e.__cause__ or e
        offline = "HF_HUB_OFFLINE is set" if isinstance(cause, errors.OfflineModeIsEnabled) else _brief(cause)
        reason = f"the hub can't be reached ({offline}) and its cache doesn't hold all of it"
    except Exception as e:  # the hub's client raises its own, its HTTP library's and OSError
        reason = _brief(e)
    else:
        if (local / inside).exists():
            return local / inside
        reason = f"{repo} has no {inside}"
    raise UserError(f"{url}: can't be fetched: {reason}")


def _fsspec(url: str) -> Path:
    target = cache() / hashlib.sha256(url.encode()).hexdigest()[:16] / url.rpartition("/")[2]
    if target.exists():
        return target
    with _alone(target):
        if target.exists():  # another process has just fetched it
            return target
        try:
            _fetch(url, target)
        except ImportError as e:
            raise UserError(f"{url}: {e}") from None
        except UserError:
            raise
        except Exception as e:  # every file system raises its own
            kept = target.with_name(f".{target.name}.partial").exists()
            more = "; what has come is kept, the same command goes on" if kept else ""
            raise UserError(f"{url}: can't be fetched: {_brief(e)}{more}") from None
    return target


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Waits until no other process fetches the same; a process that is killed lets go."""
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(target.with_name(f".{target.name}.lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that fetches {target}", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as e:  # some clusters' file systems know no locks
            raise UserError(
                f"{target.parent}: can't be used ({e.strerror}); OPENPI_PORT_CACHE= names another place"
            ) from None
        yield


def _fetch(url: str, target: Path) -> None:
    """Fetches what is missing of a checkpoint, and gives it its name when all is there."""
    print(f"fetching {url} to {target}", file=sys.stderr, flush=True)
    system, found = _listed(url)
    part, note = (target.with_name(f".{target.name}.{end}") for end in ("partial", "listing.json"))
    listing = {name: [info["size"], *(str(info[k]) for k in IDENTITY if k in info)] for name, info in found.items()}
    _drop_changed(part, note, listing)
    whole.write_text(note, json.dumps(listing, indent=1))
    have = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
    total = sum(info["size"] for info in found.values())
    free = shutil.disk_usage(part.parent).free
    if free < total - have:
        raise UserError(
            f"{url}: {(total - have) / 1e9:.1f} GB to fetch, {free / 1e9:.1f} GB free in {cache()}: make room, or set "
            f"OPENPI_PORT_CACHE to another place"
        )
    stop = threading.Event()
    with (
        tqdm(total=total, initial=have, desc="fetching", unit="B", unit_scale=True, leave=False, delay=1) as bar,
        ThreadPoolExecutor(STREAMS) as pool,
    ):
        largest_first = sorted(found, key=lambda name: -found[name]["size"])
        jobs = [pool.submit(_file, system, found[name], part / name, bar, stop) for name in largest_first]
        try:
            wait(jobs, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    for job in jobs:
        if not job.cancelled():
            job.result()
    if list(found) == [ALONE]:
        (part / ALONE).rename(target)
        part.rmdir()
    else:
        part.rename(target)
    note.unlink()


def _listed(url: str) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The file system of a URL, and what is wanted there: name below it -> the file system's description.

    Raises:
      UserError: nothing there.
    """
    import fsspec

    if url.startswith(("gs://", "gcs://")):
        system, path, found = _listed_by_google(url)
    else:
        system, path = fsspec.core.url_to_fs(url)
        system.invalidate_cache()  # a listing that this process made earlier
        found = _found(system, path)
    below = {name.removeprefix(path).lstrip("/") or ALONE: info for name, info in found.items()}
    patterns = ["*"] if url.endswith("/params") else [ALONE, *WANTED]
    wanted = {name: info for name, info in below.items() if any(fnmatch.fnmatch(name, p) for p in patterns)}
    if not wanted:
        raise UserError(f"{url}: {'no checkpoint' if below else 'nothing'} there")
    return system, wanted


def _listed_by_google(url: str) -> tuple[Any, str, dict[str, dict[str, Any]]]:
    """The same of Google's storage, not yet sorted out: at first without credentials.

    Most of what is fetched there is open to everybody, and looking for credentials takes 14 s where there are none.
    """
    import aiohttp
    from gcsfs.core import GCSFileSystem  # gcsfs' own choice asks a second service, over gRPC, about every bucket

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback of what it raises as well
    _require_host(os.environ.get("STORAGE_EMULATOR_HOST") or GOOGLE)
    timeout = aiohttp.ClientTimeout(sock_connect=PATIENCE_S, sock_read=SILENCE_S)
    path = url.partition("://")[2]
    for token in ("anon", None):
        system = GCSFileSystem(token=token, requests_timeout=timeout, skip_instance_cache=True)
        try:
            return system, path, _found(system, path)
        except Exception as e:  # a PermissionError's kin, by its words or its code
            reason = _brief(e)
            if getattr(e, "code", None) not in (401, 403) and "Forbidden" not in reason:
                raise
    raise UserError(
        f"{url}: not open to everybody, and Google's storage doesn't take this machine's credentials, if it has any "
        f"({reason}): `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"
    )


def _found(system: Any, path: str) -> dict[str, dict[str, Any]]:
    """All files at or below a path; empty where nothing is."""
    try:
        found = system.find(path, detail=True)
    except FileNotFoundError:
        return {}
    return {name: info for name, info in found.items() if not name.endswith("/")}  # a folder's marker


def _require_host(address: str) -> None:
    """Raises ConnectionError where a host isn't there, at once; gcsfs would try for half a minute, without a word."""
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY")):
        return  # which alone may know the host
    server = urlsplit(address if "://" in address else f"http://{address}")
    try:
        socket.create_connection((server.hostname, server.port or 443), PATIENCE_S).close()
    except OSError as e:
        raise ConnectionError(f"{server.hostname} can't be reached ({e.strerror or e})") from None


def _drop_changed(part: Path, note: Path, listing: Mapping[str, list[Any]]) -> None:
    """Removes of an interrupted download what is no longer there, or is another file by now."""
    part.mkdir(exist_ok=True)
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        before = {}
    for file in part.rglob("*"):
        name = str(file.relative_to(part))
        if file.is_file() and (name not in listing or before.get(name) != listing[name]):
            file.unlink()


def _file(system: Any, info: Mapping[str, Any], file: Path, bar: tqdm, stop: threading.Event) -> None:
    """Fetches a file piece by piece, from where it was interrupted."""
    file.parent.mkdir(parents=True, exist_ok=True)
    name, size = info["name"], info["size"]
    with file.open("ab") as out:
        while (start := out.tell()) < size:
            if stop.is_set():
                return
            piece = system.cat_file(name, start, min(start + PIECE, size))
            if len(piece) != min(PIECE, size - start):
                raise OSError(f"{name}: {len(piece)} bytes came of {min(PIECE, size - start)} from {start} on")
            out.write(piece)
            bar.update(len(piece))
    if "crc32c" in info and _crc32c(file) != info["crc32c"]:
        file.unlink()
        raise OSError(f"{name}: came damaged, its checksum is another")


def _crc32c(file: Path) -> str:
    """A file's checksum as Google's storage states it, of every object."""
    import google_crc32c

    checksum = google_crc32c.Checksum()
    with file.open("rb") as content:
        while piece := content.read(PIECE):
            checksum.update(piece)
    return base64.b64encode(checksum.digest()).decode()


def _brief(error: BaseException) -> str:
    """An error of somebody else's in a line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__
