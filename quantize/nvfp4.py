"""The converter's command line.

python -m quantize.nvfp4 SRC DST
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

from step_kernels.cli import Parser
from step_kernels.model.checkpoint import CheckpointError
from step_kernels.nvfp4 import SEARCHES

from .cli import print_problems
from .convert import STATE, Summary, run
from .estimate import estimate, table
from .formats import FORMATS
from .kinds import kinds
from .modelopt import NAMES
from .plan import CALIBRATED, KV_CACHES, KV_SCALES, RECIPES, REST, Settings, UsageError


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; gives the exit status."""
    options = _parser().parse_args(arguments)
    again = f"python -m quantize.nvfp4 {shlex.join([*_without_resume(arguments), '--resume'])}"
    try:
        settings = Settings(
            options.recipe,
            options.search,
            options.kv_cache,
            options.names,
            options.lm_head,
            options.calibration,
            options.kv_scales,
            options.format,
            options.mtp,
            options.rest,
            options.bits,
        )
        if options.dry_run:
            return _dry_run(options, settings)
        summary = run(
            options.source,
            options.target,
            settings,
            verify=options.verify,
            resume=options.resume,
            device=options.device,
            progress=True,
            report=options.report,
        )
    except UsageError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except CheckpointError as e:
        begun = (Path(options.target) / STATE).exists()
        print(f"error: {e}" + (f"; to go on: {again}" if begun else ""), file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as e:
        what = str(e).partition(". ")[0]
        print(f"error: {options.device}: {what}; to go on where there is more: {again}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; to go on: {again}", file=sys.stderr)
        return 130
    _print(summary, options)
    return 1 if summary.problems else 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m quantize.nvfp4",
        description="Converts a BF16 or FP8 Step-3.5 or Step-3.7 checkpoint to NVFP4 for vLLM, SGLang, TensorRT-LLM, "
        "a slice at a time. Without --calibration the scales of activations (input_scale) are 1.0.",
        epilog="example: python -m quantize.nvfp4 Step-3.7-Flash Step-3.7-Flash-NVFP4 --search mse --kv-cache fp8",
    )
    parser.add_argument(
        "source", metavar="SRC", help="folder of the checkpoint, or the word bundled for the one inside"
    )
    parser.add_argument("target", metavar="DST", help="folder to make; must not exist or be empty, but for --resume")
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default=RECIPES[0],
        help="what to quantize: the routed experts, or the linear layers of attention, dense MLPs and share experts "
        "too, to NVFP4 or mixed as --bits says; the router, the attention's small g_proj (engines expect it so) and "
        "the vision encoder stay as they are, and so do the MTP layers without --mtp (default: %(default)s)",
    )
    parser.add_argument(
        "--bits",
        type=float,
        metavar="BITS",
        help="with --recipe mixed: how many a weight of the routed experts and these linear layers may have together. "
        "Each layer gets NVFP4 (4.5 bits), FP8 with a scale a row (8) or stays as it is, by what that changes in the "
        "hidden states of the --calibration; this is measured first, in a pass over the source, by "
        "--dry-run too",
    )
    parser.add_argument(
        "--rest",
        choices=REST,
        default=REST[0],
        help="with --recipe experts, what becomes of the trunk's other linear layers: they stay as they are, or go to "
        "FP8 with a scale a row, for vLLM 0.33 and this project (default: %(default)s)",
    )
    parser.add_argument(
        "--lm-head", action="store_true", help="quantize lm_head too; only with --recipe linears, mixed or --rest fp8"
    )
    parser.add_argument(
        "--mtp",
        action="store_true",
        help="quantize the MTP layers' attention and MLP too (with --lm-head also their heads), to NVFP4 or as --rest "
        "says, for vLLM and this project: SGLang builds these layers unquantized",
    )
    parser.add_argument(
        "--search",
        choices=(*SEARCHES, *CALIBRATED),
        default="mse",
        help="how block scales are chosen: least squared error of nine, amax / 6, or the better of amax / 6 and "
        "amax / 4; with --calibration also codes and scales by the inputs' Hessian, in blocks of 16 (hessian) or whole "
        "(gptq: most accurate, and the most memory) (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="a text, or token ids in a .npy file, of two dimensions if sequences are to stay apart: what goes through "
        "the source model, a layer at a time, to measure input scales and for hessian and gptq; at most 1.05 M tokens",
    )
    parser.add_argument(
        "--kv-scales",
        choices=KV_SCALES,
        default=KV_SCALES[0],
        help="scales of the FP8 KV cache: 1.0, which SGLang always takes, or by --calibration (default: %(default)s)",
    )
    parser.add_argument(
        "--kv-cache", choices=KV_CACHES, default="fp8", help="KV cache type to ask of engines (default: %(default)s)"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="modelopt: experts stacked, for vLLM, SGLang, TensorRT-LLM and this project; compressed-tensors: experts "
        "one by one, for vLLM (default: %(default)s)",
    )
    parser.add_argument(
        "--names",
        choices=NAMES,
        default="source",
        help="tensor names: the source's, or the NVFP4 release's, model.language_model.*, for models with vision "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True, help="check the result (default: yes)"
    )
    parser.add_argument("--report", metavar="HTML", help="write a page with the errors, sizes and plots of the result")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on with a stopped conversion in DST")
    how.add_argument(
        "--dry-run",
        action="store_true",
        help="only print what would become of the tensors, the room it takes and, after a few seconds' measuring, how "
        "long",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="with --dry-run: a line a tensor")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute: cpu, cuda (all GPUs), or some of them, as cuda:0,cuda:1; the bytes are the same "
        "(default here: %(default)s)",
    )
    return parser


def _without_resume(arguments: list[str] | None) -> list[str]:
    return [a for a in (sys.argv[1:] if arguments is None else arguments) if a != "--resume"]


def _dry_run(options: argparse.Namespace, settings: Settings) -> int:
    plan, cost = estimate(options.source, options.target, settings, device=options.device, progress=True)
    print("\n".join(table(plan, options.verbose)))
    rates = (cost.reading, cost.quantizing, cost.writing)
    print("measured: read {:.2f}, quantize {:.2f}, write {:.2f} GB/s".format(*(rate / 1e9 for rate in rates)))
    found = kinds(plan)
    bits = 8 * sum(kind.result for kind in found) / sum(kind.weights for kind in found)
    print(
        f"reads {_size(cost.read)}, writes {_size(cost.written)} in {len(plan.shards)} files, {bits:.2f} bits a "
        f"weight, where {_size(cost.free)} are free; takes about {_duration(cost.seconds)}, without the verification"
        + (" and what --calibration takes" if settings.calibration else "")
    )
    if cost.written > cost.free:
        raise CheckpointError(f"{options.target}: {cost.free:,} bytes are free, wanted {cost.written:,}")
    return 0


def _print(summary: Summary, options: argparse.Namespace) -> None:
    if summary.errors.sums:
        print(summary.errors.table())
        rate = summary.bytes_in / summary.seconds / 1e9
        print(f"read {_size(summary.bytes_in)}, wrote {_size(summary.bytes_out)} in {summary.seconds:.1f} s", end="")
        print(f" ({rate:.2f} GB/s), verified in {summary.verify_seconds:.1f} s", end="")
        print(f"; peak memory {_size(summary.host_peak)}, of a GPU {_size(summary.gpu_peak)}")
    for zero in summary.zeros[:20]:
        print(f"{zero} is all zero in the source: codes 0, scales 1")
    if len(summary.zeros) > 20:
        print(f"and {len(summary.zeros) - 20} more")
    if summary.left_out:
        print(f"not copied: {', '.join(summary.left_out)}")
    print_problems(summary.problems)
    if not summary.problems:
        print(f"{options.target}: {'verified' if options.verify else 'not verified'}")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    sys.exit(main())
