"""The residual addition and norm before each half of a layer of Step-3.7-Flash: hidden size 4096."""

from __future__ import annotations

import torch

import step_kernels as sk
from step_kernels.testing import relative_error

HIDDEN, EPS = 4096, 1e-5
CASES = {f"{tokens} tokens": tokens for tokens in (1, 64, 1024, 8192)}


def inputs(tokens: int) -> tuple:
    """The op's arguments, random."""
    x, residual = torch.randn(2, tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    return x, residual, torch.randn(HIDDEN, device="cuda", dtype=torch.bfloat16) * 0.1, EPS


def work(tokens: int) -> tuple[int, int]:
    """Bytes that must move and matrix FLOP: x, residual and weight read, norm and sum written, bf16."""
    return 2 * HIDDEN * (4 * tokens + 1), 0


def contenders() -> dict:
    """The op first, then its peers."""
    reference = sk.add_rms_norm.reference
    return {"ours": sk.add_rms_norm, "torch": reference, "torch.compile": torch.compile(reference)}


def error(x, residual, weight, eps) -> float:
    """Relative error of the norm against float64; inf if the sum is not torch's."""
    out, total = sk.add_rms_norm(x, residual, weight, eps)
    if not torch.equal(total, x + residual):
        return float("inf")
    return relative_error(out, sk.rms_norm.reference(total.double(), weight, eps))
