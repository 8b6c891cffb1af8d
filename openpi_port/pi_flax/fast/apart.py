"""Stacked weights as one array per layer, for training whose layers are written out one after another.

L layers.

In a loop over stacked weights every layer's weights are copied out of the stack, and what the backward pass needs is
copied into another and out again. Written out, the products read and write the arrays themselves; and where gradients
of several parts of a batch are added up, a product adds its own onto the sum as it writes it (cuBLAS's beta), so that
there is one set of gradients and no pass over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_pytree_node_class
class Apart(tuple):
    """The layers of one stacked weight [L, ...]: a pytree of L arrays."""

    def tree_flatten(self) -> tuple[tuple[jax.Array, ...], None]:
        """The arrays, and nothing else."""
        return tuple(self), None

    @classmethod
    def tree_unflatten(cls, _: None, arrays: Sequence[jax.Array]) -> Apart:
        """The way back."""
        return cls(arrays)


def is_apart(x: Any) -> bool:
    """For `is_leaf` of tree functions."""
    return isinstance(x, Apart)


def take(weights: Any, which: int | slice) -> Any:
    """One layer, or several, of all stacked weights in a tree, whether they lie apart or not."""

    def taken(weight: jax.Array | Apart) -> Any:
        found = weight[which]
        return Apart(found) if is_apart(weight) and isinstance(which, slice) else found

    return jax.tree.map(taken, weights, is_leaf=is_apart)


def layers(weight: jax.Array) -> Apart:
    """A stacked weight's layers, to be cast: each is then read from where it lies and written by itself.

    Their numbers are hidden from XLA, which otherwise casts the stack and copies layers out of it.
    """
    numbers = jax.lax.optimization_barrier(jnp.arange(len(weight)))
    return Apart(jax.lax.dynamic_index_in_dim(weight, number, keepdims=False) for number in numbers)


def apart(weight: jax.Array | Apart) -> Apart:
    """A stacked weight's layers, as they are if they lie apart already."""
    return weight if is_apart(weight) else Apart(_unstack(weight))


def together(weights: Any) -> Any:
    """Stacks again what lies apart in a tree.

    Behind a barrier, since XLA computes what is elementwise in several kernels where it puts it into the stacking.
    """

    def stacked(weight: jax.Array | Apart) -> jax.Array:
        return jax.lax.optimization_barrier(jnp.stack(weight)) if is_apart(weight) else weight

    return jax.tree.map(stacked, weights, is_leaf=is_apart)


@jax.custom_vjp
def _unstack(x: jax.Array) -> tuple[jax.Array, ...]:
    """A stack's layers; the gradient is stacked again, not added up from one padded array per layer."""
    return tuple(x[i] for i in range(x.shape[0]))


_unstack.defvjp(lambda x: (_unstack(x), None), lambda _, gradients: (jnp.stack(gradients),))
