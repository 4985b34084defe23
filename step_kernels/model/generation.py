"""Generation: requests that wait, prefill in chunks and decode together, and drafts that never change the outcome.

Without drafts the host runs a step behind: it launches the next step before it reads the last one's tokens.
With drafts, trunk and drafts share one cache. A step feeds each request its last token and its drafts at once;
the token chosen at each place is kept as long as the draft there was the same token, so every kept token is the
one that the trunk alone would have chosen.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from .batch import Batch, Request
from .cache import CHUNK, PAGE_SIZE, PagedCache, upload
from .decoding import Decoder
from .drafts import draft as _draft
from .drafts import settle
from .graph import DecodeGraphs, refusal, step
from .sampling import Sampling


@dataclass
class DraftStats:
    """Drafts offered and kept, by depth."""

    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


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
        batch = _batch(model, requests, kv_cache, chunk, min(max_batch, len(prompts)), cache_tokens, graphs and not mtp)
    if not mtp:
        return _run(batch, runs_ahead=model.device.type == "cuda")
    run = DecodeGraphs(model) if graphs else functools.partial(step, model)
    return _run_with_drafts(model, batch, run, stats or DraftStats())


def _batch(model, requests: list[Request], kv_cache: str, chunk: int, rows: int, tokens: int | None, graphs) -> Batch:
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
        mtp_depths=requests[0].depths,
        chunk=chunk,
        tokens=sum(lengths[:rows]) if tokens is None else min(tokens, sum(lengths[:rows])),
    )
    return Batch(model, cache, Decoder(model, cache, graphs), requests, chunk)


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


@torch.inference_mode()
def _run_with_drafts(model, batch: Batch, run, stats: DraftStats) -> Iterator[tuple[int, int]]:
    stats.drafted, stats.accepted = ([0] * len(model.mtp) for _ in "da")
    try:
        while not batch.is_done:
            batch.admit()
            launched = batch.prefill(lambda hidden: _settle_prompts(model, batch, hidden))
            yield from batch.read(*launched) if launched else ()
            if any(r and r.is_decoding for r in batch.requests):
                yield from _round(model, batch, run, stats)
    finally:
        batch.close()


def _settle_prompts(model, batch: Batch, hidden: list) -> None:
    for request, x in zip(batch.requests, hidden):
        if x is not None:
            request.tail[0] = torch.cat((request.tail[0], x))
    settle(model, batch.cache, [r if x is not None else None for r, x in zip(batch.requests, hidden)])


def _round(model, batch: Batch, run, stats: DraftStats) -> Iterator[tuple[int, int]]:
    """Draft for all that decode, feed the drafts, and keep what the trunk agrees with and its next token."""
    requests = list(batch.requests)
    drafts = _draft(model, batch.cache, requests)
    fed = [[r.tokens[-1], *d] if r and r.is_decoding else [] for r, d in zip(requests, drafts)]
    seen = [len(r.tokens) if f else 1 for r, f in zip(requests, fed)]
    context = batch.cache.tokens([n - 1 for n in seen], [len(f) for f in fed])
    x, logits = run(upload(torch.tensor(sum(fed, [])), model.device), context)
    rows, positions = zip(*((row, seen[row] + place) for row, f in enumerate(fed) for place in range(len(f))))
    chosen = batch.decoder.choose(list(rows), logits, list(positions)).tolist()
    begin = 0
    for request, own, tokens in zip(requests, drafts, fed):
        if not tokens:
            continue
        kept = matched = 0
        for place, token in enumerate(chosen[begin : begin + len(tokens)]):
            batch.keep(request, token)
            yield request.number, token
            kept += 1
            agrees = place < len(own) and token == own[place]
            matched += agrees
            if request.finished or not agrees:
                break
        request.tail[0] = torch.cat((request.tail[0], x[begin : begin + kept]))
        for depth in range(len(own)):
            stats.drafted[depth] += 1
            stats.accepted[depth] += depth < matched
        begin += len(tokens)
