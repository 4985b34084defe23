"""Save an NVFP4 checkpoint as a Hopper GPU's kernels read it: a copy that loads without being prepared."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .cli import Parser
from .model import CheckpointError, Step3p7


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m step_kernels.prepare",
        description=__doc__,
        epilog="example: python -m step_kernels.prepare Step-3.7-Flash-NVFP4 Step-3.7-Flash-sm90",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="a checkpoint folder with NVFP4 experts")
    parser.add_argument("target", type=Path, metavar="DST", help="the folder to make, of about the same size")
    parser.add_argument("--fp8", action="store_true", help="store the linears that are BF16 in FP8, a scale a row")
    parser.add_argument("--device", default="cuda", help="the GPU that prepares (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        Step3p7.save_prepared(args.source, args.target, args.device, fp8=args.fp8, progress=True)
    except (CheckpointError, ImportError, OSError, RuntimeError, ValueError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
