"""How prepared models are computed on a device: which attention, which kernels. Chosen by measurement.

XLA's own options are left as they are: on an H100 none that was tried made a chunk faster (docs/performance.md).
"""

from __future__ import annotations

import jax

from openpi_port.config import Compute
from openpi_port.pi_flax.fast import flow as flows
from openpi_port.pi_flax.fast import kernels


def flow(compute: Compute, device: jax.Device) -> flows.Options:
    """The choices of `flow.Options`; the attention is the plain model's."""
    if device.platform == "cpu":
        return flows.Options()
    return flows.Options(fused=compute.attention == "cudnn", align=kernels.PART)
