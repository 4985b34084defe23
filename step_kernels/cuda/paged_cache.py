"""What Hopper's attention kernels ask of a paged cache, and what their launchers pass with it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .tensor_map import encode

DIM = 128  # values of a head
MOST_REQUESTS = 256  # of a launch
NAMES = {torch.float8_e4m3fn: "e4m3", torch.bfloat16: "bf16"}
_LEAST_PAGE = 16
_STREAMS = 16  # that may compute at a time without sharing a buffer


def refuse(q: Tensor, k_cache: Tensor, v_cache: Tensor, gate: Tensor | None) -> str | None:
    """Why neither kernel takes the op's arguments, or None."""
    for name, tensor in (("q", q), ("gate", gate)):
        if tensor is not None and tensor.dtype != torch.bfloat16:
            return f"takes {name} in bfloat16, got {str(tensor.dtype).removeprefix('torch.')}"
    if k_cache.dtype not in NAMES:
        return f"takes float8_e4m3fn and bfloat16 caches, got {str(k_cache.dtype).removeprefix('torch.')}"
    if q.shape[2] != DIM:
        return f"takes {DIM} values a head, got {q.shape[2]}"
    page_size = k_cache.shape[2]
    if page_size < _LEAST_PAGE or page_size & (page_size - 1):
        return f"takes pages of a power of two from {_LEAST_PAGE} on, got {page_size}"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        apart = [stride * cache.itemsize for stride in cache.stride()[:3]]
        if cache.stride(3) != 1 or any(size % 16 for size in apart) or cache.data_ptr() % 16:
            return f"takes caches whose rows lie whole at multiples of 16 bytes, got strides {cache.stride()} in {name}"


def buffer(device: torch.device, size: int, fill: int) -> Tensor:
    """i32 [size] of this stream's own, all `fill`; a kernel that writes there leaves it so."""
    pool, taken = _pool(device.index, size, fill)
    stream = torch.cuda.current_stream(device).cuda_stream
    return pool[taken.setdefault(stream, len(taken) % _STREAMS)]


@functools.cache
def _pool(device: int, size: int, fill: int) -> tuple[Tensor, dict[int, int]]:
    """Made before any stream uses it: a graph's capture must not be the first, or its filling would come at replay."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("paged_attention: call it on this GPU, with as many tokens, before capturing a CUDA graph")
    pool = torch.full((_STREAMS, size), fill, dtype=torch.int32, device=f"cuda:{device}")
    torch.cuda.synchronize(device)
    return pool, {}


def tensor_map(cache: Tensor, box: int, is_operand: bool = True) -> tuple[int, ...]:
    """How the copy engine goes through a cache: boxes of `box` positions x 128 bytes, as 16 words of a parameter.

    Operands land as the matrix unit reads them, swizzled by 128 bytes; others as they are.
    """
    return _tensor_map(cache.data_ptr(), tuple(cache.shape), tuple(cache.stride()), cache.itemsize, box, is_operand)


@functools.lru_cache(1024)
def _tensor_map(
    data: int, shape: tuple[int, ...], stride: tuple[int, ...], itemsize: int, box: int, is_operand: bool
) -> tuple[int, ...]:
    sizes, strides = shape[::-1], tuple(itemsize * n for n in stride[2::-1])
    return encode(data, itemsize, sizes, strides, (DIM // itemsize, box, 1, 1), 128 * is_operand)
