"""Two evaluations of one policy, seed by seed: do Flax and torch succeed on the same ones, and where do they part?

    python -m experiments.eval --checkpoint=DIR --backend=flax --trajectories --out=eval/flax
    python -m experiments.eval --checkpoint=DIR --backend=torch --trajectories --out=eval/torch
    python -m experiments.compare eval/flax eval/torch [--tolerance=0.001] [--out=compare.png]

Rounding differs between frameworks, and the contact of gripper and cube blows any difference up; so what can be
expected is that trajectories agree until the cube is touched for the first time.
T control steps, D dimensions.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from convert.arguments import Parser
from experiments.eval_report import RESULTS, TRAJECTORIES
from openpi_port.errors import UserError, guarded

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SAME = ("env", "prompt", "replan", "max_steps", "after_success")  # settings without which a comparison means nothing
FLOOR = 1e-9


@dataclasses.dataclass(frozen=True)
class Seed:
    """How two episodes of one seed differ.

    Attributes:
      success: of either.
      error: f64 [T], largest difference of any state or action dimension (rad, or share of a gripper's opening).
      touch: control step of the first reward in either episode, when the cube is touched; T where it never is.
    """

    seed: int
    success: tuple[bool, bool]
    error: np.ndarray
    touch: int

    def parts(self, tolerance: float) -> int | None:
        """The first step at which they differ by more; None if they never do."""
        beyond = np.flatnonzero(self.error > tolerance)
        return int(beyond[0]) if len(beyond) else None

    @property
    def before(self) -> float:
        """The largest difference until the cube is touched."""
        return float(self.error[: self.touch].max(initial=0.0))


def compare(a: Path, b: Path) -> list[Seed]:
    """Reads two directories of `experiments.eval --trajectories`.

    Args:
      a, b: the directories.

    Returns:
      One entry per seed that both played.

    Raises:
      UserError: a file is missing, or they were not played alike.
    """
    ours, theirs = _results(a), _results(b)
    for key in SAME:
        if ours[key] != theirs[key]:
            raise UserError(f"{a} was played with {key}={ours[key]!r}, {b} with {theirs[key]!r}: not comparable")
    successes = [{r["seed"]: r["success"] for r in results["results"]} for results in (ours, theirs)]
    seeds = [seed for seed in successes[0] if seed in successes[1]]
    if not seeds:
        raise UserError(f"{a} and {b} have no seed in common")
    out = []
    for seed in seeds:
        episodes = [_trajectory(directory, seed) for directory in (a, b)]
        length = min(len(e["rewards"]) for e in episodes)
        errors = [
            np.abs(episodes[0][k][:length].astype(float) - episodes[1][k][:length]) for k in ("states", "actions")
        ]
        touched = np.flatnonzero(np.maximum(*(e["rewards"][:length] for e in episodes)))
        touch = int(touched[0]) if len(touched) else length
        out.append(Seed(seed, (successes[0][seed], successes[1][seed]), np.max(errors, axis=(0, 2)), touch))
    return out


def parts(a: Path, b: Path) -> list[str]:
    """What to compare: the directories themselves, or those of their tasks after --env=aloha_instructions."""
    if (a / RESULTS).exists():
        return [""]
    tasks = sorted(path.parent.name for path in a.glob(f"*/{RESULTS}"))
    both = [task for task in tasks if (b / task / RESULTS).exists()]
    return both or tasks or [""]


def report(seeds: list[Seed], tolerance: float) -> str:
    """The table, in words."""
    lines = [f"{'seed':>6} {'A':>8} {'B':>8} {'touched':>9} {'differ from':>12} {'before':>9} {'at the end':>11}"]
    for s in seeds:
        words = ["success" if ok else "failure" for ok in s.success]
        parts = s.parts(tolerance)
        where = "never" if parts is None else f"step {parts}"
        flag = "  before the touch" if parts is not None and parts < s.touch else ""
        lines.append(
            f"{s.seed:6} {words[0]:>8} {words[1]:>8} {f'step {s.touch}':>9} {where:>12} {s.before:9.2g} "
            f"{s.error[-1]:11.2g}{flag}"
        )
    count = len(seeds)
    both, neither = sum(all(s.success) for s in seeds), sum(not any(s.success) for s in seeds)
    only = [[s.seed for s in seeds if s.success == which] for which in ((True, False), (False, True))]
    early = sum((parts := s.parts(tolerance)) is not None and parts < s.touch for s in seeds)
    lines += [
        f"{count} seeds: both succeed on {both}, neither on {neither}, A alone on {only[0] or 'none'}, "
        f"B alone on {only[1] or 'none'}",
        f"until the cube is touched, trajectories agree within {tolerance:g} on {count - early} of {count} seeds "
        f"(largest difference {max(s.before for s in seeds):.2g})",
    ]
    return "\n".join(lines)


def plot(path: Path, seeds: list[Seed], tolerance: float, names: tuple[str, str]) -> None:
    """Every seed's difference over time, from its first touch of the cube on in colour."""
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for s in seeds:
        error = np.maximum(s.error, FLOOR)
        steps = np.arange(len(error)) - s.touch
        axis.plot(steps[: s.touch + 1], error[: s.touch + 1], color="0.4", lw=0.8)
        axis.plot(steps[s.touch :], error[s.touch :], color="C0" if all(s.success) else "C3", lw=0.8)
    axis.axhline(tolerance, color="k", ls="--", lw=0.8)
    place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
    axis.annotate(f"tolerance {tolerance:g}", (0.995, tolerance), fontsize=8, **place)
    axis.axvline(0, color="k", lw=0.8)
    axis.set(yscale="log", xlabel="control steps since the cube is touched", ylabel="largest difference (rad)")
    axis.set_title(f"{names[0]} against {names[1]}: {len(seeds)} seeds (red: not both succeed)", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.01)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _results(directory: Path) -> dict[str, Any]:
    path = directory / RESULTS
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({_why(error)}); is {directory} the --out of an evaluation?") from None


def _trajectory(directory: Path, seed: int) -> dict[str, np.ndarray]:
    path = directory / TRAJECTORIES / f"seed_{seed:04d}.npz"
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({_why(error)}); was it evaluated with --trajectories?") from None


def _why(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = Parser("python -m experiments.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("a", metavar="A", type=Path)
    parser.add_argument("b", metavar="B", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="rad, or share of a gripper's opening")
    parser.add_argument("--out", type=Path, help="a picture of the differences over time")

    def run() -> None:
        args = parser.parse_args(argv)
        for part in parts(args.a, args.b):
            a, b = args.a / part, args.b / part
            seeds = compare(a, b)
            print(f"A: {a}\nB: {b}\n{report(seeds, args.tolerance)}")
            if args.out is not None:
                path = args.out.with_stem("_".join([args.out.stem, *Path(part).parts]))
                plot(path, seeds, args.tolerance, (str(a), str(b)))
                print(path)

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
