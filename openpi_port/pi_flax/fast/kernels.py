"""Two Triton kernels (through Pallas) for the few rows of a denoising step, where XLA's products leave the chip idle.

R rows, S keys, H head dim, D width, F width of the MLP, P parts of the keys.

A step has 50 rows: its time is that of reading weights and of starting kernels. So the first product of the MLP makes
both halves and joins them, and attention is split along the keys, to have work for every multiprocessor.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

MASKED = -1e30
MOST_ROWS = 64  # of `glu`
ROWS = 16  # the least that a matrix unit takes
PART = 128  # keys per program
COLUMNS, INNER = 32, 128  # of a tile of the MLP's weights


def glu(x: jax.Array, gate_up: jax.Array, *, interpret: bool = False) -> jax.Array:
    """`gelu(x @ gate) * (x @ up)` for few rows.

    Args:
      x: [R, D], R at most `MOST_ROWS`; D a multiple of `INNER`.
      gate_up: [D, 2F]; F a multiple of `COLUMNS`.
      interpret: on a CPU, for tests.

    Returns:
      [R, F] in the dtype of x.
    """
    rows, width = x.shape
    half = gate_up.shape[1] // 2
    padded = max(ROWS, pl.next_power_of_2(rows))
    return pl.pallas_call(
        functools.partial(_glu, padded=padded),
        grid=(half // COLUMNS,),
        in_specs=[pl.BlockSpec(a.shape, lambda i: (0, 0)) for a in (x, gate_up)],
        out_specs=pl.BlockSpec((rows, half), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, half), x.dtype),
        **_where(interpret, warps=4, stages=4),
    )(x, gate_up)


def _glu(x_ref, w_ref, out_ref, *, padded: int) -> None:
    rows, width = x_ref.shape
    half = w_ref.shape[1] // 2
    columns = pl.ds(pl.program_id(0) * COLUMNS, COLUMNS)
    others = pl.ds(half + pl.program_id(0) * COLUMNS, COLUMNS)
    there = jax.lax.broadcasted_iota(jnp.int32, (padded, 1), 0) < rows

    def body(i, sums):
        inner = pl.ds(i * INNER, INNER)
        x = _load(x_ref, (pl.ds(0, padded), inner), there, (padded, INNER))
        return tuple(s + _dot(x, w_ref[inner, c]) for s, c in zip(sums, (columns, others), strict=True))

    zero = jnp.zeros((padded, COLUMNS), jnp.float32)
    gate, up = jax.lax.fori_loop(0, width // INNER, body, (zero, zero))
    out = (jax.nn.gelu(gate, approximate=True) * up).astype(out_ref.dtype)
    triton.store(out_ref.at[pl.ds(0, padded), columns], out, mask=jnp.broadcast_to(there, out.shape))


def attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Softmax attention of rows that share their keys.

    Args:
      q: [R, H], R a multiple of `ROWS`.
      k, v: [S, H], S a multiple of `PART`.
      seen: bool [S].
      interpret: on a CPU, for tests.

    Returns:
      [R, H] in the dtype of q.
    """
    (rows, dim), parts = q.shape, k.shape[0] // PART
    per_row = pl.BlockSpec((None, ROWS), lambda i, j: (j, i))
    sums, peak, total = pl.pallas_call(
        _attend,
        grid=(rows // ROWS, parts),
        in_specs=[
            pl.BlockSpec((ROWS, dim), lambda i, j: (i, 0)),
            pl.BlockSpec((PART, dim), lambda i, j: (j, 0)),
            pl.BlockSpec((PART, dim), lambda i, j: (j, 0)),
            pl.BlockSpec((PART,), lambda i, j: (j,)),
        ],
        out_specs=[pl.BlockSpec((None, ROWS, dim), lambda i, j: (j, i, 0)), per_row, per_row],
        out_shape=[jax.ShapeDtypeStruct((parts, rows, *d), jnp.float32) for d in ((dim,), (), ())],
        **_where(interpret, warps=4, stages=2),
    )(q, k, v, seen.astype(jnp.int32))
    weight = jnp.exp(peak - peak.max(0))
    return ((sums * weight[..., None]).sum(0) / (total * weight).sum(0)[:, None]).astype(q.dtype)


def _attend(q_ref, k_ref, v_ref, seen_ref, sums_ref, peak_ref, total_ref) -> None:
    logits = _dot(q_ref[...], k_ref[...].T) * q_ref.shape[1] ** -0.5
    logits = jnp.where(seen_ref[...][None] > 0, logits, MASKED)
    peak = logits.max(1)
    probs = jnp.exp(logits - peak[:, None])
    sums_ref[...] = _dot(probs.astype(v_ref.dtype), v_ref[...])
    peak_ref[...] = peak
    total_ref[...] = probs.sum(1)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _load(ref, where: tuple, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return triton.load(ref.at[where], mask=jnp.broadcast_to(mask, shape), other=0.0)


def _where(interpret: bool, *, warps: int, stages: int) -> dict:
    if interpret:
        return {"interpret": True}
    return {"compiler_params": triton.CompilerParams(num_warps=warps, num_stages=stages)}
