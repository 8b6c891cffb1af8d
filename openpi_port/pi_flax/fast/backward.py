"""Operations and gradients in the form in which XLA computes them fastest on a GPU.

B batch, T tokens, D width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


@jax.custom_vjp
def add_to_each(x: jax.Array, table: jax.Array) -> jax.Array:
    """x [B, T, D] + table [T, D]; the table's gradient is a product of matrices, not a sum over samples.

    For that sum XLA would lay out all activations and gradients that lead there with the samples last, and transpose
    them for every product.
    """
    return x + table


def _add_to_each_backward(table: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    size, length, width = gradient.shape
    where = jnp.tile(jnp.eye(length, dtype=gradient.dtype), (size, 1))  # [B * T, T]
    return gradient, (where.T @ gradient.reshape(-1, width)).astype(table.dtype)


add_to_each.defvjp(lambda x, table: (x + table, table), _add_to_each_backward)


def gelu(x: jax.Array) -> jax.Array:
    """The tanh form, in float32, from the logistic function: (1 + tanh(u)) / 2 is logistic(2 u), and cheaper."""
    x32 = x.astype(jnp.float32)
    u = x32 * (math.sqrt(2 / math.pi) * (1 + 0.044715 * x32 * x32))
    return (x32 * jax.nn.sigmoid(2 * u)).astype(x.dtype)


@jax.custom_vjp
def finished(x: jax.Array) -> jax.Array:
    """x, whose gradient is computed once and then read.

    For the input of an activation function that comes out of a product with a bias. Otherwise XLA puts the activation's
    derivative and the sum for the bias into one kernel, which reads and writes half as much again.
    """
    return x


finished.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))


@jax.custom_vjp
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., D] with mean 0 and variance 1, scaled and shifted, computed in float32.

    The gradients of scale and bias are summed from x and the gradient by themselves. What they share with the gradient
    of x would be written to memory in float32.
    """
    return _layer_norm(x, scale, bias)[0]


def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x32 - mean).mean(-1, keepdims=True) + 1e-6)
    normed = (x32 - mean) * inverse
    return (normed * scale + bias).astype(x.dtype), (x, mean, inverse, scale, bias)


def _layer_norm_backward(saved: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse, scale, bias = saved

    def read(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:  # anew, for each of the two passes
        x, gradient = (part.astype(jnp.float32) for part in jax.lax.optimization_barrier((x, gradient)))
        return (x - mean) * inverse, gradient

    gradient = jax.lax.optimization_barrier(gradient)
    normed, of_y = read(x, gradient)
    of_normed = of_y * scale
    along = (of_normed * normed).mean(-1, keepdims=True)
    of_x = inverse * (of_normed - of_normed.mean(-1, keepdims=True) - normed * along)
    normed, of_y = read(x, gradient)
    rows = tuple(range(x.ndim - 1))
    of_scale, of_bias = (of_y * normed).sum(rows), of_y.sum(rows)
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


layer_norm.defvjp(_layer_norm, _layer_norm_backward)
