"""Generation: requests that wait, prefill in chunks and decode together, and drafts that never change the outcome.

On a GPU the host runs a step behind: it launches the next step before it reads the last one's tokens. Trunk and
draft layers share one cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

from .batch import Batch, Request
from .cache import CHUNK, PAGE_SIZE, PagedCache
from .decoding import Decoder
from .drafts import DraftStats
from .graph import refusal
from .sampling import Sampling


def generate(
    model,
    prompts: list[list[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    mtp: bool = False,
    kv_cache: str = "fp8",
    images: list[dict] | None = None,
    stop_ids: tuple[int, ...] | None = None,
    chunk: int = CHUNK,
    max_batch: int = 128,
    cache_tokens: int | None = None,
    graphs: bool | None = None,
    stats: DraftStats | None = None,
) -> Iterator[tuple[int, int]]:
    """(request, token) pairs as they are chosen, each request's in order, its stop token included.

    `images`: for each prompt the image arguments of Step3p7's call. `kv_cache`: fp8, or `model` for the model's
    dtype. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 sample from all tokens, else from at most 1024. A
    sample depends on seed, request and position alone. `stop_ids` default to the config's. `chunk`: prompt tokens
    a prefill step. At most `max_batch` requests run at a time, over at most `cache_tokens` positions of cache (by
    default enough for any of so many); the others wait. `graphs`: decode in CUDA graphs, by default wherever the
    kernels allow it.
    """
    config = model.config
    if mtp and not model.mtp:
        raise ValueError("mtp: this checkpoint has no MTP layers")
    if kv_cache not in ("fp8", "model"):
        raise ValueError(f"kv_cache: got {kv_cache!r}, wanted fp8 or model")
    if chunk < 1 or max_batch < 1:
        raise ValueError(f"chunk, max_batch: got {chunk}, {max_batch}, wanted at least 1")
    sampling = Sampling(temperature, top_p, top_k, seed)
    if not prompts or not all(prompts):
        raise ValueError("prompts: got an empty prompt, wanted at least one token")
    length = max(map(len, prompts)) + max_new_tokens
    if length > config.max_positions:
        raise ValueError(
            f"prompts: prompt and max_new_tokens make {length} tokens, wanted at most {config.max_positions}"
        )
    reason = refusal(model)
    if graphs and reason:
        raise ValueError(f"graphs: {reason}")
    graphs = reason is None if graphs is None else graphs
    options = dict(
        new=max_new_tokens,
        stop=set(config.eos_ids if stop_ids is None else stop_ids),
        sampling=sampling,
        depths=len(model.mtp) if mtp else 0,
    )
    with torch.inference_mode():
        requests = [
            Request(model, i, p, images=images[i] if images else None, **options) for i, p in enumerate(prompts)
        ]
        if max_new_tokens < 1:
            return iter(())
        stats = DraftStats() if stats is None else stats
        stats.drafted, stats.accepted = ([0] * options["depths"] for _ in "da")
        rows = min(max_batch, len(prompts))
        batch = _batch(model, requests, kv_cache, chunk, rows, cache_tokens, graphs, stats)
    return _run(batch, runs_ahead=model.device.type == "cuda")


def _batch(
    model, requests: list[Request], kv_cache: str, chunk: int, rows: int, tokens: int | None, graphs: bool,
    stats: DraftStats,
) -> Batch:  # fmt: skip
    depths = requests[0].depths
    lengths = sorted((-(-r.length // PAGE_SIZE) * PAGE_SIZE for r in requests), reverse=True)
    if tokens is not None and tokens < lengths[0]:
        raise ValueError(
            f"cache_tokens: got {tokens}, wanted at least {lengths[0]}, the longest prompt and its new tokens in "
            f"pages of {PAGE_SIZE}"
        )
    cache = PagedCache(
        model.config,
        rows,
        lengths[0],
        dtype=torch.float8_e4m3fn if kv_cache == "fp8" else model.dtype,
        device=model.device,
        mtp_depths=depths,
        chunk=chunk,
        tokens=sum(lengths[:rows]) if tokens is None else min(tokens, sum(lengths[:rows])),
    )
    return Batch(model, cache, Decoder(model, cache, graphs, depths), requests, chunk, stats)


@torch.inference_mode()
def _run(batch: Batch, runs_ahead: bool) -> Iterator[tuple[int, int]]:
    """Prefill and decode by turns. Running ahead, what a turn launched is read after the next turn's launches."""
    launched = deque()
    try:
        while not batch.is_done:
            batch.admit()
            unread = len(launched)
            for launch in (batch.prefill, batch.decode):
                new = launch()
                launched.extend([new] if new else [])
                while launched and not runs_ahead:
                    yield from batch.read(*launched.popleft())
            for _ in range(unread):
                yield from batch.read(*launched.popleft())
    finally:
        batch.close()
