"""Launcher of csrc/sm90_paged_prefill*.cu: many new tokens a request over a paged e4m3 or bf16 cache."""

from __future__ import annotations

import torch
from torch import Tensor

from . import paged_cache
from .driver import Kernel, multiprocessors
from .paged_cache import DIM, MOST_REQUESTS, NAMES, tensor_map

ROWS = 128  # (token, head) pairs of a block at a time
TILES = (128, 112)  # keys of a tile; the narrower one fits windows of 512
FP8 = "fp8"  # all products
MOST_WINDOW = 4096  # whose items are short and alike: blocks that share them would write more than they save
LEAST_BOX = 16  # positions of the smallest copy
_THREADS = 384
_SHARED_BYTES = 227 * 1024
# The tensor maps are one parameter, the last: the driver reads its 256 bytes from the first q's address.
_PARAMETERS = "PPPPPPPPPPPqqqqqiiiiiiiiiiif" + 32 * "q"
VARIANTS = {
    (dtype, variant): Kernel(
        "sm90_paged_prefill", f"sm90_paged_prefill_{name}_{variant}", _PARAMETERS, size, dependent=True
    )
    for dtype, name in NAMES.items()
    for variant, size in ((128, _SHARED_BYTES), (112, _SHARED_BYTES), ("split", _SHARED_BYTES), ("combine", 0))
}
VARIANTS |= {
    (FP8, variant): Kernel(
        "sm90_paged_prefill_fp8", f"sm90_paged_prefill_fp8_{variant}", _PARAMETERS, size, dependent=True
    )
    for variant, size in ((128, _SHARED_BYTES), ("split", _SHARED_BYTES), ("combine", 0))
}


def refuse(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, block_table: Tensor,
    seq_lens: Tensor, query_start: Tensor, window: int | None = None, gate: Tensor | None = None,
    softmax_scale: float | None = None,
) -> str | None:  # fmt: skip
    """Why the kernel does not take the op's arguments, or None."""
    if reason := paged_cache.refuse(q, k_cache, v_cache, gate):
        return reason
    if q.shape[0] * q.shape[1] >= 1 << 31:
        return f"takes fewer than 2^31 rows, got {q.shape[0]} tokens x {q.shape[1]} heads"


def launch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, block_table: Tensor,
    seq_lens: Tensor, query_start: Tensor, window: int | None = None, gate: Tensor | None = None,
    softmax_scale: float | None = None, lse: Tensor | None = None, fewest: int = 1, out: Tensor | None = None,
    variant: int | str | None = None, fp8: bool = False,
) -> Tensor:  # fmt: skip
    """As ops.paged_attention; `lse`, f32 [tokens, q_heads], takes the log of the scores' sum of exponentials.

    Rows of `out`, and of `lse`, that belong to requests of less than `fewest` new tokens stay as they are; padding
    behind the last request's gets zeros. `variant`, a tile's keys or "split", follows from shapes if not given. `fp8`:
    as ops.paged_attention.fp8_reference, over e4m3 caches.
    """
    heads = q.shape[1]
    kv_heads, page_size = k_cache.shape[1:3]
    group, requests = heads // max(1, kv_heads), len(seq_lens)
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if out.numel() == 0:
        return out
    if requests == 0 or k_cache.shape[0] == 0:
        if lse is not None:
            lse.fill_(-torch.inf)
        return out.zero_()
    q = q if _loads_by_16_bytes(q) else q.clone(memory_format=torch.contiguous_format)
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    seq_lens, query_start = seq_lens.contiguous(), query_start.contiguous()
    blocks = multiprocessors(q.device.index)
    shared = shares_items(len(q), requests, group, kv_heads, window, blocks)
    variant = variant or ("split" if shared else max(TILES) if fp8 else tile_keys(group, window))
    partial = q.new_empty((2 * blocks, ROWS, DIM + 4), dtype=torch.float32) if variant == "split" else 0
    # A window's first tile begins where a box does: small boxes waste fewest keys. 112 is no multiple of larger ones.
    box = min(page_size, max(TILES)) if window is None and variant != min(TILES) else LEAST_BOX
    # What ldmatrix transposes is swizzled too: eight rows of 128 bytes at a time would all be in the same banks.
    maps = (*tensor_map(k_cache, box), *tensor_map(v_cache, box, fp8 or v_cache.itemsize == 2))
    scale = (DIM**-0.5 if softmax_scale is None else softmax_scale) * 1.4426950408889634  # exp2 is cheaper
    scale_strides = [s.stride(0) if s.dim() else 0 for s in (k_scale, v_scale)]
    strides = (*q.stride()[:2], block_table.stride(0), *((0, 0) if gate is None else gate.stride()), *scale_strides)
    for first in range(0, requests, MOST_REQUESTS):
        last = min(first + MOST_REQUESTS, requests)
        arguments = (
            q, k_scale, v_scale, block_table[first:], seq_lens[first:], query_start[first:],
            0 if gate is None else gate, out, 0 if lse is None else lse, counter(q.device), partial, *strides,
            last - first, fewest, q.shape[0] if last == requests else -1, kv_heads, group, page_size.bit_length() - 1,
            box.bit_length() - 1, min(window or 1 << 30, 1 << 30), blocks, scale, *maps,
        )  # fmt: skip
        kind = FP8 if fp8 else k_cache.dtype
        VARIANTS[kind, variant].launch((blocks, 1, 1), _THREADS, *arguments)
        if variant == "split":
            grid = -(-q.shape[0] * heads // (_THREADS // 32))  # a warp for a row
            VARIANTS[kind, "combine"].launch((grid, 1, 1), _THREADS, *arguments)
    return out


def shares_items(tokens: int, requests: int, group: int, kv_heads: int, window: int | None, blocks: int) -> bool:
    """Whether blocks share items' keys: items may differ much in length, or be too few to keep all blocks busy."""
    if requests > MOST_REQUESTS or (window is not None and window <= MOST_WINDOW):
        return False
    return tokens * group <= requests * ROWS or (tokens * group // ROWS + requests) * kv_heads <= 2 * blocks


def tile_keys(group: int, window: int | None) -> int:
    """The tile that covers a window and a block's tokens with fewest keys, the wide one where both do."""
    if window is None:
        return max(TILES)
    span = window + -(-ROWS // group) + LEAST_BOX - 1
    return min(TILES, key=lambda keys: -(-span // keys) * keys)


def counter(device: torch.device) -> Tensor:
    """i32 of this stream's own, zero; a kernel that counts in the first leaves it so."""
    return paged_cache.buffer(device, 32, 0)


def _loads_by_16_bytes(q: Tensor) -> bool:
    return q.stride(2) == 1 and q.stride(0) % 8 == 0 and q.stride(1) % 8 == 0 and q.data_ptr() % 16 == 0
