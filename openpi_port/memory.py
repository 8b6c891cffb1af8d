"""How much memory a training run needs, computed from its configuration before anything is allocated.

B batch, S tokens of the whole sequence, T tokens per image, D width, F width of the MLP, N heads.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import re

from convert import layout, tables
from openpi_port import meshes
from openpi_port.config import Gemma, Pi0, Pi0Fast, Siglip, Train
from openpi_port.errors import UserError

GIB = 2**30
# What a plan may take of a device's memory, since not all of what is free is in one piece. Measured: torch holds 3.7
# GiB more than is in use, and all of the device counts; JAX counts what it has put aside for itself.
SPARED = {"flax": 0.95, "torch": 0.92}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes by purpose, on one device.

    Attributes:
      num_params: parameters in all; `num_trained` of them are trained.
      rounded: what layers compute with beside float32 weights.
      gradients: what they add to the peak. Of a batch in one part they are written where activations were, as far as
        these reach.
    """

    num_params: int
    num_trained: int
    weights: int
    rounded: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """The peak, without the framework's own buffers."""
        return self.weights + self.rounded + self.gradients + self.optimizer + self.average + self.activations

    def __str__(self) -> str:
        unit, name = (GIB, "GiB") if self.total >= GIB else (2**20, "MiB")
        parts = ("weights", "rounded", "gradients", "optimizer", "average", "activations")
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
    """Weights, their gradients, Adam's two moments and the average, and the activations of one part of a batch.

    All float32, but frozen weights in the dtype they are used in; and the gradients of what layers use in bfloat16,
    which are added up in `Compute.gradients`.

    Args:
      config: the run.
      shape: of the mesh (`meshes.shape`); what is planned is one device's part.
    """
    num_params, num_trained = count_params(config.model, config.frozen)
    shapes = layout.side_shapes(tables.entries(config.model), layout.OURS)
    counts = {name: math.prod(s) for name, s in shapes.items()}
    weights = sum(n * (2 if meshes.stored_in(config, name) == "bfloat16" else 4) for name, n in counts.items())
    trained = {name: n for name, n in counts.items() if not meshes.is_frozen(config, name)}
    rounded = sum(n for name, n in trained.items() if _LAYERS.search(name))
    if config.compute.dtype == "float32" or (config.backend == "torch" and shape[1] > 1):
        rounded = 0
    one = config.backend == "torch" and meshes.copied(shape)  # tensor of all, which is there from the beginning
    whole, added = num_trained - rounded, config.microbatches > 1 or one
    if isinstance(config.model, Pi0) and not config.insulate and (config.backend == "flax" or shape[1] == 1):
        whole -= trained.get("gemma/embedding", 0)  # only rows that are looked up have a gradient
    sums = 4 if added and config.compute.gradients == "float32" else 2
    gradients = 4 * whole + sums * rounded
    samples = config.batch_size // math.prod(shape) // config.microbatches
    kept, workspace = (samples * n for n in _activations(config))
    if not added:
        gradients = max(0, gradients - kept)
    elif config.backend == "flax" and not unrolled(config):  # not only the sum, but what is added to it
        gradients += 4 * whole + 2 * rounded
    weights, rounded, gradients, moments = (
        -(-n // shape[1]) for n in (weights, 2 * rounded, gradients, 4 * num_trained)
    )
    return Plan(
        num_params=num_params,
        num_trained=num_trained,
        weights=weights,
        rounded=rounded,
        gradients=gradients,
        optimizer=2 * moments,
        average=moments if config.optimizer.ema else 0,
        activations=kept + workspace,
    )


def alternatives(config: Train, shape: tuple[int, int], room: int) -> list[tuple[str, Plan]]:
    """Ways to spend memory on speed, the fastest first: what is kept for the backward pass, in how many parts.

    Args:
      config: the run.
      shape: of the mesh.
      room: bytes of one device.

    Returns:
      Flags and the plan that goes with them, up to the first whose plan leaves a tenth of the room or more.
    """
    found = []
    for way in _ways(config, shape):
        compute = way.compute
        sums = f" --config.compute.gradients={compute.gradients}" * (compute.gradients != config.compute.gradients)
        flags = f"--config.compute.remat={compute.remat} --config.microbatches={way.microbatches}{sums}"
        found.append((flags, plan(way, shape)))
        if found[-1][1].total <= 0.9 * room:
            break
    return found


def settle(config: Train, shape: tuple[int, int], room: int) -> Train:
    """Settles `Compute.remat` and `Compute.gradients` where they are "auto", and then `microbatches`.

    Args:
      config: the run.
      shape: of the mesh.
      room: bytes of one device.

    Returns:
      The run in the fastest way whose plan fits with a little to spare; if none does, in the one that takes the least.

    Raises:
      UserError: `microbatches` doesn't divide what a device gets of a batch, or nothing is trained.
    """
    here = config.batch_size // math.prod(shape)
    if here % config.microbatches:
        raise UserError(
            f"config.microbatches={config.microbatches} doesn't divide the {here} samples that each of "
            f"{math.prod(shape)} devices gets of a batch: change it, or config.batch_size={config.batch_size}"
        )
    if not count_params(config.model, config.frozen)[1]:
        raise UserError(f"config.frozen={config.frozen} leaves nothing to train")
    if config.compute.remat != "auto":
        compute = config.compute
        alone = "bfloat16" if meshes.copied(shape) else "float32"
        gradients = alone if compute.gradients == "auto" else compute.gradients
        return dataclasses.replace(config, compute=dataclasses.replace(compute, gradients=gradients))
    for way in (ways := _ways(config, shape)):
        if plan(way, shape).total <= SPARED[config.backend] * room:
            return way
    return min(ways, key=lambda way: plan(way, shape).total)


def _ways(config: Train, shape: tuple[int, int]) -> list[Train]:
    """The run with other settings of what takes memory, the fastest first."""
    here, found = config.batch_size // math.prod(shape), []
    counts = [n for n in (1, 2, 4, 8, 16) if here % n == 0 and n >= config.microbatches] or [config.microbatches]
    fine = 4 if config.backend == "flax" else 8  # in more parts than that, products are slower than computed again
    if config.backend == "torch" and shape[1] > 1:
        fine = counts[0]  # a state that is split is gathered for every part
    few, many = ([n for n in counts if (n <= fine) == wanted] for wanted in (True, False))
    rest = itertools.chain((("dots", n) for n in few), (("full", n) for n in counts), (("dots", n) for n in many))
    # XLA computes quicker again than it reads what "none" would keep.
    most = [("none", counts[0])] if config.backend == "torch" else []
    for remat, count in [*most, *rest]:
        auto = config.compute.gradients == "auto"
        if not auto:
            sums = [config.compute.gradients]
        elif meshes.copied(shape):
            sums = ["bfloat16"]
        else:
            sums = ["float32", "bfloat16"] if count > 1 else ["float32"]
        for gradients in sums:
            compute = dataclasses.replace(config.compute, remat=remat, gradients=gradients)
            found.append(dataclasses.replace(config, compute=compute, microbatches=count))
    return found


def largest_batch(config: Train, shape: tuple[int, int], room: int) -> int:
    """The most samples of one step, over all devices, that fit with these settings; 0 if none do."""
    step = math.prod(shape) * config.microbatches

    def total(count: int) -> int:
        return plan(dataclasses.replace(config, batch_size=count * step), shape).total

    beyond = 1
    while total(beyond) <= room:
        beyond *= 2
    return step * (bisect.bisect_right(range(beyond), room, 1, key=total) - 1)


def written(config: Train, kind: str) -> Train:
    """Settles `Compute.compile` in Flax: are layers written out one after another, or a loop?

    Written out on a GPU, if nothing is frozen: frozen weights would be copied out of their stacks, where a run that
    freezes them means to save memory. A TPU's compiler takes minutes for one layer.

    Args:
      config: the run.
      kind: of device: "cpu", "gpu" or "tpu".
    """
    if config.backend == "torch" or config.compute.compile != "auto":
        return config
    how = "unrolled" if kind == "gpu" and not config.frozen else "scan"
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, compile=how))


def unrolled(config: Train) -> bool:
    """Whether layers are written out one after another; where that isn't settled, as on a GPU."""
    return config.backend == "flax" and written(config, "gpu").compute.compile == "unrolled"


# What is cast before layers use it; norms compute in float32.
_LAYERS = re.compile(r"^(vision/blocks|vision/head|gemma/layers)/(?!.*norm_\w+/(scale|bias)$)")


def _activations(config: Train) -> tuple[int, int]:
    """Bytes per sample that the backward pass needs, and of the workspace of one layer."""
    model = dataclasses.replace(config.model, cameras=config.cameras)
    size = 2 if config.compute.dtype == "bfloat16" else 4
    prefix, suffix = model.prefix_len, 0 if isinstance(model, Pi0Fast) else model.suffix_len
    read = prefix + (config.max_action_tokens if config.insulate else 0)  # by the language model
    tokens = len(model.cameras) * model.vision.num_tokens
    plain = config.compute.attention == "plain" or config.compute.dtype == "float32"
    # Passes through layers: their sizes, tokens of a sample, keys to which each has a logit in memory.
    language = model.language
    if isinstance(model, Pi0) and not config.insulate:  # of its last layer only keys and values are computed
        language = dataclasses.replace(language, depth=language.depth - 1)
    passes = [(model.vision, tokens, plain * model.vision.num_tokens), (language, read, plain * read)]
    if isinstance(model, Pi0):
        products = plain or config.backend == "flax"  # which has no kernel for so few queries
        passes.append((model.expert, config.draws * suffix, products * (prefix + suffix)))
    kept = sum(layers.depth * count * _kept(layers, logits, config) for layers, count, logits in passes)
    if config.backend == "torch":
        kept += tokens * 2 * 3 * model.vision.patch_size**2 * 4 // size  # images and their patches, in float32
        if isinstance(model, Pi0) and config.compute.remat != "full":  # keys and values: of each draw, and with its own
            seen = config.draws * (prefix + suffix) + (config.draws * prefix if config.draws > 1 else 0)
            kept += seen * 2 * language.num_kv_heads * language.head_dim * model.expert.depth
    return size * kept, size * max(count * _workspace(layers, config) for layers, count, _ in passes)


def _kept(layers: Siglip | Gemma, logits: int, config: Train) -> int:
    """Numbers per token that a layer leaves for the backward pass, with so many logits per head."""
    width, mlp, remat = layers.width, layers.mlp_dim, config.compute.remat
    if remat == "full":
        return width
    if isinstance(layers, Gemma):
        heads, gates = (layers.num_heads + 2 * layers.num_kv_heads) * layers.head_dim, 2
        attended = layers.num_heads * layers.head_dim
    else:
        heads, attended, gates = 3 * width, width, 1
    products = 2 * width + heads + attended + gates * mlp  # the layer's input, attention's sum, and between them
    eager = config.backend == "torch" and config.compute.compile == "none"
    if remat == "dots":
        return products + (width if eager else 0)  # which doesn't know that the last isn't needed
    inside = 3 * layers.num_heads * logits
    if config.backend == "torch" and not eager:
        return products + 2 * width + inside  # what norms make; a compiled layer computes the rest again
    return products + 4 * width + 2 * mlp + inside


def _workspace(layers: Siglip | Gemma, config: Train) -> int:
    """Numbers per token that the backward pass of one layer needs at a time."""
    if unrolled(config):
        again = dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat="dots"))
        return 3 * layers.mlp_dim + (_kept(layers, 0, again) if config.compute.remat == "full" else 0)
    return 8 * layers.width + 5 * layers.mlp_dim
