"""Launcher of csrc/sm90_paged_attention*.cu: a few new tokens a request over a paged e4m3 or bf16 cache.

Many tokens go to the launcher of the kernels for those, paged_prefill.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import paged_cache, paged_prefill
from .driver import Kernel, multiprocessors
from .paged_cache import DIM, MOST_REQUESTS, NAMES, tensor_map

TILE = 64  # keys
# Queries of a request and kv head that kernels for few take: in a window, or where all requests may have as many, over
# e4m3; where some have more than others, or over bf16.
MOST_COLUMNS, MOST_OTHER_COLUMNS = 32, 16
# In a window blocks side by side take more queries than columns, while they are few: 128 (8 requests of 4 tokens x 12
# heads) take 10.5 us and paged_prefill.py's 13.7, 192 (of 5 tokens) 16.7 and 13.9.
MOST_WINDOW_COLUMNS, FEW_BLOCKS = 64, 128
THREADS = {8: 512, 16: 512, 32: 384}  # by the columns: the queries (tokens x heads of a group) of a row
LEAST_TILES = 1  # of a block's share
_SHARED_BYTES = 227 * 1024
_ABSENT = -1  # no sum has these bits
# The tensor maps are one parameter, the last: the driver reads its 256 bytes from the first q's address.
_PARAMETERS = "PPPPPPPPPPqqqqqiiiiiiiiiif" + 32 * "q"
VARIANTS = {
    (dtype, columns): Kernel(
        "sm90_paged_attention", f"sm90_paged_attention_{name}_{columns}", _PARAMETERS, _SHARED_BYTES, dependent=True
    )
    for dtype, name in NAMES.items()
    for columns in THREADS
}
# For rows of few tiles: blocks that share one -> tiles of each at most; -> blocks that a multiprocessor holds.
CLUSTERS = {1: 16, 2: 5, 4: 3, 8: 2}
_RESIDENT = {2: 3, 4: 4, 8: 4}
WARPGROUPS = (1, 2)  # of a block that has a row for itself; a multiprocessor holds four of them
_WINDOW_THREADS = 160
_ROWS_BOX = 16  # positions of a copy where a block has a row for itself: none beyond the window but these
_WINDOW_PARAMETERS = "PPPPPPPPPiiiiqiiiiiiiiiiiif" + 32 * "q"


def _window_bytes(columns: int, tiles: int) -> int:
    """Shared memory: Shape::kBytes of the source, and 1024 to align. 48 KB or less would get another carveout."""
    sums = tiles * 2 * columns * TILE + columns * (4 * DIM + 48)
    keys_and_q = tiles * TILE * DIM + 2 * columns * DIM
    early = 3 if columns <= 16 and tiles == 5 else tiles
    size = -(-max(sums, keys_and_q) // 1024) * 1024 + early * TILE * DIM + columns * 24 + (2 * tiles + 1) * 8 + 1024
    return max(size, 48 * 1024 + 128)


def _rows_bytes(columns: int, warpgroups: int) -> int:
    """Shared memory: Stream::kBytes of the source, and 1024 to align."""
    places = 5 if columns == 32 or (columns, warpgroups) == (16, 1) else 6
    ring_and_p = places * (TILE * DIM + 8) + (4 if columns <= 16 else 2) * columns * TILE + columns * 16
    return warpgroups * ring_and_p + 2 * columns * DIM + columns * 8 + 1024


WINDOW_VARIANTS = {
    (columns, cluster): Kernel(
        "sm90_paged_attention_window", f"sm90_paged_attention_window_{columns}_{cluster}", _WINDOW_PARAMETERS,
        _window_bytes(columns, tiles), dependent=True,
    )
    for columns in THREADS
    for cluster, tiles in CLUSTERS.items()
    if cluster > 1
}  # fmt: skip
ROW_VARIANTS = {
    (columns, warpgroups): Kernel(
        "sm90_paged_attention_window", f"sm90_paged_attention_window_rows_{columns}_{warpgroups}", _WINDOW_PARAMETERS,
        _rows_bytes(columns, warpgroups), dependent=True,
    )
    for columns in THREADS
    for warpgroups in WARPGROUPS
}  # fmt: skip


def refuse(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, block_table: Tensor,
    seq_lens: Tensor, query_start: Tensor, window: int | None = None, gate: Tensor | None = None,
    softmax_scale: float | None = None,
) -> str | None:  # fmt: skip
    """Why the kernel does not take the op's arguments, or None."""
    if reason := paged_prefill.refuse(
        q, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, query_start, window, gate
    ):
        return reason
    kv_heads, page_size = k_cache.shape[1:3]
    tiles = -(-block_table.shape[1] * page_size // TILE)
    if not has_many(q, kv_heads, len(seq_lens), window, k_cache.dtype) and q.shape[0] * kv_heads * tiles >= 1 << 31:
        return f"takes fewer than 2^31 tiles, got {q.shape[0]} tokens x {kv_heads} heads x {tiles}"


def launch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, block_table: Tensor,
    seq_lens: Tensor, query_start: Tensor, window: int | None = None, gate: Tensor | None = None,
    softmax_scale: float | None = None, lse: Tensor | None = None, columns: int | None = None,
    least_tiles: int = LEAST_TILES, cluster: int | None = None, ahead: int | None = None,
    warpgroups: int | None = None,
) -> Tensor:  # fmt: skip
    """As ops.paged_attention; `lse`, f32 [tokens, q_heads], takes the log of the scores' sum of exponentials.

    What is not given follows from shapes: `columns`, the queries that share a reading of the cache; `cluster`, the
    blocks that share a row where its keys are few, or 0 for the kernel that takes any; `least_tiles` of a block of
    the latter; `ahead`, by how many requests clusters have L2 read ahead, 0 for not; `warpgroups` of a block that
    has rows for itself (`cluster` is 1).
    """
    tokens, heads, _ = q.shape
    kv_heads, page_size = k_cache.shape[1:3]
    group, requests = heads // max(1, kv_heads), len(seq_lens)
    if columns is None and cluster is None and has_many(q, kv_heads, requests, window, k_cache.dtype):
        return paged_prefill.launch(
            q, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, query_start, window, gate, softmax_scale, lse
        )
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    if requests == 0 or k_cache.shape[0] == 0:
        if lse is not None:
            lse.fill_(-torch.inf)
        return out.zero_()
    q = q if _loads_by_8_bytes(q) else q.clone(memory_format=torch.contiguous_format)
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    seq_lens, query_start = seq_lens.contiguous(), query_start.contiguous()
    columns = columns or variant(group, -(-tokens // requests))
    maps = (*tensor_map(k_cache, min(page_size, TILE)), *tensor_map(v_cache, min(page_size, TILE)))
    scale = (DIM**-0.5 if softmax_scale is None else softmax_scale) * 1.4426950408889634  # exp2 is cheaper
    scale_strides = [s.stride(0) if s.dim() else 0 for s in (k_scale, v_scale)]
    strides = (*q.stride()[:2], block_table.stride(0), *((0, 0) if gate is None else gate.stride()), *scale_strides)
    blocks = multiprocessors(q.device.index)
    chunks = -(-tokens // (requests * (columns // group)))  # of a request's tokens, if they are alike
    if cluster is None:
        tiles = most_tiles(window, columns // group, block_table.shape[1] * page_size)
        cluster = 0
        if k_cache.dtype == torch.float8_e4m3fn and requests < 65536 and (tokens <= requests or tokens % requests == 0):
            cluster = cluster_size(requests * chunks * kv_heads, tiles, blocks)
    if cluster:
        beside = cluster * chunks * kv_heads  # blocks of a request
        box = min(page_size, TILE if cluster > 1 else _ROWS_BOX)
        if cluster > 1:
            kernel, threads, resident = WINDOW_VARIANTS[columns, cluster], _WINDOW_THREADS, _RESIDENT[cluster]
        else:
            warpgroups = warpgroups or warpgroups_for(requests * chunks * kv_heads, blocks)
            kernel, threads, resident = ROW_VARIANTS[columns, warpgroups], 128 * warpgroups, 4 // warpgroups
            maps = (*tensor_map(k_cache, box), *tensor_map(v_cache, box))
        kernel.launch(
            (kv_heads * cluster, requests, chunks), threads, q, k_scale, v_scale, block_table, seq_lens, query_start,
            0 if gate is None else gate, out, 0 if lse is None else lse, *strides[:2], *strides[3:5],
            strides[2], *scale_strides, requests, tokens, kv_heads, group,
            -(-65536 // group), columns // group, page_size.bit_length() - 1, box.bit_length() - 1,
            min(window or 1 << 30, 1 << 30), -(-blocks * resident // beside) if ahead is None else ahead, scale,
            *maps,
        )  # fmt: skip
        return out
    for first in range(0, requests, MOST_REQUESTS):
        last = min(first + MOST_REQUESTS, requests)
        VARIANTS[k_cache.dtype, columns].launch(
            (blocks, 1, 1), THREADS[columns], q, k_scale, v_scale, block_table[first:], seq_lens[first:],
            query_start[first:], 0 if gate is None else gate, out, 0 if lse is None else lse,
            partials(q.device, columns), *strides, last - first, tokens if last == requests else -1, kv_heads, group,
            columns // group, page_size.bit_length() - 1, min(window or 1 << 30, 1 << 30), least_tiles, scale, *maps,
        )  # fmt: skip
    return out


def launch_lse(q: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """As ops.paged_attention_lse."""
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    return launch(q, *arguments, *(None,) * (10 - len(arguments)), lse=lse), lse


def has_many(
    q: Tensor, kv_heads: int, requests: int, window: int | None, cache: torch.dtype = torch.float8_e4m3fn
) -> bool:
    """Whether there are so many queries for each request and kv head that paged_prefill.py serves them."""
    group = q.shape[1] // max(1, kv_heads)
    may_be_alike = cache == torch.float8_e4m3fn and len(q) % max(1, requests) == 0
    most = MOST_COLUMNS if window is not None or may_be_alike else MOST_OTHER_COLUMNS
    together = max(1, MOST_COLUMNS // max(1, group))  # tokens of a block
    blocks = requests * kv_heads * -(-len(q) // (together * max(1, requests)))
    if window is not None and may_be_alike and blocks <= FEW_BLOCKS:
        tiles = most_tiles(window, together, 1 << 30)
        most = MOST_WINDOW_COLUMNS if cluster_size(1, tiles, 1) else most
    return group > 16 or len(q) * group > requests * most


def variant(group: int, tokens: int) -> int:
    """The smallest variant that reads the cache once for `tokens` tokens of a request, or the largest."""
    return next((columns for columns in THREADS if columns >= group * tokens), max(THREADS))


def most_tiles(window: int | None, tokens: int, keys: int) -> int:
    """Tiles that the keys of `tokens` neighbours can touch, in a table of `keys`."""
    tiles = -(-keys // TILE)
    return tiles if window is None else min(tiles, (window + tokens - 1 + TILE - 2) // TILE + 1)


def cluster_size(rows: int, tiles: int, multiprocessors: int) -> int:
    """Blocks to share a row of up to `tiles`: as many as multiprocessors hold one of; 0: no kernel takes so many."""
    fitting = [size for size, most in CLUSTERS.items() if tiles <= size * most]
    return max((size for size in fitting if rows * size <= multiprocessors), default=min(fitting, default=0))


def warpgroups_for(rows: int, multiprocessors: int) -> int:
    """Of a block that has a row for itself: so many that half of what fits is used and the next launch can start."""
    return max((size for size in WARPGROUPS if rows * size <= 2 * multiprocessors), default=1)


def partials(device: torch.device, columns: int) -> Tensor:
    """i32 [blocks * columns * 132] of this stream's own, absent; a kernel that keeps sums there leaves it so."""
    return paged_cache.buffer(device, multiprocessors(device.index) * columns * (DIM + 4), _ABSENT)


def _loads_by_8_bytes(q: Tensor) -> bool:
    return q.stride(2) == 1 and q.stride(0) % 4 == 0 and q.stride(1) % 4 == 0 and q.data_ptr() % 8 == 0
