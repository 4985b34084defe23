"""The whole model's speed on this machine: prefill, decode by batch, and where the time of a step goes.

python -m bench.e2e --layers 6 --json e2e.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from step_kernels.cli import Parser
from step_kernels.model import CheckpointError, Step3p7, StepConfig
from step_kernels.model.cache import PagedCache
from step_kernels.model.config import FULL, SLIDING
from step_kernels.model.graph import DecodeGraphs, refusal, step

from .run import machine
from .timing import NoGPU, require_gpu


def released_config(layers: int) -> StepConfig:
    """Step-3.7-Flash's widths with its first `layers` trunk layers; the last two clamp, as the release's do."""
    types = [FULL if i % 4 == 0 else SLIDING for i in range(layers)] + [SLIDING] * 3

    def clamped(limit):
        return [limit if layers - 2 <= i < layers else 0.0 for i in range(layers + 3)]

    text = {
        "model_type": "step3p5",
        "hidden_size": 4096,
        "intermediate_size": 11264,
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": 3,
        "vocab_size": 128896,
        "max_position_embeddings": 262144,
        "num_attention_heads": 64,
        "num_attention_groups": 8,
        "head_dim": 128,
        "attention_other_setting": {"num_attention_heads": 96, "num_attention_groups": 8, "head_dim": 128},
        "layer_types": types,
        "sliding_window": 512,
        "rope_theta": [5e6 if t == FULL else 1e4 for t in types],
        "partial_rotary_factors": [0.5 if t == FULL else 1.0 for t in types],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": 131072,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
        },
        "yarn_only_types": [FULL],
        "moe_layers_enum": list(range(min(3, layers), layers)),
        "moe_num_experts": 288,
        "moe_top_k": 8,
        "moe_intermediate_size": 1280,
        "share_expert_dim": 1280,
        "moe_router_scaling_factor": 3.0,
        "swiglu_limits": clamped(7.0),
        "swiglu_limits_shared": clamped(16.0),
        "bos_token_id": 0,
        "eos_token_id": [1, 2, 128007],
    }
    vision = {"image_size": 728, "patch_size": 14, "width": 1536, "layers": 47, "heads": 16}
    return StepConfig.from_dict({"image_token_id": 128001, "vision_config": vision, "text_config": text})


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


@torch.inference_mode()
def prefill(model, length: int, chunk: int = 2048) -> float:
    """Tokens a second of a prompt of `length` random tokens, in chunks, through an FP8 cache."""
    tokens = torch.randint(0, model.config.vocab_size, (length,), device=model.device)

    def run():
        cache = PagedCache(
            model.config, 1, length, dtype=torch.float8_e4m3fn, device=model.device, chunk=min(chunk, length)
        )
        for begin in range(0, length, chunk):
            part = tokens[begin : begin + chunk]
            hidden = model.trunk(model.embed_tokens[part], cache.tokens([begin], [len(part)]))
        return model.logits(hidden[-1:])

    run()
    return length / seconds(run, 3)


@torch.inference_mode()
def decode(model, batch: int, length: int, profile: bool = False) -> tuple[float, str | None, list]:
    """Milliseconds a step of `batch` requests with `length` tokens each; why no graph, or None; kernels by time."""
    cache = PagedCache(model.config, batch, length + 1, dtype=torch.float8_e4m3fn, device=model.device, chunk=length)
    context = cache.tokens([0] * batch, [length] * batch)  # pages of random keys and values stand in for a prefill
    for pair in cache.layers:
        for pages in pair:
            pages.view(torch.uint8).random_(0, 0x70)
    context = cache.tokens([length] * batch, [1] * batch)
    tokens = torch.randint(0, model.config.vocab_size, (batch,), device=model.device)
    reason = refusal(model)
    run = DecodeGraphs(model) if reason is None else lambda *a: step(model, *a)
    for _ in range(3):
        run(tokens, context)
    took = seconds(lambda: run(tokens, context), 20)
    kernels = []
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            run(tokens, context)
            torch.cuda.synchronize()
        kernels = [(e.key, e.count, e.self_device_time_total) for e in profiler.key_averages()]
        kernels = sorted((k for k in kernels if k[2]), key=lambda k: -k[2])
    return took * 1000, reason, kernels


@torch.inference_mode()
def image(model) -> float:
    """Milliseconds for the whole view and six crops of one image."""
    whole = torch.randn(1, 3, model.config.vision.image_size, model.config.vision.image_size)
    crops = torch.randn(6, 3, model.config.vision.crop_size, model.config.vision.crop_size)
    whole, crops = (t.to(model.device, model.dtype) for t in (whole, crops))
    model.image_features(whole, crops, [6])
    return seconds(lambda: model.image_features(whole, crops, [6]), 5) * 1000


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.e2e", description=__doc__.splitlines()[0], epilog="example: python -m bench.e2e"
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, help="a folder; without it, random weights of real widths")
    parser.add_argument(
        "--layers", type=int, default=6, metavar="N", help="trunk layers of random weights (default: 6)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args(arguments)
    if options.layers < 4:
        parser.error(f"--layers: got {options.layers}, wanted at least 4 (three are dense)")
    try:
        require_gpu()
        result = measure(options)
    except (CheckpointError, NoGPU) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(options: argparse.Namespace) -> dict:
    if options.checkpoint:
        model = Step3p7.from_pretrained(options.checkpoint, progress=True)
    else:
        model = Step3p7.random(released_config(options.layers))
    config = model.config
    result = {
        **machine(),
        "gpu": torch.cuda.get_device_name(),
        "layers": config.num_layers,
        "prefill": {},
        "decode": {},
    }
    print(f"{result['gpu']}, {config.num_layers} layers of {config.hidden_size}, weights and all "
          f"{torch.cuda.memory_allocated() / 1e9:.1f} GB")  # fmt: skip
    limit = config.max_positions - 1
    for length in (1024, 8192, 32768):
        if length <= limit:
            result["prefill"][length] = prefill(model, length)
            print(f"prefill {length:>6} tokens {result['prefill'][length]:>10.0f} tokens/s", flush=True)
    kernels = []
    for batch, length in ((1, 1024), (1, 32768), (8, 1024), (64, 1024)):
        if length <= limit:
            took, reason, found = decode(model, batch, length, profile=(batch, length) == (1, 1024))
            kernels = kernels or found
            result["decode"][f"{batch} x {length}"] = took
            print(f"decode  {batch:>3} x {length:>6}   {took:>8.3f} ms a step {batch / took * 1000:>10.0f} tokens/s"
                  f"{'' if reason is None else f'   without graph: {reason}'}", flush=True)  # fmt: skip
    if model.vision:
        result["image"] = image(model)
        print(f"image with 6 crops     {result['image']:>8.1f} ms")
    result["kernels"] = [{"kernel": name, "calls": calls, "us": us} for name, calls, us in kernels[:25]]
    print("\na decode step of one request at 1024 tokens, by kernel:")
    for name, calls, us in kernels[:25]:
        print(f"{us:>10.1f} us {calls:>5} x  {name[:90]}")
    return result


if __name__ == "__main__":
    sys.exit(main())
