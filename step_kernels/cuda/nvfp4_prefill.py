"""Launchers of csrc/sm90_nvfp4_prefill.cu and sm90_nvfp4_moe_prefill.cu: prepared NVFP4 weights and many bf16 tokens.

Prepared codes are u8 [..., blocks, chunks, 2048], scales u8 [..., blocks, chunks, 256]: a tile of 64 rows x 64 k each.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from .driver import Kernel

# Tile sizes (tokens) of each kernel, ascending, by the largest. A kernel's sizes share its registers: no more fit.
SIZES = {128: (32, 64, 96, 128), 160: (64, 96, 128, 160), 256: (128, 224, 256)}
TILE_ROWS, TILE_K = 64, 64
CLUSTER_BLOCKS = 4  # two CTAs of two 64-row blocks
BOX = 32  # tokens of one copy
THREADS = 384
SHARED_BYTES = 1024 + 4 * 256 * 128 + 2 * 256 * 128  # alignment, stages of x, staged outputs
GROUP = 8  # token tiles that go through the weight together: 16 MB of x at k = 4096, so that L2 holds them
MAX_EXPERTS = 1024  # threads of the sort, one an expert
_LARGEST = 1 << 30  # bytes of sorted x at a time, without its padding

# The tensor maps are one parameter, the last: the driver reads its 256 bytes from the first q's address.
_PARAMETERS = "PPPPPiiiiiiiif" + 32 * "q"
PLAIN = {s: Kernel("sm90_nvfp4_prefill", f"sm90_nvfp4_prefill_plain_{s}", _PARAMETERS, SHARED_BYTES) for s in SIZES}
PAIRED = {s: Kernel("sm90_nvfp4_prefill", f"sm90_nvfp4_prefill_paired_{s}", _PARAMETERS, SHARED_BYTES) for s in SIZES}
SORT = Kernel("sm90_nvfp4_moe_prefill", "sm90_nvfp4_moe_prefill_sort", "PPPPiiiiii")
GATHER = Kernel("sm90_nvfp4_moe_prefill", "sm90_nvfp4_moe_prefill_gather", "PPPqii")
COMBINE = Kernel("sm90_nvfp4_moe_prefill", "sm90_nvfp4_moe_prefill_combine", "PPPPii")


def linear(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor, n: int) -> Tensor:
    """bf16 [..., k], a prepared plain weight [n, k], global_scale f32 [] or [parts] -> bf16 [..., n]."""
    rows = _copyable(x.reshape(-1, x.shape[-1]))
    out = x.new_empty(len(rows), -(-n // 8) * 8)  # the copy engine writes rows of a multiple of 16 bytes
    if out.numel() == 0 or x.numel() == 0:
        return x.new_zeros(*x.shape[:-1], n)
    clusters = _clusters(x.device.index)
    row_tiles = -(-codes.shape[0] // CLUSTER_BLOCKS)
    size = dense_tile(len(rows), row_tiles, clusters)
    token_tiles = -(-len(rows) // size)
    kernel = PLAIN[min(largest for largest, sizes in SIZES.items() if size in sizes)]
    work = (0, 0, token_tiles, size, GROUP, row_tiles)
    _product(kernel, rows, (codes, scales, global_scale), work, out, n, min(clusters, token_tiles * row_tiles))
    return out[:, :n].reshape(*x.shape[:-1], n)


def moe(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: tuple[Tensor, Tensor, Tensor],
    down: tuple[Tensor, Tensor, Tensor], inner: int, limit: float | None,
) -> Tensor:  # fmt: skip
    """bf16 [tokens, hidden], f32 and i32 [tokens, top_k] -> bf16 [tokens, hidden].

    `gate_up` (paired) and `down` (plain) are prepared (codes, scales, global_scale) of the experts.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel() == 0 or ids.numel() == 0 or gate_up[0].numel() == 0:
        return out.zero_()
    x, weights, ids = _copyable(x), weights.contiguous(), ids.contiguous()
    step = max(1, _LARGEST // (2 * ids.shape[1] * x.shape[1]))
    for t in range(0, len(x), step):
        part = slice(t, t + step)
        _moe(x[part], weights[part], ids[part], gate_up, down, inner, limit, out[part])
    return out


def _moe(x, weights, ids, gate_up, down, inner_size, limit, out) -> None:
    (tokens, hidden), (_, top_k), experts = x.shape, ids.shape, len(gate_up[0])
    largest = moe_tiles(ids.numel() / experts)
    tiles, rows = bounds(ids.numel(), experts, largest)
    sizes = SIZES[largest]
    position = torch.empty_like(ids)
    table, count = ids.new_empty(tiles, 4), ids.new_empty(1)
    sorted_rows, inner = x.new_empty(rows, hidden), x.new_empty(rows, inner_size)
    sizes = (*sizes, *[largest] * (4 - len(sizes)))
    SORT.launch((1, 1, 1), 1024, ids, position, table, count, ids.numel(), experts, *sizes)
    GATHER.launch((tokens, 1, 1), 256, x, position, sorted_rows, x.stride(0), hidden, top_k)
    clusters = _clusters(x.device.index)
    limit = float("inf") if limit is None else limit
    for kernel, values, weight, to, columns in (
        (PAIRED[largest], sorted_rows, gate_up, inner, 32),
        (PLAIN[largest], inner, down, sorted_rows, 64),  # the sorted x has been read
    ):
        row_tiles = -(-weight[0].shape[1] // CLUSTER_BLOCKS)
        work = (table, count, 0, 0, 1, row_tiles)
        _product(kernel, values, weight, work, to, to.shape[1], min(clusters, tiles * row_tiles), limit, columns)
    COMBINE.launch((tokens, 1, 1), 256, sorted_rows, weights, position, out, hidden, top_k)


def dense_tile(tokens: int, row_tiles: int, clusters: int) -> int:
    """Tokens a tile for the shortest way through all tiles, each cluster taking one at a time."""

    def clocks(size: int) -> int:
        return -(-(-(-tokens // size) * row_tiles) // clusters) * _chunk_clocks(size)

    return min(sorted(set().union(*SIZES.values())), key=clocks)


def moe_tiles(mean: float) -> int:
    """Which kernel, by its largest tile, is best where experts have `mean` tokens, give or take its square root."""

    def clocks(largest: int) -> float:
        total = 0
        for tokens in (mean + deviations * mean**0.5 for deviations in (-1.5, -0.5, 0.5, 1.5)):
            count = max(1, -(-tokens // largest))
            total += count * _chunk_clocks(next(s for s in SIZES[largest] if s * count >= tokens))
        return total

    return min(SIZES, key=clocks)


def bounds(pairs: int, experts: int, largest: int) -> tuple[int, int]:
    """The most tiles and rows of sorted x that any routing of `pairs` can need."""
    sizes = (0, *SIZES[largest])
    tiles = pairs // largest + min(experts, pairs)
    return tiles, pairs + tiles * max(b - a for a, b in zip(sizes, sizes[1:]))


def _chunk_clocks(size: int) -> int:
    """Of 128 rows x 64 k: the tensor cores', 4 a token, or the issue slots' that expand the codes."""
    return max(4 * size, 330 + size // 4) + 80


def _product(kernel, x, weight, work, out, rows, clusters, limit=0.0, box_columns=64) -> None:
    codes, scales, global_scale = weight
    blocks, chunks = codes.shape[-3:-1]
    parts = global_scale.numel() // (len(codes) if codes.dim() == 4 else 1)
    values = (*work, blocks, chunks, parts, rows, limit)
    maps = (*tensor_map(x, TILE_K), *tensor_map(out, box_columns))
    kernel.launch((2 * clusters, 1, 1), THREADS, codes, scales, global_scale.contiguous(), *values, *maps)


def _copyable(x: Tensor) -> Tensor:
    """x, or a copy whose rows start at multiples of 16 bytes."""
    aligned = x.stride(0) >= x.shape[1] and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if aligned and x.stride(1) == 1 else x.clone(memory_format=torch.contiguous_format)


@functools.cache
def _clusters(device: int) -> int:
    """Clusters that run at once: two multiprocessors each."""
    return torch.cuda.get_device_properties(device).multi_processor_count // 2


def tensor_map(x: Tensor, columns: int) -> tuple[int, ...]:
    """How the copy engine goes through bf16 [rows, k]: boxes of BOX rows x 64 or 32 columns, swizzled, 0 outside."""
    buffer = (ctypes.c_uint64 * 24)()
    address = -(-ctypes.addressof(buffer) // 64) * 64  # the driver takes maps at multiples of 64 bytes alone
    sizes, strides = (ctypes.c_uint64 * 2)(x.shape[1], x.shape[0]), (ctypes.c_uint64 * 1)(2 * x.stride(0))
    box, steps = (ctypes.c_uint32 * 2)(columns, BOX), (ctypes.c_uint32 * 2)(1, 1)
    bf16, plain, promote_256, zeros = 9, 0, 3, 0  # values of cuda.h's enums
    swizzle = {64: 3, 32: 2}[columns]  # by a row's 128 or 64 bytes
    error = _libcuda().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address), bf16, 2, ctypes.c_void_p(x.data_ptr()), sizes, strides, box, steps, plain,
        swizzle, promote_256, zeros,
    )  # fmt: skip
    if error:
        raise RuntimeError(f"cuTensorMapEncodeTiled: error {error} for bf16 {list(x.shape)}, stride {x.stride(0)}")
    return tuple((ctypes.c_int64 * 16).from_address(address))


@functools.cache
def _libcuda():
    return ctypes.CDLL("libcuda.so.1")
