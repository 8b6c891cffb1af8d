"""How prepared models are compiled: which attention, which of XLA's options. Chosen by measurement on an H100.

They are given to the compiler with each program, not through the environment, so that nothing else is compiled
differently, and an option that `XLA_FLAGS` names is the user's.
"""

from __future__ import annotations

import os
from typing import Any

import jax

from openpi_port.config import Compute
from openpi_port.pi_flax.fast import flow as flows

GPU = {
    # One CUDA graph over whatever stands between two host decisions, the loop over the steps included.
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,WHILE",
    "xla_gpu_graph_min_graph_size": 1,
}


def compiler(device: jax.Device) -> dict[str, Any]:
    """XLA's options for a device."""
    theirs = os.environ.get("XLA_FLAGS", "")
    chosen = GPU if device.platform == "gpu" else {}
    return {name: value for name, value in chosen.items() if name not in theirs}


def flow(compute: Compute) -> flows.Options:
    """The choices of `flow.Options`; the attention is the plain model's."""
    return flows.Options(fused=compute.attention == "cudnn")
