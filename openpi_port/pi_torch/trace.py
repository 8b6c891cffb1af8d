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

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from openpi_port.batch import Batch
from openpi_port.pi_torch import device as devices
from openpi_port.pi_torch import gemma, pi0, siglip
from openpi_port.pi_torch.pi0_fast import Pi0Fast
from openpi_port.schedule import euler_times

EXPERTS = ("language", "expert")
SMALL_VOCABULARY = 4096  # up to which all logits are compared, not only the target's and their sum

Named = Iterator[tuple[str, np.ndarray]]


@torch.no_grad()
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
    config = module.config
    batch = _put(batch, module)

    images = torch.cat([pi0.to_unit(batch["image"][name]) for name in config.cameras])
    yield "vision/images", _host(images)
    x = module.vision.embed(images)
    yield "vision/embedded", _host(x)
    small = _small(config.vision.width, x)
    for i, block in enumerate(module.vision.blocks):
        parts, x = block_parts(block, x, small)
        for name, part in parts.items():
            yield f"vision/{i:02d}/{name}", _host(part)
        yield f"vision/{i:02d}/out", _host(x)
    for name, part in end_parts(module.vision, x, small).items():
        yield f"vision/{name}", _host(part)
    yield "prefix/prompt", _host(module.gemma.embed(batch["tokenized_prompt"]))
    yield from (_tokens if isinstance(module, Pi0Fast) else _flow)(module, batch)


def _flow(module: pi0.Pi0, batch: Batch) -> Named:
    """From noisy actions to the loss."""
    time = batch["time"]
    t = time[:, None, None]
    x_t = t * batch["noise"] + (1 - t) * batch["actions"]
    xs, conds, positions, mask = module.joint_inputs(batch, x_t, time)
    yield "prefix/tokens", _host(xs[0])
    yield "suffix/x_t", _host(x_t)
    yield "suffix/time_embedding", _host(pi0.embed_time(time, module.config.expert.width))
    if conds[1] is not None:
        yield "suffix/condition", _host(conds[1])
    yield "suffix/tokens", _host(xs[1])
    yield "masks/attention", _host(mask)
    yield "masks/positions", _host(positions)

    yield from _layers(module, xs, conds, positions, mask)
    yield "output/velocity", _host(module.velocity(batch, x_t, time))
    yield "output/loss", _host(module.loss(batch, batch["noise"], time))


def _tokens(module: Pi0Fast, batch: Batch) -> Named:
    """From images and text to the loss; the last token is no one's input."""
    tokens, positions, mask = module.joint_inputs(batch)
    yield "prefix/tokens", _host(tokens.x)
    yield "masks/attention", _host(mask)
    yield "masks/positions", _host(positions)

    yield from _layers(module, [tokens.x[:, :-1]], [None], positions[:, :-1], mask[:, :-1, :-1])
    targets, scored = batch["tokenized_prompt"][:, 1:], batch["token_loss_mask"][:, 1:]
    for name, part in score_parts(module.logits(batch), targets, scored).items():
        yield f"output/{name}", _host(part)
    yield "output/loss", _host(module.loss(batch))


def _layers(
    module: pi0.Pi0 | Pi0Fast, xs: list[Tensor], conds: list[Tensor | None], positions: Tensor, mask: Tensor
) -> Named:
    """All layers and the final norms; see `layer_parts`."""
    xs = [x.to(getattr(torch, module.compute.dtype)) for x in xs]
    small = [_small(x.shape[-1], x) for x in xs]
    experts = EXPERTS[: len(xs)]
    for i, layer in enumerate(module.gemma.layers):
        parts, xs = layer_parts(layer, xs, conds, positions, mask, small)
        for name, part in parts.items():
            yield f"layers/{i:02d}/{name}", _host(part)
        for name, x in zip(experts, xs, strict=True):
            yield f"layers/{i:02d}/{name}/out", _host(x)
    for i, name in enumerate(experts):
        norm = module.gemma.norms[i]
        yield f"output/{name}_norm_small", _host(norm(small[i], conds[i])[0])
        yield f"output/{name}", _host(norm(xs[i], conds[i])[0])


def block_parts(block: siglip.Block, x: Tensor, small: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The inner tensors of a vision block at its input x [B, T, D], and its output."""
    attention = block.attn(block.norm_attn(x))
    after = x + attention
    parts = {
        "norm_attn_small": block.norm_attn(small),
        "norm_attn": block.norm_attn(x),
        "attention": attention,
        "norm_mlp_small": block.norm_mlp(small),
        "norm_mlp": block.norm_mlp(after),
        "mlp": block.mlp(block.norm_mlp(after)),
    }
    return parts, block(x)


def end_parts(vision: siglip.Siglip, x: Tensor, small: Tensor) -> dict[str, Tensor]:
    """What follows the last vision block, whose output is x [B, T, D]."""
    normed = vision.norm(x)
    return {"norm_small": vision.norm(small), "norm": normed, "tokens": vision.head(normed)}


def layer_parts(
    layer: gemma.Layer,
    xs: list[Tensor],
    conds: list[Tensor | None],
    positions: Tensor,
    mask: Tensor,
    small: list[Tensor],
) -> tuple[dict[str, Tensor], list[Tensor]]:
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
    lengths = [x.shape[1] for x in xs]
    parts, gates, qkv = {}, [], []
    for (name, expert, x, cond, little), where in zip(experts, positions.split(lengths, dim=1), strict=True):
        parts[f"{name}/norm_attn_small"] = expert.norm_attn(little, cond)[0]
        parts[f"{name}/norm_attn"], gate = expert.norm_attn(x, cond)
        if gate is not None:
            parts[f"{name}/gate_attn"] = gate
        gates.append(gate)
        qkv.append(expert.qkv(parts[f"{name}/norm_attn"], gemma.angles(where, expert.head_dim)))
        parts |= {f"{name}/{letter}": part for letter, part in zip("qkv", qkv[-1], strict=True)}

    q, k, v = (torch.cat(part, dim=1) for part in zip(*qkv, strict=True))
    attended = gemma.attention(q, k, v, mask).split(lengths, dim=1)
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


def score_parts(logits: Tensor, targets: Tensor, scored: Tensor) -> dict[str, Tensor]:
    """What is compared of the scores.

    Args:
      logits: float32 [..., V].
      targets: int [...], the tokens that should come.
      scored: bool [...], which places count; the others are 0.

    Returns:
      The targets' logits and the logsumexp [...]; of a small vocabulary also all logits [..., V].
    """
    parts = {
        "target_logits": logits.gather(-1, targets.long()[..., None])[..., 0].where(scored, 0),
        "logsumexp": logits.logsumexp(-1).where(scored, 0),
    }
    if logits.shape[-1] <= SMALL_VOCABULARY:
        parts["logits"] = logits.where(scored[..., None], 0)
    return parts


@torch.no_grad()
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
    batch = _put(batch, module)
    yield from (_decoding if isinstance(module, Pi0Fast) else _denoising)(module, batch, num_steps)


def _denoising(module: pi0.Pi0, batch: Batch, num_steps: int) -> Named:
    prefix, cache = module.prefill(batch)
    yield from _cache(cache)

    times, dt = euler_times(num_steps)
    x_t = batch["noise"]
    for i, time in enumerate(times):
        velocity = module.denoise(prefix, cache, batch["state"], x_t, x_t.new_full(x_t.shape[:1], float(time)))
        yield f"trajectory/{i:02d}/velocity", _host(velocity)
        x_t = x_t + float(dt) * velocity
        yield f"trajectory/{i:02d}/x_t", _host(x_t)
    yield "trajectory/actions", _host(module.sample_actions(batch, batch["noise"], num_steps))


def _decoding(module: Pi0Fast, batch: Batch, _: int) -> Named:
    """Near the rounding, two tokens may be equally likely; so the greedy choice is compared in float32 only."""
    forced = batch["forced_tokens"]
    steps = forced.shape[1]
    prompt = module.prefill(batch, forced.new_zeros(0), steps)
    hidden, cache = prompt.hidden, prompt.cache
    yield from _cache(gemma.KVCache(*(c[:, :, : prompt.valid.shape[1]] for c in cache)))

    for step in range(steps):
        every = forced.new_ones(len(hidden), dtype=torch.bool)
        for name, part in score_parts(module.gemma.logits(hidden), forced[:, step], every).items():
            yield f"decode/{step:02d}/{name}", _host(part)
        hidden, cache = module.advance(prompt, cache, forced[:, step], torch.tensor(step, device=forced.device))
    if module.compute.dtype == "float32":
        yield "decode/tokens", _host(module.decode(batch, steps))


def _cache(cache: gemma.KVCache) -> Named:
    for i, (k, v) in enumerate(zip(cache.k, cache.v, strict=True)):
        yield f"cache/{i:02d}/k", _host(k)
        yield f"cache/{i:02d}/v", _host(v)


def gradients(module: pi0.Pi0 | Pi0Fast, batch: Batch) -> dict[str, np.ndarray]:
    """The mean loss's gradient by every parameter, under the names of `weights.shapes`, float32."""
    batch = _put(batch, module)
    names, params = zip(*module.named_parameters(), strict=True)
    given = () if isinstance(module, Pi0Fast) else (batch["noise"], batch["time"])
    mean_loss = module.loss(batch, *given).mean()
    # The last layer's prefix feeds nothing, so some parameters have no gradient: in Flax that is zero.
    grads = torch.autograd.grad(mean_loss, params, allow_unused=True, materialize_grads=True)
    return {name: _host(grad) for name, grad in zip(names, grads, strict=True)}


def _put(batch: Batch, module: pi0.Pi0 | Pi0Fast) -> Batch:
    return devices.put(dict(batch), next(module.parameters()).device)


def _small(width: int, like: Tensor) -> Tensor:
    """An input [1, 1, D] so small that a norm's eps, 1e-6, outweighs its mean square, 5e-7."""
    return torch.from_numpy(1e-3 * np.cos(np.arange(width, dtype=np.float32))).to(like)[None, None]


def _host(x: Tensor) -> np.ndarray:
    return (x.float() if x.is_floating_point() else x).detach().cpu().numpy()
