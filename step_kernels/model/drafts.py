"""Drafts of the MTP layers: each depth guesses one token more, from the hidden states of the depth above."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import Request
from .cache import PagedCache, upload


def settle(model, cache: PagedCache, requests: list[Request | None]) -> list[Tensor | None]:
    """Compute every draft item whose token is known; the last depth-0 hidden state of each request."""
    last = [None] * len(requests)
    for depth in range(len(model.mtp)):
        ready = [min(len(r.tail[depth]), len(r.tokens) - 1 - depth - r.done[depth]) if r else 0 for r in requests]
        ready = [max(n, 0) for n in ready]
        starts = [r.done[depth] if r else 0 for r in requests]
        x = [r.tail[depth][:n] if r else None for r, n in zip(requests, ready)]
        embeddings = [r.embed(model, s + 1 + depth, s + 1 + depth + n) for r, s, n in zip(requests, starts, ready) if n]
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


def draft(model, cache: PagedCache, requests: list[Request | None]) -> list[list[int]]:
    """A draft a depth for each request that decodes. Items on drafted tokens are computed again once settled."""
    active = [r if r and r.is_decoding else None for r in requests]
    hidden = settle(model, cache, active)
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
            embeddings = [model.embed_tokens[upload(torch.tensor(tokens), model.device)]]
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
