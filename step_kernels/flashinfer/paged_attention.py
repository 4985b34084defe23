"""Decode attention over a BF16 or FP8 cache by FlashInfer's trtllm-gen kernels (sm_100, sm_103)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import refuse as refuse_version

PAGE_SIZES = (16, 32, 64)


def refuse(
    q, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, query_start, window=None, gate=None,
    softmax_scale=None,
) -> str | None:  # fmt: skip
    """bf16 queries of decode, heads of 128, groups up to 16, pages of 16 to 64, one scale a cache."""
    tokens, heads, dim = q.shape
    kv_heads, page_size = k_cache.shape[1:3]
    if q.dtype != torch.bfloat16 or k_cache.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        names = " and ".join(str(t.dtype).removeprefix("torch.") for t in (q, k_cache))
        return f"takes bfloat16 queries and a bfloat16 or float8_e4m3fn cache, got {names}"
    if not 0 < tokens <= block_table.shape[0]:
        return f"serves decode: 1 to {block_table.shape[0]} tokens (requests), got {tokens}"
    if dim != 128:
        return f"takes heads of 128, got {dim}"
    if heads // kv_heads > 16:
        return f"takes up to 16 query heads a kv head, got {heads // kv_heads}"
    if page_size not in PAGE_SIZES or not block_table.shape[1]:
        return f"takes pages of 16, 32 or 64 tokens, got {page_size}, {block_table.shape[1]} a request"
    if k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        return "takes caches whose last dimension is contiguous"
    if k_cache.dtype == torch.float8_e4m3fn and (k_scale.numel() != 1 or v_scale.numel() != 1):
        return "takes one k_scale and one v_scale, got one a head"
    return refuse_version()


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    """128 MiB, zero when first used; the kernels leave their counters at zero."""
    return torch.zeros(128 << 20, dtype=torch.uint8, device=device)


def launch(
    q, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, query_start, window=None, gate=None,
    softmax_scale=None,
) -> Tensor:  # fmt: skip
    """paged_attention's arguments -> [tokens, q_heads, d]."""
    from flashinfer.decode import trtllm_batch_decode_with_kv_cache

    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    quantized = k_cache.dtype == torch.float8_e4m3fn
    out = trtllm_batch_decode_with_kv_cache(
        q.contiguous(),
        (k_cache, v_cache),
        _workspace(q.device),
        block_table.clamp(min=0),  # an entry that nobody may read can be -1, but kernels load whole tiles
        seq_lens,
        max_seq_len=block_table.shape[1] * k_cache.shape[2],
        bmm1_scale=(k_scale * scale).view(1) if quantized else scale,
        bmm2_scale=v_scale.view(1) if quantized else 1.0,
        window_left=-1 if window is None else window - 1,
        backend="trtllm-gen",
        q_len_per_req=None,
        max_q_len=q.shape[0],  # how the tokens spread over the requests is known on the device alone
        cum_seq_lens_q=query_start,
    )
    return out if gate is None else (out.float() * gate.float().sigmoid()[..., None]).to(q.dtype)
