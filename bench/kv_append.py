"""From the q/k/v projections into the FP8 cache, as in Step-3.7-Flash: 8 KV heads of 128 dims, pages of 64 tokens.

A full-attention layer has 64 query heads and 64 rotary dims, a sliding one 96 and 128.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

import step_kernels as sk
from step_kernels.ops.kv_append import rope
from step_kernels.ops.rms_norm import normalized
from step_kernels.testing import relative_error

KV_HEADS, DIM, PAGE = 8, 128, 64


class Case(NamedTuple):
    tokens: int
    heads: int = 64
    rotary: int = 64


TOKENS = (1, 64, 1024, 8192)
CASES = {f"{tokens} tokens": Case(tokens) for tokens in TOKENS}
CASES |= {f"{tokens} tokens, 96h": Case(tokens, 96, 128) for tokens in TOKENS}


def inputs(case: Case) -> tuple:
    """The op's arguments, random: q, k and v are views of one buffer."""
    tokens, heads, rotary = case
    qkv = torch.randn(tokens, heads + 2 * KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    norms = torch.randn(2, DIM, device="cuda", dtype=torch.bfloat16) * 0.1
    inv_freq = 5e6 ** -(torch.arange(0, rotary, 2, device="cuda") / rotary)
    pages = -(-tokens // PAGE)
    caches = torch.zeros(2, pages, KV_HEADS, PAGE, DIM, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    scales = torch.full((2,), 0.1, device="cuda")
    slots = torch.randperm(pages * PAGE, device="cuda")[:tokens]
    positions = torch.randint(0, 262144, (tokens,), device="cuda")
    return (*qkv.split((heads, KV_HEADS, KV_HEADS), 1), *norms, 1e-5, inv_freq, positions, slots, *caches, *scales)


def work(case: Case) -> tuple[int, int]:
    """Bytes that must move and matrix FLOP: q, k and v read, q written in bf16, k and v in a byte."""
    return case.tokens * DIM * (2 * (2 * case.heads + 2 * KV_HEADS) + 2 * KV_HEADS), 0


def contenders() -> dict:
    """The op alone: its reference reads slots on the host, which no CUDA graph can hold."""
    return {"ours": sk.kv_append}


def error(q, k, v, q_norm, k_norm, eps, inv_freq, positions, *cache) -> float:
    """Relative error of q against float64."""
    out = sk.kv_append(q, k, v, q_norm, k_norm, eps, inv_freq, positions, *cache)
    angle = (positions.float()[:, None, None] * inv_freq).double()
    return relative_error(out, rope(normalized(q.double(), q_norm, eps), angle))
