"""The router of Step-3.7-Flash from hidden states on: 4096 of them, 288 experts, top 8."""

from __future__ import annotations

import torch

import step_kernels as sk
from step_kernels.testing import relative_error

HIDDEN, EXPERTS, TOP_K, SCALE = 4096, 288, 8, 3.0
MARGIN = 1e-5  # between two experts' scores, below which f32 sums may order them otherwise
# Tokens, and whether the weight is rounded to bf16, as the release stores it.
CASES = {f"{tokens} tokens": (tokens, True) for tokens in (1, 8, 64, 1024, 8192)}
CASES |= {f"{tokens} tokens, f32 weight": (tokens, False) for tokens in (1, 64, 8192)}


def inputs(case: tuple[int, bool]) -> tuple:
    """The op's arguments, random, with logits of size 1.3 as the release's."""
    tokens, rounded = case
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(EXPERTS, HIDDEN, device="cuda") * 1.3 / HIDDEN**0.5
    if rounded:
        weight = weight.bfloat16().float()
    torch.cuda.synchronize()  # the kernel may read a weight before the kernel ahead of it has ended
    return x, weight, torch.randn(EXPERTS, device="cuda") * 0.1, TOP_K, SCALE


def work(case: tuple[int, bool]) -> tuple[int, int]:
    """Bytes that must move and matrix FLOP: x and the f32 weight, in one or three bf16 parts, read; choices written."""
    tokens, rounded = case
    size = 2 * tokens * HIDDEN + 4 * EXPERTS * (HIDDEN + 1) + 8 * TOP_K * tokens
    return size, (1 if rounded else 3) * 2 * tokens * HIDDEN * EXPERTS


def contenders() -> dict:
    """The op first, then its peers."""

    def in_three(x, weight, bias, top_k, scale):
        return sk.moe_topk(x.float() @ weight.mT, bias, top_k, scale)

    return {"ours": sk.moe_router, "cast, cuBLAS, moe_topk": in_three}


def error(x, weight, bias, top_k, scale) -> float:
    """Relative error of the weights against float64; inf if ids differ from float64's where no scores are close."""
    weights, ids = sk.moe_router(x, weight, bias, top_k, scale)
    scores = (x.double() @ weight.double().mT).sigmoid()
    ranked, order = (scores + bias).sort(dim=1, descending=True)
    best = ranked[:, : top_k + 1]
    certain = (best[:, :-1] - best[:, 1:] > MARGIN).all(1)
    if not torch.equal(ids[certain].long(), order[certain, :top_k]):
        return float("inf")
    chosen = scores.gather(1, ids.long())
    return relative_error(weights, chosen / chosen.sum(1, keepdim=True) * scale)
