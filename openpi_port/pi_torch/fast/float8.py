"""The language model's MLPs in float8 (e4m3: 3 bits of mantissa), on request.

Images and prompt: two thirds of a chunk's operations are these products, and matrix units do them at twice bfloat16's
rate. Generated tokens: most of what is read are these weights, and they have half the bytes; activations stay as they
are. Everything else stays too, and the action expert, which would not be faster. What keeps the numbers in range:

- RMSNorm's scale goes into the weights before they are rounded. What is left of a normed row is at most sqrt(D), so one
  power of two fits all rows, whatever comes.
- Weights have one factor per matrix: a floating point keeps its digits over 15 octaves.
- Every row of GeGLU's output has a factor of its own; the residual takes it back.

M rows, D width, F width of the MLP.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openpi_port.pi_torch.fast import onednn, ops
from openpi_port.pi_torch.fast.ops import Sum
from openpi_port.pi_torch.fast.pack import Block, Norm

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0


class Mlp(NamedTuple):
    """An MLP with the norm before it.

    Attributes:
      gate_up: float8 [2F, D].
      gate_up_factor: float32 [], what takes a product back to its size.
      down: float8 [D, F].
      down_factor: float32 [].
      room: what normed rows are multiplied by.
      one: float32 [], the factor of what needs none.
    """

    gate_up: Tensor
    gate_up_factor: Tensor
    down: Tensor
    down_factor: Tensor
    room: float
    one: Tensor


def pack(block: Block, norm: Norm) -> Mlp:
    """Rounds the weights of a layer's MLP, which follows this norm."""
    room = 2.0 ** math.floor(math.log2(LARGEST / math.sqrt(len(norm.scale))))
    gate_up, gate_up_factor = _round(block.gate_up.float() * norm.scale)
    down, down_factor = _round(block.down.float())
    return Mlp(gate_up, gate_up_factor / room, down, down_factor, room, torch.ones_like(down_factor))


def of_tokens(blocks: list[Block], norms: list[Norm], mlps: list[Mlp]) -> tuple[list[Block], list[Norm]]:
    """The same rounded weights as `flow.run` takes them, with the scales of their norms in them."""
    rounded = [
        block._replace(
            gate_up=mlp.gate_up,
            gate_up_factor=mlp.gate_up_factor * mlp.room,
            down=mlp.down,
            down_factor=mlp.down_factor,
        )
        for block, mlp in zip(blocks, mlps, strict=True)
    ]
    return rounded, [n._replace(scale=torch.ones_like(n.scale)) if i % 2 else n for i, n in enumerate(norms)]


def add_mlp(total: Sum, mlp: Mlp) -> Tensor:
    """`x + MLP(norm(x))`, [M, D], of the sum x, which is overwritten."""
    x, y = rms_norm(total, mlp.room)
    y, factors = geglu(product(y, mlp.gate_up, mlp.gate_up_factor, mlp.one, x.dtype))
    add_(x, product(y, mlp.down, mlp.down_factor, mlp.one, x.dtype), factors)
    return x


def rms_norm(total: Sum, room: float) -> tuple[Tensor, Tensor]:
    """The sum x, [M, D], and `x / rms(x) * room` in float8."""
    x = total.x
    if ops.on_gpu(x):
        from openpi_port.pi_torch.fast.kernels import float8

        return x, float8.rms_norm(total, room)
    x32 = x.float()
    return x, (x32 * (torch.rsqrt(x32.square().mean(-1, keepdim=True) + ops.EPS) * room)).to(FLOAT8)


def product(x: Tensor, w: Tensor, factor: Tensor, one: Tensor, dtype: torch.dtype) -> Tensor:
    """`x @ w.T * factor`: float8 [M, D] and [F, D] to [M, F]."""
    if x.is_cuda and dtype == torch.bfloat16:
        return torch._scaled_mm(x, w.t(), scale_a=one, scale_b=factor, out_dtype=dtype, use_fast_accum=True)
    return F.linear(x.to(dtype), w.to(dtype)) * factor.to(dtype)


def geglu(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.geglu`, each row divided by a factor: [M, 2F] to float8 [M, F] and float32 [M]."""
    if ops.on_gpu(gate_up):
        from openpi_port.pi_torch.fast.kernels import float8

        return float8.geglu(gate_up)
    gate, up = gate_up.float().chunk(2, -1)
    y = onednn.gelu(gate) * up
    factors = y.abs().amax(-1).clamp(min=1e-20) / LARGEST
    return (y / factors[:, None]).to(FLOAT8), factors


def add_(x: Tensor, y: Tensor, factors: Tensor) -> None:
    """`x += y * factors` in place: [M, D], [M, D], float32 [M]."""
    if ops.on_gpu(x):
        from openpi_port.pi_torch.fast.kernels import float8

        float8.add_(x, y, factors)
    else:
        x.add_((y.float() * factors[:, None]).to(x.dtype))


def _round(w: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in float8, and the factor that they are to be multiplied by."""
    factor = w.abs().amax().clamp(min=1e-20) / LARGEST
    return (w / factor).to(FLOAT8), factor
