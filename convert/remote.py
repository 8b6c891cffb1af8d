"""Checkpoints at a URL: fetched once into a cache, whole or not at all."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
from pathlib import Path

from openpi_port.errors import UserError

WANTED = ["*.json", "*.safetensors", "*.model", "*.npz", "*params/*", "*assets/*"]


def cache() -> Path:
    """Where fetched checkpoints are kept: $OPENPI_PORT_CACHE, or ~/.cache/openpi_port."""
    return Path(os.environ.get("OPENPI_PORT_CACHE", Path.home() / ".cache" / "openpi_port"))


def fetch(path: str | Path) -> Path:
    """A local path for a path or URL.

    Args:
      path: a local path; `hf://user/name[/folder][@revision]`, through huggingface_hub (HF_ENDPOINT, HF_TOKEN and
        HF_HOME apply); or any URL that fsspec knows (`gs://`, `s3://`, `file://`).

    Raises:
      UserError: not reachable, not there, or a package for the protocol is missing.
    """
    url = str(path)
    if "://" not in url:
        return Path(path).expanduser()
    return _hub(url) if url.startswith("hf://") else _fsspec(url)


def _hub(url: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = url.removeprefix("hf://").partition("@")
    parts = name.strip("/").split("/")
    if len(parts) < 2:
        raise UserError(f"{url}: expected hf://user/name, maybe with /folder and @revision")
    folder = "/".join(parts[2:])
    wanted = [f"{folder}/{pattern}" for pattern in WANTED] if folder else WANTED
    try:
        local = snapshot_download("/".join(parts[:2]), revision=revision or None, allow_patterns=wanted)
    except Exception as e:  # the hub's client raises its own, requests' and OSError
        raise UserError(f"{url}: can't be fetched ({type(e).__name__}: {' '.join(str(e).split())[:200]})") from None
    return Path(local) / folder


def _fsspec(url: str) -> Path:
    import fsspec
    from fsspec.callbacks import TqdmCallback

    target = cache() / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16] / url.rstrip("/").rpartition("/")[2]
    if target.exists():
        return target
    part = target.with_name(f".{target.name}.partial-{os.getpid()}")
    part.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback of what it raises as well
    try:
        options = {"token": "anon"} if url.startswith("gs://openpi-assets") else {}
        system, remote_path = fsspec.core.url_to_fs(url, **options)
        print(f"fetching {url} to {target}", file=sys.stderr, flush=True)  # asking a host that is away takes a while
        if not system.exists(remote_path):
            raise FileNotFoundError("nothing there")
        shown = TqdmCallback(tqdm_kwargs={"desc": "fetching", "unit": " files", "leave": False, "delay": 2})
        system.get(remote_path.rstrip("/"), str(part), recursive=system.isdir(remote_path), callback=shown)
        part.rename(target)
    except ImportError as e:
        raise UserError(f"{url}: {e}") from None
    except Exception as e:  # every file system raises its own
        raise UserError(f"{url}: can't be fetched ({type(e).__name__}: {' '.join(str(e).split())[:200]})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
    return target
