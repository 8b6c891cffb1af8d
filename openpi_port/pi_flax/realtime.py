"""Real-time chunking: chunks that go on where the previous one is being played (see `openpi_port/realtime.py`).

B batch, A actions in a chunk, J action dim. Flow time runs from 1 (noise) to 0 (data).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from openpi_port.batch import Batch
from openpi_port.pi_flax.pi0 import Pi0, integrate
from openpi_port.realtime import MAX_GUIDANCE, guidance


def sample_guided(
    model: Pi0,
    batch: Batch,
    noise: jax.Array,
    previous: jax.Array,
    weights: jax.Array,
    num_steps: int = 10,
    limit: float = MAX_GUIDANCE,
) -> jax.Array:
    """Samples a chunk that is pulled towards the previous one.

    Args:
      model: pi0 or pi0.5, trained as usual.
      batch: observation.
      noise: [B, A, J], the starting point.
      previous: [B, A, J], the actions not yet played, from the observation's on; anything where the weight is 0.
      weights: [B, A, J], or 1 for J: see `soft_mask`. Where all are 0, plain sampling.
      num_steps: number of Euler steps.
      limit: of the guidance, beta.

    Returns:
      Actions, float32 [B, A, J].
    """
    prefix, cache = model.prefill(batch)
    state = jnp.asarray(batch["state"])

    def velocity(x_t: jax.Array, time: jax.Array) -> jax.Array:
        times = jnp.broadcast_to(time, x_t.shape[:1])
        plain = lambda x: model.denoise(prefix, cache, state, x, times)  # noqa: E731
        return guided_velocity(plain, x_t, time, previous, weights, limit)

    return integrate(velocity, noise, num_steps)


def guided_velocity(
    velocity: Callable[[jax.Array], jax.Array],
    x_t: jax.Array,
    time: jax.Array,
    previous: jax.Array,
    weights: jax.Array,
    limit: float,
) -> jax.Array:
    """The velocity that leads to a chunk near the previous one (pseudo-inverse guidance; equation 2 of 2506.07339).

    v - guidance(t) * J^T diag(weights) (previous - x_0), where x_0 = x_t - t v is the estimate of the clean chunk and J
    its Jacobian with respect to x_t.

    Args:
      velocity: of x_t [B, A, J] at this flow time.
      x_t: [B, A, J].
      time: [].
      previous, weights, limit: see `sample_guided`.
    """

    def clean(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        v = velocity(x)
        return x - time * v, v

    x_0, pull_back, v = jax.vjp(clean, x_t, has_aux=True)
    (pull,) = pull_back(weights * (previous - x_0))
    return v - guidance(time, limit) * pull


def sample_conditioned(
    model: Pi0, batch: Batch, noise: jax.Array, previous: jax.Array, delay: jax.Array, num_steps: int = 10
) -> jax.Array:
    """Samples the rest of chunks whose first actions are given (inference of arXiv 2512.05964).

    Args:
      model: trained with `config.Train.max_delay`.
      batch: observation.
      noise: [B, A, J], the starting point of what is not given.
      previous: [B, A, J], of which the first `delay` actions are given; anything after them.
      delay: int [B], below A; 0 gives nothing.
      num_steps: number of Euler steps.

    Returns:
      Actions, float32 [B, A, J]; the given ones are unchanged.
    """
    prefix, cache = model.prefill(batch)
    state = jnp.asarray(batch["state"])
    given = jnp.arange(noise.shape[1]) < delay[:, None]  # [B, A]

    def velocity(x_t: jax.Array, time: jax.Array) -> jax.Array:
        v = model.denoise(prefix, cache, state, x_t, jnp.where(given, 0.0, time))
        return jnp.where(given[..., None], 0.0, v)

    return integrate(velocity, jnp.where(given[..., None], previous, noise), num_steps)
