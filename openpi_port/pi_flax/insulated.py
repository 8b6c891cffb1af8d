"""Knowledge insulation: how pi0.5 is trained so that its action expert can't spoil its language model.

B batch, A actions in a chunk, J action dim, R draws, T prompt tokens, N action tokens, D width.

    query \\ key      images + prompt   action tokens   noisy actions
    images+prompt          x
    action tokens          x               causal
    noisy actions       x, stopped                            x

The language model learns to write the actions as FAST tokens. The expert learns the flow from the language model's keys
and values, through which no gradient goes back. It doesn't see the action tokens, which don't exist when actions are
sampled: what is deployed is plain pi0.5. (Driess et al., "Knowledge Insulating Vision-Language-Action Models", 2025.)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from openpi_port.batch import Batch
from openpi_port.masks import attention_mask, positions
from openpi_port.pi_flax.gemma import KVCache
from openpi_port.pi_flax.pi0 import Pi0, Tokens
from openpi_port.pi_flax.pi0_fast import token_loss


class Losses(NamedTuple):
    """float32: of the flow [B, A], which trains the expert, and of the tokens [B], which trains all the rest."""

    flow: jax.Array
    tokens: jax.Array


def losses(model: Pi0, batch: Batch, noise: jax.Array, time: jax.Array) -> Losses:
    """Both losses of a training batch.

    Args:
      model: pi0.5.
      batch: observation, `actions`, `action_tokens` and `action_tokens_mask` [B, N].
      noise: [B, A, J] or [B, R, A, J].
      time: [B] or [B, R], in (0, 1].
    """
    noise, time = jnp.asarray(noise), jnp.asarray(time)
    if noise.ndim == 3:
        noise, time = noise[:, None], time[:, None]
    prefix, cache, hidden = read(model, batch)
    flow = model.loss_of_draws(*jax.lax.stop_gradient((prefix, cache)), batch, noise, time)
    tokens, scored = jnp.asarray(batch["action_tokens"]), jnp.asarray(batch["action_tokens_mask"])
    return Losses(flow, token_loss(model.gemma, hidden, tokens, scored))


def read(model: Pi0, batch: Batch) -> tuple[Tokens, KVCache, jax.Array]:
    """One pass of the language model over images, prompt and action tokens.

    Returns:
      Images and prompt, their keys and values (those of `Pi0.prefill`), and what each action token is predicted from,
      [B, N, D].
    """
    prefix = model.embed_prefix(batch)
    length = prefix.x.shape[1]
    given = jnp.asarray(batch["action_tokens_mask"])[:, :-1]  # nothing follows the last
    x = jnp.concatenate([prefix.x, model.gemma.embed(jnp.asarray(batch["action_tokens"])[:, :-1])], 1)
    valid = jnp.concatenate([prefix.valid, given], 1)
    mask = attention_mask(valid, jnp.concatenate([prefix.starts_block, jnp.ones_like(given)], 1))
    (out, _), cache = model.gemma([x, None], [None, None], positions(valid), mask, return_cache=True)

    prompt = jnp.asarray(batch["tokenized_prompt_mask"])
    last = length - prompt.shape[1] + prompt.sum(1) - 1  # of the prompt, before its padding
    hidden = jnp.concatenate([jnp.take_along_axis(out, last[:, None, None], 1), out[:, length:]], 1)
    return prefix, KVCache(*(c[:, :, :length] for c in cache)), hidden
