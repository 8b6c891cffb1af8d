"""`python -m convert.parity A B`: the same input through two checkpoints or backends, compared tensor by tensor.

A and B are any checkpoints that can be opened; the same path twice compares the two frameworks. Prints one table per
stage, names the first tensor that differs by more than rounding explains, and writes a page with pictures.
Exit status: 0 the same, 1 something diverges, 2 a mistake in the command.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convert import arguments, formats, parity_batch, parity_rows, tables
from convert.parity_rows import STAGES, TOLERANCE, Row, compare_gradients, compare_traces, first_beyond
from convert.source import Source
from openpi_port import loading, whole
from openpi_port.backends import NAMES, Backend
from openpi_port.config import Dtype, Pi0, Pi0Fast
from openpi_port.errors import UserError, guarded, near
from openpi_port.fields import to_dict

PARTS = ("forward", "sampling", "gradients")
DRAWN = ("masks/attention", "trajectory/", "output/logits", "output/target_logits", "output/logsumexp", "decode/")
BOLD, RED, PLAIN = "\033[1m", "\033[31m", "\033[0m"


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two: a checkpoint in a framework.

    Attributes:
      source: the checkpoint.
      backend: "flax" or "torch".
      dtype: of weights and matrix products.
      device: see `openpi_port.load_model`.
    """

    source: Source
    backend: str
    dtype: Dtype = "float32"
    device: str | None = None

    def __str__(self) -> str:
        return f"{self.source.path} ({self.source.format}) in {self.backend}"

    def traced(
        self, batch: Mapping[str, Any], parts: Sequence[str]
    ) -> Iterator[tuple[str, Iterable[tuple[str, np.ndarray]]]]:
        """Fills a model, which is gone again after the last part.

        Yields:
          Each of the parts, with the tensors that the report compares, by name (gradients by canonical name).
        """
        backend = Backend(self.backend)
        # A parameter kept in bfloat16 would have its gradient rounded to that, on each side to its own neighbour.
        source = self.source.rounded(self.dtype)
        module = loading.fill(source, self.backend, self.dtype, self.device).module
        with backend.device.precision(module.compute):
            for part in parts:
                if part == "gradients":
                    grads = backend.trace.gradients(module, batch)
                    yield part, tables.translate(grads, self.source.model, self.backend, "flax").items()
                else:
                    yield part, getattr(backend.trace, part)(module, batch)


class Kept(Mapping[str, np.ndarray]):
    """Tensors in a directory, in the order in which they came.

    Raises:
      UserError: there is no room.
    """

    def __init__(self, folder: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
        self._files: dict[str, Path] = {}
        try:
            folder.mkdir()
            for name, tensor in tensors:
                self._files[name] = folder / f"{len(self._files)}.npy"
                np.save(self._files[name], tensor)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{folder}: can't keep what A computes ({reason}); TMPDIR= names another place") from None

    def __getitem__(self, name: str) -> np.ndarray:
        return np.load(self._files[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
      a, b: labels of the two sides.
      dtype: that both computed in.
      tolerance: the share of each tensor's largest value up to which they are the same.
      batch: which input.
      rows: every tensor, in the order of the computation.
      pictures: tensors of both sides that the page draws: name -> (A's, B's).
    """

    a: str
    b: str
    dtype: str
    tolerance: float
    batch: str
    rows: list[Row]
    pictures: dict[str, tuple[np.ndarray, np.ndarray]]

    @property
    def first(self) -> Row | None:
        """The first tensor beyond tolerance."""
        return first_beyond(self.rows)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return guarded(lambda: _run(argv), "interrupted; nothing was written")


def _run(argv: list[str] | None) -> int:
    parser = arguments.Parser("python -m convert.parity", description=__doc__, allow_abbrev=False)
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--backend-a", choices=NAMES, help="default: the framework that wrote A")
    parser.add_argument(
        "--backend-b", choices=NAMES, help="default: that of B, or the other one if A and B are the same"
    )
    parser.add_argument("--batch", choices=parity_batch.KINDS, default="random")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="float32")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to compare; gradients need the most memory")
    parser.add_argument("--device", help="cpu, gpu, cuda:1; default: the best that each framework finds")
    parser.add_argument("--out", default="parity.html", help="the page; empty for none")
    args, rest = parser.parse_known_args(argv)
    parts = args.parts.split(",")
    for part in parts:
        if part not in PARTS:
            raise UserError(f"--parts={part}: {near(part, PARTS)}")
    if args.batch_size < 1:
        raise UserError(f"--batch-size={args.batch_size} must be at least 1")

    page = Path(args.out) if args.out else None
    if page is not None:  # now, not when all is computed
        page.parent.mkdir(parents=True, exist_ok=True)

    overrides = arguments.overrides(rest, "python -m convert.parity")
    sources = [formats.open_checkpoint(path, **overrides) for path in (args.a, args.b)]
    same_architecture(*(source.model for source in sources))
    backend_a = args.backend_a or native(sources[0])
    other = next(name for name in NAMES if name != backend_a)
    backend_b = args.backend_b or (other if args.a == args.b else native(sources[1]))
    batch = parity_batch.make(args.batch, sources[0], args.batch_size, args.seed)
    backends = (backend_a, backend_b)
    sides = [Side(*both, args.dtype, args.device) for both in zip(sources, backends, strict=True)]
    report = run(*sides, batch, parts, args.batch)
    print(text(report, color=sys.stdout.isatty()))
    if page is not None:
        from convert import parity_page

        whole.write_text(page, parity_page.page(report))
        print(f"{page}: the same with pictures")
    return 0 if report.first is None else 1


def native(source: Source) -> str:
    """The framework that computes with a checkpoint of that format at home."""
    return "flax" if source.format in ("flax", "openpi") else "torch"


def same_architecture(a: Pi0 | Pi0Fast, b: Pi0 | Pi0Fast) -> None:
    """Refuses to compare what can't be the same.

    Raises:
      UserError: a model of another kind, or two that differ in a size; the message names the first.
    """
    for model in (a, b):
        if not isinstance(model, Pi0 | Pi0Fast):
            raise UserError(f"a {type(model).__name__} checkpoint has no trace; the report compares policies")
    if type(a) is not type(b):
        raise UserError(f"A and B are of different architectures: {type(a).__name__} and {type(b).__name__}")
    left, right = ({k: v for k, v in to_dict(model).items() if k != "size"} for model in (a, b))
    for field in left:
        if left[field] != right[field]:
            raise UserError(
                f"A and B are of different architectures: {field} is {left[field]} and {right[field]}; where the "
                f"weights don't determine it, state it with --model.{field}="
            )


def run(a: Side, b: Side, batch: dict[str, Any], parts: Sequence[str], batch_name: str) -> Report:
    """Sends a batch through both sides, one after the other, and compares everything on the way.

    One model is in memory at a time; what A computes lies on the disk until B has computed it too.

    Args:
      a, b: what to compare, of the same architecture and dtype.
      batch: see `parity_batch`.
      parts: of `PARTS`.
      batch_name: for the report.
    """
    model = a.source.model
    tolerance = parity_rows.tolerance(model, a.dtype)
    parts = [part for part in PARTS if part in parts]
    rows: list[Row] = []
    pictures: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    with tempfile.TemporaryDirectory(prefix="parity_") as folder:
        kept = {part: Kept(Path(folder, part), _shown(found, f"A: {part}")) for part, found in a.traced(batch, parts)}
        gc.collect()  # a module may refer to itself
        for part, found in b.traced(batch, parts):
            ours, theirs = kept[part], _shown(found, f"B: {part}", len(kept[part]))
            if part == "gradients":
                rows += compare_gradients(ours, theirs, tolerance)
                continue
            valid = parity_batch.valid_prefix(model, batch, part)
            for row, left, right in compare_traces(ours.items(), theirs, tolerance, valid):
                rows.append(row)
                if row.name.startswith(DRAWN) and "velocity" not in row.name:
                    pictures[row.name] = (left, right)
    return Report(str(a), str(b), a.dtype, tolerance, batch_name, rows, pictures)


def _shown(tensors: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
    return tqdm(tensors, what, total, unit=" tensors", leave=False, delay=2)


def text(report: Report, *, color: bool) -> str:
    """The tables for a terminal: one per stage; layers that agree take one line each, with their worst tensor.

    Args:
      report: what was found.
      color: whether bold and red are understood.
    """
    bold, red, plain = (BOLD, RED, PLAIN) if color else ("", "", "")
    lines = [f"A: {report.a}", f"B: {report.b}", f"{report.dtype}, batch {report.batch}"]
    header = ("tensor", "shape", "max |A|", "max error", "relative", "allowed", "")
    for stage in STAGES:
        rows = [row for row in report.rows if row.stage == stage]
        if not rows:
            continue
        cells, marks = [header], [""]
        for label, row, ok in fold(rows, report.first):
            beyond = "" if ok else "<- first" if row is report.first else "beyond"
            numbers = (f"{row.magnitude:.2e}", f"{row.error:.1e}", f"{row.relative:.1e}", f"{row.allowed:.1e}")
            if row.exact:
                numbers = ("", f"{row.error:.0f} differ", f"{row.relative:.1e}", "none")
            cells.append((label, "x".join(map(str, row.shape)), *numbers, beyond))
            marks.append("" if ok else bold + red if row is report.first else red)
        widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
        beyond = sum(not row.ok for row in rows)
        verdict = f"{beyond} of {len(rows)} beyond tolerance" if beyond else f"{len(rows)} tensors agree"
        lines += ["", f"{bold}{stage}{plain}: {verdict}"]
        for row, mark in zip(cells, marks, strict=True):
            padded = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            lines.append(f"  {mark}{'  '.join(padded).rstrip()}{plain if mark else ''}")
    lines += ["", conclusion(report) if report.first is None else f"{bold}{conclusion(report)}{plain}"]
    return "\n".join(lines)


def fold(rows: Sequence[Row], first: Row | None) -> list[tuple[str, Row, bool]]:
    """Rows with labels: the tensors of a layer as the worst among them, the first beyond tolerance always by itself."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        parts = row.name.split("/")
        layered = len(parts) > 2 and parts[1].isdigit()
        key = f"{parts[0]}/{parts[1]}" if layered and row is not first else row.name
        groups.setdefault(key, []).append(row)
    folded = []
    for key, members in groups.items():
        worst = max(members, key=lambda row: (not row.ok, row.error / row.allowed if row.allowed else row.error))
        label = key if len(members) == 1 and key == worst.name else f"{key} worst: {worst.name.removeprefix(key + '/')}"
        folded.append((label, worst, worst.ok))
    return folded


def conclusion(report: Report) -> str:
    """The verdict in a sentence."""
    first = report.first
    if first is None:
        worst = max((row for row in report.rows if row.allowed), key=lambda row: row.error / row.allowed)
        return (
            f"{len(report.rows)} tensors agree; the furthest apart is {worst.name}, {worst.error:.1e} of "
            f"{worst.allowed:.1e} allowed"
        )
    return f"first tensor beyond tolerance: {first.name}, error {first.error:.1e}, allowed {first.allowed:.1e}"


if __name__ == "__main__":
    sys.exit(main())
