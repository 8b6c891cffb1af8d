"""Products with weights on a CPU by oneDNN: weights laid out once, and what follows a product in the same pass.

A weight that was laid out has its shape and dtype, but no strides; only the functions here take it. They take plain
weights too (a GPU's, a large model's, or a CPU's that has no oneDNN) and then compute the same in plain torch.

A call takes 13 microseconds more than one of MKL. It pays for `mini` too: both cores take part, bfloat16 goes at twice
the rate where the CPU has it (AVX512-BF16, AMX), and gelu, factors and residuals cost next to nothing.

M rows, D width, F width after the product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from openpi_port.pi_torch.fast.pack import Block, GateUp, Vision

MOST = 2**30  # bytes of a model's weights, which lie there twice then
_OPS = torch.ops.mkldnn  # what torch's own compiler calls for products on a CPU; not public, so they may be absent
_NEEDED = "_is_mkldnn_bf16_supported", "_linear_pointwise", "_reorder_linear_weight"


def takes(module: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether a module's weights are to be laid out, for products in this dtype."""
    size = sum(p.numel() for p in module.parameters()) * dtype.itemsize
    if next(module.parameters()).device.type != "cpu" or size > MOST or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(_OPS, name) for name in _NEEDED):
        return False
    return dtype == torch.float32 or _OPS._is_mkldnn_bf16_supported()


def lay_out(w: Tensor) -> Tensor:
    """A weight [F, D] as oneDNN reads it fastest."""
    return _OPS._reorder_linear_weight(w.contiguous(), None)


def lay_out_vision(vision: Vision) -> Vision:
    """The weights of a vision transformer, laid out."""
    names = ("qkv", "o", "up", "down")
    layers = [layer._replace(**{name: lay_out(getattr(layer, name)) for name in names}) for layer in vision.layers]
    return vision._replace(patch=lay_out(vision.patch), layers=layers, head=lay_out(vision.head))


def lay_out_block(block: Block) -> Block:
    """The weights of a layer, laid out; gate and up apart, since they are multiplied as up is computed."""
    gate_up = GateUp(*(lay_out(half) for half in block.gate_up.chunk(2)))
    return Block(lay_out(block.qkv), lay_out(block.o), gate_up, lay_out(block.down))


def plain_block(block: Block) -> Block:
    """The weights of a layer as they were before `lay_out_block`."""
    dense = [w.to_dense() if w.is_mkldnn else w for w in (block.qkv, block.o, block.down)]
    gate_up = block.gate_up
    if isinstance(gate_up, GateUp):
        gate_up = torch.cat([half.to_dense() for half in gate_up])
    return Block(dense[0], dense[1], gate_up, dense[2])


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ w.T + bias`: [M, D], [F, D] and [F] to [M, F]."""
    return _OPS._linear_pointwise(x, w, bias, "none", [], "") if w.is_mkldnn else F.linear(x, w, bias)


def linear_gelu(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gelu(x @ w.T + bias)`, tanh form."""
    if w.is_mkldnn:
        return _OPS._linear_pointwise(x, w, bias, "gelu", [], "tanh")
    return gelu(F.linear(x, w, bias))


def linear_times(x: Tensor, w: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    """`(x @ w.T + bias) * other`, [M, F]."""
    return _OPS._linear_pointwise.binary(x, other, w, bias, "mul") if w.is_mkldnn else F.linear(x, w, bias) * other


def linear_plus(x: Tensor, w: Tensor, other: Tensor) -> Tensor:
    """`x @ w.T + other`, [M, F]."""
    return _OPS._linear_pointwise.binary(x, other, w, None, "add") if w.is_mkldnn else torch.addmm(other, x, w.t())


def gelu(x: Tensor) -> Tensor:
    """The tanh form, `x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x ** 3))`: a CPU has no fast tanh."""
    y = x * x
    return y.mul_(1.5957691216057308 * 0.044715).add_(1.5957691216057308).mul_(x).sigmoid_().mul_(x)
