"""Comparing two traces tensor by tensor, and how much two right computations may differ.

The tolerance is relative to the largest value of each tensor.

float32: 1e-4. Rounding alone gives about 2e-5 after 18 layers of activations of order 1 to 5, and the largest
arguments of a sine set a floor: the time embedding's reach 1571 rad and a rotary angle is a position, up to about
1000; float32 numbers of that size lie 1.2e-4 apart, which is how far two correctly rounded angles can differ. Measured
between the two frameworks: up to 2.5e-5 in gradients, 2.2e-5 in the time embedding, 1e-5 elsewhere. The faults worth
finding are of 1e-2 and more.

pi0-FAST, float32: 1e-3. The attention of the golden checkpoint is so sharp that it enlarges the rounding of the rotary
angles at every layer: after three, both frameworks are 5e-4 of the largest value away from the same in float64, and
2.6e-4 from one another, as in gradients.

bfloat16: 1e-1. Its numbers have 8 bits, so that a single product is off by up to 4e-3 of the largest value; measured
after 3 layers 3e-2, in gradients 5e-2. That finds only gross faults: hunt in float32.

A gradient is small where many terms cancel (a bias of the keys has none at all, its gradient is pure rounding), so
gradients count as no smaller than 1/100 of the model's largest. Masks, positions and tokens must be equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from openpi_port.config import Pi0, Pi0Fast
from openpi_port.errors import UserError

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}
TOLERANCE_FAST = {"float32": 1e-3, "bfloat16": 1e-1}
STAGES = ("vision", "prefix", "suffix", "masks", "layers", "output", "cache", "trajectory", "decode", "gradients")


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of both sides.

    Attributes:
      name: "stage/.../tensor".
      shape: of A's.
      magnitude: the largest absolute value of A's, or the number of elements of a mask or of tokens.
      error: the largest absolute difference, or the number of elements that differ; inf where one is not finite.
      allowed: the error up to which they are the same.
      norms: Euclidean norms of A's and B's.
    """

    name: str
    shape: tuple[int, ...]
    magnitude: float
    error: float
    allowed: float
    norms: tuple[float, float]

    @property
    def stage(self) -> str:
        """Of `STAGES`."""
        return self.name.partition("/")[0]

    @property
    def exact(self) -> bool:
        """Whether the two must be equal, and `error` counts what isn't."""
        return self.stage == "masks" or self.name == "decode/tokens"

    @property
    def relative(self) -> float:
        """The error in units of the largest value."""
        return self.error / self.magnitude if self.magnitude else self.error and float("inf")

    @property
    def ok(self) -> bool:
        """Whether the two sides agree."""
        return self.error <= self.allowed


def tolerance(model: Pi0 | Pi0Fast, dtype: str) -> float:
    """The share of each tensor's largest value up to which two of a kind are the same."""
    return (TOLERANCE_FAST if isinstance(model, Pi0Fast) else TOLERANCE)[dtype]


def compare(name: str, a: np.ndarray, b: np.ndarray, tolerance: float, floor: float = 0.0) -> Row:
    """One row.

    Args:
      name: of the tensor.
      a, b: both sides.
      tolerance: see `tolerance`.
      floor: the least magnitude that the tolerance refers to.
    """
    if a.shape != b.shape:
        return Row(name, a.shape, 0.0, float("inf"), 0.0, (0.0, 0.0))
    if not np.issubdtype(a.dtype, np.floating):
        norms = (float(a.sum()), float(b.sum()))
        return Row(name, a.shape, float(a.size), float((a != b).sum()), 0.0, norms)
    error = float(np.abs(a - b).max(initial=0)) if np.isfinite(a).all() and np.isfinite(b).all() else float("inf")
    magnitude = float(np.abs(a).max(initial=0))
    norms = tuple(float(np.linalg.norm(x.astype(np.float64).ravel())) for x in (a, b))
    return Row(name, a.shape, magnitude, error, tolerance * max(magnitude, floor), norms)


def compare_traces(
    a: Iterable[tuple[str, np.ndarray]], b: Iterable[tuple[str, np.ndarray]], tolerance: float, valid: np.ndarray
) -> Iterator[tuple[Row, np.ndarray, np.ndarray]]:
    """Rows of two traces that advance together, so that only one tensor of each is held; and the tensors.

    Args:
      a, b: (name, tensor) in the same order.
      tolerance: see `tolerance`.
      valid: bool [B, S], which prefix tokens exist; what the others compute is compared nowhere.

    Raises:
      UserError: the two do not have the same tensors.
    """
    for (name, left), (other, right) in zip(a, b, strict=True):
        if name != other:
            raise UserError(f"A computes {name} where B computes {other}: these are not the same architecture")
        both = (left, right)
        if is_prefix(name) and left.shape[:2] == right.shape[:2] == valid.shape:
            both = (left[valid], right[valid])
        row = compare(name, *both, tolerance)
        yield dataclasses.replace(row, shape=left.shape), left, right


def compare_gradients(a: Mapping[str, np.ndarray], b: Iterable[tuple[str, np.ndarray]], tolerance: float) -> list[Row]:
    """Rows of the gradients by canonical name, A's as the measure of how large they are."""
    floor = max(float(np.abs(grad).max()) for grad in a.values()) / 100
    return [compare(f"gradients/{name}", a[name], grad, tolerance, floor) for name, grad in b]


def is_prefix(name: str) -> bool:
    """Whether a tensor's first two axes are samples and prefix tokens."""
    return "/language" in name or name.startswith("cache/")


def first_beyond(rows: Iterable[Row]) -> Row | None:
    """The first tensor, in the order of the computation, that differs by more than it may."""
    return next((row for row in rows if not row.ok), None)
