"""pi0 and pi0.5: a vision-language model whose action expert predicts the velocity of a flow over action chunks.

B batch, A actions in a chunk (horizon), J action dim, T prompt tokens, D width, S sequence.

    query \\ key   images + prompt   state   actions
    images+prompt         x
    state                 x            x               (pi0 only)
    actions               x            x        x

Flow time runs from 1 (noise) to 0 (data).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpi_port.batch import Batch
from openpi_port.config import Compute
from openpi_port.config import Pi0 as Config
from openpi_port.masks import Blocks, attention_mask, blocks, positions
from openpi_port.pi_torch.gemma import Gemma, KVCache
from openpi_port.pi_torch.layers import Linear
from openpi_port.pi_torch.siglip import Siglip
from openpi_port.schedule import euler_times


class Tokens(NamedTuple):
    """Embedded tokens [B, S, D], which of them are valid, and where new attention blocks start (both bool [B, S])."""

    x: Tensor
    valid: Tensor
    starts_block: Tensor


class Pi0(nn.Module):
    """Images, prompt, state and noisy actions to the velocity of the actions."""

    def __init__(self, config: Config, compute: Compute) -> None:
        super().__init__()
        self.config = config
        self.compute = compute
        adarms = config.time_in == "adarms"
        width = config.expert.width
        self.vision = Siglip(config.vision, config.language.width, compute)
        self.gemma = Gemma([config.language, config.expert], [False, adarms], config.vocab_size, compute)
        self.action_in_proj = Linear(config.action_dim, width, bias=True)
        if config.state_in == "suffix":
            self.state_proj = Linear(config.action_dim, width, bias=True)
        if adarms:
            self.time_mlp_in = Linear(width, width, bias=True)
            self.time_mlp_out = Linear(width, width, bias=True)
        else:
            self.action_time_mlp_in = Linear(2 * width, width, bias=True)
            self.action_time_mlp_out = Linear(width, width, bias=True)
        self.action_out_proj = Linear(width, config.action_dim, bias=True)

    def embed_prefix(self, batch: Batch) -> Tokens:
        """Tokens of the batch's cameras, in the model's order, then of the prompt; they all see one another."""
        names = [name for name in self.config.cameras if name in batch["image"]]
        images = torch.stack([to_unit(batch["image"][name]) for name in names])  # [cameras, B, ...]
        cameras, size = images.shape[:2]
        image_tokens = self.vision(images.flatten(0, 1))
        image_tokens = image_tokens.unflatten(0, (cameras, size))
        prompt = self.gemma.embed(batch["tokenized_prompt"])
        x = torch.cat([*image_tokens, prompt], dim=1)

        per_image = image_tokens.shape[2]
        seen = [batch["image_mask"][name][:, None] for name in names]
        valid = [m.expand(size, per_image) for m in seen]
        valid = torch.cat([*valid, batch["tokenized_prompt_mask"]], dim=1)
        return Tokens(x, valid, torch.zeros_like(valid))

    def embed_suffix(self, state: Tensor, x_t: Tensor, time: Tensor) -> tuple[Tokens, Tensor | None]:
        """Tokens of the state (pi0) and of the noisy actions, and the condition of the norms (pi0.5).

        Args:
          state: [B, J].
          x_t: [B, A, J].
          time: [B], or [B, A] where actions have flow times of their own (real-time chunking).

        Returns:
          Tokens [B, 1 + A or A, D] and the condition [B, D], per token [B, 1 + A or A, D], or None.
        """
        time_emb = embed_time(time, self.config.expert.width)
        actions = self.action_in_proj(x_t)
        cond = None
        if self.config.time_in == "adarms":
            cond = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time_emb))))
        else:
            time_emb = (time_emb if time.ndim == 2 else time_emb[:, None]).expand_as(actions)
            actions = self.action_time_mlp_in(torch.cat([actions, time_emb], dim=-1))
            actions = self.action_time_mlp_out(F.silu(actions))

        x = actions
        if self.config.state_in == "suffix":
            x = torch.cat([self.state_proj(state)[:, None], actions], dim=1)
            if cond is not None and cond.ndim == 3:  # the state has no flow time; the last action is never a given one
                cond = torch.cat([cond[:, -1:], cond], dim=1)
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        starts = torch.arange(x.shape[1], device=x.device) <= (self.config.state_in == "suffix")  # state, first action
        return Tokens(x, valid, starts.expand(x.shape[:2])), cond

    def joint_inputs(self, batch: Batch, x_t: Tensor, time: Tensor) -> tuple[list, list, Tensor, Tensor]:
        """Tokens and conditions of the two experts, positions [B, S] and mask [B, S, S] of one joint pass."""
        prefix = self.embed_prefix(batch)
        suffix, cond = self.embed_suffix(batch["state"], x_t, time)
        valid = torch.cat([prefix.valid, suffix.valid], dim=1)
        starts_block = torch.cat([prefix.starts_block, suffix.starts_block], dim=1)
        return [prefix.x, suffix.x], [None, cond], positions(valid), attention_mask(valid, starts_block)

    def velocity(self, batch: Batch, x_t: Tensor, time: Tensor) -> Tensor:
        """The predicted velocity [B, A, J] at noisy actions x_t [B, A, J] and flow times [B] or [B, A]."""
        (_, out), _ = self.gemma(*self.joint_inputs(batch, x_t, time))
        return self._project_out(out)

    def loss(self, batch: Batch, noise: Tensor, time: Tensor) -> Tensor:
        """Flow-matching loss: the velocity's mean squared error over the action dims.

        Args:
          batch: observation and `actions` [B, A, J].
          noise: [B, A, J]; or [B, R, A, J], R draws that share one pass over images and prompt.
          time: [B] or [B, R], in (0, 1]; with a last axis A where actions have flow times of their own.

        Returns:
          float32 [B, A], the mean over the draws; of no use where the flow time is 0, because that action is given.
        """
        if noise.ndim == 3:
            noise, time = noise[:, None], time[:, None]
        prefix = self.embed_prefix(batch)
        cache = self.gemma.keys_values(prefix.x, positions(prefix.valid), blocks(prefix.valid, None))
        return self.loss_of_draws(prefix, cache, batch, noise, time)

    def prefill(self, batch: Batch) -> tuple[Tokens, KVCache]:
        """Runs the prefix once: its tokens, and the keys and values that every Euler step attends to."""
        prefix = self.embed_prefix(batch)
        mask = blocks(prefix.valid, None)
        _, cache = self.gemma([prefix.x, None], [None, None], positions(prefix.valid), mask, return_cache=True)
        return prefix, cache

    def denoise(self, prefix: Tokens, cache: KVCache, state: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        """The same velocity as `velocity`, from the prefix's keys and values."""
        suffix, cond = self.embed_suffix(state, x_t, time)
        seen, mask = blocks(prefix.valid, None).keys, blocks(suffix.valid, suffix.starts_block)
        mask = Blocks(mask.queries, torch.cat([seen, mask.keys], dim=1))
        pos = prefix.valid.sum(1, keepdim=True) + positions(suffix.valid)
        (_, out), _ = self.gemma([None, suffix.x], [None, cond], pos, mask, cache)
        return self._project_out(out)

    def loss_of_draws(self, prefix: Tokens, cache: KVCache, batch: Batch, noise: Tensor, time: Tensor) -> Tensor:
        """The loss, float32 [B, A], of R draws of noise and time (see `loss`), from the prefix's keys and values."""
        size, draws = noise.shape[:2]
        t = time.reshape(size, draws, -1, 1)
        actions = batch["actions"][:, None]
        x_t = t * noise + (1 - t) * actions  # [B, R, A, J]
        state = batch["state"]
        if draws > 1:
            prefix = Tokens(*(x.repeat_interleave(draws, dim=0) for x in prefix))
            cache = KVCache(*([x.repeat_interleave(draws, dim=0) for x in layers] for layers in cache))
            state = state.repeat_interleave(draws, dim=0)
        v_t = self.denoise(prefix, cache, state, x_t.flatten(0, 1), time.flatten(0, 1))
        return (v_t.reshape(x_t.shape) - (noise - actions)).square().mean((1, 3))

    def sample_actions(self, batch: Batch, noise: Tensor, num_steps: int = 10) -> Tensor:
        """Integrates the flow from noise to actions with Euler steps.

        Args:
          batch: observation.
          noise: [B, A, J], the starting point.
          num_steps: number of Euler steps.

        Returns:
          Actions, float32 [B, A, J].
        """
        prefix, cache = self.prefill(batch)

        def velocity(x_t: Tensor, time: Tensor) -> Tensor:
            return self.denoise(prefix, cache, batch["state"], x_t, time.expand(noise.shape[0]))

        return integrate(velocity, noise, num_steps)

    def _project_out(self, out: Tensor) -> Tensor:
        return self.action_out_proj(out[:, -self.config.action_horizon :].float())


def integrate(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, num_steps: int) -> Tensor:
    """Euler steps from flow time 1 to 0.

    Args:
      velocity: of x_t [B, A, J] at a flow time [].
      noise: [B, A, J], where they begin.
      num_steps: how many.

    Returns:
      [B, A, J] at flow time 0.
    """
    times, dt = euler_times(num_steps)
    x_t = noise
    for time in times:  # made on the device: a copy from the host can't be recorded
        x_t = x_t + float(dt) * velocity(x_t, torch.full((), float(time), device=noise.device))
    return x_t


def to_unit(image: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1]; a float image is in that range already."""
    return image.float() / 255 * 2 - 1 if image.dtype == torch.uint8 else image


def embed_time(time: Tensor, dim: int, min_period: float = 4e-3, max_period: float = 4.0) -> Tensor:
    """Sines and cosines of the flow time at periods from `min_period` to `max_period`, in float32.

    Args:
      time: [...].
      dim: even.

    Returns:
      float32 [..., dim], sines first.
    """
    fraction = torch.linspace(0.0, 1.0, dim // 2, dtype=torch.float32, device=time.device)
    period = min_period * (max_period / min_period) ** fraction
    angle = time[..., None].float() * (1.0 / period * 2 * math.pi)
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)
