"""Launcher of csrc/sm90_paged_attention.cu: a few new tokens a request over a paged e4m3 or bf16 cache."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from .driver import Kernel

DIM, TILE = 128, 64  # values of a head; keys of a tile
THREADS = {8: 512, 16: 512, 32: 384, 64: 384}  # by the columns: the queries (tokens x heads of a group) of a row
MOST_REQUESTS = 256  # of a launch
LEAST_TILES = 1  # of a block's share
_SHARED_BYTES = 227 * 1024
_STREAMS = 16  # that may compute at a time without sharing partial sums
_ABSENT = -1  # no sum has these bits
# The tensor maps are one parameter, the last: the driver reads its 256 bytes from the first q's address.
_PARAMETERS = "PPPPPPPPPPqqqqqiiiiiiiiiif" + 32 * "q"
_NAMES = {torch.float8_e4m3fn: "e4m3", torch.bfloat16: "bf16"}
VARIANTS = {
    (dtype, columns): Kernel(
        "sm90_paged_attention", f"sm90_paged_attention_{name}_{columns}", _PARAMETERS, _SHARED_BYTES, dependent=True
    )
    for dtype, name in _NAMES.items()
    for columns in THREADS
}


def refuse(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, block_table: Tensor,
    seq_lens: Tensor, query_start: Tensor, window: int | None = None, gate: Tensor | None = None,
    softmax_scale: float | None = None,
) -> str | None:  # fmt: skip
    """Why the kernel does not take the op's arguments, or None."""
    for name, tensor in (("q", q), ("gate", gate)):
        if tensor is not None and tensor.dtype != torch.bfloat16:
            return f"takes {name} in bfloat16, got {str(tensor.dtype).removeprefix('torch.')}"
    if k_cache.dtype not in _NAMES:
        return f"takes float8_e4m3fn and bfloat16 caches, got {str(k_cache.dtype).removeprefix('torch.')}"
    if q.shape[2] != DIM:
        return f"takes {DIM} values a head, got {q.shape[2]}"
    kv_heads, page_size = k_cache.shape[1:3]
    group = q.shape[1] // kv_heads
    if group > 16:
        return f"takes up to 16 query heads a kv head, got {group}"
    if q.shape[0] * group > len(seq_lens) * max(THREADS):
        return f"takes up to {max(THREADS) // group} tokens a request, got {q.shape[0]} for {len(seq_lens)} requests"
    if page_size < 16 or page_size & (page_size - 1):
        return f"takes pages of a power of two from 16 on, got {page_size}"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        apart = [stride * cache.itemsize for stride in cache.stride()[:3]]
        if cache.stride(3) != 1 or any(size % 16 for size in apart) or cache.data_ptr() % 16:
            return f"takes caches whose rows lie whole at multiples of 16 bytes, got strides {cache.stride()} in {name}"
    tiles = -(-block_table.shape[1] * page_size // TILE)
    if q.shape[0] * kv_heads * tiles >= 1 << 31:
        return f"takes fewer than 2^31 tiles, got {q.shape[0]} tokens x {kv_heads} heads x {tiles}"


def launch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, block_table: Tensor,
    seq_lens: Tensor, query_start: Tensor, window: int | None = None, gate: Tensor | None = None,
    softmax_scale: float | None = None, lse: Tensor | None = None, columns: int | None = None,
    least_tiles: int = LEAST_TILES,
) -> Tensor:  # fmt: skip
    """As ops.paged_attention; `lse`, f32 [tokens, q_heads], takes the log of the scores' sum of exponentials.

    `columns`, the queries that share a reading of the cache, and `least_tiles` follow from shapes if not given.
    """
    tokens, heads, _ = q.shape
    kv_heads, page_size = k_cache.shape[1:3]
    group, requests = heads // max(1, kv_heads), len(seq_lens)
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
    maps = (*_tensor_map(*_shape(k_cache)), *_tensor_map(*_shape(v_cache)))
    scale = (DIM**-0.5 if softmax_scale is None else softmax_scale) * 1.4426950408889634  # exp2 is cheaper
    scale_strides = [s.stride(0) if s.dim() else 0 for s in (k_scale, v_scale)]
    strides = (*q.stride()[:2], block_table.stride(0), *((0, 0) if gate is None else gate.stride()), *scale_strides)
    blocks = _multiprocessors(q.device.index)
    for first in range(0, requests, MOST_REQUESTS):
        last = min(first + MOST_REQUESTS, requests)
        VARIANTS[k_cache.dtype, columns].launch(
            (blocks, 1, 1), THREADS[columns], q, k_scale, v_scale, block_table[first:], seq_lens[first:],
            query_start[first:], 0 if gate is None else gate, out, 0 if lse is None else lse,
            partials(q.device, columns), *strides, last - first, tokens if last == requests else -1, kv_heads, group,
            columns // group, page_size.bit_length() - 1, min(window or 1 << 30, 1 << 30), least_tiles, scale, *maps,
        )  # fmt: skip
    return out


def variant(group: int, tokens: int) -> int:
    """The smallest variant that reads the cache once for `tokens` tokens of a request, or the largest."""
    return next((columns for columns in THREADS if columns >= group * tokens), max(THREADS))


def partials(device: torch.device, columns: int) -> Tensor:
    """i32 [blocks, columns * 132] of this stream's own, absent; a kernel that keeps sums there leaves it so."""
    pool, taken = _pool(device.index, columns)
    stream = torch.cuda.current_stream(device).cuda_stream
    return pool[taken.setdefault(stream, len(taken) % _STREAMS)]


@functools.cache
def _pool(device: int, columns: int) -> tuple[Tensor, dict[int, int]]:
    """Made before any stream uses it: a graph's capture must not be the first, or its filling would come at replay."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("paged_attention: call it on this GPU, with as many tokens, before capturing a CUDA graph")
    shape = (_STREAMS, _multiprocessors(device) * columns * (DIM + 4))
    pool = torch.full(shape, _ABSENT, dtype=torch.int32, device=f"cuda:{device}")
    torch.cuda.synchronize(device)
    return pool, {}


def _loads_by_8_bytes(q: Tensor) -> bool:
    return q.stride(2) == 1 and q.stride(0) % 4 == 0 and q.stride(1) % 4 == 0 and q.data_ptr() % 8 == 0


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _shape(cache: Tensor) -> tuple:
    return cache.data_ptr(), tuple(cache.shape), tuple(cache.stride()), cache.itemsize


@functools.lru_cache(1024)
def _tensor_map(data: int, shape: tuple[int, ...], stride: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """How the copy engine goes through [pages, kv_heads, page_size, 128] of bytes or bf16: boxes 128 bytes wide."""
    buffer = (ctypes.c_uint64 * 24)()
    address = -(-ctypes.addressof(buffer) // 64) * 64  # the driver takes maps at multiples of 64 bytes alone
    sizes, strides = (
        (ctypes.c_uint64 * 4)(*reversed(shape)),
        (ctypes.c_uint64 * 3)(*(itemsize * n for n in reversed(stride[:3]))),
    )
    box, steps = (ctypes.c_uint32 * 4)(DIM // itemsize, min(shape[2], TILE), 1, 1), (ctypes.c_uint32 * 4)(1, 1, 1, 1)
    dtype, plain, by_128, promote_256, zeros = {1: 0, 2: 9}[itemsize], 0, 3, 3, 0  # values of cuda.h's enums
    error = _libcuda().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address), dtype, 4, ctypes.c_void_p(data), sizes, strides, box, steps, plain, by_128,
        promote_256, zeros,
    )  # fmt: skip
    if error:
        raise RuntimeError(f"cuTensorMapEncodeTiled: error {error} for a cache {list(shape)}, strides {list(stride)}")
    return tuple((ctypes.c_int64 * 16).from_address(address))


@functools.cache
def _libcuda():
    return ctypes.CDLL("libcuda.so.1")
