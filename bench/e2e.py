"""The whole model's speed on this machine, beside what its bytes and FLOP allow: decode, prefill, images, kernels.

python -m bench.e2e --layers 6 --json e2e.json --plot e2e.svg
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from step_kernels.cli import Parser
from step_kernels.model import CheckpointError, Step3p7, memory, moe
from step_kernels.model.cache import CHUNK, PagedCache
from step_kernels.model.decoding import Decoder
from step_kernels.model.graph import refusal
from step_kernels.model.synthetic import RECIPES, ROUTERS

from . import timing
from .release import released_config
from .run import machine

DECODE = [(batch, 1024) for batch in (1, 8, 32, 64, 128)] + [(1, 32768), (8, 32768), (1, 200000)]
PREFILL = (2048, 8192, 32768, 131072)
FIRST_TOKEN = (1024, 8192)
CROPS = (1, 4, 30)
STEPS = 64  # of decoding that a cache has room for
SPARE = 2 << 30  # bytes a case must leave free: graphs, workspaces, the allocator's rounding


def seconds(call, repeats: int) -> float:
    """Median wall time of a call, the GPU waited for."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def size(part) -> int:
    """Bytes of every tensor that a module, or a list of them, holds."""
    if isinstance(part, (list, tuple)):
        return sum(map(size, part))
    if isinstance(part, Tensor) or dataclasses.is_dataclass(part):
        return memory.size(part)
    if type(part).__module__.startswith("step_kernels.model"):
        return sum(map(size, vars(part).values()))
    return 0


@contextlib.contextmanager
def experts_counted():
    """A list that gets the number of experts that each routed sum meanwhile had to read."""
    counts, routed_sum = [], moe.routed_sum

    def counted(x, weights, ids, *rest):
        counts.append(ids.unique().numel())
        return routed_sum(x, weights, ids, *rest)

    moe.routed_sum = counted
    try:
        yield counts
    finally:
        moe.routed_sum = routed_sum


def positions_bytes(model, length: int) -> int:
    """Bytes of keys and values that one request's next token reads in all layers, in FP8."""
    layers = model.config.layers[: model.config.num_layers]
    return sum(2 * x.kv_heads * x.head_dim * min(length, x.window or length) for x in layers)


def filled_cache(model, batch: int, length: int) -> PagedCache | None:
    """Random keys and values in place of a prefill of `length` tokens each; None where memory does not hold them."""
    full = [x for x in model.config.layers[: model.config.num_layers] if x.window is None]
    needed = batch * (length + STEPS) * sum(2 * x.kv_heads * x.head_dim for x in full)
    if needed + SPARE > torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated():
        return None
    cache = PagedCache(model.config, batch, length + STEPS, dtype=torch.float8_e4m3fn, device=model.device, chunk=1)
    for pair in cache.layers:
        for pages in pair:
            pages.view(torch.uint8).random_(0, 0x70)
    return cache


@torch.inference_mode()
def decode(model, batch: int, length: int, profile: bool = False) -> dict | None:
    """A step of `batch` requests with `length` tokens each; None where their cache does not fit."""
    cache = filled_cache(model, batch, length)
    if cache is None:
        return None
    requests, reason = list(range(batch)), refusal(model)
    for request in requests:
        cache.settle(request, length, length + STEPS)
    tokens = torch.randint(0, model.config.vocab_size, (batch,), device=model.device)
    eager, decoder = (Decoder(model, cache, graphs) for graphs in (False, reason is None))
    for each in (eager, decoder):
        each.feed(requests, tokens, [length] * batch)
    with experts_counted() as counts:
        eager.step(requests, 0)
    for _ in range(3):
        decoder.step(requests, 0)
    took = seconds(lambda: decoder.step(requests, 0), 20)
    parts = [model.layers, model.norm, model.lm_head]
    routed = [layer.ffn.experts for layer in model.layers if isinstance(layer.ffn, moe.MoE)]
    each = size(routed) / (len(routed) * model.config.num_experts) if routed else 0
    read = size(parts) - size(routed) + each * sum(counts) + batch * positions_bytes(model, length)
    found = {"ms": took * 1e3, "bytes": int(read), "floor_ms": read / timing.memory_ceiling() * 1e3}
    found |= {"experts": sum(counts) / max(1, len(counts)), "without_graph": reason}
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            decoder.step(requests, 0)
            torch.cuda.synchronize()
        kernels = [(e.key, e.count, e.self_device_time_total) for e in profiler.key_averages()]
        found["kernels"] = sorted((k for k in kernels if k[2]), key=lambda k: -k[2])
    return found


@torch.inference_mode()
def prefill(model, length: int, chunk: int) -> dict | None:
    """A prompt of `length` random tokens in chunks through an FP8 cache; None where that does not fit."""
    tokens = torch.randint(0, model.config.vocab_size, (length,), device=model.device)

    def run():
        cache = PagedCache(
            model.config, 1, length, dtype=torch.float8_e4m3fn, device=model.device, chunk=min(chunk, length)
        )
        for begin in range(0, length, chunk):
            part = tokens[begin : begin + chunk]
            hidden = model.trunk(model.embed_tokens[part], cache.tokens([begin], [len(part)]))
        return model.logits(hidden[-1:])

    try:
        run()
        took = seconds(run, 3 if length <= 32768 else 1)
    except torch.cuda.OutOfMemoryError:
        return None
    return {
        "tokens_s": length / took,
        "floor_tokens_s": length / (prefill_flops(model, length) / timing.matrix_ceiling()),
    }


def prefill_flops(model, length: int) -> int:
    """Of every product that a prompt's tokens need: two a weight and token, four a pair of tokens and value."""
    config, total = model.config, 0
    for layer in config.layers[: config.num_layers]:
        q, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        weights = config.hidden_size * (2 * q + 2 * kv + layer.heads)
        if layer.moe:
            inner = config.top_k * config.moe_intermediate_size + config.share_expert_dim
            weights += config.hidden_size * (3 * inner + config.num_experts)
        else:
            weights += 3 * config.hidden_size * config.intermediate_size
        window = min(layer.window or length, length)
        pairs = window * (window + 1) // 2 + (length - window) * window
        total += 2 * weights * length + 4 * q * pairs
    return total


def first_token(model, length: int) -> float:
    """Seconds from a prompt of `length` tokens to its first token."""
    prompt = torch.randint(13, model.config.vocab_size, (length,)).tolist()
    return seconds(lambda: next(iter(model.generate(prompt, max_new_tokens=1))), 3)


@torch.inference_mode()
def image(model, crops: int) -> float:
    """Milliseconds for the whole view and the crops of one image."""
    sizes = ((1, model.config.vision.image_size), (crops, model.config.vision.crop_size))
    whole, parts = (torch.randn(n, 3, s, s, device=model.device, dtype=model.dtype) for n, s in sizes)
    model.image_features(whole, parts, [crops])
    return seconds(lambda: model.image_features(whole, parts, [crops]), 3) * 1000


def measure(model, options: argparse.Namespace) -> dict:
    """Everything, printed as it comes."""
    config, chunk = model.config, options.chunk
    weights = str(options.checkpoint) if options.checkpoint else f"random, {options.recipe}, router {options.router}"
    result = {**machine(), "gpu": torch.cuda.get_device_name(), "layers": config.num_layers, "weights": weights}
    result |= {"memory_tb_s": timing.memory_ceiling() / 1e12, "matrix_tflop_s": timing.matrix_ceiling() / 1e12}
    print(f"{result['gpu']}, {config.num_layers} layers of {config.hidden_size}, weights and all "
          f"{torch.cuda.memory_allocated() / 1e9:.1f} GB; {result['memory_tb_s']:.2f} TB/s, "
          f"{result['matrix_tflop_s']:.0f} TFLOP/s")  # fmt: skip
    limit, kernels = config.max_positions - STEPS, []
    print("decode   batch  context    ms a step   tokens/s   floor ms   share   experts a layer")
    result["decode"] = {}
    for batch, length in DECODE:
        if length > limit:
            continue
        found = decode(model, batch, length, profile=(batch, length) == DECODE[0])
        if found is None:
            print(f"        {batch:>6} {length:>8}    does not fit")
            continue
        kernels = found.pop("kernels", kernels)
        result["decode"][f"{batch} x {length}"] = found
        reason = found["without_graph"]
        print(f"        {batch:>6} {length:>8} {found['ms']:>12.3f} {batch / found['ms'] * 1e3:>10.0f} "
              f"{found['floor_ms']:>10.3f} {found['floor_ms'] / found['ms']:>7.0%} {found['experts']:>10.1f}"
              f"{f'   without graph: {reason}' if reason else ''}", flush=True)  # fmt: skip
        torch.cuda.empty_cache()
    print(f"prefill           tokens   tokens/s      floor   share   (chunks of {chunk})")
    result |= {"chunk": chunk, "prefill": {}}
    for length in PREFILL:
        found = prefill(model, length, chunk) if length <= limit else None
        if found:
            result["prefill"][length] = found
            share = found["tokens_s"] / found["floor_tokens_s"]
            print(f"               {length:>9} {found['tokens_s']:>10.0f} {found['floor_tokens_s']:>10.0f} "
                  f"{share:>7.0%}", flush=True)  # fmt: skip
        torch.cuda.empty_cache()
    result["first_token_s"] = {n: first_token(model, n) for n in FIRST_TOKEN if n <= limit}
    for length, took in result["first_token_s"].items():
        print(f"first token of {length:>9} {took * 1e3:>10.1f} ms")
    if model.vision:
        result["image_ms"] = {crops: image(model, crops) for crops in CROPS}
        for crops, took in result["image_ms"].items():
            print(f"image with {crops:>3} crops    {took:>10.1f} ms")
    result["kernels"] = [{"kernel": name, "launches": n, "us": us} for name, n, us in kernels]
    whole = sum(us for _, _, us in kernels)
    print(
        f"\nkernels of a decode step of one request at {DECODE[0][1]} tokens, {whole / 1e3:.3f} ms one after the other:"
    )
    print("        us  share  launches  kernel")
    for name, launches, us in kernels[:30]:
        print(f"{us:>10.1f} {us / whole:>6.1%} {launches:>9}  {name[:90]}")
    return result


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
        result = measure(_model(options), options)
    except (CheckpointError, timing.NoGPU) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        from .e2e_plot import plot

        plot(result, options.plot)
    return 0


def _model(options: argparse.Namespace) -> Step3p7:
    if options.checkpoint:
        return Step3p7.from_pretrained(options.checkpoint, progress=True)
    return Step3p7.random(released_config(options.layers), recipe=options.recipe, router=options.router)


if __name__ == "__main__":
    sys.exit(main())
