"""How much memory a training run needs, computed from its configuration before anything is allocated.

B batch, S tokens of the whole sequence, T tokens per image, D width, F width of the MLP, N heads.
"""

from __future__ import annotations

import dataclasses
import math
import re

from convert import layout, tables
from openpi_port import meshes
from openpi_port.config import Gemma, Pi0, Pi0Fast, Siglip, Train
from openpi_port.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes by purpose.

    Attributes:
      num_params: parameters in all; `num_trained` of them are trained.
    """

    num_params: int
    num_trained: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """The peak, without the framework's own buffers."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations

    def __str__(self) -> str:
        unit, name = (GIB, "GiB") if self.total >= GIB else (2**20, "MiB")
        parts = ("weights", "gradients", "optimizer", "average", "activations")
        words = ", ".join(f"{part} {getattr(self, part) / unit:.1f}" for part in parts)
        return f"{self.total / unit:.1f} {name} ({words})"


def count_params(model: Pi0 | Pi0Fast, frozen: tuple[str, ...] = ()) -> tuple[int, int]:
    """Number of parameters, and of those that no pattern of `frozen` matches."""
    shapes = layout.side_shapes(tables.entries(model), layout.OURS)
    for pattern in frozen:
        if not any(re.search(pattern, name) for name in shapes):
            raise UserError(f"config.frozen: {pattern!r} is found in no parameter's name; one is {next(iter(shapes))}")
    trained = {n: s for n, s in shapes.items() if not any(re.search(p, n) for p in frozen)}
    return layout.num_elements(shapes), layout.num_elements(trained)


def plan(config: Train, shape: tuple[int, int] = (1, 1)) -> Plan:
    """Weights, their gradients, Adam's two moments and the average, and the activations of one batch.

    All float32, but frozen weights in the dtype they are used in.

    Args:
      config: the run.
      shape: of the mesh (`meshes.shape`); what is planned is one device's part.
    """
    num_params, num_trained = count_params(config.model, config.frozen)
    shapes = layout.side_shapes(tables.entries(config.model), layout.OURS)
    size = sum(math.prod(s) * (2 if meshes.stored_in(config, n) == "bfloat16" else 4) for n, s in shapes.items())
    weights, trained = (-(-count // shape[1]) for count in (size, num_trained))
    return Plan(
        num_params=num_params,
        num_trained=num_trained,
        weights=weights,
        gradients=4 * trained,
        optimizer=8 * trained,
        average=4 * trained if config.optimizer.ema else 0,
        activations=config.batch_size // math.prod(shape) * _activations(config),
    )


def _activations(config: Train) -> int:
    """Bytes per sample that the backward pass needs, and the workspace of one layer."""
    model, size = config.model, 2 if config.compute.dtype == "bfloat16" else 4
    vision = _layer(model.vision, model.vision.num_tokens, model.vision.num_tokens, size)
    vision_inputs = model.vision.num_tokens * model.vision.width * size
    prefix, suffix = model.prefix_len, 0 if isinstance(model, Pi0Fast) else model.suffix_len
    read = prefix + (config.max_action_tokens if config.insulate else 0)  # by the language model
    joint = _layer(model.language, read, read + suffix, size)
    joint_inputs = read * model.language.width * size
    if isinstance(model, Pi0):
        joint += config.draws * _layer(model.expert, suffix, prefix + suffix, size)
        joint_inputs += config.draws * suffix * model.expert.width * size
    cameras, vision_depth, depth = len(model.cameras), model.vision.depth, model.language.depth
    if config.compute.remat == "full":
        return cameras * (vision_depth * vision_inputs + vision) + depth * joint_inputs + joint
    return cameras * vision_depth * vision + depth * joint


def _layer(config: Siglip | Gemma, queries: int, keys: int, size: int) -> int:
    """Activations of one layer: norms, projections and MLP per token, and attention logits and probabilities."""
    per_token = 10 * config.width + 4 * config.mlp_dim
    return size * queries * per_token + config.num_heads * queries * keys * (4 + size)
