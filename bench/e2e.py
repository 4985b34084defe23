"""The whole model's speed on this machine, beside what bytes and FLOP allow: start, decode, drafts, prefill, images.

python -m bench.e2e --layers 6 --json e2e.json --plot e2e.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from step_kernels.cli import Parser
from step_kernels.model import CheckpointError, Step3p7
from step_kernels.model.cache import CHUNK
from step_kernels.model.synthetic import RECIPES, ROUTERS

from . import timing
from .release import released_config
from .run import machine
from .steps import STEPS, decode, first_token, gain, image, prefill, round_of_drafts, start

DECODE = [(batch, 1024) for batch in (1, 8, 32, 64, 128)] + [(1, 32768), (8, 32768), (1, 200000)]
DRAFTS = [(batch, 1024) for batch in (1, 8, 32)]
PREFILL = (2048, 8192, 32768, 131072, 262144 - STEPS)
FIRST_TOKEN = (1024, 8192)
CROPS = (1, 4, 30)


def measure(model, options: argparse.Namespace) -> dict:
    """Everything but the start, printed as it comes."""
    config = model.config
    weights = str(options.checkpoint) if options.checkpoint else f"random, {options.recipe}, router {options.router}"
    result = {**machine(), "gpu": torch.cuda.get_device_name(), "layers": config.num_layers, "weights": weights}
    result |= {"memory_tb_s": timing.memory_ceiling() / 1e12, "matrix_tflop_s": timing.matrix_ceiling() / 1e12}
    print(f"{result['gpu']}, {config.num_layers} layers of {config.hidden_size}, weights and all "
          f"{torch.cuda.memory_allocated() / 1e9:.1f} GB; {result['memory_tb_s']:.2f} TB/s, "
          f"{result['matrix_tflop_s']:.0f} TFLOP/s")  # fmt: skip
    limit = config.max_positions - STEPS
    result["decode"], kernels, between = _decode(model, limit)
    if model.mtp:
        result["drafts"] = _drafts(model, result["decode"])
    result |= {"chunk": options.chunk, "prefill": _prefill(model, limit, options.chunk)}
    result["first_token_s"] = {n: first_token(model, n) for n in FIRST_TOKEN if n <= limit}
    for length, took in result["first_token_s"].items():
        print(f"first token of {length:>9} {took * 1e3:>10.1f} ms")
    if model.vision:
        result["image_ms"] = {crops: image(model, crops) for crops in CROPS}
        for crops, took in result["image_ms"].items():
            print(f"image with {crops:>3} crops    {took:>10.1f} ms")
    result["between"] = between
    result["kernels"] = [{"kernel": name, "launches": n, "us": us} for name, n, us in kernels]
    _print_kernels(kernels, between)
    return result


def _decode(model, limit: int) -> tuple[dict, list, float | None]:
    """The cases, the first one's kernels, and the share of its time between the big ones."""
    cases, kernels, between = {}, [], None
    print("decode   batch  context    ms a step   tokens/s   floor ms   share   experts a layer")
    for batch, length in DECODE:
        if length > limit:
            continue
        found = decode(model, batch, length, profile=(batch, length) == DECODE[0])
        if found is None:
            print(f"        {batch:>6} {length:>8}    does not fit")
            continue
        kernels, between = found.pop("kernels", kernels), found.pop("between", between)
        cases[f"{batch} x {length}"] = found
        reason = found["without_graph"]
        print(f"        {batch:>6} {length:>8} {found['ms']:>12.3f} {batch / found['ms'] * 1e3:>10.0f} "
              f"{found['floor_ms']:>10.3f} {found['floor_ms'] / found['ms']:>7.0%} {found['experts']:>10.1f}"
              f"{f'   without graph: {reason}' if reason else ''}", flush=True)  # fmt: skip
        torch.cuda.empty_cache()
    return cases, kernels, between


def _drafts(model, steps: dict) -> dict:
    """The rounds of the cases whose plain steps were measured."""
    cases, depths = {}, len(model.mtp)
    kept = "".join(f"{f'{n} kept':>9}" for n in range(depths + 1))
    print(f"drafts   batch  context   ms a round   in steps  tokens/s: plain{kept}   repaid by")
    for batch, length in DRAFTS:
        plain = steps.get(f"{batch} x {length}")
        took = round_of_drafts(model, batch, length) if plain else None
        if took is None:
            continue
        found = cases[f"{batch} x {length}"] = gain(batch, depths, plain["ms"], took)
        rates = "".join(f"{rate:>9.0f}" for rate in found["tokens_s"])
        print(f"        {batch:>6} {length:>8} {took:>12.3f} {found['steps']:>10.2f} {batch / plain['ms'] * 1e3:>16.0f}"
              f"{rates} {found['repaid_by']:>11.2f}", flush=True)  # fmt: skip
        torch.cuda.empty_cache()
    return cases


def _prefill(model, limit: int, chunk: int) -> dict:
    cases = {}
    print(f"prefill           tokens   tokens/s      floor   share   GB beside the cache   (chunks of {chunk})")
    for length in PREFILL:
        found = prefill(model, length, chunk) if length <= limit else None
        if found:
            cases[length] = found
            share = found["tokens_s"] / found["floor_tokens_s"]
            print(f"               {length:>9} {found['tokens_s']:>10.0f} {found['floor_tokens_s']:>10.0f} "
                  f"{share:>7.0%} {found['peak_bytes'] / 1e9:>10.2f}", flush=True)  # fmt: skip
        torch.cuda.empty_cache()
    return cases


def _print_kernels(kernels: list[tuple[str, int, float]], between: float | None) -> None:
    whole, context = sum(us for _, _, us in kernels), DECODE[0][1]
    print(f"\nkernels of a decode step of one request at {context} tokens, {whole / 1e3:.3f} ms one after the other:")
    print("        us  share  launches  kernel")
    for name, launches, us in kernels[:30]:
        print(f"{us:>10.1f} {us / whole:>6.1%} {launches:>9}  {name[:90]}")
    if between is not None:
        print(f"no linear, expert or attention over more than a window runs for {between:.1%} of that step's time")


def _print_start(found: dict) -> None:
    print(f"start    {found['load_s']:.1f} s for {found['bytes'] / 1e9:.1f} GB, "
          f"{found['bytes'] / found['load_s'] / 1e9:.2f} GB/s; a prompt's first token after "
          f"{found['first_token_s']:.1f} s, steps in graphs after {found['step_s']:.1f} s; at most "
          f"{found['device_bytes'] / 1e9:.1f} GB of the device, {found['host_bytes'] / 1e9:.2f} GB more of the host",
          flush=True)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.e2e",
        description=__doc__.splitlines()[0],
        epilog="example: python -m bench.e2e --plot e2e.svg",
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, help="a folder; without it, random weights of real widths")
    parser.add_argument(
        "--layers", type=int, default=6, metavar="N", help="trunk layers of random weights (default: 6)"
    )
    parser.add_argument("--recipe", choices=RECIPES, default="experts", help="of random weights (default: experts)")
    parser.add_argument("--router", choices=ROUTERS, default="balanced", help="of random weights (default: balanced)")
    parser.add_argument(
        "--chunk", type=int, default=CHUNK, metavar="N", help=f"prompt tokens a step (default: {CHUNK})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there (.svg or .png)")
    options = parser.parse_args(arguments)
    if options.layers < 4:
        parser.error(f"--layers: got {options.layers}, wanted at least 4 (three are dense)")
    if options.chunk < 1:
        parser.error(f"--chunk: got {options.chunk}, wanted at least 1")
    try:
        timing.require_gpu()
        model, started = _model(options)
        result = measure(model, options) | ({"start": started} if started else {})
    except (CheckpointError, timing.NoGPU) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        from .e2e_plot import plot

        plot(result, options.plot)
    return 0


def _model(options: argparse.Namespace) -> tuple[Step3p7, dict | None]:
    """The model and, of a checkpoint's, how it started."""
    if not options.checkpoint:
        return Step3p7.random(released_config(options.layers), recipe=options.recipe, router=options.router), None
    model, started = start(options.checkpoint)
    _print_start(started)
    return model, started


if __name__ == "__main__":
    sys.exit(main())
