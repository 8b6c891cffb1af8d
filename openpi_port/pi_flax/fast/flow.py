"""The prepared pi0 and pi0.5: images, prompt and noise to actions, as few and as large operations as there can be.

B batch, C cameras, T prompt tokens, S tokens of the prefix, A actions (horizon), J action dim, D width, L layers.

What is saved against the plain model, all of it exact:
- the prefix stops at the last layer's keys and values;
- the state token's keys and values depend neither on the actions nor on the time: computed once, in the first step,
  where one row more costs nothing (a pass of its own would read the expert's weights once more);
- what depends on the step alone (`Times`) is computed once per number of steps, not per chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from openpi_port import config as configs
from openpi_port.pi_flax.fast import merge, split
from openpi_port.pi_flax.fast.layers import (
    Keys,
    Layer,
    Modulation,
    Rotation,
    add,
    attend,
    block,
    layer_norm,
    mlp,
    product,
    qkv,
    rms,
    rotation,
)
from openpi_port.pi_flax.pi0 import Pi0, embed_time, to_unit
from openpi_port.schedule import euler_times


class Options(NamedTuple):
    """How, never what. Chosen by measurement; see docs/performance.md."""

    fused: bool = False  # attention of images and prefix by cuDNN
    align: int = 8  # the cache's length is a multiple
    mesh: Mesh | None = None  # devices that share the rows, see `split`


class Weights(NamedTuple):
    """All that a chunk needs. `actions_in` and `actions_out` are float32, as in the plain model."""

    vision: merge.Vision
    embedding: jax.Array
    language: tuple[Layer, ...]
    expert: tuple[Layer, ...]
    state: tuple[jax.Array, jax.Array] | None  # [J, D], [D]
    actions_in: jax.Array  # [J, D], for pi0 with the first layer of the MLP that mixes in the time
    mix_out: tuple[jax.Array, jax.Array] | None  # the second, [D, D], [D]
    last_norm: Modulation | None
    actions_out: jax.Array  # [D, J]
    out_bias: jax.Array  # [J]


class Times(NamedTuple):
    """What depends on the flow time alone; E steps.

    Attributes:
      dt: float32 [E], the (negative) length of the step.
      bias: float32 [E, D], of the embedded actions.
      layers: AdaRMS [E, L, 2, 1, 1, D], of attention and MLP; None for pi0.
      last: AdaRMS [E, 1, 1, D] before the actions leave; None for pi0.
    """

    dt: jax.Array
    bias: jax.Array
    layers: Modulation | None
    last: Modulation | None


class Inputs(NamedTuple):
    """An observation, and the noise for those that flow.

    The prefix is ordered so that valid tokens come first: then its positions count from 0, and a number per sample says
    what may be seen. Nothing else depends on the order.
    """

    images: jax.Array  # [B, C, H, W, 3]
    prompt: jax.Array  # int [B, T]
    order: jax.Array | None  # int [B, S], which token comes when; None where they are in order
    length: jax.Array  # int [B], how many are valid
    state: jax.Array | None = None  # [B, J]
    noise: jax.Array | None = None  # [B, A, J]


def weights(model: Pi0) -> Weights:
    """Lays out a loaded model's; see `merge`."""
    dtype = model.compute.dtype
    actions_in, mix_out, state = merge.f32(model.action_in_proj.kernel), None, None
    if model.config.time_in == "mlp":
        actions_in = actions_in @ merge.f32(model.action_time_mlp_in.kernel)[: model.config.expert.width]
        mix_out = model.action_time_mlp_out.kernel[...], model.action_time_mlp_out.bias[...]
    if model.config.state_in == "suffix":
        state = model.state_proj.kernel[...], model.state_proj.bias[...]
    return Weights(
        merge.vision(model.vision, dtype),
        model.gemma.embedding[...],
        merge.experts(model.gemma, 0, dtype),
        merge.experts(model.gemma, 1, dtype),
        state,
        actions_in,
        mix_out,
        merge.norm(model.gemma.norms[1]),
        merge.f32(model.action_out_proj.kernel),
        merge.f32(model.action_out_proj.bias),
    )


def times(model: Pi0, num_steps: int) -> Times:
    """See `Times`; computed in float32."""
    steps, dt = euler_times(num_steps)
    steps, dt = jnp.asarray(steps), jnp.full(len(steps), dt)
    embedded = embed_time(steps, model.config.expert.width)
    bias = merge.f32(model.action_in_proj.bias)
    if model.config.time_in == "mlp":
        first, width = model.action_time_mlp_in, model.config.expert.width
        bias = (
            bias @ merge.f32(first.kernel)[:width] + embedded @ merge.f32(first.kernel)[width:] + merge.f32(first.bias)
        )
        return Times(dt, bias, None, None)
    cond = jax.nn.swish(model.time_mlp_out(jax.nn.swish(model.time_mlp_in(embedded))))

    def modulation(kernel: jax.Array, bias: jax.Array) -> Modulation:
        scale, shift, gate = jnp.split((cond @ kernel + bias)[:, None, None], 3, axis=-1)
        return Modulation(1 + scale, shift, gate)

    expert = model.gemma.layers.experts[1]
    both = [n.modulation for n in (expert.norm_attn, expert.norm_mlp)]
    kernel, inner = (jnp.stack([merge.f32(getattr(m, name)) for m in both], 1) for name in ("kernel", "bias"))
    layers = jax.vmap(jax.vmap(modulation, out_axes=1), out_axes=1)(kernel, inner)
    last = model.gemma.norms[1].modulation
    return Times(
        dt, jnp.broadcast_to(bias, embedded.shape), layers, modulation(merge.f32(last.kernel), merge.f32(last.bias))
    )


def see(w: merge.Vision, config: configs.Siglip, images: jax.Array, dtype: str, options: Options) -> jax.Array:
    """Images [B, C, H, W, 3] to tokens [B, C T, D] of the language model."""
    B, C, side = *images.shape[:2], images.shape[2] // config.patch_size
    patch = config.patch_size
    if C == 0:
        return jnp.zeros((B, 0, w.head.shape[1]), dtype)
    patches = to_unit(images).reshape(B * C, side, patch, side, patch, 3).swapaxes(2, 3)
    patches = split.rows(patches.reshape(B * C, side * side, -1), options.mesh)
    x = (patches @ w.patch + w.position).astype(dtype)
    for layer in w.blocks:
        x = block(x, layer, config.num_heads, fused=options.fused, mesh=options.mesh)
    x = product(layer_norm(x, w.norm), w.head) + w.head_bias
    return x.reshape(B, -1, x.shape[-1])


def read(w: Weights, config: configs.Pi0, image_tokens: jax.Array, inputs: Inputs, options: Options) -> list[Keys]:
    """The prefix: what every step attends to, layer by layer, with room for the suffix."""
    x = prefix_tokens(w.embedding, image_tokens, inputs)
    cache = run_language(w.language, config.language, x, inputs.length, options)
    suffix = config.suffix_len + split.spare(config.suffix_len, options.mesh)
    room = round_up(x.shape[1] + suffix, options) - x.shape[1]
    return [Keys(*(jnp.pad(c, ((0, 0), (0, room), (0, 0), (0, 0))) for c in keys)) for keys in cache]


def prefix_tokens(embedding: jax.Array, image_tokens: jax.Array, inputs: Inputs) -> jax.Array:
    """Images and prompt [B, S, D], valid tokens first."""
    x = jnp.concatenate([image_tokens, embed(embedding, inputs.prompt, image_tokens.dtype)], axis=1)
    if inputs.order is None:
        return x
    return jnp.take_along_axis(x, inputs.order[..., None], axis=1, mode="promise_in_bounds")


def embed(embedding: jax.Array, tokens: jax.Array, dtype: str) -> jax.Array:
    """Token ids [..] to [.., D]; see `Gemma.embed`."""
    x = embedding[tokens].astype(dtype)
    return x * jnp.asarray(x.shape[-1] ** 0.5, x.dtype)


def round_up(length: int, options: Options) -> int:
    """The length that a cache of so many places gets, so that rows start aligned and no product takes a slow path."""
    return -(-length // options.align) * options.align


def run_language(
    layers: tuple[Layer, ...], config: configs.Gemma, x: jax.Array, length: jax.Array, options: Options
) -> list[Keys]:
    """Keys and values of all layers of tokens x [B, S, D] that see one another; the first `length` [B] are valid."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    by, cache, x = rotation(jnp.arange(x.shape[1])[None], config.head_dim), [], split.rows(x, options.mesh)
    for w in layers[:-1]:
        q, keys = qkv(rms(x, w.norm_attn), w.qkv, heads, kv_heads, by, options.mesh)
        cache.append(keys)
        x = x + product(attend(q, keys, length, fused=options.fused), w.o)
        x = x + mlp(rms(x, w.norm_mlp), w)
    last = layers[-1]
    y, own = rms(x, last.norm_attn), last.qkv[:, heads * config.head_dim :]
    return [*cache, qkv(y, own, 0, kv_heads, by, options.mesh)[1]]


def run(
    layers: tuple[Layer, ...],
    config: configs.Gemma,
    x: jax.Array,
    cache: list[Keys],
    by: Rotation,
    at: jax.Array | int,
    seen: jax.Array,
    modulation: Modulation | None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, list[Keys]]:
    """Tokens x [B, T, D] through all layers.

    Args:
      layers: the weights.
      config: their sizes.
      x: the embedded tokens.
      cache: keys and values, into which the tokens' own are written from place `at` on.
      by: the tokens' rotation.
      at: see there.
      seen: bool [B, 1 or T, S], which places of the cache they see then.
      modulation: of AdaRMS, [L, 2, ...] each.
      mesh: see `split`.

    Returns:
      The last layer's output, and the cache.
    """
    cache, x = list(cache), split.rows(x, mesh)
    for i, w in enumerate(layers):
        attn, ffw = w.norm_attn, w.norm_mlp
        if modulation is not None:
            attn, ffw = (Modulation(*(m[i, n] for m in modulation)) for n in (0, 1))
        q, new = qkv(rms(x, attn), w.qkv, config.num_heads, config.num_kv_heads, by, mesh)
        written = (jax.lax.dynamic_update_slice_in_dim(c, n, at, 1) for c, n in zip(cache[i], new, strict=True))
        cache[i] = Keys(*written)
        x = add(x, product(attend(q, cache[i], seen), w.o), attn)
        x = add(x, mlp(rms(x, ffw), w), ffw)
    return x, cache


def step(
    w: Weights,
    config: configs.Pi0,
    dtype: str,
    inputs: Inputs,
    x_t: jax.Array,
    cache: list[Keys],
    time: Times,
    *,
    with_state: bool = False,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, list[Keys]]:
    """One Euler step.

    Args:
      w, config, dtype: the model.
      inputs: the observation.
      x_t: [B, A, J].
      cache: keys and values of the prefix; then come the state's and the actions'.
      time: of this step, without the axis E.
      with_state: the state's token goes through too, ahead of the actions, which it doesn't see.
      mesh: see `split`.

    Returns:
      x_t of the next time, and the cache.
    """
    x = x_t @ w.actions_in + time.bias
    if w.mix_out is not None:
        kernel, bias = w.mix_out
        x = product(jax.nn.swish(x).astype(dtype), kernel.astype(dtype)) + bias.astype(dtype)
    x = x.astype(dtype)
    start = inputs.images.shape[1] * config.vision.num_tokens + inputs.prompt.shape[1]
    actions, end = start + (w.state is not None), start + config.suffix_len
    place = jnp.arange(cache[0].k.shape[1])
    seen = ((place < inputs.length[:, None]) | ((place >= start) & (place < end)))[:, None]
    at = actions
    if with_state:
        kernel, bias = w.state
        state = inputs.state @ kernel.astype(jnp.float32) + bias
        x, at = jnp.concatenate([state[:, None].astype(dtype), x], 1), start
    spare = split.spare(end - at, mesh)  # rows behind all others, whose keys nothing sees
    if with_state:
        seen = seen & ((place < actions) | (jnp.arange(end - at + spare)[:, None] > 0))
    x = jnp.pad(x, ((0, 0), (0, spare), (0, 0)))
    by = rotation(inputs.length[:, None] + jnp.arange(at, end + spare) - start, config.expert.head_dim)
    x, cache = run(w.expert, config.expert, x, cache, by, at, seen, time.layers, mesh)
    last = w.last_norm if time.last is None else time.last
    velocity = rms(x[:, actions - at : end - at], last).astype(jnp.float32) @ w.actions_out + w.out_bias
    return x_t + time.dt * velocity, cache


def integrate(
    w: Weights,
    config: configs.Pi0,
    dtype: str,
    all_times: Times,
    cache: list[Keys],
    inputs: Inputs,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Euler steps from noise to actions."""
    carry = (inputs.noise, cache)
    if w.state is not None:
        first = jax.tree.map(lambda x: x[0], all_times)
        all_times = jax.tree.map(lambda x: x[1:], all_times)
        carry = step(w, config, dtype, inputs, *carry, first, with_state=True, mesh=mesh)

    def body(carry: tuple, time: Times) -> tuple[tuple, None]:
        return step(w, config, dtype, inputs, *carry, time, mesh=mesh), None

    return jax.lax.scan(body, carry, all_times)[0][0]


def sample(
    w: Weights, config: configs.Pi0, dtype: str, all_times: Times, inputs: Inputs, options: Options
) -> jax.Array:
    """A chunk of actions, float32 [B, A, J]; see `Pi0.sample_actions`."""
    tokens = see(w.vision, config.vision, inputs.images, dtype, options)
    cache = read(w, config, tokens, inputs, options)
    return integrate(w, config, dtype, all_times, cache, inputs, options.mesh)
