"""How prepared models are computed on a device: which attention, which lengths. Chosen by measurement.

XLA's own options are left as they are: on an H100 none that was tried made a chunk faster (docs/performance.md).
"""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from openpi_port.config import Compute
from openpi_port.pi_flax.fast import flow as flows

TILE = 128  # of tokens or keys, in an accelerator's products


def flow(compute: Compute, device: jax.Device) -> flows.Options:
    """The choices of `flow.Options`; the attention is the plain model's."""
    if device.platform == "cpu":
        return flows.Options()
    return flows.Options(fused=compute.attention == "cudnn", align=TILE)


def keep_programs(device: jax.Device) -> None:
    """Keeps what is compiled for an accelerator, and how it was tuned, on disk, so that the next start is quick.

    In `~/.cache/openpi_port/jax`, unless JAX has been given a place of its own (`JAX_COMPILATION_CACHE_DIR`). Not on a
    CPU: its programs are for this very processor, and a home directory may be another's too.
    """
    if device.platform == "cpu" or jax.config.jax_compilation_cache_dir:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "openpi_port" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # rounding the weights alone is 50 small ones
    compilation_cache.reset_cache()  # it may have been asked for before, and have remembered that there is none
