"""Launcher of csrc/sm90_paged_prefill.cu: many new tokens a request over a paged e4m3 or bf16 cache."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from .driver import Kernel
from .paged_attention import DIM, MOST_REQUESTS, _libcuda, _multiprocessors, _shape

ROWS = 128  # (token, head) pairs of a block at a time
TILES = (128, 112)  # keys of a tile; the narrower one fits windows of 512
LEAST_BOX = 16  # positions of the smallest copy
_THREADS = 384
_SHARED_BYTES = 227 * 1024
_STREAMS = 16  # that may compute at a time without sharing a counter
# The tensor maps are one parameter, the last: the driver reads its 256 bytes from the first q's address.
_PARAMETERS = "PPPPPPPPPPqqqqqiiiiiiiiif" + 32 * "q"
_NAMES = {torch.float8_e4m3fn: "e4m3"}
VARIANTS = {
    (dtype, keys): Kernel("sm90_paged_prefill_k8", f"sm90_paged_prefill_{name}_{keys}", _PARAMETERS, _SHARED_BYTES)
    for dtype, name in _NAMES.items()
    for keys in TILES
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
    page_size = k_cache.shape[2]
    if page_size < LEAST_BOX or page_size & (page_size - 1):
        return f"takes pages of a power of two from {LEAST_BOX} on, got {page_size}"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        apart = [stride * cache.itemsize for stride in cache.stride()[:3]]
        if cache.stride(3) != 1 or any(size % 16 for size in apart) or cache.data_ptr() % 16:
            return f"takes caches whose rows lie whole at multiples of 16 bytes, got strides {cache.stride()} in {name}"
    if q.shape[0] * q.shape[1] >= 1 << 31:
        return f"takes fewer than 2^31 rows, got {q.shape[0]} tokens x {q.shape[1]} heads"


def launch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, block_table: Tensor,
    seq_lens: Tensor, query_start: Tensor, window: int | None = None, gate: Tensor | None = None,
    softmax_scale: float | None = None, lse: Tensor | None = None, keys: int | None = None,
) -> Tensor:  # fmt: skip
    """As ops.paged_attention; `lse`, f32 [tokens, q_heads], takes the log of the scores' sum of exponentials.

    `keys` of a tile follow from the window if not given.
    """
    heads = q.shape[1]
    kv_heads, page_size = k_cache.shape[1:3]
    group, requests = heads // max(1, kv_heads), len(seq_lens)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    if requests == 0 or k_cache.shape[0] == 0:
        if lse is not None:
            lse.fill_(-torch.inf)
        return out.zero_()
    q = q if _loads_by_16_bytes(q) else q.clone(memory_format=torch.contiguous_format)
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    seq_lens, query_start = seq_lens.contiguous(), query_start.contiguous()
    keys = keys or tile_keys(group, window)
    # A window's first tile begins where a box does: small boxes waste fewest keys. 112 is no multiple of larger ones.
    box = min(page_size, keys) if window is None and keys == 128 else LEAST_BOX
    maps = (*_tensor_map(*_shape(k_cache), box, True), *_tensor_map(*_shape(v_cache), box))
    scale = (DIM**-0.5 if softmax_scale is None else softmax_scale) * 1.4426950408889634  # exp2 is cheaper
    scale_strides = [s.stride(0) if s.dim() else 0 for s in (k_scale, v_scale)]
    strides = (*q.stride()[:2], block_table.stride(0), *((0, 0) if gate is None else gate.stride()), *scale_strides)
    for first in range(0, requests, MOST_REQUESTS):
        last = min(first + MOST_REQUESTS, requests)
        VARIANTS[k_cache.dtype, keys].launch(
            (_multiprocessors(q.device.index), 1, 1), _THREADS, q, k_scale, v_scale, block_table[first:],
            seq_lens[first:], query_start[first:], 0 if gate is None else gate, out, 0 if lse is None else lse,
            counter(q.device), *strides, last - first, q.shape[0] if last == requests else -1, kv_heads, group,
            page_size.bit_length() - 1, box.bit_length() - 1, min(window or 1 << 30, 1 << 30), scale, *maps,
        )  # fmt: skip
    return out


def tile_keys(group: int, window: int | None) -> int:
    """The tile that covers a window and a block's tokens with fewest keys, the wide one where both do."""
    if window is None:
        return max(TILES)
    span = window + -(-ROWS // group) + LEAST_BOX - 1
    return min(TILES, key=lambda keys: -(-span // keys) * keys)


def counter(device: torch.device) -> Tensor:
    """i32 [1] of this stream's own, zero; a kernel that counts there leaves it so."""
    pool, taken = _pool(device.index)
    stream = torch.cuda.current_stream(device).cuda_stream
    return pool[taken.setdefault(stream, len(taken) % _STREAMS)]


@functools.cache
def _pool(device: int) -> tuple[Tensor, dict[int, int]]:
    """Made before any stream uses it: a graph's capture must not be the first, or its filling would come at replay."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("paged_attention: call it on this GPU, with as many tokens, before capturing a CUDA graph")
    pool = torch.zeros(_STREAMS, 32, dtype=torch.int32, device=f"cuda:{device}")  # a line each
    torch.cuda.synchronize(device)
    return pool, {}


def _loads_by_16_bytes(q: Tensor) -> bool:
    return q.stride(2) == 1 and q.stride(0) % 8 == 0 and q.stride(1) % 8 == 0 and q.data_ptr() % 16 == 0


@functools.lru_cache(1024)
def _tensor_map(data: int, shape: tuple[int, ...], stride: tuple[int, ...], itemsize: int, box: int, keys: bool = False) -> tuple[int, ...]:
    """How the copy engine goes through [pages, kv_heads, page_size, 128]: boxes of `box` positions x 128 bytes.

    bf16 lands as the matrix unit reads it, swizzled by 128 bytes; bytes land as they are, to be expanded.
    """
    buffer = (ctypes.c_uint64 * 24)()
    address = -(-ctypes.addressof(buffer) // 64) * 64  # the driver takes maps at multiples of 64 bytes alone
    sizes, strides = (
        (ctypes.c_uint64 * 4)(*reversed(shape)),
        (ctypes.c_uint64 * 3)(*(itemsize * n for n in reversed(stride[:3]))),
    )
    boxes, steps = (ctypes.c_uint32 * 4)(DIM // itemsize, box, 1, 1), (ctypes.c_uint32 * 4)(1, 1, 1, 1)
    dtype, swizzle = {1: (0, 3 if keys else 0), 2: (9, 3)}[itemsize]  # values of cuda.h's enums
    plain, promote_256, zeros = 0, 3, 0
    error = _libcuda().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address), dtype, 4, ctypes.c_void_p(data), sizes, strides, boxes, steps, plain, swizzle,
        promote_256, zeros,
    )  # fmt: skip
    if error:
        raise RuntimeError(f"cuTensorMapEncodeTiled: error {error} for a cache {list(shape)}, strides {list(stride)}")
    return tuple((ctypes.c_int64 * 16).from_address(address))
