"""The router of Step-3.7-Flash: 288 experts, top 8."""

from __future__ import annotations

import torch

import step_kernels as sk
from step_kernels.testing import relative_error

EXPERTS, TOP_K, SCALE = 288, 8, 3.0
CASES = {f"{tokens} tokens": tokens for tokens in (1, 64, 1024, 8192)}


def inputs(tokens: int) -> tuple:
    """The op's arguments, random."""
    return torch.randn(tokens, EXPERTS, device="cuda"), torch.randn(EXPERTS, device="cuda") * 0.1, TOP_K, SCALE


def work(tokens: int) -> tuple[int, int]:
    """Bytes that must move and matrix FLOP: logits and bias read, weights and ids written."""
    return 4 * EXPERTS * (tokens + 1) + 8 * TOP_K * tokens, 0


def contenders() -> dict:
    """The op first, then its peers."""
    reference = sk.moe_topk.reference
    return {"ours": sk.moe_topk, "torch": reference, "torch.compile": torch.compile(reference)}


def error(logits, bias, top_k, scale) -> float:
    """Relative error of the weights against float64; inf if an id differs from the reference's."""
    weights, ids = sk.moe_topk(logits, bias, top_k, scale)
    if not torch.equal(ids, sk.moe_topk.reference(logits, bias, top_k, scale)[1]):
        return float("inf")
    scores = logits.double().sigmoid().gather(1, ids.long())
    return relative_error(weights, scores / scores.sum(1, keepdim=True) * scale)
