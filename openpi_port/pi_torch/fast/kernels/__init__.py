"""Triton kernels for bfloat16 on a GPU; `ops.py` says what each computes, under the same name."""

from openpi_port.pi_torch.fast.kernels.attention import attend, attend_all
from openpi_port.pi_torch.fast.kernels.ends import leave, lift
from openpi_port.pi_torch.fast.kernels.rows import geglu, layer_norm, rms_norm, split_qkv, start
from openpi_port.pi_torch.fast.kernels.stream import add_projected, normed_geglu, normed_qkv

__all__ = [
    "add_projected",
    "attend",
    "attend_all",
    "geglu",
    "layer_norm",
    "leave",
    "lift",
    "normed_geglu",
    "normed_qkv",
    "rms_norm",
    "split_qkv",
    "start",
]
