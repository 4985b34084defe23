"""What a model's steps take: decode, rounds of drafts, prefill, images, and how long until the first of them."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import time
from pathlib import Path

import torch
from torch import Tensor

from step_kernels.model import Step3p7, memory, moe
from step_kernels.model.cache import PagedCache
from step_kernels.model.decoding import Decoder
from step_kernels.model.graph import refusal

from . import timeline, timing

STEPS = 64  # of decoding that a cache has room for
SPARE = 2 << 30  # bytes a case must leave free: graphs, workspaces, the allocator's rounding
LONG = 32768  # prompts beyond this run once


def seconds(call, repeats: int) -> float:
    """Median wall time of a call, the GPU waited for."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
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


def filled_cache(model, batch: int, length: int, depths: int = 0, room: int = STEPS) -> PagedCache | None:
    """Random keys and values in place of a prefill of `length` tokens each, settled for `room` more, with layers for
    `depths` of drafts; None where memory does not hold them."""
    layers = model.config.layers[: model.config.num_layers + depths]
    needed = batch * (length + room) * sum(2 * x.kv_heads * x.head_dim for x in layers if x.window is None)
    free = memory.free_bytes(model.device)
    if free is not None and needed + SPARE > free:
        return None
    cache = PagedCache(
        model.config, batch, length + room, dtype=torch.float8_e4m3fn, device=model.device, mtp_depths=depths, chunk=1
    )
    for pair in cache.layers:
        for pages in pair:
            pages.view(torch.uint8).random_(0, 0x70)
    for request in range(batch):
        cache.settle(request, length, length + room)
    return cache


@torch.inference_mode()
def decode(model, batch: int, length: int, profile: bool = False) -> dict | None:
    """A step of `batch` requests with `length` tokens each; None where their cache does not fit."""
    cache = filled_cache(model, batch, length)
    if cache is None:
        return None
    requests, reason = list(range(batch)), refusal(model)
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
        ran = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        found["between"] = timeline.between([(e.name, e.time_range.start, e.time_range.end) for e in ran])
    return found


@torch.inference_mode()
def round_of_drafts(model, batch: int, length: int) -> float | None:
    """Milliseconds of a round of `batch` requests with `length` tokens each: every draft layer once, then all drafts
    and the token before them fed at once. None where their cache does not fit."""
    depths, warm, repeats = len(model.mtp), 3, 20
    cache = filled_cache(model, batch, length, depths, (1 + depths) * (warm + repeats + 2))  # if all are kept
    if cache is None:
        return None
    requests, decoder = list(range(batch)), Decoder(model, cache, refusal(model) is None, depths)
    decoder.drafts.hidden.normal_()
    decoder.drafts.embeddings.normal_()
    tokens = torch.randint(0, model.config.vocab_size, (batch,), device=model.device)
    decoder.feed(requests, tokens, [length] * batch)
    for _ in range(warm):
        decoder.step(requests, 0)
    return seconds(lambda: decoder.step(requests, 0), repeats) * 1e3


def gain(batch: int, depths: int, step_ms: float, round_ms: float) -> dict:
    """What rounds give beside plain steps: tokens/s where 0 to `depths` drafts are kept, and how many repay a round."""
    rates = [batch * (1 + kept) / round_ms * 1e3 for kept in range(depths + 1)]
    return {"ms": round_ms, "steps": round_ms / step_ms, "tokens_s": rates, "repaid_by": round_ms / step_ms - 1}


@torch.inference_mode()
def prefill(model, length: int, chunk: int) -> dict | None:
    """A prompt of `length` random tokens in chunks through an FP8 cache; None where that does not fit. `peak_bytes`:
    the most of it beyond weights and cache."""
    tokens = torch.randint(0, model.config.vocab_size, (length,), device=model.device)

    def empty() -> PagedCache:
        most = min(chunk, length)
        return PagedCache(model.config, 1, length, dtype=torch.float8_e4m3fn, device=model.device, chunk=most)

    def run():
        cache = empty()
        for begin in range(0, length, chunk):
            part = tokens[begin : begin + chunk]
            hidden = model.trunk(model.embed_tokens[part], cache.tokens([begin], [len(part)]))
        return model.logits(hidden[-1:])

    held = torch.cuda.memory_allocated()
    try:
        held += empty().bytes
        torch.cuda.reset_peak_memory_stats()
        if length <= LONG:
            run()
        took = seconds(run, 3 if length <= LONG else 1)
    except torch.cuda.OutOfMemoryError:
        return None
    return {
        "tokens_s": length / took,
        "floor_tokens_s": length / (prefill_flops(model, length) / timing.matrix_ceiling()),
        "peak_bytes": torch.cuda.max_memory_allocated() - held,
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


def start(folder: Path) -> tuple[Step3p7, dict]:
    """A checkpoint's model, and seconds from nothing to its weights, to the first token of a prompt, and to the first
    step in a graph; peak bytes of the device, and of the host beyond what it held before."""
    held, begin = _host_peak(), time.perf_counter()
    model = Step3p7.from_pretrained(folder, progress=True)
    torch.cuda.synchronize()
    found = {"load_s": time.perf_counter() - begin, "device_bytes": torch.cuda.max_memory_reserved()}
    found |= {"host_bytes": _host_peak() - held, "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors"))}
    prompt = torch.randint(13, model.config.vocab_size, (min(1024, model.config.max_positions - 8),)).tolist()
    tokens = model.generate(prompt, max_new_tokens=4, stop_ids=())
    next(tokens)
    found["first_token_s"] = time.perf_counter() - begin
    for _ in tokens:
        pass
    return model, found | {"step_s": time.perf_counter() - begin}


def _host_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
