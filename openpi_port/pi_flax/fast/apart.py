"""Stacked weights in pieces, for training: one array per layer where layers are written out one after another.

L layers.

In a loop over stacked weights every layer's weights are copied out of the stack, and what the backward pass needs is
copied into another and out again. Written out, the products read and write the arrays themselves; and where gradients
of several parts of a batch are added up, a product adds its own onto the sum as it writes it (cuBLAS's beta), so that
there is one set of gradients and no pass over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


@jax.tree_util.register_pytree_node_class
class Cut(Apart):
    """All layers but the last [L - 1, ...], and the last [1, ...], of one stacked weight."""


def is_apart(x: Any) -> bool:
    """For `is_leaf` of tree functions."""
    return isinstance(x, Apart)


def cut(weight: jax.Array) -> Cut:
    """A stacked weight in two."""
    return Cut((weight[:-1], weight[-1:]))


def but_last(weights: Any) -> Any:
    """All layers but the last of all stacked weights in a tree, however they lie."""
    return _taken(weights, lambda both: both[0], slice(-1))


def last(weights: Any) -> Any:
    """The last layer of all stacked weights in a tree, however they lie."""
    return _taken(weights, lambda both: both[1][0], -1)


def _taken(weights: Any, of_two: Callable[[Cut], jax.Array], which: int | slice) -> Any:
    def taken(weight: jax.Array | Apart) -> Any:
        if isinstance(weight, Cut):
            return of_two(weight)
        return Apart(weight[which]) if is_apart(weight) and isinstance(which, slice) else weight[which]

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
        if not is_apart(weight):
            return weight
        return jax.lax.optimization_barrier(_joined(weight) if isinstance(weight, Cut) else jnp.stack(weight))

    return jax.tree.map(stacked, weights, is_leaf=is_apart)


def joined(weights: Any) -> Any:
    """Makes one array again of what is cut in two, for a loop over all layers: XLA drops those that it doesn't read."""
    return jax.tree.map(lambda weight: _joined(weight) if is_apart(weight) else weight, weights, is_leaf=is_apart)


def _joined(weight: Cut) -> jax.Array:
    return jnp.concatenate(weight)


@jax.custom_vjp
def _unstack(x: jax.Array) -> tuple[jax.Array, ...]:
    """A stack's layers; the gradient is stacked again, not added up from one padded array per layer."""
    return tuple(x[i] for i in range(x.shape[0]))


_unstack.defvjp(lambda x: (_unstack(x), None), lambda _, gradients: (jnp.stack(gradients),))
