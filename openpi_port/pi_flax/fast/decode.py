"""The prepared pi0-FAST: images and prompt once, then token by token.

B batch, T tokens, N given ones, P places of images and prompt, S places of the cache, D width, G generated tokens.

What is saved against the plain model, all of it exact: layers unrolled over weights of their own, and after the last
layer's keys and values the prompt goes on with its last token alone.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from openpi_port import config as configs
from openpi_port.pi_flax.fast import flow, merge
from openpi_port.pi_flax.fast.layers import Keys, Layer, Modulation, attend, mlp, product, qkv, rms, rotation
from openpi_port.pi_flax.gemma import Gemma
from openpi_port.pi_flax.pi0_fast import Pi0Fast, Prompt


class Weights(NamedTuple):
    """All that decoding needs."""

    vision: merge.Vision
    embedding: jax.Array  # [V, D], the model's own array
    language: tuple[Layer, ...]
    norm: Modulation


class Scores(NamedTuple):
    """The part of `Gemma` that chooses tokens."""

    embedding: jax.Array

    logits = Gemma.logits


class Decoder:
    """`Pi0Fast`'s decoding, with the two passes through the layers replaced.

    Args:
      w: the weights.
      config: the architecture.
      dtype: of the activations.
      options: see `flow.Options`.
    """

    begin, step, decode, position = Pi0Fast.begin, Pi0Fast.step, Pi0Fast.decode, Pi0Fast.position

    def __init__(self, w: Weights, config: configs.Pi0Fast, dtype: str, options: flow.Options) -> None:
        self.config, self.gemma = config, Scores(w.embedding)
        self._w, self._dtype, self._options = w, dtype, options

    def prefill(self, inputs: flow.Inputs, lead: jax.Array, max_steps: int) -> Prompt:
        """See `Pi0Fast.prefill`; the observation as `flow.Inputs`."""
        tokens = flow.see(self._w.vision, self.config.vision, inputs.images, self._dtype, self._options)
        return self.read(tokens, inputs, lead, max_steps)

    def read(self, image_tokens: jax.Array, inputs: flow.Inputs, lead: jax.Array, max_steps: int) -> Prompt:
        """What follows `flow.see` in `prefill`."""
        w, sizes, length = self._w, self.config.language, inputs.length
        x = flow.prefix_tokens(w.embedding, image_tokens, inputs)
        B, P, num = *x.shape[:2], len(lead)
        x = jnp.concatenate([x, jnp.broadcast_to(flow.embed(w.embedding, lead, x.dtype), (B, num, x.shape[-1]))], 1)
        place, given = jnp.arange(P + num), jnp.arange(num)
        position = jnp.concatenate([jnp.broadcast_to(place[:P], (B, P)), self.position(length, given)], 1)
        seen = (place < length[:, None, None]) | ((place >= P) & (place <= P + given[:, None]))
        by, cache, room = rotation(position, sizes.head_dim), [], flow.round_up(P + max_steps, self._options) - P - num
        for layer in w.language[:-1]:
            q, keys = qkv(rms(x, layer.norm_attn), layer.qkv, sizes.num_heads, sizes.num_kv_heads, by)
            cache.append(keys)
            front = Keys(*(k[:, :P] for k in keys))
            attended = [attend(q[:, :P], front, length, fused=self._options.fused)]
            attended += [attend(q[:, P:], keys, seen)] if num else []
            x = x + product(jnp.concatenate(attended, 1), layer.o)
            x = x + mlp(rms(x, layer.norm_mlp), layer)

        layer = w.language[-1]
        q, keys = qkv(rms(x, layer.norm_attn), layer.qkv, sizes.num_heads, sizes.num_kv_heads, by)
        cache.append(keys)
        last = (jnp.full(B, P + num) if num else length) - 1
        x, q = (jnp.take_along_axis(a, last.reshape(B, *[1] * (a.ndim - 1)), 1) for a in (x, q))
        x = x + product(attend(q, keys, seen[:, -1:] if num else length), layer.o)
        x = x + mlp(rms(x, layer.norm_mlp), layer)
        cache = [Keys(*(jnp.pad(k, ((0, 0), (0, room), (0, 0), (0, 0))) for k in keys)) for keys in cache]
        return Prompt(rms(x, w.norm)[:, 0], cache, jnp.arange(P) < length[:, None], length)

    def advance(
        self, prompt: Prompt, cache: list[Keys], token: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, list[Keys]]:
        """See `Pi0Fast.advance`."""
        w, sizes, start = self._w, self.config.language, prompt.valid.shape[1]
        x = flow.embed(w.embedding, token[:, None], self._dtype)
        by, cache = rotation(self.position(prompt.length, step[None]), sizes.head_dim), list(cache)
        place = jnp.arange(cache[0].k.shape[1])
        seen = ((place < prompt.length[:, None]) | ((place >= start) & (place <= start + step)))[:, None]
        x, cache = flow.run(w.language, sizes, x, cache, by, start + step, seen, None)
        return rms(x, w.norm)[:, 0], cache


def weights(model: Pi0Fast) -> Weights:
    """Lays out a loaded model's; see `merge`."""
    dtype = model.compute.dtype
    return Weights(
        merge.vision(model.vision, dtype),
        model.gemma.embedding[...],
        merge.experts(model.gemma, 0, dtype),
        merge.norm(model.gemma.norms[0]),
    )
