"""Attention over an e4m3 cache at the sizes of Step-3.7-Flash: 64 heads in full layers, 96 in those of 512 keys."""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

import step_kernels as sk
from step_kernels.testing import relative_error

KV_HEADS, DIM, PAGE_SIZE, WINDOW = 8, 128, 64, 512


class Case(NamedTuple):
    """`batch` requests of `new` tokens each, at the end of `length`."""

    batch: int
    new: int
    length: int
    heads: int
    window: int | None = None

    @property
    def pages(self) -> int:
        return -(-self.length // PAGE_SIZE)


DECODE = [(1, 8192), (1, 32768), (1, 131072), (16, 8192), (64, 8192)]
CASES = {f"{b} at {n // 1024}k, {h}h": Case(b, 1, n, h) for h in (64, 96) for b, n in DECODE}
# One page more than the window: a longer cache would make for fewer copies, whose windows all fit into L2.
CASES |= {f"{b} at 576, window": Case(b, 1, WINDOW + PAGE_SIZE, 96, WINDOW) for b in (1, 16, 64)}
CASES |= {f"{m // 1024}k of {n // 1024}k, 64h": Case(1, m, n, 64) for m, n in ((8192, 8192), (2048, 32768))}
CASES |= {"8k of 8k, window": Case(1, 8192, 8192, 96, WINDOW)}


def inputs(case: Case) -> tuple:
    """The op's arguments, random, with pages in random order and a gate."""
    tokens, pages = case.batch * case.new, case.batch * case.pages
    shape = (pages, KV_HEADS, PAGE_SIZE, DIM)
    caches = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    return (
        torch.randn(tokens, case.heads, DIM, device="cuda", dtype=torch.bfloat16),
        *caches,
        one,
        one,
        torch.randperm(pages, device="cuda", dtype=torch.int32).view(case.batch, -1),
        torch.full((case.batch,), case.length, device="cuda", dtype=torch.int32),
        torch.arange(case.batch + 1, device="cuda", dtype=torch.int32) * case.new,
        case.window,
        torch.randn(tokens, case.heads, device="cuda", dtype=torch.bfloat16),
    )


def work(case: Case) -> tuple[int, int]:
    """Bytes that must move and matrix FLOP: the keys and values that a query sees read once, q read, out written."""
    oldest = case.length - case.new  # position of the first query
    seen = torch.arange(oldest, case.length) + 1
    first = 0
    if case.window:
        seen, first = seen.clamp(max=case.window), max(0, oldest - case.window + 1)
    cache = 2 * case.batch * (case.length - first) * KV_HEADS * DIM
    rows = case.batch * case.heads
    return cache + 2 * 2 * rows * case.new * DIM, 4 * rows * DIM * int(seen.sum())


@functools.lru_cache(maxsize=1)
def _in_order(batch: int, length: int):
    """Endlessly, bf16 keys and values [batch, kv_heads, length, d], in turns of more bytes than an L2 cache holds."""
    shape = (2, batch, KV_HEADS, length, DIM)
    count = max(1, (256 << 20) // (2 * math.prod(shape)))
    return itertools.cycle([torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)])


def _sdpa(q, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, query_start, window, gate):
    """torch's attention over bf16 keys and values that lie in order: no pages, no gate.

    A prompt has no window (it would take a mask of all pairs), one behind cached tokens is not causal (3 % more).
    """
    batch, length = len(seq_lens), block_table.shape[1] * PAGE_SIZE
    new = len(q) // batch
    key, value = next(_in_order(batch, length))
    if new == 1 and window:
        key, value = key[:, :, -window:], value[:, :, -window:]
    query = q.view(batch, new, -1, DIM).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, is_causal=new == length, enable_gqa=True)


def contenders() -> dict:
    """The op first, then its peer."""
    return {"ours": sk.paged_attention, "sdpa of bf16": _sdpa}


def error(*arguments) -> float:
    """Relative error against float64, of a prompt's last 64 tokens."""
    q, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, query_start, window, gate = arguments
    out = sk.paged_attention(*arguments)
    kept = min(len(q), 64 * len(seq_lens))
    cache = (k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, query_start.clamp(max=kept))
    return relative_error(out[-kept:], sk.paged_attention.reference(q[-kept:].double(), *cache, window, gate[-kept:]))
