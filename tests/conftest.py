"""Shared by all tests: where the golden vectors and the material outside the repository are."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Tests compile much and compute little: without LLVM's expensive passes and MLIR's emitters they take a third of the
# time. jaxlib 0.11 has no other emitters, and ends at a flag that it doesn't know.
QUICK_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1" + " --xla_cpu_use_fusion_emitters=false" * (version("jaxlib") < "0.11")
)

# Both frameworks run on the CPU in one process; tests compare in float32, so nothing may be rounded lower.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", QUICK_COMPILE)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# Its LLVM must come before that of the simulation's OpenGL, see sim/aloha_tasks.py.
if importlib.util.find_spec("triton"):
    importlib.import_module("triton")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a script's background jobs have it, and what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What takes longest begins first, so that no worker is left alone with it at the end.
FIRST = ("test_sharding", "test_train", "test_pi0", "test_parity", "test_lora", "test_eval")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The golden vectors that ship with the repository."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data sets and tokenizers that do not ship; absent in a user's clone, required in CI."""
    path = Path(os.environ.get("OPENPI_PORT_SHARED", ROOT.parent / "shared"))
    if path.is_dir():
        return path
    return _absent(f"{path} is absent (real data sets and tokenizers; set OPENPI_PORT_SHARED)")


@pytest.fixture(scope="module")
def own_caches(tmp_path_factory) -> Iterator[None]:
    """Caches of decoded frames that nothing else has filled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def openpi_client() -> ModuleType:
    """The published client, which pins old versions of what it needs: CI installs it without them."""
    try:
        importlib.import_module("tree")
        importlib.import_module("openpi_client.action_chunk_broker")
        return importlib.import_module("openpi_client.websocket_client_policy")
    except ImportError as error:
        how = "pip install --no-deps openpi-client==0.1.2 dm-tree typing_extensions"
        return _absent(f"the real openpi-client is absent ({error}): {how}")


def _absent(message: str) -> NoReturn:
    if os.environ.get("OPENPI_PORT_REQUIRE_ALL"):
        pytest.fail(message)
    pytest.skip(message)
