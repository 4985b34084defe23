"""Run a Step-3.7 checkpoint: text and images in, text out, as it is made."""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import time
from pathlib import Path

import torch

from .cli import Parser, close_quietly
from .model import CheckpointError, Step3p7, StepConfig
from .model.checkpoint import Checkpoint

BUNDLED = Path(__file__).parent / "model" / "bundled"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m step_kernels.generate",
        description=__doc__,
        epilog="example: python -m step_kernels.generate OUT --prompt 'What is this?' --image photo.jpg --mtp --stats",
    )
    parser.add_argument("checkpoint", nargs="?", default="bundled", metavar="CHECKPOINT", help="a folder in BF16, FP8 "
                        "or NVFP4; without it the bundled miniature")  # fmt: skip
    parser.add_argument("--prompt", default="Hello", metavar="TEXT", help="the user's turn (default: %(default)s)")
    parser.add_argument("--image", action="append", default=[], metavar="FILE",
                        help="an image for the prompt; may be repeated; `bundled` is one of four digits")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=_count, default=64, metavar="N", help="at most (default: %(default)s)")
    parser.add_argument("--temperature", type=_temperature, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--top-p", type=_share, default=1.0, metavar="P", help="sample from this much probability mass")
    parser.add_argument(
        "--top-k", type=_kept, default=0, metavar="K", help="sample from the K best tokens; 0: from all"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sampling (default: %(default)s)")
    parser.add_argument("--mtp", action="store_true", help="draft ahead with the MTP layers; the output stays the same")
    parser.add_argument("--kv-cache", choices=("fp8", "model"), default="fp8",
                        help="e4m3 with the checkpoint's scales (default), or the model's dtype")  # fmt: skip
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default here: %(default)s")  # fmt: skip
    parser.add_argument("--stats", action="store_true", help="print speed, memory and kept drafts at the end")
    parser.add_argument("--plan", action="store_true",
                        help="print what weights, cache and workspace take of memory, and load nothing")  # fmt: skip
    parser.add_argument("--context", type=_count, metavar="N",
                        help="with --plan: tokens a request may have (default: all that the model takes)")  # fmt: skip
    parser.add_argument("--requests", type=_count, default=1, metavar="N",
                        help="with --plan: requests at a time (default: %(default)s)")  # fmt: skip
    return parser.parse_args(argv)


def _number(kind, low, high, wanted):
    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"got {text}, wanted {wanted}")
        return value

    return convert


_count = _number(int, 1, sys.maxsize, "a positive integer")
_temperature = _number(float, 0, 1e9, "a number from 0 up")
_kept = _number(int, 0, 1024, "0 (all) to 1024")
_share = _number(float, 1e-9, 1, "a number above 0, at most 1")


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"got {text}, wanted cpu, cuda or cuda:N") from None


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        run(args)
    except (CheckpointError, ImportError, OSError, RuntimeError, ValueError) as e:
        if isinstance(e, BrokenPipeError):
            close_quietly()
            return 1
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run(args: argparse.Namespace) -> None:
    from .model.chat import Chat
    from .model.generation import DraftStats, generate
    from .model.image import prepare

    folder = BUNDLED if args.checkpoint == "bundled" else Path(args.checkpoint)
    dtype = torch.float32 if args.device.type == "cpu" else torch.bfloat16
    if args.plan:
        return _print_plan(folder, args)
    config = StepConfig.from_dict(Checkpoint(folder).config, str(folder / "config.json"))
    if args.image and config.vision is None:
        raise ValueError(f"--image: {folder} has no vision encoder")
    pictures = [BUNDLED / "picture.png" if image == "bundled" else image for image in args.image]
    chat, views = Chat(folder, config), [prepare(picture, config.vision) for picture in pictures]
    images = {}
    if views:
        crops = torch.cat([v.crops for v in views])
        images = {
            "pixel_values": torch.stack([v.global_view for v in views]),
            "patch_pixel_values": crops if len(crops) else None,
            "num_patches": [len(v.crops) for v in views],
        }
    prompt = chat.prompt(args.prompt, views)
    length = len(prompt) + args.max_new_tokens
    model = Step3p7.from_pretrained(folder, args.device, dtype, progress=True, context=length)
    drafts, times = DraftStats(), [time.perf_counter()]

    def tokens():
        for _, token in generate(
            model, [prompt], max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
            top_k=args.top_k, seed=args.seed, mtp=args.mtp, kv_cache=args.kv_cache, images=[images], stats=drafts,
        ):  # fmt: skip
            times.append(time.perf_counter())
            yield token

    for piece in chat.stream(tokens()):
        print(piece, end="", flush=True)
    print(flush=True)
    if args.stats:
        print(_report(len(prompt), times, drafts, args.device), file=sys.stderr)


def _print_plan(folder: Path, args: argparse.Namespace) -> None:
    from .model.memory import free_bytes, usable_device

    plan = Step3p7.plan(folder, requests=args.requests, context=args.context)
    if args.kv_cache == "model":
        plan = dataclasses.replace(plan, cache_dtype=torch.bfloat16)
    free = free_bytes(usable_device(args.device))
    print(plan.table(free, str(args.device)))
    if free is not None:
        plan.check(free, str(args.device))


def _report(prompt: int, times: list[float], drafts, device: torch.device) -> str:
    new, first = len(times) - 1, times[1] - times[0]
    lines = [f"prompt      {prompt} tokens, first token after {first:.3f} s"]
    rate = f", {(new - 1) / (times[-1] - times[1]):.1f} tokens/s after the first" if times[-1] > times[1] else ""
    lines.append(f"generated   {new} tokens{rate}")
    if drafts.drafted and drafts.drafted[0]:
        kept = " / ".join(f"{a / d:.2f}" for a, d in zip(drafts.accepted, drafts.drafted))
        rounds = drafts.drafted[0]
        lines.append(f"drafts      {rounds} rounds of {(new - 1) / rounds:.2f} tokens, kept by depth {kept}")
    if device.type == "cuda":
        lines.append(f"peak memory {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on {device}")
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        lines.append(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
