"""How prepared models are computed on a device: which attention, which kernels. Chosen by measurement.

XLA's own options are left as they are: on an H100 none that was tried made a chunk faster (docs/performance.md).
"""

from __future__ import annotations

from openpi_port.config import Compute
from openpi_port.pi_flax.fast import flow as flows


def flow(compute: Compute) -> flows.Options:
    """The choices of `flow.Options`; the attention is the plain model's."""
    return flows.Options(fused=compute.attention == "cudnn")
