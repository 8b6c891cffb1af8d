"""Gemma with experts: every layer holds one set of weights per expert, and all experts attend together.

B batch, T queries, S keys, N heads, K kv heads, H head dim, D width, F width of the MLP, L layers, V vocabulary.

Expert 0 is the language model of PaliGemma; pi0 adds expert 1 for state and actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from openpi_port.config import Compute
from openpi_port.config import Gemma as Config
from openpi_port.masks import Blocks
from openpi_port.pi_flax import lora
from openpi_port.pi_flax.attention import attention, prepare
from openpi_port.pi_flax.fast.apart import but_last, last
from openpi_port.pi_flax.fast.backward import gelu
from openpi_port.pi_flax.layers import AdaRMSNorm, Angles, RMSNorm, add_gated, angles, kept, lowered, rope, run, stack


class KVCache(NamedTuple):
    """Rotated keys and values of tokens already seen: [L, B, S, K, H], or [B, S, K, H] inside a layer."""

    k: jax.Array
    v: jax.Array


class Expert(nnx.Module):
    """One expert's weights in one layer."""

    def __init__(self, config: Config, *, adarms: bool) -> None:
        self.head_dim = config.head_dim
        norm = AdaRMSNorm if adarms else RMSNorm
        width, heads, kv_heads = config.width, config.num_heads, config.num_kv_heads
        attn, mlp = config.lora_of("attn"), config.lora_of("mlp")
        self.norm_attn = norm(width)
        self.q = lora.to_heads(width, heads, config.head_dim, attn)
        self.k = lora.to_heads(width, kv_heads, config.head_dim, attn)
        self.v = lora.to_heads(width, kv_heads, config.head_dim, attn)
        self.o = lora.from_heads(heads, config.head_dim, width, attn)
        self.norm_mlp = norm(width)
        self.gate = lora.plain(width, config.mlp_dim, mlp)
        self.up = lora.plain(width, config.mlp_dim, mlp)
        self.down = lora.plain(config.mlp_dim, width, mlp)

    def qkv(self, x: jax.Array, where: Angles) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Scaled, rotated queries [B, T, N, H], rotated keys and values [B, T, K, H] of a normed x [B, T, D]."""
        q = kept(rope(self._heads(self.q, x), where) * self.head_dim**-0.5)
        return q, *self.keys_values(x, where)

    def keys_values(self, x: jax.Array, where: Angles) -> KVCache:
        """Rotated keys and values [B, T, K, H] of a normed x [B, T, D]."""
        return KVCache(kept(rope(self._heads(self.k, x), where)), kept(self._heads(self.v, x)))

    def mlp(self, x: jax.Array) -> jax.Array:
        """GeGLU."""
        return self.down(gelu(kept(self.gate(x))) * kept(self.up(x)))

    def _heads(self, linear: nnx.Module, x: jax.Array) -> jax.Array:
        return rearrange(linear(x), "B T (N H) -> B T N H", H=self.head_dim)


class Layer(nnx.Module):
    """One layer of all experts."""

    def __init__(self, configs: Sequence[Config], adarms: Sequence[bool], compute: Compute) -> None:
        self.backend = compute.attention
        self.experts = nnx.List([Expert(c, adarms=a) for c, a in zip(configs, adarms, strict=True)])

    def __call__(
        self,
        xs: Sequence[jax.Array | None],
        conds: Sequence[jax.Array | None],
        where: Angles,
        mask: Any,
        cache: KVCache | None,
        write_at: jax.Array | int | None = None,
        keys_only: bool = False,
    ) -> tuple[list[jax.Array | None], KVCache]:
        """See `Gemma.__call__`; `mask` is prepared, `where` stands for the positions.

        With `keys_only` computes only the keys and values, of the language model.

        Returns:
          The experts' outputs, and their tokens' keys and values.
        """
        if keys_only:
            expert = self.experts[0]
            return xs, expert.keys_values(expert.norm_attn(xs[0], conds[0])[0], where)
        present = [i for i, x in enumerate(xs) if x is not None]
        spans = _spans([xs[i].shape[1] for i in present])
        normed, qs, ks, vs = {}, [], [], []
        for i, (start, stop) in zip(present, spans, strict=True):
            normed[i] = self.experts[i].norm_attn(xs[i], conds[i])
            q, k, v = self.experts[i].qkv(normed[i][0], where.of(start, stop))
            qs.append(q), ks.append(k), vs.append(v)
        q, new = jnp.concatenate(qs, 1), KVCache(jnp.concatenate(ks, 1), jnp.concatenate(vs, 1))
        if write_at is not None:
            at = (0, write_at, 0, 0)
            seen = new = KVCache(*(jax.lax.dynamic_update_slice(c, n, at) for c, n in zip(cache, new, strict=True)))
        else:
            seen = new if cache is None else KVCache(*(jnp.concatenate(c, 1) for c in zip(cache, new, strict=True)))
        attended = kept(attention(q, seen.k, seen.v, mask, self.backend))

        outs: list[jax.Array | None] = [None] * len(xs)
        for i, (start, stop) in zip(present, spans, strict=True):
            expert = self.experts[i]
            x = kept(add_gated(xs[i], expert.o(attended[:, start:stop]), normed[i][1]))
            y, gate = expert.norm_mlp(x, conds[i])
            outs[i] = add_gated(x, expert.mlp(y), gate)
        return outs, new


class Gemma(nnx.Module):
    """The stack of layers, the token embedding of expert 0 and the final norms."""

    def __init__(self, configs: Sequence[Config], adarms: Sequence[bool], vocab_size: int, compute: Compute) -> None:
        self.compute = compute
        self.head_dim = configs[0].head_dim
        self.embedding = nnx.Param(jnp.zeros((vocab_size, configs[0].width)))
        self.layers = stack(Layer(configs, adarms, compute), configs[0].depth)
        self.norms = nnx.List([(AdaRMSNorm if a else RMSNorm)(c.width) for c, a in zip(configs, adarms, strict=True)])

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embeds token ids [B, T], scaled by sqrt(D): [B, T, D] in the working dtype."""
        x = self.embedding[...][tokens].astype(self.compute.dtype)
        return x * jnp.asarray(x.shape[-1] ** 0.5, x.dtype)

    def __call__(
        self,
        xs: Sequence[jax.Array | None],
        conds: Sequence[jax.Array | None],
        positions: jax.Array,
        mask: jax.Array | Blocks,
        cache: KVCache | None = None,
        *,
        return_cache: bool = False,
        write_at: jax.Array | int | None = None,
    ) -> tuple[list[jax.Array | None], KVCache | None]:
        """Runs the tokens of every expert through all layers.

        Args:
          xs: tokens per expert, [B, T_i, D_i], None for an expert that takes no part.
          conds: condition per expert, [B, D_i] or [B, T_i, D_i], None where the norms take none.
          positions: int [B, T], of all tokens in the order of the experts.
          mask: bool [B, T, S], or its blocks; S counts the cache first, then the tokens.
          cache: keys and values that the tokens also see.
          return_cache: whether to keep the tokens' own keys and values.
          write_at: writes them into the cache, from that place of S on, instead of appending them; S is then the
            length of the cache, and what is returned is the cache.

        Returns:
          The normed outputs per expert, and the tokens' keys and values [L, B, T, K, H] or None.
        """
        graph, layers = self._layers()
        xs, new = self._scan(graph, layers, xs, conds, positions, mask, cache, return_cache, write_at)
        outs = [None if x is None else norm(x, cond)[0] for x, cond, norm in zip(xs, conds, self.norms, strict=True)]
        return outs, new

    def keys_values(self, x: jax.Array, positions: jax.Array, mask: jax.Array | Blocks) -> KVCache:
        """The keys and values [L, B, T, K, H] that `__call__` gives of the language model's tokens alone.

        Leaves out what the last layer does after them. Takes the layers apart, which costs nothing where they are cast
        (in training) and a copy where they aren't.
        """
        graph, layers = self._layers()
        others = [None] * (len(self.norms) - 1)
        xs, new = self._scan(graph, but_last(layers), [x, *others], [None, *others], positions, mask, None, True, None)
        layer, where = nnx.merge(graph, last(layers)), angles(positions, self.head_dim)
        _, own = layer(xs, [None, *others], where, None, None, keys_only=True)
        return KVCache(*(jnp.concatenate([a, b[None]]) for a, b in zip(new, own, strict=True)))

    def logits(self, x: jax.Array, table: jax.Array | None = None) -> jax.Array:
        """Scores of the vocabulary in float32, through the tied embedding: [..., D] to [..., V].

        Args:
          x: outputs of the language model.
          table: rows of the embedding [V, D], where not all are asked for.
        """
        table = self.embedding[...] if table is None else table
        return jnp.einsum("...D,VD->...V", x, table.astype(x.dtype), preferred_element_type=jnp.float32)

    def _layers(self) -> tuple[nnx.GraphDef, nnx.State]:
        graph, layers = nnx.split(self.layers)
        return graph, lowered(layers, self.compute)

    def _scan(
        self,
        graph: nnx.GraphDef,
        layers: nnx.State,
        xs: Sequence[jax.Array | None],
        conds: Sequence[jax.Array | None],
        positions: jax.Array,
        mask: jax.Array | Blocks,
        cache: KVCache | None,
        return_cache: bool,
        write_at: jax.Array | int | None,
    ) -> tuple[list[jax.Array | None], KVCache | None]:
        """Runs through those layers; see `__call__`."""
        mask, where = prepare(mask, self.compute.attention), angles(positions, self.head_dim)
        xs = [None if x is None else x.astype(self.compute.dtype) for x in xs]

        def body(xs: list, inputs: tuple) -> tuple[list, KVCache | None]:
            layer, seen = inputs
            xs, new = nnx.merge(graph, layer)(xs, conds, where, mask, seen, write_at)
            return xs, new if return_cache or write_at is not None else None

        return run(body, xs, (layers, cache), self.compute)


def _spans(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Where each expert's tokens lie in the concatenated sequence."""
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
