"""Causal attention of new tokens over a paged KV cache: decode, prefill and mixtures in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import fp8_attention
from ..registry import Kernel, define, expect, lazy
from .kv_append import CACHE_DTYPES
from .swiglu import FLOATS


def _check(
    q,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    block_table,
    seq_lens,
    query_start,
    window=None,
    gate=None,
    softmax_scale=None,
):
    expect("q", q, (None, None, None), FLOATS)
    tokens, heads, dim = q.shape
    expect("k_cache", k_cache, (None, None, None, dim), CACHE_DTYPES)
    expect("v_cache", v_cache, tuple(k_cache.shape), k_cache.dtype)
    kv_heads = k_cache.shape[1]
    if heads % kv_heads:
        raise ValueError(f"q: got {heads} heads, wanted a multiple of the cache's {kv_heads}")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        expect(name, scale, () if scale.dim() == 0 else (kv_heads,), torch.float32)
    expect("block_table", block_table, (None, None), torch.int32)
    requests = block_table.shape[0]
    expect("seq_lens", seq_lens, (requests,), torch.int32)
    expect("query_start", query_start, (requests + 1,), torch.int32)
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}, wanted at least 1 (a token sees itself), or None")
    if gate is not None:
        expect("gate", gate, (tokens, heads), FLOATS)


def _fake(q, *args):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _triton_refuses(q, k_cache, v_cache, k_scale, v_scale, table, seq_lens, start, window=None, gate=None, *_):
    for name, tensor in (("q", q), ("gate", gate)):
        if tensor is not None and tensor.dtype == torch.float64:
            return f"takes {name} in bfloat16, float16 or float32, got float64"
    if not 1 <= q.shape[2] <= 256:
        return f"takes 1 to 256 values a head, got {q.shape[2]}"
    group = q.shape[1] // k_cache.shape[1]
    if group > 32:
        return f"takes up to 32 query heads a kv head, got {group}"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(3) != 1:
            return f"takes caches whose last dimension has stride 1, got {cache.stride(3)} in {name}"


def _fake_lse(q, *args):
    return _fake(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


_FLASHINFER, _FP8 = "flashinfer.paged_attention", "cuda.paged_prefill_fp8"
_KERNELS = (
    Kernel("cuda-fp8", lazy(f"{_FP8}.launch"), (90, 90), "cuda.bindings", lazy(f"{_FP8}.refuse")),
    Kernel("cuda", lazy("cuda.paged_attention.launch"), (90, 90), "cuda.bindings", lazy("cuda.paged_attention.refuse")),
    Kernel("flashinfer", lazy(f"{_FLASHINFER}.launch"), (100, 103), "flashinfer", lazy(f"{_FLASHINFER}.refuse")),
    Kernel("triton", lazy("triton.paged_attention.launch"), package="triton", refuse=_triton_refuses),
)

_KERNELS_LSE = (
    Kernel("cuda-fp8", lazy(f"{_FP8}.launch_lse"), (90, 90), "cuda.bindings", lazy(f"{_FP8}.refuse")),
    Kernel(
        "cuda", lazy("cuda.paged_attention.launch_lse"), (90, 90), "cuda.bindings", lazy("cuda.paged_attention.refuse")
    ),
)


@define(check=_check, fake=_fake, kernels=_KERNELS)
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    window: int | None = None,
    gate: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """q [tokens, q_heads, d] over caches [pages, kv_heads, page_size, d] -> [tokens, q_heads, d] of q's dtype.

    Request r owns the q rows query_start[r] to query_start[r + 1] (i32 [requests + 1]), the last of its
    seq_lens[r] tokens (i32, the new ones included, already in the cache); position p lies in page
    block_table[r, p // page_size] (i32 [requests, pages]). A query at position p sees keys j <= p and, with a
    window, p - j < window; other pages are never read, their entries may be -1. Query head h uses kv head
    h // (q_heads / kv_heads). e4m3 caches are multiplied by k_scale, v_scale (f32 [] or [kv_heads]). softmax
    in f32, times `softmax_scale` (d ** -0.5); the output times sigmoid(gate) where gate [tokens, q_heads] is
    given. A query that sees no key gives zeros.
    """
    return _attend(
        q, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, query_start, window, gate, softmax_scale
    )[0]


@define(check=_check, fake=_fake_lse, kernels=_KERNELS_LSE)
def paged_attention_lse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    window: int | None = None,
    gate: Tensor | None = None,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """paged_attention, and f32 [tokens, q_heads] (f64 for a float64 q): the log of the sum of exponentials of a query's
    scaled scores, by which parts of the keys that were attended to apart are joined; -inf where it sees no key.
    """
    return _attend(
        q, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, query_start, window, gate, softmax_scale
    )


def fp8_reference(
    q, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, query_start,
    window=None, gate=None, softmax_scale=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The reference of kernels in FP8 (fp8_attention.py): paged_attention_lse of rounded queries and probabilities."""
    rounded = fp8_attention.round_queries(q).to(q.dtype)  # exact: 4 of bf16's 8 bits
    return _attend(
        rounded, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, query_start, window, gate, softmax_scale,
        fp8_attention.weigh,
    )  # fmt: skip


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    return scores.softmax(-1), scores.logsumexp(-1)


def _attend(
    q, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, query_start, window, gate, softmax_scale,
    softmax=_softmax,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    compute = torch.promote_types(q.dtype, torch.float32)
    _, heads, dim = q.shape
    kv_heads, page_size = k_cache.shape[1:3]
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros(q.shape, dtype=compute, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=compute, device=q.device)
    bounds = query_start.tolist()
    for request, length in enumerate(seq_lens.tolist()):
        begin, end = bounds[request : request + 2]
        if begin == end:
            continue
        first = 0 if window is None else max(0, length - (end - begin) - window + 1)
        position = torch.arange(first, length, device=q.device)  # of the keys
        page = block_table[request, position // page_size].long()
        keys, values = (
            # [kv_heads, keys, d]
            (cache[page, :, position % page_size].to(compute) * s.to(compute).reshape(-1, 1)).transpose(0, 1)
            if cache.dtype == torch.float8_e4m3fn
            else cache[page, :, position % page_size].to(compute).transpose(0, 1)
            for cache, s in ((k_cache, k_scale), (v_cache, v_scale))
        )
        query = q[begin:end].to(compute).unflatten(1, (kv_heads, heads // kv_heads))
        scores = torch.einsum("tgnd,gkd->gntk", query, keys) * scale
        behind = torch.arange(length - (end - begin), length, device=q.device)[:, None] - position
        hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
        scores = scores.masked_fill(hidden, -torch.inf)
        weights, sums = softmax(scores)
        lse[begin:end] = sums.permute(2, 0, 1).flatten(1)
        weights = weights.masked_fill(hidden.all(-1, keepdim=True), 0.0)  # softmax of no key is NaN
        out[begin:end] = torch.einsum("gntk,gkd->tgnd", weights, values).flatten(1, 2)
    if gate is not None:
        out = out * gate.to(compute).sigmoid()[..., None]
    return out.to(q.dtype), lse
