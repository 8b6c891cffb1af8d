"""What a run is made of, as frozen dataclasses; the edge (ml_collections) is turned into these by `fields.build`.

Sizes are named: `base` is the published pi0, `mini` trains on a laptop, `debug` is for tests.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

from openpi_port.errors import UserError

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Siglip:
    """The vision transformer: [H, W] images to (H / patch) * (W / patch) tokens."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int = 14
    image_size: int = 224

    @property
    def num_tokens(self) -> int:
        """Tokens per image."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside an expert's weights: `w + alpha / rank * a @ b`.

    Attributes:
      rank: of `a` and `b`.
      alpha: None takes the rank, as openpi does.
      targets: "attn" adapts queries, keys, values and output, "mlp" the three matrices of the MLP.
    """

    rank: int
    alpha: float | None = None
    targets: tuple[Literal["attn", "mlp"], ...] = ("attn", "mlp")

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.targets:
            raise UserError(f"config: lora.rank={self.rank}, lora.targets={self.targets}: adapts nothing; use no lora")
        object.__setattr__(self, "targets", tuple(sorted(set(self.targets))))
        object.__setattr__(self, "alpha", float(self.rank if self.alpha is None else self.alpha))

    @property
    def scaling(self) -> float:
        """What `a @ b` is multiplied by."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Gemma:
    """One expert of the language stack. Experts attend together, so heads and depth agree among them."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    lora: Lora | None = None

    def lora_of(self, target: Literal["attn", "mlp"]) -> Lora | None:
        """The adapters of attention or of the MLP, if there are any."""
        return self.lora if self.lora is not None and target in self.lora.targets else None


@dataclasses.dataclass(frozen=True)
class Pi0:
    """A flow-matching policy: pi0 (`suffix`, `mlp`) and pi0.5 (`prompt`, `adarms`) differ in two mechanisms.

    Attributes:
      state_in: the robot's state enters as a token of the suffix, or as text in the prompt.
      time_in: the flow time is mixed into the action tokens by an MLP, or modulates the expert's norms (AdaRMS).
      cameras: names of the images in the batch, in the order of their tokens.
      size: the named size that this is, for people.
    """

    vision: Siglip
    language: Gemma
    expert: Gemma
    vocab_size: int = 257152
    action_dim: int = 32
    action_horizon: int = 50
    max_token_len: int = 48
    state_in: Literal["suffix", "prompt"] = "suffix"
    time_in: Literal["mlp", "adarms"] = "mlp"
    cameras: tuple[str, ...] = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    size: str = dataclasses.field(default="custom", compare=False)

    def __post_init__(self) -> None:
        language, expert = self.language, self.expert
        for field in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(language, field) != getattr(expert, field):
                raise UserError(
                    f"config.model: language.{field}={getattr(language, field)} and "
                    f"expert.{field}={getattr(expert, field)} must be equal, because the experts attend together"
                )
        _check_patches(self.vision)

    @property
    def prefix_len(self) -> int:
        """Tokens of images and prompt."""
        return len(self.cameras) * self.vision.num_tokens + self.max_token_len

    @property
    def suffix_len(self) -> int:
        """Tokens of state (if it is one) and actions."""
        return self.action_horizon + (self.state_in == "suffix")


@dataclasses.dataclass(frozen=True)
class Pi0Fast:
    """An autoregressive policy (pi0-FAST): the vision-language model writes the actions as tokens.

    Defaults are openpi's.

    Attributes:
      vocab_size: rows of the embedding; action token k is row vocab_size - 1 - 128 - k.
      action_dim: the most that a robot may have; the weights don't depend on it.
      max_token_len: prompt, state and action tokens together.
      positions: how tokens are numbered. "openpi": in training all are counted, padding and empty cameras too; the
        first generated token skips a number. "contiguous": valid tokens only, without a gap (LeRobot).
      missing_cameras: whether the black images of cameras that the robot lacks are seen, as in openpi, or masked.
      size: the named size that this is, for people.
    """

    vision: Siglip
    language: Gemma
    vocab_size: int = 257152
    action_dim: int = 32
    action_horizon: int = 32
    max_token_len: int = 250
    cameras: tuple[str, ...] = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")
    positions: Literal["openpi", "contiguous"] = "openpi"
    missing_cameras: Literal["visible", "masked"] = "visible"
    size: str = dataclasses.field(default="custom", compare=False)

    def __post_init__(self) -> None:
        _check_patches(self.vision)

    @property
    def prefix_len(self) -> int:
        """Tokens of images and text."""
        return len(self.cameras) * self.vision.num_tokens + self.max_token_len


def _check_patches(vision: Siglip) -> None:
    if vision.image_size % vision.patch_size:
        raise UserError(
            f"config.model.vision: image_size={vision.image_size} is no multiple of patch_size={vision.patch_size}"
        )


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model is computed; never what it computes.

    Attributes:
      dtype: of activations and matrix products; parameters keep their own (float32 while training).
      remat: what the backward pass computes again: each layer, from its input ("full"); all but matrix products and
        attention, which are kept ("dots"); or nothing ("none"). "auto" settles this, and raises `Train.microbatches`,
        to what is fastest of what the device has memory for (`memory.settle`).
      attention: "plain" keeps the logits and is the reference. Fused: torch has "sdpa", "flex" and "products" (not yet
        measured), Flax has "cudnn" and "splash". "auto" takes the fastest that the framework, the device and the dtype
        have, and "plain" on a CPU.
      compile: how training is compiled. torch: each kind of layer once ("layers"), that and all of a pass recorded as
        one launch ("graph", of pi0 and pi0.5 that are not split), that with norms and sums of gradients of this
        project's ("fused", not yet measured), or nothing ("none"). Flax: layers as a loop ("scan")
        or one after another ("unrolled": faster on a GPU). "auto" is "graph" on one GPU, "layers" on several or split,
        and "none" on a CPU; in Flax "unrolled" where models are trained on a GPU and nothing is frozen, else "scan".
      gradients: dtype in which the gradients of `Train.microbatches` (and in torch of devices that each hold the whole
        state) are added up, where weights are used in bfloat16: that is the dtype they are computed in, so with one
        part there is no difference. "auto" is "float32", but "bfloat16" where `remat` is "auto" and that avoids further
        parts, and over devices, where it halves what is sent.
    """

    dtype: Dtype = "float32"
    remat: Literal["auto", "none", "dots", "full"] = "none"
    attention: Literal["auto", "plain", "sdpa", "flex", "products", "cudnn", "splash"] = "auto"
    compile: Literal["auto", "none", "layers", "graph", "fused", "scan", "unrolled"] = "auto"
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
      validation: share of episodes kept for validation.
      augment: "default", "openpi" (what openpi's JAX training really does), "shift" (for a camera that never moves)
        or "none".
      state_noise: standard deviation of noise on the normalised state in training.
      root: where data sets from the hub are kept; None takes the hub's own cache.
      cache_gb: room on disk for decoded, resized frames; 0 decodes every time.
      num_workers: processes that load; 0 loads in threads of the main process.
      norm_stats: an openpi norm_stats.json to use; None computes them from the training episodes.
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
        if not 0 <= self.validation < 1:
            raise UserError(f"config.data.validation={self.validation}: a share of the episodes, from 0 to below 1")
        for field in ("state_noise", "cache_gb", "num_workers"):
            if getattr(self, field) < 0:
                raise UserError(f"config.data.{field}={getattr(self, field)}: 0 or more")
        if not 0 < self.weight < float("inf"):
            raise UserError(f"config.data.weight={self.weight} must be above 0; leave out a data set that has none")


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


_COUNTS = ("batch_size", "microbatches", "draws", "num_steps")
_COUNTS += ("log_every", "save_every", "keep_every", "eval_every", "eval_batches")


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
        for field in _COUNTS:
            if getattr(self, field) < 1:
                raise UserError(f"config.{field}={getattr(self, field)}: 1 or more")
        if isinstance(self.model, Pi0Fast) and self.draws != 1:
            raise UserError(f"config.draws={self.draws}: pi0-FAST draws neither noise nor time; leave it at 1")
        if not 0 <= self.max_delay < self.model.action_horizon:
            raise UserError(
                f"config.max_delay={self.max_delay}: from 0 to {self.model.action_horizon - 1}, so that of a chunk's "
                f"{self.model.action_horizon} actions one at least is to learn"
            )
        if isinstance(self.model, Pi0Fast) and self.max_delay:
            raise UserError(f"config.max_delay={self.max_delay}: pi0-FAST has no flow times; leave it at 0")
        if self.batch_size % self.microbatches:
            raise UserError(f"config.microbatches={self.microbatches} doesn't divide batch_size={self.batch_size}")
        if self.insulate and getattr(self.model, "state_in", None) != "prompt":
            raise UserError(
                "config.insulate=True is for pi0.5 (model.state_in='prompt'): its language model must see the state to "
                "write the actions"
            )
        for name, data in self.mixture.items():
            if not re.fullmatch(r"[\w-][\w.-]*", name):
                raise UserError(f"config.mixture.{name}: names a directory of statistics; use letters, digits and _.-")
            for field in dataclasses.fields(Data):
                if field.name in ("cache_gb", "num_workers") and getattr(data, field.name) != field.default:
                    raise UserError(
                        f"config.mixture.{name}.{field.name}: set config.data.{field.name}, for all data sets"
                    )

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


# width, depth, mlp, heads: big_vision's So400m/14; kv heads and head dim: Gemma's and openpi's variants.
SIGLIP = {
    "base": Siglip(width=1152, depth=27, mlp_dim=4304, num_heads=16),
    "mini": Siglip(width=192, depth=4, mlp_dim=768, num_heads=4, patch_size=16),
    "debug": Siglip(width=32, depth=2, mlp_dim=64, num_heads=2, patch_size=56),
}
LANGUAGE = {
    "base": Gemma(width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1, head_dim=256),
    "mini": Gemma(width=192, depth=5, mlp_dim=384, num_heads=4, num_kv_heads=1, head_dim=48),
    "debug": Gemma(width=64, depth=2, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=16),
}
EXPERT = {
    "base": Gemma(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256),
    "mini": Gemma(width=192, depth=5, mlp_dim=432, num_heads=4, num_kv_heads=1, head_dim=48),
    "debug": Gemma(width=32, depth=2, mlp_dim=64, num_heads=4, num_kv_heads=1, head_dim=16),
}
SIZES = tuple(SIGLIP)
