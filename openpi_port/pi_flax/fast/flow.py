"""The prepared pi0 and pi0.5: images, prompt and noise to actions, as few and as large operations as there can be.

B batch, C cameras, T prompt tokens, S tokens of the prefix, A actions (horizon), J action dim, D width, L layers.

What is saved against the plain model, all of it exact:
- the prefix stops at the last layer's keys and values;
- the state token's keys and values depend neither on the actions nor on the time: computed once, as part of the
  prefix's; the steps then have A rows and no mask among them;
- what depends on the step alone (`Times`) is computed once per number of steps, not per chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from openpi_port import config as configs
from openpi_port.pi_flax.fast import fold
from openpi_port.pi_flax.fast.layers import (
    Keys,
    Layer,
    Modulation,
    attend,
    block,
    layer_norm,
    mlp,
    qkv,
    rms,
    rotation,
)
from openpi_port.pi_flax.pi0 import Pi0, embed_time, to_unit
from openpi_port.schedule import euler_times

ALIGN = 64  # the cache's length is a multiple: rows that start aligned, products that need no slow path


class Options(NamedTuple):
    """How, never what. Chosen by measurement; see docs/performance.md."""

    fused: bool = False  # attention of images and prefix by cuDNN
    unroll: int = 1  # Euler steps per turn of the loop


class Weights(NamedTuple):
    """All that a chunk needs. `actions_in` and the two `_out` are float32, as in the plain model."""

    vision: fold.Vision
    embedding: jax.Array
    language: tuple[Layer, ...]
    expert: tuple[Layer, ...]
    state: tuple[jax.Array, jax.Array] | None  # [J, D], [D]
    actions_in: jax.Array  # [J, D], for pi0 with the first layer of the MLP that mixes in the time
    mix_out: tuple[jax.Array, jax.Array] | None  # the second, [D, D], [D]
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
    """An observation and the noise.

    The prefix is ordered so that valid tokens come first: then its positions count from 0, and a number per sample says
    what may be seen. Nothing else depends on the order.
    """

    images: jax.Array  # [B, C, H, W, 3]
    prompt: jax.Array  # int [B, T]
    order: jax.Array | None  # int [B, S], which token comes when; None where they are in order
    length: jax.Array  # int [B], how many are valid
    state: jax.Array  # [B, J]
    noise: jax.Array  # [B, A, J]


def weights(model: Pi0) -> Weights:
    """Folds a loaded model; see `fold`."""
    dtype = model.compute.dtype
    actions_in, mix_out, state = fold.f32(model.action_in_proj.kernel), None, None
    if model.config.time_in == "mlp":
        actions_in = actions_in @ fold.f32(model.action_time_mlp_in.kernel)[: model.config.expert.width]
        mix_out = model.action_time_mlp_out.kernel[...], model.action_time_mlp_out.bias[...]
    if model.config.state_in == "suffix":
        state = model.state_proj.kernel[...], model.state_proj.bias[...]
    out = fold.f32(model.action_out_proj.kernel)
    if model.config.time_in == "mlp":
        out = fold.scale_of(model.gemma.norms[1]) * out
    return Weights(
        fold.vision(model.vision, dtype),
        model.gemma.embedding[...],
        fold.experts(model.gemma, 0, dtype),
        fold.experts(model.gemma, 1, dtype),
        state,
        actions_in,
        mix_out,
        out,
        fold.f32(model.action_out_proj.bias),
    )


def times(model: Pi0, num_steps: int) -> Times:
    """See `Times`; computed in float32."""
    steps, dt = euler_times(num_steps)
    steps, dt = jnp.asarray(steps), jnp.full(len(steps), dt)
    embedded = embed_time(steps, model.config.expert.width)
    bias = fold.f32(model.action_in_proj.bias)
    if model.config.time_in == "mlp":
        first, width = model.action_time_mlp_in, model.config.expert.width
        bias = bias @ fold.f32(first.kernel)[:width] + embedded @ fold.f32(first.kernel)[width:] + fold.f32(first.bias)
        return Times(dt, bias, None, None)
    cond = jax.nn.swish(model.time_mlp_out(jax.nn.swish(model.time_mlp_in(embedded))))

    def modulation(kernel: jax.Array, bias: jax.Array) -> Modulation:
        scale, shift, gate = jnp.split((cond @ kernel + bias)[:, None, None], 3, axis=-1)
        return Modulation(1 + scale, shift, gate)

    expert = model.gemma.layers.experts[1]
    both = [n.modulation for n in (expert.norm_attn, expert.norm_mlp)]
    kernel, inner = (jnp.stack([fold.f32(getattr(m, name)) for m in both], 1) for name in ("kernel", "bias"))
    layers = jax.vmap(jax.vmap(modulation, out_axes=1), out_axes=1)(kernel, inner)
    last = model.gemma.norms[1].modulation
    return Times(
        dt, jnp.broadcast_to(bias, embedded.shape), layers, modulation(fold.f32(last.kernel), fold.f32(last.bias))
    )


def see(w: fold.Vision, config: configs.Siglip, images: jax.Array, dtype: str, options: Options) -> jax.Array:
    """Images [B, C, H, W, 3] to tokens [B, C T, D] of the language model."""
    B, C, side = *images.shape[:2], images.shape[2] // config.patch_size
    patch = config.patch_size
    if C == 0:
        return jnp.zeros((B, 0, w.head.shape[1]), dtype)
    patches = to_unit(images).reshape(B * C, side, patch, side, patch, 3).swapaxes(2, 3)
    x = (patches.reshape(B * C, side * side, -1) @ w.patch + w.position).astype(dtype)
    for layer in w.blocks:
        x = block(x, layer, config.num_heads, fused=options.fused)
    x = layer_norm(x) @ w.head + w.head_bias
    return x.reshape(B, -1, x.shape[-1])


def read(w: Weights, config: configs.Pi0, image_tokens: jax.Array, inputs: Inputs, options: Options) -> list[Keys]:
    """The prefix: what every step attends to, layer by layer, with room for the suffix."""
    x = w.embedding[inputs.prompt].astype(image_tokens.dtype)
    x = jnp.concatenate([image_tokens, x * jnp.asarray(x.shape[-1] ** 0.5, x.dtype)], axis=1)
    if inputs.order is not None:
        x = jnp.take_along_axis(x, inputs.order[..., None], axis=1, mode="promise_in_bounds")
    cache = run_language(w.language, config.language, x, inputs.length, fused=options.fused)
    S = x.shape[1]
    room = -(-(S + config.suffix_len) // ALIGN) * ALIGN - S
    cache = [Keys(*(jnp.pad(c, ((0, 0), (0, room), (0, 0), (0, 0))) for c in keys)) for keys in cache]
    if w.state is None:
        return cache
    x = embed_state(w, inputs.state)[:, None].astype(x.dtype)
    return run_expert(w.expert, config.expert, x, cache, inputs.length, S, S)[1]


def embed_state(w: Weights, state: jax.Array) -> jax.Array:
    """The state's token [B, D]."""
    kernel, bias = w.state
    return state @ kernel.astype(jnp.float32) + bias


def run_language(
    layers: tuple[Layer, ...], config: configs.Gemma, x: jax.Array, length: jax.Array, *, fused: bool
) -> list[Keys]:
    """Keys and values of all layers of tokens x [B, S, D] that see one another; the first `length` [B] are valid."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    by, cache = rotation(jnp.arange(x.shape[1])[None], config.head_dim), []
    for w in layers[:-1]:
        q, keys = qkv(rms(x), w.qkv, heads, kv_heads, by)
        cache.append(keys)
        x = x + attend(q, keys, length, fused=fused) @ w.o
        x = x + mlp(rms(x), w)
    last = layers[-1].qkv[:, heads * config.head_dim :]
    return [*cache, qkv(rms(x), last, 0, kv_heads, by)[1]]


def run_expert(
    layers: tuple[Layer, ...],
    config: configs.Gemma,
    x: jax.Array,
    cache: list[Keys],
    length: jax.Array,
    start: int,
    at: int,
    modulation: Modulation | None = None,
) -> tuple[jax.Array, list[Keys]]:
    """Tokens of the suffix, x [B, T, D], through all layers; they see the prefix, the suffix so far and one another.

    Args:
      layers: the expert's.
      config: its sizes.
      x: their embedding.
      cache: keys and values of the prefix, of which `length` [B] are valid, and from place `start` on of the suffix.
      length: see there.
      start: see there.
      at: where in the cache these tokens go.
      modulation: of AdaRMS, [L, 2, ...] each.

    Returns:
      Their last layer's output, and the cache with their keys and values.
    """
    T, room = x.shape[1], jnp.arange(cache[0].k.shape[1])
    by = rotation(length[:, None] + jnp.arange(at - start, at - start + T), config.head_dim)
    seen = ((room < length[:, None]) | ((room >= start) & (room < at + T)))[:, None]
    grown = []
    for i, w in enumerate(layers):
        attn, ffw = (None if modulation is None else Modulation(*(m[i, n] for m in modulation)) for n in (0, 1))
        q, new = qkv(rms(x, attn), w.qkv, config.num_heads, config.num_kv_heads, by)
        written = (jax.lax.dynamic_update_slice_in_dim(c, n, at, 1) for c, n in zip(cache[i], new, strict=True))
        grown.append(Keys(*written))
        x = add(x, attend(q, grown[-1], seen) @ w.o, attn)
        x = add(x, mlp(rms(x, ffw), w), ffw)
    return x, grown


def add(x: jax.Array, y: jax.Array, by: Modulation | None) -> jax.Array:
    """The residual connection, gated by AdaRMS."""
    return x + y if by is None else (x + y * by.gate).astype(x.dtype)


def denoise(
    w: Weights,
    config: configs.Pi0,
    dtype: str,
    cache: list[Keys],
    length: jax.Array,
    start: int,
    x_t: jax.Array,
    time: Times,
) -> tuple[jax.Array, list[Keys]]:
    """The velocity [B, A, J] at one flow time, of which `time` has no axis E; and the cache, which was written to."""
    x = x_t @ w.actions_in + time.bias
    if w.mix_out is not None:
        kernel, bias = w.mix_out
        x = jax.nn.swish(x).astype(dtype) @ kernel.astype(dtype) + bias.astype(dtype)
    at = start + (w.state is not None)
    x, cache = run_expert(w.expert, config.expert, x.astype(dtype), cache, length, start, at, time.layers)
    return rms(x, time.last).astype(jnp.float32) @ w.actions_out + w.out_bias, cache


def sample(
    w: Weights, config: configs.Pi0, dtype: str, all_times: Times, inputs: Inputs, options: Options
) -> jax.Array:
    """A chunk of actions, float32 [B, A, J]; see `Pi0.sample_actions`."""
    tokens = see(w.vision, config.vision, inputs.images, dtype, options)
    cache = read(w, config, tokens, inputs, options)
    return integrate(w, config, dtype, all_times, cache, inputs, options)


def integrate(
    w: Weights,
    config: configs.Pi0,
    dtype: str,
    all_times: Times,
    cache: list[Keys],
    inputs: Inputs,
    options: Options,
) -> jax.Array:
    """Euler steps from noise to actions."""
    start = inputs.images.shape[1] * config.vision.num_tokens + inputs.prompt.shape[1]

    def step(carry: tuple, time: Times) -> tuple[tuple, None]:
        x_t, cache = carry
        velocity, cache = denoise(w, config, dtype, cache, inputs.length, start, x_t, time)
        return (x_t + time.dt * velocity, cache), None

    return jax.lax.scan(step, (inputs.noise, cache), all_times, unroll=options.unroll)[0][0]
