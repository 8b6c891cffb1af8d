"""What makes Flax's training fast: gradients of its own are what JAX derives from the plain formulas."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from openpi_port.pi_flax.attention import attention
from openpi_port.pi_flax.fast import attend, backward, options
from openpi_port.pi_flax.fast.copies import add_up


def normals(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(1 + 2 * rng.standard_normal(shape, np.float32)) for shape in shapes]


def masked(q, k, v):
    mask = jnp.arange(k.shape[1]) < 6
    logits = jnp.where(mask, jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, 4, 2)), -1e30)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), jnp.repeat(v, 4, 2)).reshape(*q.shape[:2], -1)


def attended(backend):
    def attended(q, k, v):
        return attention(q, k, v, jnp.broadcast_to(jnp.arange(7) < 6, (2, 5, 7)), backend)

    return attended


def layer_norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6) * scale + bias


@jax.custom_vjp
def by_products(q, k, v):
    return masked(q, k, v)


def by_products_backward(operands, gradient):
    q, k, v = operands
    out, gradient = (x.reshape(q.shape) for x in (masked(q, k, v), gradient))
    logits = jnp.einsum("btnh,bsh->bnts", q, k[:, :6, 0])
    return attend.gradients(*operands, jnp.full(2, 6), out, jax.nn.logsumexp(logits, -1), gradient, 1.0)


by_products.defvjp(lambda *x: (by_products(*x), x), by_products_backward)


@pytest.mark.parametrize(
    ("name", "found", "expected", "shapes"),
    [
        ("layer norm", backward.layer_norm, layer_norm, [(3, 5, 16), (16,), (16,)]),
        ("positions", backward.add_to_each, lambda x, table: x + table, [(3, 5, 16), (5, 16)]),
        ("gelu", backward.gelu, lambda x: jax.nn.gelu(x, approximate=True), [(3, 16)]),
        ("finished", backward.finished, lambda x: x, [(3, 16)]),
        ("plain attention", attended("plain"), masked, [(2, 5, 4, 8), (2, 7, 1, 8), (2, 7, 1, 8)]),
        ("attention by products", by_products, masked, [(2, 5, 4, 8), (2, 7, 1, 8), (2, 7, 1, 8)]),
        ("few queries, keys padded", attended("cudnn"), masked, [(2, 5, 4, 8), (2, 7, 1, 8), (2, 7, 1, 8)]),
    ],
)
def test_values_and_gradients(name, found, expected, shapes):
    operands = normals(*shapes)
    weight = normals(expected(*operands).shape)[0]
    for function in (lambda f: f(*operands), lambda f: gradients(f, operands, weight)):
        for a, b in zip(jax.tree.leaves(function(found)), jax.tree.leaves(function(expected)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()), err_msg=name)


def gradients(function, operands, weight):
    return jax.grad(lambda *x: (function(*x) * weight).sum(), tuple(range(len(operands))))(*operands)


def test_options_are_known_to_xla():
    """XLA refuses a name that it doesn't know, also one for GPUs on a CPU."""
    gpu, cpu = SimpleNamespace(platform="gpu"), jax.devices("cpu")[0]
    for shape in ((1, 1), (2, 1), (1, 2)):
        chosen = options.training(gpu, shape)
        assert ("xla_gpu_enable_latency_hiding_scheduler" in chosen) == (shape == (2, 1))
        assert jax.jit(lambda x: 2 * x, compiler_options=chosen)(1.0) == 2
    assert options.training(cpu, (2, 1)) == {}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_devices_add_up_after_the_backward_pass(dtype):
    """No sum over devices begins before the last gradient is there; that the sums are right: tests/test_sharding.py."""

    def summed(trained, frozen, batch, counted):
        return jax.grad(lambda w: ((batch @ w[0] + frozen) @ w[1]).sum() / counted)(trained)

    w, b = jnp.ones((3, 3), jnp.bfloat16), np.ones((4, 3), np.float32)
    mesh = AbstractMesh((2, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    lowered = jax.jit(add_up(summed, mesh, dtype)).trace((w, w), w[0], b, 4.0).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert {str(x.dtype) for x in lowered.out_info} == {dtype}
    assert text.count('all_reduce"(') == 2
    assert text.rindex("dot_general") < text.index("optimization_barrier") < text.index('all_reduce"(')
