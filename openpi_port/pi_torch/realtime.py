"""Real-time chunking: chunks that go on where the previous one is being played (see `openpi_port/realtime.py`).

B batch, A actions in a chunk, J action dim. Flow time runs from 1 (noise) to 0 (data).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openpi_port.batch import Batch
from openpi_port.pi_torch.pi0 import Pi0, integrate
from openpi_port.realtime import MAX_GUIDANCE, guidance


@torch.inference_mode(False)
@torch.no_grad()
def sample_guided(
    model: Pi0,
    batch: Batch,
    noise: Tensor,
    previous: Tensor,
    weights: Tensor,
    num_steps: int = 10,
    limit: float = MAX_GUIDANCE,
) -> Tensor:
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
    state = batch["state"].clone()  # tensors of a caller's inference mode take no part in gradients, copies do

    def velocity(x_t: Tensor, time: Tensor) -> Tensor:
        times = time.expand(x_t.shape[0])
        plain = lambda x: model.denoise(prefix, cache, state, x, times)  # noqa: E731
        return guided_velocity(plain, x_t, time, previous, weights, limit)

    return integrate(velocity, noise.clone(), num_steps)


def guided_velocity(
    velocity: Callable[[Tensor], Tensor],
    x_t: Tensor,
    time: Tensor,
    previous: Tensor,
    weights: Tensor,
    limit: float,
) -> Tensor:
    """The velocity that leads to a chunk near the previous one (pseudo-inverse guidance; equation 2 of 2506.07339).

    v - guidance(t) * J^T diag(weights) (previous - x_0), where x_0 = x_t - t v is the estimate of the clean chunk and J
    its Jacobian with respect to x_t.

    Args:
      velocity: of x_t [B, A, J] at this flow time.
      x_t: [B, A, J].
      time: [].
      previous, weights, limit: see `sample_guided`.
    """
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        v = velocity(x)
        x_0 = x - time * v
    (pull,) = torch.autograd.grad(x_0, x, weights * (previous - x_0.detach()))
    return v.detach() - guidance(time, limit) * pull


@torch.no_grad()
def sample_conditioned(
    model: Pi0, batch: Batch, noise: Tensor, previous: Tensor, delay: Tensor, num_steps: int = 10
) -> Tensor:
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
    given = torch.arange(noise.shape[1], device=noise.device) < delay[:, None]  # [B, A]

    def velocity(x_t: Tensor, time: Tensor) -> Tensor:
        v = model.denoise(prefix, cache, batch["state"], x_t, torch.where(given, 0.0, time))
        return torch.where(given[..., None], 0.0, v)

    return integrate(velocity, torch.where(given[..., None], previous, noise), num_steps)
