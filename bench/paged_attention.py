"""Attention over an e4m3 cache at the sizes of Step-3.7-Flash: 64 heads in full layers, 96 in those of 512 keys."""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

import step_kernels as sk
from step_kernels.cuda import paged_attention, paged_prefill
from step_kernels.testing import relative_error

KV_HEADS, DIM, PAGE_SIZE, WINDOW = 8, 128, 64, 512


class Case(NamedTuple):
    """Requests of `new` tokens each, at the end of `lengths`."""

    lengths: tuple[int, ...]
    new: int
    heads: int
    window: int | None = None


def _pages(length: int) -> int:
    return -(-length // PAGE_SIZE)


K = 1024
DECODE = [(1, 8), (1, 32), (1, 128), (1, 256), (16, 8), (16, 32), (64, 8)]
CASES = {f"{b} at {n}k, {h}h": Case(b * (n * K,), 1, h) for h in (64, 96) for b, n in DECODE}
CASES |= {"63 at 2k, 1 at 256k": Case(63 * (2 * K,) + (256 * K,), 1, 64)}
# One page more than the window: a longer cache would make for fewer copies, whose windows all fit into L2.
CASES |= {f"{b} at 576, window": Case(b * (WINDOW + PAGE_SIZE,), 1, 96, WINDOW) for b in (1, 16, 64)}
DRAFTS = [(1, 4, 128), (1, 8, 128), (16, 2, 8), (16, 4, 8), (16, 8, 8)]
CASES |= {f"{b} x {m} of {n}k, 64h": Case(b * (n * K,), m, 64) for b, m, n in DRAFTS}
CASES |= {f"{b} x 4 of 576, window": Case(b * (WINDOW + PAGE_SIZE,), 4, 96, WINDOW) for b in (1, 16)}
CASES |= {f"{m}k of {n}k, 64h": Case((n * K,), m * K, 64) for m, n in ((8, 8), (2, 32), (2, 128))}
CASES |= {"8k of 8k, window": Case((8 * K,), 8 * K, 96, WINDOW)}


def inputs(case: Case) -> tuple:
    """The op's arguments, random, with pages in random order and a gate."""
    counts = [_pages(length) for length in case.lengths]
    requests, tokens = len(counts), len(counts) * case.new
    shape = (sum(counts), KV_HEADS, PAGE_SIZE, DIM)
    caches = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn) for _ in range(2))
    order = torch.randperm(sum(counts), dtype=torch.int32).split(counts)
    one = torch.ones((), device="cuda")
    return (
        torch.randn(tokens, case.heads, DIM, device="cuda", dtype=torch.bfloat16),
        *caches,
        one,
        one,
        torch.nn.utils.rnn.pad_sequence(order, batch_first=True, padding_value=-1).cuda(),
        torch.tensor(case.lengths, device="cuda", dtype=torch.int32),
        torch.arange(requests + 1, device="cuda", dtype=torch.int32) * case.new,
        case.window,
        torch.randn(tokens, case.heads, device="cuda", dtype=torch.bfloat16),
    )


def work(case: Case) -> tuple[int, int]:
    """Bytes that must move and matrix FLOP: the keys and values that a query sees read once, q read, out written."""
    read = pairs = 0
    for length in case.lengths:
        oldest = length - case.new  # position of the first query
        seen, first = torch.arange(oldest, length) + 1, 0
        if case.window:
            seen, first = seen.clamp(max=case.window), max(0, oldest - case.window + 1)
        read += length - first
        pairs += int(seen.sum())
    rows = len(case.lengths) * case.new * case.heads
    return 2 * read * KV_HEADS * DIM + 2 * 2 * rows * DIM, 4 * DIM * case.heads * pairs


@functools.lru_cache(maxsize=1)
def _in_order(batch: int, length: int):
    """Endlessly, bf16 keys and values [batch, kv_heads, length, d], in turns of more bytes than an L2 cache holds."""
    shape = (2, batch, KV_HEADS, length, DIM)
    count = max(1, (256 << 20) // (2 * math.prod(shape)))
    return itertools.cycle([torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)])


def _sdpa(q, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, query_start, window, gate):
    """torch's attention over bf16 keys and values that lie in order: no pages, no gate, requests of one length.

    A prompt has no window (it would take a mask of all pairs), one behind cached tokens is not causal (3 % more).
    """
    batch, length = len(seq_lens), block_table.shape[1] * PAGE_SIZE
    if len(k_cache) != block_table.numel():
        raise ValueError(f"takes requests of one length, got {len(k_cache)} pages for {batch} of up to {length} tokens")
    new = len(q) // batch
    key, value = next(_in_order(batch, length))
    if new == 1 and window:
        key, value = key[:, :, -window:], value[:, :, -window:]
    query = q.view(batch, new, -1, DIM).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, is_causal=new == length, enable_gqa=True)


def contenders() -> dict:
    """The op first, then its peer."""
    return {"ours": sk.paged_attention, "sdpa of bf16": _sdpa}


def peers(case: Case, *arguments) -> dict:
    """The op as STEP_KERNELS_FP8_ATTENTION=1 has it, with all products in FP8, for many tokens that see all."""
    if case.window or not paged_attention.has_many(arguments[0], KV_HEADS, len(case.lengths), case.window):
        return {}
    return {"all in FP8": lambda: (functools.partial(paged_prefill.launch, fp8=True), arguments)}


def error(*arguments) -> float:
    """Relative error against float64, of a prompt's last 64 tokens."""
    q, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, query_start, window, gate = arguments
    out = sk.paged_attention(*arguments)
    kept = min(len(q), 64 * len(seq_lens))
    cache = (k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, query_start.clamp(max=kept))
    return relative_error(out[-kept:], sk.paged_attention.reference(q[-kept:].double(), *cache, window, gate[-kept:]))
