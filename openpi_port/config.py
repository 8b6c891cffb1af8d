"""What a run is made of, as frozen dataclasses; the edge (ml_collections) is turned into these by `fields.build`.

The models themselves are described in `architecture.py`, which is re-exported here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

from openpi_port.architecture import EXPERT, LANGUAGE, SIGLIP, SIZES, Gemma, Lora, Pi0, Pi0Fast, Siglip
from openpi_port.errors import UserError
from openpi_port.ranges import COUNT, FROM_ZERO, POSITIVE, SHARE, check

__all__ = [
    "EXPERT",
    "FROZEN",
    "LANGUAGE",
    "LORA_ONLY",
    "SIGLIP",
    "SIZES",
    "Compute",
    "Data",
    "Dtype",
    "Gemma",
    "Lora",
    "Mesh",
    "Optimizer",
    "Pi0",
    "Pi0Fast",
    "Siglip",
    "Train",
]

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model is computed; never what it computes.

    Attributes:
      dtype: of activations and matrix products; parameters keep their own (float32 while training).
      remat: what the backward pass computes again: each layer, from its input ("full"); all but matrix products and
        attention, which are kept ("dots"); or nothing ("none"; layers that torch compiles keep norms, too, and compute
        gelu and such again). "auto" settles this, and raises `Train.microbatches`, to what is fastest of what the
        device has memory for (`memory.settle`).
      attention: "plain" keeps the logits and is the reference. Fused: torch has "sdpa" and "flex", Flax has
        "cudnn" and "splash". "auto" takes the fastest that the framework, the device and the dtype have, and "plain" on
        a CPU.
      compile: how training is compiled. torch: each kind of layer once ("layers"), that and all of a pass recorded as
        one launch ("graph", of pi0 and pi0.5 that are not split), or nothing ("none"). Flax: layers as a loop ("scan")
        or one after another ("unrolled": faster on a GPU). "auto" is "graph" on GPUs, "layers" where that can't be,
        and "none" on a CPU; in Flax "unrolled" where models are trained on a GPU and nothing is frozen, else "scan".
      gradients: dtype in which the gradients of `Train.microbatches` (and of devices that each hold the whole state)
        are added up, where weights are used in bfloat16: that is the dtype they are computed in, so with one
        part there is no difference. "auto" is "float32", but "bfloat16" where `remat` is "auto" and that avoids further
        parts, and over devices, where it halves what is sent.
    """

    dtype: Dtype = "float32"
    remat: Literal["auto", "none", "dots", "full"] = "none"
    attention: Literal["auto", "plain", "sdpa", "flex", "cudnn", "splash"] = "auto"
    compile: Literal["auto", "none", "layers", "graph", "scan", "unrolled"] = "auto"
    gradients: Literal["auto", "float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How a run is spread over devices; what it computes doesn't depend on it.

    Every device takes its own part of each batch.

    Attributes:
      data: copies of the state of training; -1 for as many as there are devices.
      fsdp: devices that share one copy among them.
      min_size: parameters with fewer elements are whole on every device.
    """

    data: int = -1
    fsdp: int = 1
    min_size: int = 2**18

    def __post_init__(self) -> None:
        if self.fsdp < 1 or self.data < -1 or self.data == 0:
            raise UserError(f"config.mesh: data={self.data}, fsdp={self.fsdp}: give counts of devices, or data=-1")
        check("config.mesh", self, FROM_ZERO, "min_size")


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set and the way from its names and units to the model's.

    Attributes:
      repo_id: a name on the Hugging Face hub, `hf://...`, a local directory, or a data set that ships here. LeRobot,
        RLDS or ALOHA's HDF5: what it is, the files show.
      robot: a module of `openpi_port.robots`.
      cameras: model camera -> image key of the data set; model cameras that are absent or empty are black
        and masked.
      state, actions: columns of the data set.
      prompt: the instruction; None takes each episode's task.
      task: of RLDS, the features with the instruction, separated by commas; the first that is not empty counts.
        Empty for `language_instruction`.
      prompt_style: whose way of writing the prompt the weights have learned. LeRobot keeps underscores (pi0), and
        0.4 writes the state padded to the model's dims (pi0.5); for pi0-FAST both versions pad the state, keep upper
        case and put one more <bos> before the actions.
      delta: which action dimensions become differences to the state; empty for none.
      norm: z-score, or quantiles to [-1, 1].
      split: of RLDS, such as "train+val"; empty for "train".
      episodes: numbers of those to use; empty for all.
      skip: numbers of those to leave out, such as damaged ones.
      validation: share of episodes kept for validation.
      augment: "default", "openpi" (what openpi's JAX training really does), "shift" (for a camera that never moves)
        or "none".
      state_noise: standard deviation of noise on the normalised state in training.
      root: where data sets from the hub are kept; None takes the hub's own cache.
      cache_gb: room on disk for decoded, resized frames; 0 decodes every time.
      num_workers: processes that load; 0 loads in threads of the main process.
      norm_stats: an openpi norm_stats.json to use, or its directory (local, gs://, hf://); None computes them from the
        training episodes.
      weight: in a mixture, the share of the samples relative to the other data sets'.
    """

    repo_id: str
    robot: str
    cameras: Mapping[str, str]
    state: str = "observation.state"
    actions: str = "action"
    prompt: str | None = None
    task: str = ""
    prompt_style: Literal["openpi", "lerobot-0.4", "lerobot-0.6"] = "openpi"
    delta: tuple[bool, ...] = ()
    norm: Literal["zscore", "quantile"] = "zscore"
    split: str = ""
    episodes: tuple[int, ...] = ()
    skip: tuple[int, ...] = ()
    validation: float = 0.1
    augment: Literal["default", "openpi", "shift", "none"] = "default"
    state_noise: float = 0.0
    root: str | None = None
    cache_gb: float = 8.0
    num_workers: int = 0
    norm_stats: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "cameras", {k: v for k, v in self.cameras.items() if v})


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with clipping, warm-up and cosine decay, and an exponential average of the weights (`ema`; 0 for none)."""

    peak_lr: float = 2.5e-5
    end_lr: float = 2.5e-6
    warmup_steps: int = 1000
    decay_steps: int = 30000
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-10
    clip_norm: float = 1.0
    ema: float = 0.99

    def __post_init__(self) -> None:
        where = "config.optimizer"
        check(where, self, POSITIVE, "peak_lr", "eps", "clip_norm")
        check(where, self, FROM_ZERO, "end_lr", "warmup_steps", "decay_steps", "weight_decay")
        check(where, self, SHARE, "b1", "b2", "ema")


# What openpi freezes when it trains LoRA: all of the language stack but the adapters. The vision tower and the
# projections of state, time and actions are trained.
LORA_ONLY = (r"^gemma/(?!.*/lora_[ab]$)",)

# Names for what is frozen most often.
FROZEN = {
    "language-but-lora": r"^gemma/(embedding$|norms/0/|layers/experts/0/(?!.*lora_[ab]$))",
    "expert-but-lora": r"^gemma/(norms/1/|layers/experts/1/(?!.*lora_[ab]$))",
    "all-but-lora": r"^(?!.*/lora_[ab]$)",
    "all-but-expert": r"^(vision/|gemma/(embedding$|norms/0/|layers/experts/0/))",
}


@dataclasses.dataclass(frozen=True)
class Train:
    """A whole run.

    Attributes:
      name: names the run's directory.
      data: the data set of the robot that the policy is for.
      mixture: further data sets that are learned along with it, by name; each with its own robot, cameras, transforms
        and statistics. `cache_gb` and `num_workers` of `data` count for all.
      backend: "flax" or "torch".
      tokenizer: "paligemma", "small" or "small_numbers" (which ship with the project; the latter has one token for each
        number of a state in the prompt), or a path to a SentencePiece model.
      fast_tokenizer: of pi0-FAST's actions: a processor's directory, a name on the Hugging Face hub, or one that ships
        ("fast_aloha"). Also of the action tokens that `insulate` adds.
      allow_truncation: cuts pi0-FAST's sequences that exceed max_token_len, as openpi does, and reports their share;
        otherwise such a sequence ends the run.
      init: a checkpoint to start from (local, gs://, hf://); None starts from fresh weights.
      frozen: what is not trained: names of `FROZEN` ("language-but-lora", "expert-but-lora": that part except its
        adapters; "all-but-lora"; "all-but-expert": vision and language model), or regular expressions over parameter
        paths (Flax names).
      save: which weights a checkpoint holds. "trained" leaves out the frozen ones, which are found again by `init` (or
        `seed`, where that is None) and recognised by a checksum.
      microbatches: parts that each batch goes through the model in, one after another, for want of memory; the step is
        the same. With `compute.remat` "auto" the fewest that there may be.
      draws: of noise and time per sample; several share one pass over images and prompt.
      max_delay: above 0, training-time real-time chunking: the first actions of a chunk, from none to so many, are
        given as they are, with flow time 0, and the loss is on the others (docs/real_time.md).
      insulate: knowledge insulation, for pi0.5: the expert's gradient stops at the language model's keys and values,
        and the language model learns to write the actions as FAST tokens instead. What is deployed is the same model.
      max_action_tokens: of `insulate`, the most that a chunk may have with its two end marks.
      flow_weight: of `insulate`, what the flow's loss is multiplied by before the tokens' is added.
      loss_on_padding: count the repeated last action after an episode's end, as openpi does. A token of pi0-FAST mixes
        all actions of its chunk, so there it always counts.
      out: directory for checkpoints and metrics.
    """

    name: str
    model: Pi0 | Pi0Fast
    data: Data
    mixture: Mapping[str, Data] = dataclasses.field(default_factory=dict)
    optimizer: Optimizer = Optimizer()
    compute: Compute = Compute()
    mesh: Mesh = Mesh()
    backend: Literal["flax", "torch"] = "flax"
    tokenizer: str = "paligemma"
    fast_tokenizer: str = "physical-intelligence/fast"
    allow_truncation: bool = False
    init: str | None = None
    frozen: tuple[str, ...] = ()
    save: Literal["all", "trained"] = "all"
    batch_size: int = 32
    microbatches: int = 1
    draws: int = 1
    max_delay: int = 0
    insulate: bool = False
    max_action_tokens: int = 250
    flow_weight: float = 1.0
    num_steps: int = 30000
    seed: int = 0
    loss_on_padding: bool = False
    out: str = "checkpoints"
    log_every: int = 100
    save_every: int = 1000
    keep_every: int = 5000
    eval_every: int = 1000
    eval_batches: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "frozen", tuple(FROZEN.get(name, name) for name in self.frozen))
        check("config", self, COUNT, "batch_size", "microbatches", "draws", "num_steps", "max_action_tokens")
        check("config", self, COUNT, "log_every", "save_every", "keep_every", "eval_every", "eval_batches")
        check("config", self, FROM_ZERO, "seed", "flow_weight")
        _check_frozen(self)
        _check_mechanisms(self)
        _check_data_sets(self)

    @property
    def cameras(self) -> tuple[str, ...]:
        """The model's cameras that some data set has; images of others are masked in all samples.

        All of them where masks don't hide what is missing (`Pi0Fast.missing_cameras`), or where none is named yet.
        """
        if getattr(self.model, "missing_cameras", "masked") == "visible":
            return self.model.cameras
        named = {camera for data in self.datasets.values() for camera in data.cameras}
        return tuple(camera for camera in self.model.cameras if camera in named) or self.model.cameras

    @property
    def datasets(self) -> Mapping[str, Data]:
        """All data sets by name; that of the deployed robot comes first and is called ""."""
        return {"": self.data, **self.mixture}


def _check_frozen(run: Train) -> None:
    """Raises UserError where a pattern is none."""
    for pattern in run.frozen:
        try:
            re.compile(pattern)
        except re.error as error:
            known = ", ".join(FROZEN)
            raise UserError(
                f"config.frozen: {pattern!r} is no regular expression ({error}), nor one of {known}"
            ) from None


def _check_mechanisms(run: Train) -> None:
    """Raises UserError where settings of the training contradict the model or each other."""
    if isinstance(run.model, Pi0Fast) and run.draws != 1:
        raise UserError(f"config.draws={run.draws}: pi0-FAST draws neither noise nor time; leave it at 1")
    if not 0 <= run.max_delay < run.model.action_horizon:
        raise UserError(
            f"config.max_delay={run.max_delay}: from 0 to {run.model.action_horizon - 1}, so that of a chunk's "
            f"{run.model.action_horizon} actions one at least is to learn"
        )
    if isinstance(run.model, Pi0Fast) and run.max_delay:
        raise UserError(f"config.max_delay={run.max_delay}: pi0-FAST has no flow times; leave it at 0")
    if run.batch_size % run.microbatches:
        raise UserError(f"config.microbatches={run.microbatches} doesn't divide batch_size={run.batch_size}")
    if run.insulate and getattr(run.model, "state_in", None) != "prompt":
        raise UserError(
            "config.insulate=True is for pi0.5 (model.state_in='prompt'): its language model must see the state to "
            "write the actions"
        )


def _check_data_sets(run: Train) -> None:
    """Raises UserError where a data set can't be named, or a number of it can't be."""
    for name, data in run.mixture.items():
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise UserError(f"config.mixture.{name}: names a directory of statistics; use letters, digits and _.-")
        for field in dataclasses.fields(Data):
            if field.name in ("cache_gb", "num_workers") and getattr(data, field.name) != field.default:
                raise UserError(f"config.mixture.{name}.{field.name}: set config.data.{field.name}, for all data sets")
    for name, data in run.datasets.items():  # which don't know what a run calls them
        where = f"config.mixture.{name}" if name else "config.data"
        check(where, data, SHARE, "validation")
        check(where, data, FROM_ZERO, "state_noise", "cache_gb", "num_workers")
        check(where, data, POSITIVE, "weight")
