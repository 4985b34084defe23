"""paged_attention of many tokens with all products in FP8 (fp8_attention.py), where that was allowed:
csrc/sm90_paged_prefill_fp8.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import fp8_attention
from . import paged_prefill
from .paged_attention import has_many


def refuse(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, block_table: Tensor,
    seq_lens: Tensor, query_start: Tensor, window: int | None = None, gate: Tensor | None = None,
    softmax_scale: float | None = None,
) -> str | None:  # fmt: skip
    """Why the kernel does not take the op's arguments, or None."""
    if reason := fp8_attention.refuse():
        return reason
    if k_cache.dtype != torch.float8_e4m3fn:
        return f"takes float8_e4m3fn caches, got {str(k_cache.dtype).removeprefix('torch.')}"
    if window is not None:  # whose items are short: softmax, not products, takes their time
        return f"is no faster in a window, got {window}"
    if reason := paged_prefill.refuse(
        q, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, query_start, window, gate
    ):
        return reason
    if not has_many(q, k_cache.shape[1], len(seq_lens), window):
        return f"takes many tokens a request, got {len(q)} for {len(seq_lens)}"


def launch(q: Tensor, *arguments) -> Tensor:
    """As ops.paged_attention.fp8_reference, without the logarithms."""
    return paged_prefill.launch(q, *arguments, fp8=True)


def launch_lse(q: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """As ops.paged_attention.fp8_reference."""
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    return paged_prefill.launch(q, *arguments, lse=lse, fp8=True), lse
