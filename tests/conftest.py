"""Shared by all tests: where the golden vectors and the material outside the repository are."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

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

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a script's background jobs have it, and what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
    message = f"{path} is absent (real data sets and tokenizers; set OPENPI_PORT_SHARED)"
    if os.environ.get("OPENPI_PORT_REQUIRE_SHARED"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="module")
def own_caches(tmp_path_factory) -> Iterator[None]:
    """Caches of decoded frames that nothing else has filled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
