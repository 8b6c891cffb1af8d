"""One optimizer step: loss, gradient, clipping, AdamW, moving average; and the state that goes to disk.

B batch, A actions in a chunk.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from openpi_port import batch as batches
from openpi_port import config as configs
from openpi_port import memory, meshes, strict
from openpi_port.batch import Batch
from openpi_port.config import Compute
from openpi_port.config import Train as Config
from openpi_port.errors import UserError
from openpi_port.pi_flax import attention, insulated
from openpi_port.pi_flax import device as devices
from openpi_port.pi_flax.fast import options
from openpi_port.pi_flax.fast.apart import cut, layers, together
from openpi_port.pi_flax.fast.copies import add_up
from openpi_port.pi_flax.infer import build
from openpi_port.pi_flax.layers import lowered
from openpi_port.pi_flax.pi0_fast import Pi0Fast
from openpi_port.pi_flax.sharding import Layout
from openpi_port.schedule import learning_rate


class State(NamedTuple):
    """Everything that a step reads and writes."""

    trained: nnx.State
    frozen: nnx.State
    optimizer: optax.OptState
    average: nnx.State | None


class Trainer:
    """A model in training.

    Attributes:
      config: the run, with what is "auto" of remat, gradients and compile settled.
      step: number of optimizer steps done.
    """

    def __init__(self, config: Config, weights: Mapping[str, np.ndarray], device: str | None = None) -> None:
        """Fills a model with `weights` (by Flax path, all of them) and makes a fresh optimizer state."""
        self._layout = Layout(config, device)
        kind, (_, room) = devices.kind(self._layout.device), devices.describe(self._layout.device)
        config = memory.settle(memory.written(config, kind), self._layout.shape, room)
        self.config = config
        self.step = 0
        options.keep_programs(self._layout.device)
        compute = attention.resolve(config.compute, self._layout.device)
        if compute.compile not in ("scan", "unrolled"):
            raise UserError(f"config.compute.compile={compute.compile!r}: Flax has auto, scan, unrolled")
        self._compute = compute
        self._keys = batches.training(config.model, insulate=config.insulate)
        module = self._layout.fill(build(config.model, compute), weights)
        self._graph, trained, frozen = nnx.split(module, partial(is_trained, config), ...)
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(config.optimizer.clip_norm),
            optax.scale_by_adam(config.optimizer.b1, config.optimizer.b2, config.optimizer.eps),
            optax.add_decayed_weights(config.optimizer.weight_decay),
        )
        where, whole = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(trained)}, self._layout.whole
        likewise = jax.tree.map(lambda leaf: where.get(leaf.shape, whole), jax.eval_shape(self._fresh, trained))
        self._state = State(trained, frozen, *jax.jit(self._fresh, out_shardings=likewise)(trained))
        stay = jax.tree.map(lambda leaf: leaf.sharding, self._state)
        how = options.training(self._layout.device, self._layout.shape)
        self._update = jax.jit(self._update_fn, donate_argnums=0, out_shardings=(stay, whole), compiler_options=how)
        self._evaluate = jax.jit(self._evaluate_fn, out_shardings=whole)

    def update(self, batch: Batch) -> dict[str, Any]:
        """One optimizer step on this process's part of a batch; returns scalars that are still being computed."""
        batch = self._layout.put(batches.leave_out(batches.select(batch, self._keys), self.config.cameras))
        rate = np.float32(learning_rate(self.step, self.config.optimizer))
        with self._surroundings():
            self._state, metrics = self._update(self._state, batch, rate)
        self.step += 1
        return metrics

    def evaluate(self, batch: Batch) -> float:
        """The loss of the averaged weights on a batch, of which this process gives its part."""
        batch = self._layout.put(batches.leave_out(batches.select(batch, self._keys), self.config.cameras))
        trained = self._deployed()
        with self._surroundings():
            return float(self._evaluate(trained, self._state.frozen, batch))

    def weights(self, *, only_trained: bool = False) -> dict[str, np.ndarray]:
        """What is deployed, by Flax path: averaged where an average is kept; see `Layout.gather`."""
        trained = self._deployed()
        return self._layout.gather(_named(trained if only_trained else nnx.merge_state(trained, self._state.frozen)))

    def train_state(self) -> dict[str, np.ndarray]:
        """What else a resume needs: Adam's moments, and the raw weights where `weights` are averaged."""
        _, adam, _ = self._state.optimizer
        parts = {"mu": adam.mu, "nu": adam.nu}
        if self._state.average is not None:
            parts["raw"] = self._state.trained
        named = {f"{name}/{path}": value for name, part in parts.items() for path, value in _named(part).items()}
        return self._layout.gather(named)

    def restore(self, step: int, train_state: Mapping[str, np.ndarray]) -> None:
        """Continues after `step` steps; the trainer was built from what `weights` gave at that step."""
        parts = ["mu", "nu", *([] if self._state.average is None else ["raw"])]
        shapes = {n: leaf.shape for n, leaf in _named(self._state.trained).items()}
        shapes = {f"{part}/{n}": shape for part in parts for n, shape in shapes.items()}
        strict.check({name: tuple(value.shape) for name, value in train_state.items()}, shapes, "train_state")
        mu, nu, *raw = (self._filled(train_state, f"{part}/") for part in parts)
        clip, adam, decay = self._state.optimizer
        adam = adam._replace(count=self._layout.place(np.asarray(step, adam.count.dtype)), mu=mu, nu=nu)
        average = self._state.trained if raw else None  # what was deployed, and so loaded, is the average
        trained = raw[0] if raw else self._state.trained
        self._state = State(trained, self._state.frozen, (clip, adam, decay), average)
        self.step = step

    def _surroundings(self) -> contextlib.ExitStack:
        """A context in which float32 products are exact, and a kernel that XLA can't split finds the mesh."""
        stack = contextlib.ExitStack()
        stack.enter_context(devices.precision(self.config.compute))
        if self._compute.attention == "splash":
            stack.enter_context(jax.set_mesh(self._layout.whole.mesh))
        return stack

    def _fresh(self, trained: nnx.State) -> tuple[optax.OptState, nnx.State | None]:
        """The optimizer's state, and the average, before the first step."""
        return self._optimizer.init(trained), jax.tree.map(jnp.copy, trained) if self.config.optimizer.ema else None

    def _filled(self, arrays: Mapping[str, np.ndarray], prefix: str) -> nnx.State:
        """The arrays of that prefix in the structure of the trained weights."""
        flat = zip(_names(self._state.trained), nnx.to_flat_state(self._state.trained), strict=True)
        place = self._layout.place
        return nnx.from_flat_state([(path, leaf.replace(place(arrays[prefix + name]))) for name, (path, leaf) in flat])

    def _deployed(self) -> nnx.State:
        return self._state.trained if self._state.average is None else self._state.average

    def _update_fn(self, state: State, batch: Batch, rate: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        (loss, parts), grads = self._gradients(state, batch)
        updates, optimizer = self._optimizer.update(grads, state.optimizer, state.trained)
        trained = jax.tree.map(lambda p, u: p - rate * u, state.trained, updates)
        average = state.average
        if average is not None:
            decay = self.config.optimizer.ema
            average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, trained)
        metrics = {"loss": loss, **parts, "grad_norm": self._layout.complete(grads), "learning_rate": rate}
        return State(trained, state.frozen, optimizer, average), metrics

    def _gradients(self, state: State, batch: Batch) -> tuple[tuple[jax.Array, dict[str, jax.Array]], nnx.State]:
        """The losses and the gradient of their mean, float32, part by part of the batch."""
        trained = _as_used(state.trained, self._compute, in_two=_IN_TWO if self._leaves_out_last() else None)
        frozen = _as_used(state.frozen, self._compute)
        summed, parts, tokens = self._summed, self.config.microbatches, batch["tokenized_prompt"]
        if meshes.copied(self._layout.shape):
            summed = add_up(summed, self._layout.whole.mesh, self.config.compute.gradients)
            parts *= self._layout.shape[0]
        counted = {"num_counted": self._counted(batch) / parts} if "action_is_pad" in batch else {}
        if only_rows := self._reads_only_rows():
            trained, batch = _with_rows(trained, batch)
        losses, grads = summed(trained, frozen, batch, counted)
        if only_rows:
            grads = _scattered(grads, tokens, state.trained, self._layout.whole)
        return jax.tree.map(lambda x: x.astype(jnp.float32) / parts, (losses, grads))

    def _summed(
        self, trained: nnx.State, frozen: nnx.State, batch: Batch, counted: Batch
    ) -> tuple[tuple[jax.Array, dict[str, jax.Array]], nnx.State]:
        """Sums over the parts of one device's samples: of their losses, and of their gradients.

        `counted` says how many actions count in a part, on average over all of them.
        """
        gradients, count = jax.value_and_grad(self._loss, has_aux=True), self.config.microbatches
        if count == 1:
            losses, grads = gradients(trained, frozen, batch | counted)
            return losses, together(grads)

        def add(sums: nnx.State, part: Batch) -> tuple[nnx.State, tuple]:
            losses, grads = gradients(trained, frozen, part | counted)
            return jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, grads), losses

        # Every `count`-th sample, so that all devices have a share in every part.
        parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), batch)
        dtype = self.config.compute.gradients
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, dtype if p.dtype == jnp.bfloat16 else p.dtype), trained)
        sums, losses = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x.sum(0), losses), together(sums)

    def _reads_only_rows(self) -> bool:
        """Whether the loss reads of the embedding, which is trained, the prompt's rows alone and writes no tokens."""
        writes = isinstance(self.config.model, configs.Pi0Fast) or self.config.insulate
        return not writes and is_trained(self.config, _EMBEDDING)

    def _leaves_out_last(self) -> bool:
        """Whether of the language model's last layer only keys and values are computed."""
        return isinstance(self.config.model, configs.Pi0) and not self.config.insulate

    def _evaluate_fn(self, trained: nnx.State, frozen: nnx.State, batch: Batch) -> jax.Array:
        return self._loss(trained, frozen, batch)[0]

    def _loss(self, trained: nnx.State, frozen: nnx.State, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The mean loss, and what it consists of where it has parts."""
        module = nnx.merge(self._graph, trained, frozen)
        if isinstance(module, Pi0Fast):
            return module.loss(batch).mean(), {}
        if self.config.insulate:
            flow, tokens = insulated.losses(module, batch, batch["noise"], batch["time"])
            flow, tokens = self._mean(flow, batch), tokens.mean()
            return self.config.flow_weight * flow + tokens, {"loss_flow": flow, "loss_tokens": tokens}
        return self._mean(module.loss(batch, batch["noise"], batch["time"]), batch), {}

    def _mean(self, loss: jax.Array, batch: Batch) -> jax.Array:
        """Of a loss [B, A] over the actions that count, which are not equally many in all parts."""
        counted = self._counts(batch)
        return (loss * counted).sum() / (batch["num_counted"] if "num_counted" in batch else self._counted(batch))

    def _counted(self, batch: Batch) -> jax.Array:
        """How many actions of a batch count, one at least."""
        return jnp.maximum(self._counts(batch).sum(), 1)

    def _counts(self, batch: Batch) -> jax.Array:
        """Which actions of a batch count, float32 [B, A]."""
        padding = jnp.asarray(batch["action_is_pad"], jnp.float32)
        counted = jnp.ones_like(padding) if self.config.loss_on_padding else 1.0 - padding
        if self.config.max_delay:  # what is given, in all draws alike, is not learned
            counted = counted * (batch["time"].reshape(len(padding), -1, padding.shape[1])[:, 0] > 0)
        return counted


def is_trained(config: Config, path: tuple, _: Any = None) -> bool:
    """Whether the parameter at that path is trained."""
    return not meshes.is_frozen(config, "/".join(map(str, path)))


def _as_used(weights: nnx.State, compute: Compute, in_two: str | None = None) -> nnx.State:
    """Casts, once a step, what only layers use, and takes stacks apart where layers are written out.

    Where layers are a loop, stacks whose names match `in_two` are cast to two pieces (`apart.Cut`).
    """

    def used(path: tuple, leaf: Any) -> Any:
        name = "/".join(map(str, path))
        if not re.match("vision/(blocks|head)|gemma/layers", name):
            return leaf
        weight = nnx.from_flat_state([(path, leaf)])
        if compute.compile == "unrolled" and not name.startswith("vision/head"):
            weight = jax.tree.map(layers, weight)
        elif compute.compile == "scan" and in_two and re.match(in_two, name):
            weight = jax.tree.map(cut, weight)
        return dict(nnx.to_flat_state(lowered(weight, compute)))[path]

    return nnx.from_flat_state([(path, used(path, leaf)) for path, leaf in nnx.to_flat_state(weights)])


def _with_rows(trained: nnx.State, batch: Batch) -> tuple[nnx.State, Batch]:
    """Puts the rows that a batch's prompts read in place of the embedding, and their numbers in place of the tokens.

    So that the gradient is not of the size of the vocabulary in every part of the batch.
    """
    tokens = batch["tokenized_prompt"]
    rows = jax.tree.map(lambda table: table[tokens.reshape(-1)], _embedding(trained))
    numbers = jnp.arange(tokens.size, dtype=tokens.dtype).reshape(tokens.shape)
    return nnx.merge_state(trained, rows), {**batch, "tokenized_prompt": numbers}


def _scattered(grads: nnx.State, tokens: jax.Array, trained: nnx.State, whole: jax.sharding.Sharding) -> nnx.State:
    """The gradient of the whole embedding from that of the rows that were read, which every device is told."""

    def scattered(rows: jax.Array, table: jax.Array) -> jax.Array:
        where, rows = (jax.lax.with_sharding_constraint(x, whole) for x in (tokens.reshape(-1), rows))
        if whole.mesh.size > 1 and rows.shape[1] % whole.mesh.size == 0:
            where, rows = _once(where, rows, len(table), whole)
        return jnp.zeros_like(table).at[where].add(rows)

    return nnx.merge_state(grads, jax.tree.map(scattered, _embedding(grads), _embedding(trained)))


def _once(
    where: jax.Array, rows: jax.Array, size: int, whole: jax.sharding.NamedSharding
) -> tuple[jax.Array, jax.Array]:
    """The same sums of rows, each row once, and then some beyond the last of `size`, which nobody has.

    A GPU adds what belongs to one row in the order in which it comes to it. Devices that hold the same weights must
    agree to the bit, or they drift apart; so each adds up columns of its own, and tells the others.
    """
    columns = jax.sharding.NamedSharding(whole.mesh, jax.sharding.PartitionSpec(None, whole.mesh.axis_names))
    where, place = jnp.unique(where, size=where.size, fill_value=size, return_inverse=True)
    rows = jax.lax.with_sharding_constraint(rows, columns)
    total = jax.lax.with_sharding_constraint(jnp.zeros_like(rows).at[place].add(rows), columns)
    return where, jax.lax.with_sharding_constraint(total, whole)


_EMBEDDING = ("gemma", "embedding")
_IN_TWO = r"gemma/layers/experts/0/.*kernel$"


def _embedding(weights: nnx.State) -> nnx.State:
    return nnx.from_flat_state([(path, leaf) for path, leaf in nnx.to_flat_state(weights) if path == _EMBEDDING])


def _names(state: nnx.State) -> list[str]:
    return ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]


def _named(state: nnx.State) -> dict[str, jax.Array]:
    """Arrays by path."""
    return dict(zip(_names(state), (leaf.get_value() for _, leaf in nnx.to_flat_state(state)), strict=True))
