"""The models' mechanisms and sizes, as frozen dataclasses.

Sizes are named: `base` is the published pi0, `mini` trains on a laptop, `debug` is for tests.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from openpi_port.errors import UserError
from openpi_port.ranges import COUNT, check


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
      state_in: the robot's state enters as a token of the suffix, as text in the prompt, or not at all (openpi's
        `discrete_state_input=False`; the weights of "prompt" and "none" have the same names).
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
    state_in: Literal["suffix", "prompt", "none"] = "suffix"
    time_in: Literal["mlp", "adarms"] = "mlp"
    cameras: tuple[str, ...] = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    size: str = dataclasses.field(default="custom", compare=False)

    def __post_init__(self) -> None:
        _check_sizes(self)
        language, expert = self.language, self.expert
        for field in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(language, field) != getattr(expert, field):
                raise UserError(
                    f"config.model: language.{field}={getattr(language, field)} and "
                    f"expert.{field}={getattr(expert, field)} must be equal, because the experts attend together"
                )

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
        _check_sizes(self)

    @property
    def prefix_len(self) -> int:
        """Tokens of images and text."""
        return len(self.cameras) * self.vision.num_tokens + self.max_token_len


def _check_sizes(model: Pi0 | Pi0Fast) -> None:
    """Raises UserError, naming the field, where a size can't be, or doesn't divide what it must."""
    check("config.model", model, COUNT, "vocab_size", "action_dim", "action_horizon", "max_token_len")
    vision, where = model.vision, "config.model.vision"
    check(where, vision, COUNT, "width", "depth", "mlp_dim", "num_heads", "patch_size", "image_size")
    if vision.image_size % vision.patch_size:
        raise UserError(f"{where}: image_size={vision.image_size} is no multiple of patch_size={vision.patch_size}")
    if vision.width % vision.num_heads:
        raise UserError(f"{where}: width={vision.width} is no multiple of num_heads={vision.num_heads}")
    for part in ("language", "expert"):
        if (gemma := getattr(model, part, None)) is None:
            continue
        where = f"config.model.{part}"
        check(where, gemma, COUNT, "width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")
        if gemma.num_heads % gemma.num_kv_heads:
            raise UserError(f"{where}: num_heads={gemma.num_heads} is no multiple of num_kv_heads={gemma.num_kv_heads}")
        if (lora := gemma.lora) is not None and (lora.rank < 1 or not lora.targets):
            raise UserError(f"{where}: lora.rank={lora.rank}, lora.targets={lora.targets}: adapts nothing; use no lora")
        if gemma.head_dim % 2:
            raise UserError(f"{where}.head_dim={gemma.head_dim}: must be even, since rotary embedding turns pairs")


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
