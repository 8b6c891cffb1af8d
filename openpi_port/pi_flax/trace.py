"""The model's computation tensor by tensor, in the order in which it happens: what the parity report compares.

A plain loop over the layers calls the modules that the model itself calls and hands out what they return. What a
layer passes on is always the output of the real layer, and velocity, loss and actions are those of the model's own
methods; so a trace can't drift away from the model unseen.

Every norm is also called on a fixed input of 1e-3 (`..._small`): there its eps decides the result, which the
activations of a healthy network hide.

B batch, A actions, J action dim, S tokens of the joint pass, T tokens of one expert or of the text, D width, N heads,
K kv heads, H head dim, V vocabulary, G generated tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from openpi_port.batch import Batch
from openpi_port.pi_flax import gemma, pi0, siglip
from openpi_port.pi_flax.pi0_fast import Pi0Fast
from openpi_port.schedule import euler_times

EXPERTS = ("language", "expert")
SMALL_VOCABULARY = 4096  # up to which all logits are compared, not only the target's and their sum

Named = Iterator[tuple[str, np.ndarray]]


def forward(module: pi0.Pi0 | Pi0Fast, batch: Batch) -> Named:
    """One joint pass over a training batch, from pixels to the loss.

    Args:
      module: a filled model.
      batch: observation, actions, noise and time; of pi0-FAST the observation with `token_ar_mask` and
        `token_loss_mask`.

    Yields:
      "stage/.../name" and the tensor on the host, float32, integer or boolean; stages vision, prefix, suffix (not
      pi0-FAST), masks, layers, output.
    """
    config, dtype = module.config, module.compute.dtype
    batch = jax.tree.map(jnp.asarray, dict(batch))

    images = jnp.concatenate([pi0.to_unit(batch["image"][name]) for name in config.cameras])
    yield "vision/images", _host(images)
    x = _jit(module.vision, siglip.Siglip.embed)(images)
    yield "vision/embedded", _host(x)
    block = _jit(module.vision.blocks, block_parts)
    for i in range(config.vision.depth):
        parts, x = block(x, _small(config.vision.width, dtype), layer=i)
        for name, part in parts.items():
            yield f"vision/{i:02d}/{name}", _host(part)
        yield f"vision/{i:02d}/out", _host(x)
    for name, part in _jit(module.vision, end_parts)(x, _small(config.vision.width, dtype)).items():
        yield f"vision/{name}", _host(part)
    yield "prefix/prompt", _host(_jit(module, lambda m, ids: m.gemma.embed(ids))(batch["tokenized_prompt"]))
    yield from (_tokens if isinstance(module, Pi0Fast) else _flow)(module, batch)


def _flow(module: pi0.Pi0, batch: Batch) -> Named:
    """From noisy actions to the loss."""
    time = batch["time"]
    t = time[:, None, None]
    x_t = t * batch["noise"] + (1 - t) * batch["actions"]
    xs, conds, positions, mask = _jit(module, pi0.Pi0.joint_inputs)(batch, x_t, time)
    yield "prefix/tokens", _host(xs[0])
    yield "suffix/x_t", _host(x_t)
    yield "suffix/time_embedding", _host(pi0.embed_time(time, module.config.expert.width))
    if conds[1] is not None:
        yield "suffix/condition", _host(conds[1])
    yield "suffix/tokens", _host(xs[1])
    yield "masks/attention", _host(mask)
    yield "masks/positions", _host(positions)

    yield from _layers(module, xs, conds, positions, mask)
    ends = _jit(module, lambda m, batch, x_t: (m.velocity(batch, x_t, time), m.loss(batch, batch["noise"], time)))
    velocity, loss = ends(batch, x_t)
    yield "output/velocity", _host(velocity)
    yield "output/loss", _host(loss)


def _tokens(module: Pi0Fast, batch: Batch) -> Named:
    """From images and text to the loss; the last token is no one's input."""
    tokens, positions, mask = _jit(module, Pi0Fast.joint_inputs)(batch)
    yield "prefix/tokens", _host(tokens.x)
    yield "masks/attention", _host(mask)
    yield "masks/positions", _host(positions)

    yield from _layers(module, [tokens.x[:, :-1]], [None], positions[:, :-1], mask[:, :-1, :-1])
    targets, scored = batch["tokenized_prompt"][:, 1:], batch["token_loss_mask"][:, 1:]
    scores = _jit(module, lambda m, batch: score_parts(m.logits(batch), targets, scored))(batch)
    for name, part in scores.items():
        yield f"output/{name}", _host(part)
    yield "output/loss", _host(_jit(module, Pi0Fast.loss)(batch))


def _layers(
    module: pi0.Pi0 | Pi0Fast,
    xs: list[jax.Array],
    conds: list[jax.Array | None],
    positions: jax.Array,
    mask: jax.Array,
) -> Named:
    """All layers and the final norms; see `layer_parts`."""
    dtype = module.compute.dtype
    xs = [x.astype(dtype) for x in xs]
    small = [_small(x.shape[-1], dtype) for x in xs]
    experts = EXPERTS[: len(xs)]
    layer = _jit(module.gemma.layers, layer_parts)
    for i in range(module.config.language.depth):
        parts, xs = layer(xs, conds, positions, mask, small, layer=i)
        for name, part in parts.items():
            yield f"layers/{i:02d}/{name}", _host(part)
        for name, x in zip(experts, xs, strict=True):
            yield f"layers/{i:02d}/{name}/out", _host(x)
    for i, name in enumerate(experts):
        norm = _jit(module.gemma.norms[i], lambda norm, *args: [norm(x, args[-1])[0] for x in args[:-1]])
        probed, normed = norm(small[i], xs[i], conds[i])
        yield f"output/{name}_norm_small", _host(probed)
        yield f"output/{name}", _host(normed)


def block_parts(block: siglip.Block, x: jax.Array, small: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    """The inner tensors of a vision block at its input x [B, T, D], and its output."""
    attention = block.attn(block.norm_attn(x))
    after = x + attention
    parts = OrderedDict(  # a plain dict comes out of jit sorted by name
        norm_attn_small=block.norm_attn(small),
        norm_attn=block.norm_attn(x),
        attention=attention,
        norm_mlp_small=block.norm_mlp(small),
        norm_mlp=block.norm_mlp(after),
        mlp=block.mlp(block.norm_mlp(after)),
    )
    return parts, block(x)


def end_parts(vision: siglip.Siglip, x: jax.Array, small: jax.Array) -> dict[str, jax.Array]:
    """What follows the last vision block, whose output is x [B, T, D]."""
    normed = vision.norm(x)
    return OrderedDict(norm_small=vision.norm(small), norm=normed, tokens=vision.head(normed))


def layer_parts(
    layer: gemma.Layer,
    xs: list[jax.Array],
    conds: list[jax.Array | None],
    positions: jax.Array,
    mask: jax.Array,
    small: list[jax.Array],
) -> tuple[dict[str, jax.Array], list[jax.Array]]:
    """The inner tensors of a layer in the order of the computation, and its outputs.

    Args:
      layer: one layer.
      xs: residual stream of every expert, [B, T_i, D_i].
      conds: condition of the norms of every expert, [B, D_i] or None.
      positions: int [B, S].
      mask: bool [B, S, S].
      small: what probes the eps of the norms, [1, 1, D_i] per expert.

    Returns:
      "expert/name" -> tensor, and the residual streams after the layer.
    """
    names = EXPERTS[: len(xs)]
    experts = list(zip(names, layer.experts, xs, conds, small, strict=True))
    stops = np.cumsum([x.shape[1] for x in xs])[:-1]
    parts, gates, qkv = OrderedDict(), [], []
    for (name, expert, x, cond, little), where in zip(experts, jnp.split(positions, stops, axis=1), strict=True):
        parts[f"{name}/norm_attn_small"] = expert.norm_attn(little, cond)[0]
        parts[f"{name}/norm_attn"], gate = expert.norm_attn(x, cond)
        if gate is not None:
            parts[f"{name}/gate_attn"] = gate
        gates.append(gate)
        qkv.append(expert.qkv(parts[f"{name}/norm_attn"], gemma.angles(where, expert.head_dim)))
        parts |= {f"{name}/{letter}": part for letter, part in zip("qkv", qkv[-1], strict=True)}

    q, k, v = (jnp.concatenate(part, axis=1) for part in zip(*qkv, strict=True))
    attended = jnp.split(gemma.attention(q, k, v, mask), stops, axis=1)
    parts |= {f"{name}/attended": part for name, part in zip(names, attended, strict=True)}
    for (name, expert, x, cond, little), part, gate in zip(experts, attended, gates, strict=True):
        parts[f"{name}/attention"] = expert.o(part)
        after = parts[f"{name}/after_attention"] = gemma.add_gated(x, parts[f"{name}/attention"], gate)
        parts[f"{name}/norm_mlp_small"] = expert.norm_mlp(little, cond)[0]
        parts[f"{name}/norm_mlp"], gate_mlp = expert.norm_mlp(after, cond)
        if gate_mlp is not None:
            parts[f"{name}/gate_mlp"] = gate_mlp
        parts[f"{name}/mlp"] = expert.mlp(parts[f"{name}/norm_mlp"])
    where = gemma.angles(positions, layer.experts[0].head_dim)
    return parts, layer(xs, conds, where, mask, None)[0]


def score_parts(logits: jax.Array, targets: jax.Array, scored: jax.Array) -> dict[str, jax.Array]:
    """What is compared of the scores.

    Args:
      logits: float32 [..., V].
      targets: int [...], the tokens that should come.
      scored: bool [...], which places count; the others are 0.

    Returns:
      The targets' logits and the logsumexp [...]; of a small vocabulary also all logits [..., V].
    """
    parts = OrderedDict(
        target_logits=jnp.where(scored, jnp.take_along_axis(logits, targets[..., None], -1)[..., 0], 0),
        logsumexp=jnp.where(scored, jax.nn.logsumexp(logits, -1), 0),
    )
    if logits.shape[-1] <= SMALL_VOCABULARY:
        parts["logits"] = jnp.where(scored[..., None], logits, 0)
    return parts


def sampling(module: pi0.Pi0 | Pi0Fast, batch: Batch, num_steps: int = 10) -> Named:
    """The way from noise to actions: keys and values of the prefix, every Euler step, and the model's own result.

    pi0-FAST writes tokens instead: scores at every step when `forced_tokens` are fed, and the greedy choice.

    Args:
      module: a filled model.
      batch: observation and noise; of pi0-FAST `forced_tokens`, int [B, G].
      num_steps: number of Euler steps; pi0-FAST makes one per forced token.

    Yields:
      "stage/.../name" and the tensor on the host; stages cache and trajectory, of pi0-FAST cache and decode.
    """
    batch = jax.tree.map(jnp.asarray, dict(batch))
    yield from (_decoding if isinstance(module, Pi0Fast) else _denoising)(module, batch, num_steps)


def _denoising(module: pi0.Pi0, batch: Batch, num_steps: int) -> Named:
    prefix, cache = _jit(module, pi0.Pi0.prefill)(batch)
    yield from _cache(cache)

    denoise = _jit(module, pi0.Pi0.denoise)
    times, dt = euler_times(num_steps)
    x_t = batch["noise"]
    for i, time in enumerate(times):
        velocity = denoise(prefix, cache, batch["state"], x_t, jnp.full(x_t.shape[:1], time))
        yield f"trajectory/{i:02d}/velocity", _host(velocity)
        x_t = x_t + dt * velocity
        yield f"trajectory/{i:02d}/x_t", _host(x_t)
    sample_actions = _jit(module, lambda m, batch, noise: m.sample_actions(batch, noise, num_steps))
    yield "trajectory/actions", _host(sample_actions(batch, batch["noise"]))


def _decoding(module: Pi0Fast, batch: Batch, _: int) -> Named:
    """Near the rounding, two tokens may be equally likely; so the greedy choice is compared in float32 only."""
    forced = batch["forced_tokens"]
    steps = forced.shape[1]
    prompt = _jit(module, lambda m, batch: m.prefill(batch, jnp.zeros(0, jnp.int32), steps))(batch)
    hidden, cache = prompt.hidden, prompt.cache
    yield from _cache(gemma.KVCache(*(c[:, :, : prompt.valid.shape[1]] for c in cache)))

    scores = _jit(module, lambda m, x, tokens: score_parts(m.gemma.logits(x), tokens, jnp.ones(len(x), bool)))
    advance = _jit(module, Pi0Fast.advance)
    for step in range(steps):
        for name, part in scores(hidden, forced[:, step]).items():
            yield f"decode/{step:02d}/{name}", _host(part)
        hidden, cache = advance(prompt, cache, forced[:, step], jnp.asarray(step))
    if module.compute.dtype == "float32":
        yield "decode/tokens", _host(_jit(module, lambda m, batch: m.decode(batch, steps))(batch))


def _cache(cache: gemma.KVCache) -> Named:
    for i, (k, v) in enumerate(zip(cache.k, cache.v, strict=True)):
        yield f"cache/{i:02d}/k", _host(k)
        yield f"cache/{i:02d}/v", _host(v)


def gradients(module: pi0.Pi0 | Pi0Fast, batch: Batch) -> dict[str, np.ndarray]:
    """The mean loss's gradient by every parameter, under the names of `weights.shapes`, float32."""
    batch = jax.tree.map(jnp.asarray, dict(batch))
    graph, state = nnx.split(module)
    given = () if isinstance(module, Pi0Fast) else (batch["noise"], batch["time"])
    mean_loss = lambda state: nnx.merge(graph, state).loss(batch, *given).mean()  # noqa: E731
    grads = nnx.to_flat_state(jax.jit(jax.grad(mean_loss))(state))
    return {"/".join(map(str, path)): _host(leaf.get_value()) for path, leaf in grads}


def _jit(module: nnx.Module, method: Callable | None = None) -> Callable[..., Any]:
    """A compiled call of a module, or of `method(module, ...)`; `layer=i` takes one of a stack.

    The weights are an argument, so that nothing is compiled twice for the layers of a stack.
    """
    graph, state = nnx.split(module)
    method = type(module).__call__ if method is None else method

    def run(state: nnx.State, layer: int | None, args: tuple) -> Any:
        if layer is not None:
            state = jax.tree.map(lambda w: w[layer], state)
        return method(nnx.merge(graph, state), *args)

    run = jax.jit(run)
    return lambda *args, layer=None: run(state, layer, args)


def _small(width: int, dtype: str) -> jax.Array:
    """An input [1, 1, D] so small that a norm's eps, 1e-6, outweighs its mean square, 5e-7."""
    return jnp.asarray(1e-3 * np.cos(np.arange(width, dtype=np.float32)), dtype)[None, None]


def _host(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x)
