"""Generation: chunked prefill, batched decoding, and drafts that never change the outcome.

Trunk and drafts share one cache. A step feeds each request its last token and its drafts at once; the token
chosen at each place is kept as long as the draft there was the same token, so every kept token is chosen
from the trunk's own distribution.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cache import PagedCache
from .graph import DecodeGraphs, refusal, step


@dataclass
class DraftStats:
    """Drafts offered and kept, by depth."""

    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


@dataclass
class _Request:
    tokens: list[int]  # prompt and chosen tokens; the trunk has seen all but the last
    embeddings: Tensor  # [prompt, hidden], image features included
    done: list[int]  # by depth: items whose token is settled and computed
    tail: list[Tensor]  # by depth: hidden states that wait for their token
    new: int = 0
    finished: bool = False


def generate(
    model,
    prompts: list[list[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    mtp: bool = False,
    kv_cache: str = "fp8",
    images: list[dict] | None = None,
    stop_ids: tuple[int, ...] | None = None,
    chunk: int = 2048,
    graphs: bool | None = None,
    stats: DraftStats | None = None,
) -> Iterator[tuple[int, int]]:
    """(request, token) pairs as they are chosen, each request's in order, its stop token included.

    `images`: for each prompt the image arguments of Step3p7's call. `kv_cache`: fp8, or `model` for the model's
    dtype. `temperature` 0 is greedy. `stop_ids` default to the config's. `chunk`: prompt tokens a prefill step.
    `graphs`: decode in CUDA graphs, by default wherever the kernels allow it.
    """
    config = model.config
    if mtp and not model.mtp:
        raise ValueError("mtp: this checkpoint has no MTP layers")
    if kv_cache not in ("fp8", "model"):
        raise ValueError(f"kv_cache: got {kv_cache!r}, wanted fp8 or model")
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature, top_p: got {temperature}, {top_p}, wanted >= 0 and in (0, 1]")
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
    depths = len(model.mtp) if mtp else 0
    dtype = torch.float8_e4m3fn if kv_cache == "fp8" else model.dtype
    cache = PagedCache(
        config, len(prompts), length + depths, dtype=dtype, device=model.device, mtp_depths=depths, chunk=chunk
    )
    generator = torch.Generator(model.device).manual_seed(seed)
    stop = set(config.eos_ids if stop_ids is None else stop_ids)
    requests = []
    with torch.inference_mode():
        for i, prompt in enumerate(prompts):
            embeddings = model.embed(torch.tensor(prompt), **(images[i] if images else {}))
            requests.append(_Request(list(prompt), embeddings, [0] * depths, [embeddings[:0]] * depths))
    if max_new_tokens < 1:
        return iter(())
    return _run(
        model,
        cache,
        requests,
        chunk,
        choose=lambda logits: _choose(logits, temperature, top_p, generator),
        keep=lambda request, token: _keep(request, token, max_new_tokens, stop),
        run=DecodeGraphs(model) if graphs or (graphs is None and not reason) else functools.partial(step, model),
        stats=stats or DraftStats(),
    )


@torch.inference_mode()
def _run(model, cache, requests: list[_Request], chunk: int, *, choose, keep, run, stats: DraftStats):
    depths = len(requests[0].done)
    stats.drafted, stats.accepted = [0] * depths, [0] * depths
    hidden = [_prefill(model, cache, requests, i, chunk) for i in range(len(requests))]
    first = choose(model.logits(torch.cat(hidden))).tolist()
    for i, (request, token) in enumerate(zip(requests, first)):
        keep(request, token)
        yield i, token
    while not all(r.finished for r in requests):
        drafts = _draft(model, cache, requests) if depths else [[] for _ in requests]
        fed = [[] if r.finished else [r.tokens[-1], *d] for r, d in zip(requests, drafts)]
        context = cache.tokens([len(r.tokens) - 1 for r in requests], [len(f) for f in fed])
        x, logits = run(torch.tensor(sum(fed, []), device=model.device), context)
        chosen = choose(logits).tolist()
        begin = 0
        for i, request in enumerate(requests):
            if not fed[i]:
                continue
            kept = matched = 0
            for place, token in enumerate(chosen[begin : begin + len(fed[i])]):
                keep(request, token)
                yield i, token
                kept += 1
                agrees = place < len(drafts[i]) and token == drafts[i][place]
                matched += agrees
                if request.finished or not agrees:
                    break
            if depths:
                request.tail[0] = torch.cat((request.tail[0], x[begin : begin + kept]))
            for depth in range(depths):
                stats.drafted[depth] += 1
                stats.accepted[depth] += depth < matched
            begin += len(fed[i])
            if request.finished:
                cache.free(i)


def _keep(request: _Request, token: int, max_new_tokens: int, stop: set[int]) -> None:
    request.tokens.append(token)
    request.new += 1
    request.finished = request.new == max_new_tokens or token in stop


def _prefill(model, cache: PagedCache, requests: list[_Request], i: int, chunk: int) -> Tensor:
    """Run a prompt through trunk and drafts, `chunk` tokens a step; the last token's hidden state [1, hidden]."""
    request = requests[i]
    for begin in range(0, len(request.tokens), chunk):
        x = request.embeddings[begin : begin + chunk]
        starts, counts = ([n if r == i else 0 for r in range(len(requests))] for n in (begin, len(x)))
        hidden = model.trunk(x, cache.tokens(starts, counts))
        if request.tail:
            request.tail[0] = torch.cat((request.tail[0], hidden))
            _settle(model, cache, [r if r is request else None for r in requests])
    return hidden[-1:]


def _settle(model, cache: PagedCache, requests: list[_Request | None]) -> list[Tensor | None]:
    """Compute every draft item whose token is known; the last depth-0 hidden state of each request."""
    last = [None] * len(requests)
    for depth in range(len(model.mtp)):
        ready = [min(len(r.tail[depth]), len(r.tokens) - 1 - depth - r.done[depth]) if r else 0 for r in requests]
        ready = [max(n, 0) for n in ready]
        starts = [r.done[depth] if r else 0 for r in requests]
        x = [r.tail[depth][:n] if r else None for r, n in zip(requests, ready)]
        embeddings = [
            _embedding(model, r, s + 1 + depth, s + 1 + depth + n) for r, s, n in zip(requests, starts, ready) if n
        ]
        out = _run_depth(model, cache, depth, starts, ready, embeddings, [t for t, n in zip(x, ready) if n])
        for i, r in enumerate(requests):
            if not ready[i]:
                continue
            r.done[depth] += ready[i]
            r.tail[depth] = r.tail[depth][ready[i] :]
            if depth + 1 < len(model.mtp):
                r.tail[depth + 1] = torch.cat((r.tail[depth + 1], out[i]))
            if depth == 0:
                last[i] = out[i][-1:]
    return last


def _draft(model, cache: PagedCache, requests: list[_Request]) -> list[list[int]]:
    """A draft a depth for each unfinished request. Items on drafted tokens are computed again once settled."""
    active = [None if r.finished else r for r in requests]
    hidden = _settle(model, cache, active)
    drafts: list[list[int]] = [[] for _ in requests]
    unsettled: list[Tensor | None] = [None] * len(requests)  # hidden states of the depth above, on drafted tokens
    for depth in range(len(model.mtp)):
        if depth:
            x = [
                None if r is None else r.tail[depth] if u is None else torch.cat((r.tail[depth], u))
                for r, u in zip(active, unsettled)
            ]
            counts = [0 if t is None else len(t) for t in x]
            starts = [r.done[depth] if r else 0 for r in active]
            tokens = [t for d, n in zip(drafts, counts) if n for t in d[-n:]]
            embeddings = [model.embed_tokens[torch.tensor(tokens, device=model.device)]]
            unsettled = _run_depth(model, cache, depth, starts, counts, embeddings, [t for t in x if t is not None])
            hidden = [None if t is None else t[-1:] for t in unsettled]
        heads = torch.cat([t for t in hidden if t is not None])
        chosen = iter(model.mtp[depth].logits(heads).argmax(-1).tolist())
        for i, r in enumerate(active):
            if r:
                drafts[i].append(next(chosen))
    return drafts


def _run_depth(model, cache, depth, starts, counts, embeddings, hidden) -> list[Tensor | None]:
    """One MTP layer over counts[r] items of each request from item starts[r]; their hidden states by request."""
    if not sum(counts):
        return [None] * len(counts)
    out = model.mtp[depth](torch.cat(embeddings), torch.cat(hidden), cache.tokens(starts, counts)).split(counts)
    return [t if n else None for t, n in zip(out, counts)]


def _embedding(model, request: _Request, begin: int, end: int) -> Tensor:
    """Embeddings of the request's tokens begin to end, the prompt's with its image features."""
    prompt = len(request.embeddings)
    chosen = torch.tensor(request.tokens[max(begin, prompt) : end], dtype=torch.long, device=model.device)
    return torch.cat((request.embeddings[begin : min(end, prompt)], model.embed_tokens[chosen]))


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """f32 [rows, vocab] -> i64 [rows]: the best token, or a draw from the smallest set with top_p of the mass."""
    if temperature == 0:
        return logits.argmax(-1)
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    probabilities, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    return order.gather(-1, probabilities.multinomial(1, generator=generator))[:, 0]
