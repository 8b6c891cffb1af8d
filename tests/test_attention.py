"""Attention backends: each equal to the plain one, in outputs and gradients, wherever a valid token asks.

On a CPU: torch's SDPA as it is, FlexAttention's block mask, splash attention interpreted, and what surrounds cuDNN's
kernel with XLA's in its place. `python -m experiments.bench --only=attention` compares all of them on a GPU.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from frameworks import NAMES, Framework

from openpi_port import masks
from openpi_port.backends import Backend
from openpi_port.config import Compute
from openpi_port.errors import UserError

B, T, N, H = 2, 37, 4, 16


def inputs(queries: int = T, keys: int = T, kv_heads: int = 1):
    rng = np.random.default_rng(0)
    shapes = ((B, queries, N, H), (B, keys, kv_heads, H), (B, keys, kv_heads, H), (B, queries, N * H))
    q, k, v, weight = (rng.standard_normal(s, np.float32) for s in shapes)
    valid = np.ones((B, keys), bool)
    valid[0, 5:11] = valid[1, 30:] = False  # a camera that isn't there, a short prompt
    return q * H**-0.5, k, v, weight, valid


def cases():
    """Name -> queries, keys, mask, which queries count."""
    valid = inputs()[-1]
    starts = np.zeros((B, T), bool)
    starts[:, 20:] = True
    suffix = masks.blocks(np.ones((B, 5), bool), np.array([[True, True, False, False, False]] * B))
    last = masks.Blocks(suffix.queries, np.concatenate([masks.blocks(valid, None).keys, suffix.keys], 1))
    return {
        "full": (T, None, np.ones((B, T), bool)),
        "prefix": (T, masks.blocks(valid, None), valid),
        "suffix": (5, last, np.ones((B, 5), bool)),
        "causal": (T, masks.blocks(valid, starts), valid),
        "dense": (T, masks.attention_mask(valid, starts), valid),
    }


def on_device(mask, framework: Framework):
    if isinstance(mask, masks.Blocks):
        return masks.Blocks(*(None if x is None else framework.array(x) for x in mask))
    return framework.array(mask)


def outcome(name: str, case: str, backend: str, kv_heads: int = 1):
    """Output and gradients, with the outputs of padding queries left out."""
    queries, mask, counts = cases()[case]
    keys = T + queries if case == "suffix" else T
    q, k, v, weight, _ = inputs(queries, keys, kv_heads)
    module, framework = Backend(name).attention, Framework(name)
    weight = weight * counts[..., None]
    mask = None if mask is None else module.prepare(on_device(mask, framework), backend)
    if name == "torch":
        arrays = [framework.array(x).requires_grad_() for x in (q, k, v)]
        out = module.attention(*arrays, mask, backend)
        (out * framework.array(weight)).sum().backward()
        grads = [x.grad for x in arrays]
    else:
        import jax

        def total(q, k, v):
            out = module.attention(q, k, v, mask, backend)
            return (out * weight).sum(), out

        grads, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return framework.numpy(out) * counts[..., None], *map(framework.numpy, grads)


def check(name: str, case: str, backend: str, kv_heads: int = 1) -> None:
    for a, b in zip(outcome(name, case, backend, kv_heads), outcome(name, case, "plain", kv_heads), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("case", cases())
def test_plain_is_the_same_in_both(case):
    for a, b in zip(*(outcome(name, case, "plain") for name in NAMES), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("case", cases())
def test_sdpa(case, kv_heads):
    check("torch", case, "sdpa", kv_heads)


def test_flash_but_its_kernel(monkeypatch):
    """The keys are packed, and garbage in the gradients of those that no query sees stays out."""
    import torch

    module = Backend("torch").attention

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, queries, keys):
            ctx.save_for_backward(q, k, v, queries, keys)
            return attend(q, k, v, queries, keys)

        @staticmethod
        def backward(ctx, gradient):
            *x, queries, keys = ctx.saved_tensors
            with torch.enable_grad():
                x = [part.detach().requires_grad_() for part in x]
                grads = torch.autograd.grad(attend(*x, queries, keys), x, gradient)
            for part in grads[1:]:
                part[keys[-1] :] = torch.nan
            return *grads, None, None

    def attend(q, k, v, queries, keys):
        parts = []
        for b in range(B):
            mine, seen = slice(queries[b], queries[b + 1]), slice(keys[b], keys[b + 1])
            parts.append(module._plain(q[None, mine], k[None, seen], v[None, seen], None)[0].unflatten(-1, (N, H)))
        return torch.cat(parts)

    monkeypatch.setattr(module, "_has_flash", lambda device: True)
    monkeypatch.setattr(
        module, "_flash_kernel", lambda q, k, v, queries, keys, longest: Kernel.apply(q, k, v, queries, keys)
    )
    check("torch", "prefix", "sdpa", kv_heads=2)


@pytest.mark.parametrize("case", cases())
def test_cudnn_but_its_kernel(case, monkeypatch):
    import jax

    def kernel(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return fused(*args, implementation="xla", **kwargs)

    fused = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    check("flax", case, "cudnn")


@pytest.mark.parametrize(("case", "kv_heads"), [("full", 2), ("prefix", 1), ("prefix", 2), ("suffix", 1)])
def test_splash(case, kv_heads):
    check("flax", case, "splash", kv_heads)


@pytest.mark.parametrize("case", ["prefix", "suffix", "causal"])
def test_flex_block_mask(case):
    """Tiles that are listed as whole are whole, and nothing that is seen lies in a tile that isn't listed."""
    framework, module, tile = Framework("torch"), Backend("torch").attention, 8
    queries, mask, _ = cases()[case]
    dense = np.broadcast_to(masks.dense(mask), (B, queries, mask.keys.shape[1]))
    made = module._block_mask(on_device(mask, framework), tile)
    rows, columns = (-(-n // tile) for n in dense.shape[1:])
    for b in range(B):
        for i in range(rows):
            part = set(made.kv_indices[b, 0, i, : made.kv_num_blocks[b, 0, i]].tolist())
            whole = set(made.full_kv_indices[b, 0, i, : made.full_kv_num_blocks[b, 0, i]].tolist())
            for j in range(columns):
                seen = dense[b, i * tile : (i + 1) * tile, j * tile : (j + 1) * tile]
                assert seen.all() if j in whole else (j in part) == seen.any(), (b, i, j)
                assert j not in whole or seen.shape[1] == tile
            for q in range(i * tile, min((i + 1) * tile, queries)):
                row = [bool(made.mask_mod(b, 0, q, k)) for k in range(dense.shape[2])]
                assert row == dense[b, q].tolist()


@pytest.mark.parametrize(("name", "backend"), [("torch", "plain"), ("torch", "sdpa"), ("flax", "plain")])
def test_a_row_without_keys_is_no_nan(name, backend, monkeypatch):
    """A sample with nothing valid: what it gets is of no use, but it spoils no gradient."""
    empty = masks.Blocks(None, np.full((B, T), masks.UNSEEN))
    monkeypatch.setitem(globals(), "cases", lambda: {"empty": (T, empty, np.ones((B, T), bool))})
    assert all(np.isfinite(x).all() for x in outcome(name, "empty", backend))


@pytest.mark.parametrize(
    ("name", "attention"), [("flax", "sdpa"), ("flax", "cudnn"), ("torch", "cudnn"), ("torch", "flex")]
)
def test_what_cannot_be_honoured_is_an_error(name, attention):
    backend = Backend(name)
    resolve = partial(backend.attention.resolve, device=backend.device.find("cpu"))
    assert resolve(Compute()).attention == resolve(Compute(dtype="bfloat16")).attention == "plain"
    with pytest.raises(UserError, match=f"config.compute.attention='{attention}'"):
        resolve(Compute(attention=attention))


def test_blocks_are_the_dense_mask():
    valid = inputs()[-1]
    starts = np.random.default_rng(0).random(valid.shape) < 0.2
    seen = masks.dense(masks.blocks(valid, starts))
    np.testing.assert_array_equal(seen & valid[:, :, None], masks.attention_mask(valid, starts))
    same = masks.dense(masks.blocks(valid, None))
    np.testing.assert_array_equal(same & valid[:, :, None], masks.attention_mask(valid, np.zeros_like(valid)))
