"""`python -m convert SRC DST --to=flax|torch|openpi|openpi-torch|lerobot`: any checkpoint to any two-way format."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from tqdm import tqdm

from convert import arguments, formats, report, target
from openpi_port.errors import UserError, guarded, near
from openpi_port.whole import refuse_existing

DTYPES = ("bfloat16", "float32")
EPILOG = """SRC is a directory, an .npz or .safetensors file, or a URL (hf://user/name, gs://bucket/path); what it is,
its tensors show. --model.FIELD=VALUE states what weights don't say: --model.vision.num_heads=4
--model.action_horizon=50 --model.cameras=base_0_rgb,left_wrist_0_rgb."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return guarded(lambda: _run(argv), "interrupted; nothing was written")


def _run(argv: list[str] | None) -> None:
    parser = arguments.Parser("python -m convert", description=__doc__, epilog=EPILOG, exit_on_error=False)
    parser.add_argument("src", metavar="SRC")
    parser.add_argument("dst", metavar="DST", nargs="?", help="a new directory; without it, only the table is printed")
    parser.add_argument("--to", metavar="FORMAT", required=True, help=", ".join(target.SIDES))
    parser.add_argument(
        "--dtype", metavar="DTYPE", help="round the weights to bfloat16 (or float32); else they stay as they are"
    )
    parser.add_argument("--merge-lora", action="store_true", help="add LoRA weights to those that they adapt")
    parser.add_argument("--asset", metavar="ID", help="whose statistics, where openpi's assets/ holds several")
    parser.add_argument("--quiet", action="store_true", help="no table and no progress bar")
    args, rest = parser.parse_known_args(argv)
    if args.to not in target.SIDES:
        raise UserError(f"--to={args.to}: {near(args.to, target.SIDES)}")
    overrides = arguments.overrides(rest, "python -m convert")
    if args.dst is not None:  # now, not after a long table
        refuse_existing(Path(args.dst))

    source = formats.open_checkpoint(args.src, merge_lora=args.merge_lora, asset=args.asset, **overrides)
    if args.dtype is not None:
        if args.dtype not in DTYPES:
            raise UserError(f"--dtype={args.dtype}: {near(args.dtype, DTYPES)}")
        source = source.rounded(args.dtype)
    if not args.quiet:
        print(report.table(source, args.to))
    if args.dst is None:
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a kill tidies up too
    total = target.num_bytes(source.to(target.SIDES[args.to]))
    with tqdm(total=total, unit="B", unit_scale=True, disable=args.quiet or None) as bar:
        target.write(source, args.dst, args.to, bar.update)
    print(f"{args.dst}: {args.to} checkpoint, {target.size(total)}")


if __name__ == "__main__":
    sys.exit(main())
