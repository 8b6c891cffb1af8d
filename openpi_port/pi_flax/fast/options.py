"""How models are computed on a device: prepared ones' attention and lengths, XLA's options in training.

Chosen by measurement (docs/performance.md). For prepared models XLA's options are left as they are: on an H100 none
that was tried made a chunk faster.
"""

from __future__ import annotations

import jax
from jax.experimental.compilation_cache import compilation_cache

from openpi_port import host, meshes
from openpi_port.config import Compute
from openpi_port.pi_flax.fast import flow as flows

TILE = 128  # of tokens or keys, in an accelerator's products


def flow(compute: Compute, device: jax.Device) -> flows.Options:
    """The choices of `flow.Options`; the attention is the plain model's."""
    if device.platform == "cpu":
        return flows.Options()
    return flows.Options(fused=compute.attention == "cudnn", align=TILE)


def training(device: jax.Device, shape: tuple[int, int]) -> dict[str, bool | int]:
    """XLA's options for a training step on a mesh of that shape (`data`, `fsdp`).

    Products are cuBLAS's; Triton's were no faster. None that read the same are merged: XLA would copy the results apart
    and, where a batch goes through in parts, add them to the sums in passes over memory.

    Where devices hold copies of the state, the scheduler that hides latency takes all memory that is free, to hide a
    sum that takes 2 % of a step (two H200). Off, a run takes what is planned.
    """
    if device.platform != "gpu":
        return {}
    chosen = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
    return chosen | ({"xla_gpu_enable_latency_hiding_scheduler": False} if meshes.copied(shape) else {})


def keep_programs(device: jax.Device) -> None:
    """Keeps what is compiled for an accelerator, and how it was tuned, on disk, so that the next start is quick.

    In `~/.cache/openpi_port/jax`, unless JAX has been given a place of its own (`JAX_COMPILATION_CACHE_DIR`). Not on a
    CPU: its programs are for this very processor, and a home directory may be another's too.
    """
    if device.platform == "cpu" or jax.config.jax_compilation_cache_dir:
        return
    jax.config.update("jax_compilation_cache_dir", str(host.cache() / "openpi_port" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # rounding the weights alone is 50 small ones
    compilation_cache.reset_cache()  # it may have been asked for before, and have remembered that there is none
