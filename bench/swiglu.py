"""Clamped SwiGLU at the widths of Step-3.7-Flash: 1280 in an expert, 11264 in a dense layer."""

from __future__ import annotations

import torch

import step_kernels as sk
from step_kernels.testing import relative_error

LIMIT = 7.0
CASES = {f"{tokens} x {n}": (tokens, n) for n in (1280, 11264) for tokens in (1, 64, 1024, 8192)}


def inputs(case: tuple[int, int]) -> tuple:
    """The op's arguments, random."""
    tokens, n = case
    return torch.randn(tokens, 2 * n, device="cuda", dtype=torch.bfloat16) * 3, LIMIT


def work(case: tuple[int, int]) -> tuple[int, int]:
    """Bytes that must move and matrix FLOP: gate and up read, the output written, bf16."""
    tokens, n = case
    return 2 * 3 * n * tokens, 0


def contenders() -> dict:
    """The op first, then its peers."""
    reference = sk.swiglu.reference
    return {"ours": sk.swiglu, "torch": reference, "torch.compile": torch.compile(reference)}


def error(gate_up, limit) -> float:
    """Relative error against float64."""
    return relative_error(sk.swiglu(gate_up, limit), sk.swiglu.reference(gate_up.double(), limit))
