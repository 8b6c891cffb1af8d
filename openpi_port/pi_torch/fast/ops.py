"""The operations of the prepared path: each once in plain torch, which says what it computes, and as a kernel.

bfloat16 on a GPU takes the kernels (`kernels/`); float32 and the CPU take the plain form, in the same algebra.

B batch, T queries, S keys, N heads, H head dim, D width, F width of the MLP, M = B * T rows, P parts of a row.

Rotary pairs lie side by side here (channels 2i and 2i + 1): the rows of the query and key weights are reordered once,
which changes no product of a query with a key.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openpi_port.pi_torch.fast import onednn, tiles
from openpi_port.pi_torch.fast.pack import Entry, GateUp

EPS = 1e-6  # of all norms
MASKED = -1e30  # a forbidden logit


class Residual(NamedTuple):
    """The residual stream before a norm: what the next matrix takes in, and what normalises its product.

    RMSNorm divides whole rows, so `norm(x) @ w == (x * scale) @ w / rms(x)`: the division waits for the product.

    Attributes:
      x: [M, D].
      scaled: [M, D], x times the next norm's scale; in plain torch divided already, which is cheaper there.
      squares: float32 [M, P], sums of x * x over parts of the row; None in plain torch.
      arrived: int32, zeros, on which the kernels count; None in plain torch.
    """

    x: Tensor
    scaled: Tensor
    squares: Tensor | None
    arrived: Tensor | None = None


class Sum(NamedTuple):
    """A residual stream of large products; the norm that follows reads all of it anyway, and adds up.

    Attributes:
      x: [M, D].
      parts: [P, M, D], what is still to be added to x; None for nothing.
    """

    x: Tensor
    parts: Tensor | None = None


class Seen(NamedTuple):
    """Who sees which keys. What may not be seen lies behind what may, so numbers say it.

    Attributes:
      past: int32 [B], keys that all tokens see.
      extra: int32 [T], of the keys behind those, how many each token sees; None for none.
      most: the largest of `extra`.
      bias: the same as plain torch adds it to the logits, [B, 1 or T * N, S]; None where kernels run, and on a CPU
        where all tokens see all of the first `keys`.
      place: where plain torch puts the keys of the tokens, int64 [B * T] of B * S; None where kernels run or without
        `extra`.
      keys: plain torch looks at so many, the first.
    """

    past: Tensor
    extra: Tensor | None
    most: int
    bias: Tensor | None
    place: Tensor | None = None
    keys: int = 0


def on_gpu(x: Tensor) -> bool:
    """Whether there are kernels for tensors like this one."""
    return x.is_cuda and x.dtype == torch.bfloat16


@functools.cache
def _eps(device: torch.device) -> Tensor:
    return torch.tensor(EPS, device=device)


def see(
    past: Tensor, extra: Tensor | None, most: int, keys: int, heads: int, like: Tensor, *, look: bool = True
) -> Seen:
    """Makes a mask of S keys once for all layers, for activations `like`; see `Seen`.

    On a CPU it may look whether there is anything to mask, unless what calls it is to be compiled.
    """
    if on_gpu(like):
        return Seen(past, extra, most, None)
    key, visible, place = torch.arange(keys, device=past.device), past[:, None], None
    if extra is not None:
        first = visible if len(past) == 1 else visible + torch.arange(len(past), device=past.device)[:, None] * keys
        place = (first + key[: len(extra)]).flatten()
        visible = visible + extra.repeat_interleave(heads)
    if look and past.device.type == "cpu":  # no graph is recorded there, so values may be looked at
        keys = int(visible.max())
        if bool((visible == keys).all()):
            return Seen(past, extra, most, None, place, keys)
    mask = key[:keys] < visible[..., None]
    return Seen(past, extra, most, torch.where(mask, 0.0, MASKED).to(like.dtype), place, keys)


def add_linear(x: Tensor, a: Tensor, w: Tensor) -> Sum:
    """`x + a @ w.T`: [M, D], [M, F], [D, F]; x may be overwritten."""
    if on_gpu(x) and (count := tiles.parts(len(x), *w.shape)) > 1:
        return Sum(x, partial_products(a, w, count))
    return Sum(onednn.linear_plus(a, w, x) if w.is_mkldnn else x.addmm_(a, w.t()))


def partial_products(a: Tensor, w: Tensor, count: int) -> Tensor:
    """`a @ w.T` as so many products over parts of F, [P, M, D]: they fill a GPU that one would not."""
    left, right = (t.unflatten(1, (count, -1)).transpose(0, 1) for t in (a, w))
    return torch.bmm(left, right.mT)


def linear_gelu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """`gelu(x @ w.T + b)`, tanh form: [M, D], [F, D], [F] to [M, F]."""
    if on_gpu(x):
        if hasattr(torch, "_addmm_activation"):  # cuBLASLt's epilogue (in the tanh form), which nothing public reaches
            return torch._addmm_activation(b, x, w.t(), use_gelu=True)
        return F.gelu(F.linear(x, w, b), approximate="tanh")
    return onednn.linear_gelu(x, w, b)


def layer_norm(total: Sum, offset: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The sum x, [M, D], and LayerNorm of `x + offset`, in float32; the others are float32 [D]."""
    x = total.x
    if on_gpu(x):
        from openpi_port.pi_torch.fast import kernels

        return x, kernels.layer_norm(total, offset, scale, bias)
    return x, F.layer_norm(x.float() + offset, scale.shape, scale, bias, EPS).to(x.dtype)


def rms_norm(total: Sum, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The sum x, [M, D], and `x / rms(x) * scale`, in float32; the scale is float32 [D]."""
    x = total.x
    if on_gpu(x):
        from openpi_port.pi_torch.fast import kernels

        return x, kernels.rms_norm(total, scale)
    x32 = x.float()
    if torch.compiler.is_compiling():  # one loop, so not in the fewest operations
        return x, (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS) * scale).to(x.dtype)
    norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
    norm = torch.addcmul(_eps(x.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return x, (x32 * norm).mul_(scale).to(x.dtype)


def geglu(gate_up: Tensor) -> Tensor:
    """`gelu(gate) * up`, tanh form: [M, 2F] to [M, F]."""
    if on_gpu(gate_up):
        from openpi_port.pi_torch.fast import kernels

        return kernels.geglu(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return onednn.gelu(gate).mul_(up)


def linear_geglu(x: Tensor, w: Tensor | GateUp, bias: Tensor | None = None) -> Tensor:
    """`geglu(x @ w.T + bias)`: [M, D], [2F, D], the gate's rows first, and [2F] to [M, F]."""
    if not isinstance(w, GateUp):
        return geglu(F.linear(x, w, bias))
    gate, up = (None, None) if bias is None else bias.chunk(2)
    return onednn.linear_times(x, w.up, up, onednn.linear_gelu(x, w.gate, gate))


def rotate_qkv(qkv: Tensor, turns: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary embedding of neighbouring pairs, in float32.

    Args:
      qkv: [M, (N + 2) * H]; float32 is overwritten.
      turns: float32 [M, H/2, 2], cos and sin.
      dim: H.

    Returns:
      Rotated queries [M, N * H], rotated keys [M, H] in float32, and values [M, H].
    """
    x = qkv.float()
    if torch.compiler.is_compiling():  # has no loops of complex numbers
        a, b = x[:, :-dim].view(x.shape[0], -1, dim // 2, 2).unbind(-1)
        cos, sin = turns[:, None].unbind(-1)
        y = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).view(x.shape[0], -1)
        return y[:, :-dim].to(qkv.dtype), y[:, -dim:], qkv[:, -dim:]
    pairs = torch.view_as_complex(x.view(x.shape[0], -1, dim // 2, 2))
    pairs[:, :-1].mul_(torch.view_as_complex(turns)[:, None])
    return x[:, : -2 * dim].to(qkv.dtype), x[:, -2 * dim : -dim], qkv[:, -dim:]


def split_qkv(qkv: Tensor, turns: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rotates queries and keys and puts keys and values where they belong.

    Args:
      qkv: [M, (N + 2) * H], or [M, 2 * H] without queries; overwritten.
      turns: float32 [M, H/2, 2], cos and sin of every row's angles.
      k, v: [B, S, H], of which the first are written.

    Returns:
      Queries [M, N * H].
    """
    if on_gpu(qkv):
        from openpi_port.pi_torch.fast import kernels

        return kernels.split_qkv(qkv, turns, k, v)
    q, keys, values = rotate_qkv(qkv, turns, k.shape[2])
    for cache, new in ((k, keys), (v, values)):
        cache[:, : new.shape[0] // len(cache)] = new.unflatten(0, (len(cache), -1))
    return q


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    """Attention of all heads to one head of keys and values; queries come scaled.

    Args:
      q: [M, N * H].
      k, v: [B, S, H].
      seen: which keys.

    Returns:
      [M, N * H].
    """
    if on_gpu(q):
        from openpi_port.pi_torch.fast import kernels

        return kernels.attend(q, k, v, seen)
    rows = q.reshape(len(k), -1, k.shape[2])  # heads share keys, so they are rows
    k, v = k[:, : seen.keys], v[:, : seen.keys]
    by_key = k.transpose(1, 2)
    logits = torch.bmm(rows, by_key) if seen.bias is None else torch.baddbmm(seen.bias, rows, by_key)
    return torch.bmm(logits.softmax(-1), v).reshape(q.shape)


def attend_all(qkv: Tensor, size: int, heads: int) -> Tensor:
    """Attention of every row of a sample to all its rows: [B * T, 3 * N * H] to [B * T, N * H]; queries come scaled."""
    if on_gpu(qkv):
        from openpi_port.pi_torch.fast import kernels

        return kernels.attend_all(qkv, size, heads)
    q, k, v = qkv.view(size, -1, 3, heads, qkv.shape[1] // (3 * heads)).transpose(1, 3).unbind(2)
    return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(len(qkv), -1)


def start(x: Tensor, scale: Tensor) -> Residual:
    """The stream as it enters: [M, D], with the first norm's scale, float32 [D]."""
    if on_gpu(x):
        from openpi_port.pi_torch.fast import kernels

        return kernels.start(x, scale)
    return Residual(*rms_norm(Sum(x), scale), None)


def normed_linear(stream: Residual, w: Tensor, bias: Tensor | None) -> Tensor:
    """`norm(x) @ w.T + bias`: w [F, D], bias float32 [F] or None; [M, F], in float32 with a bias."""
    x = stream.scaled
    if stream.squares is not None:
        x = x * torch.rsqrt(stream.squares.sum(-1, keepdim=True) / w.shape[1] + EPS)
    y = F.linear(x.to(w.dtype), w)
    return y if bias is None else y + bias


def normed_qkv(
    stream: Residual, w: Tensor, bias: Tensor | None, turns: Tensor, k: Tensor, v: Tensor, seen: Seen
) -> Tensor:
    """`split_qkv` of `normed_linear`, but keys and values go behind those that all tokens see."""
    if on_gpu(stream.x):
        from openpi_port.pi_torch.fast import kernels

        return kernels.normed_qkv(stream, w, bias, turns, k, v, seen.past)
    qkv = onednn.linear(stream.scaled, w, None if bias is None else bias.to(stream.x.dtype))
    q, keys, values = rotate_qkv(qkv, turns, k.shape[2])
    for cache, new in ((k, keys), (v, values)):
        if len(cache) == 1 and seen.bias is None:
            cache[0, seen.keys - len(new) : seen.keys].copy_(new)
        else:
            cache.flatten(0, 1).index_copy_(0, seen.place, new.to(cache.dtype))
    return q


def normed_geglu(stream: Residual, w: Tensor | GateUp, bias: Tensor | None, factor: Tensor | None = None) -> Tensor:
    """`geglu` of `normed_linear`: w [2F, D], the gate's rows first, times `factor` where it is float8; [M, F]."""
    if on_gpu(stream.x):
        from openpi_port.pi_torch.fast import kernels

        return kernels.normed_geglu(stream, w, bias, factor)
    return linear_geglu(stream.scaled, _widened(w, factor, stream.x), None if bias is None else bias.to(stream.x.dtype))


def _widened(w: Tensor | GateUp, factor: Tensor | None, like: Tensor) -> Tensor | GateUp:
    return w if factor is None else w.to(like.dtype) * factor


def add_projected(
    stream: Residual, a: Tensor, w: Tensor, gate: Tensor | None, scale: Tensor, factor: Tensor | None = None
) -> Residual:
    """The stream after `x + (a @ w.T) * gate`, made ready for the norm that follows.

    Args:
      stream: before; only x counts.
      a: [M, F].
      w: [D, F].
      gate: float32 [D], or None for 1.
      scale: float32 [D], the next norm's.
      factor: float32 [], of w where that is float8.
    """
    if on_gpu(a):
        from openpi_port.pi_torch.fast import kernels

        return kernels.add_projected(stream, a, w, gate, scale, factor)
    w = _widened(w, factor, a)
    if gate is None:
        return start(onednn.linear_plus(a, w, stream.x), scale)
    return start(stream.x + (onednn.linear(a, w) * gate).to(a.dtype), scale)


def lift(x_t: Tensor, first: Tensor, bias: Tensor, tokens: int, *, swish: bool, dtype: torch.dtype) -> Residual:
    """Noisy actions to the expert's width: `x_t @ first.T + bias`, then swish if asked for.

    Args:
      x_t: float32 [B, A, J].
      first: float32 [D, J].
      bias: float32 [D].
      tokens: T per sample; those before the actions become zeros.
      swish: see above.
      dtype: of what is returned.

    Returns:
      x alone, [B * T, D].
    """
    if on_gpu(x_t.new_empty(0, dtype=dtype)):
        from openpi_port.pi_torch.fast import kernels

        return kernels.lift(x_t, first, bias, tokens, swish=swish, dtype=dtype)
    x = F.linear(x_t, first, bias)
    x = (F.silu(x) if swish else x).to(dtype)
    if tokens > x.shape[1]:
        x = F.pad(x, (0, 0, tokens - x.shape[1], 0))
    x = x.flatten(0, 1)
    return Residual(x, x, None)


def enter(x_t: Tensor, base: Tensor | None, entry: Entry, bias: Tensor, scale: Tensor, dtype: torch.dtype) -> Residual:
    """Noisy actions to the expert's stream.

    Args:
      x_t: float32 [B, A, J].
      base: [B * T, D], what `entry.w` adds to: the state's token and the bias; None where there is no `entry.w`.
      entry: the weights.
      bias: float32 [D], the step's.
      scale: float32 [D], the first norm's.
      dtype: of the stream.
    """
    if base is None:
        return start(lift(x_t, entry.first, bias, x_t.shape[1], swish=False, dtype=dtype).x, scale)
    hidden = lift(x_t, entry.first, bias, len(base) // len(x_t), swish=True, dtype=dtype)
    return add_projected(hidden._replace(x=base), hidden.x, entry.w, None, scale)


def leave(stream: Residual, w: Tensor, bias: Tensor, x_t: Tensor, dt: float) -> Tensor:
    """The Euler step, `x_t + dt * (norm(x) @ w.T + bias)` of the actions' rows: w [J, D], x_t float32 [B, A, J]."""
    if on_gpu(stream.x):
        from openpi_port.pi_torch.fast import kernels

        return kernels.leave(stream, w, bias, x_t, dt)
    v_t = normed_linear(stream, w, bias).unflatten(0, (len(x_t), -1))
    return x_t + dt * v_t[:, -x_t.shape[1] :]
