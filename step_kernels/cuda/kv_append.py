"""Launcher of csrc/smxx_kv_append.cu: q/k norm, rope and the paged write of bf16 tokens, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from .driver import Kernel, multiprocessors

MOST_DIM = 128
_GROUP = 8  # values that lie together: a load of 16 bytes
_BLOCK_WARPS = 5  # at most
_WARPS = 15  # that a multiprocessor has registers for
_FEW = 10  # warps a multiprocessor, up to which more of them with less to do each are done sooner
_PARAMETERS = "P" * 13 + "q" * 12 + "i" * 14 + "ff"  # one struct: the driver reads it from its first member's address
# (values of a chunk, rounds): a lane has two chunks of a head, a round is 2 heads of 16 lanes or 4 of 8.
TILES = ((4, 1), (4, 2), (8, 4))
_NAMES = {torch.float8_e4m3fn: "e4m3", torch.bfloat16: "bf16"}
VARIANTS = {
    (dtype, tile): Kernel("smxx_kv_append", f"smxx_kv_append_{name}_{tile[0]}_{tile[1]}", _PARAMETERS, dependent=True)
    for dtype, name in _NAMES.items()
    for tile in TILES
}


def refuse(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, inv_freq: Tensor, positions: Tensor,
    slots: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor,
) -> str | None:  # fmt: skip
    """Why the kernel does not take the op's arguments, or None."""
    if q.dtype != torch.bfloat16:
        return f"takes bfloat16, got {_name(q.dtype)}"
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm.dtype not in (torch.bfloat16, torch.float32):
            return f"takes norms in bfloat16 and float32, got {name} in {_name(norm.dtype)}"
    if k_cache.dtype not in _NAMES:
        return f"takes float8_e4m3fn and bfloat16 caches, got {_name(k_cache.dtype)}"
    dim, frequencies, page_size = q.shape[2], inv_freq.shape[0], k_cache.shape[2]
    if dim % _GROUP or not _GROUP <= dim <= MOST_DIM:
        return f"takes multiples of {_GROUP} up to {MOST_DIM} values a head, got {dim}"
    if frequencies % _GROUP:
        return f"takes a multiple of {_GROUP} frequencies, got {frequencies}"
    if k_cache.shape[0] * page_size >= 1 << 31:
        return f"takes fewer than 2^31 slots, got {k_cache.shape[0]} pages of {page_size}"
    for name, x in (("q", q), ("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        apart = [stride for stride, size in zip(x.stride(), x.shape[:-1]) if size > 1]
        past = x.data_ptr() % (_GROUP * x.itemsize)
        if x.stride(-1) != 1 or any(stride % _GROUP for stride in apart) or past:
            where = f"strides {x.stride()}, {past} bytes past a multiple of {_GROUP * x.itemsize}"
            return f"takes {name} in whole groups of {_GROUP} values, got {where}"


def launch(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, inv_freq: Tensor, positions: Tensor,
    slots: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor,
    tile: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """As ops.kv_append; `tile`, one of TILES, follows from the shapes if not given."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    tokens, q_heads, dim = q.shape
    kv_heads, processors = k.shape[1], multiprocessors(q.device.index)
    tile = tile or variant(tokens, q_heads, kv_heads, processors)
    grid, warps, q_warps, k_warps = shape(tokens, q_heads, kv_heads, tile, processors)
    if 0 in grid:
        return out
    norms = [_loads_by_16_bytes(x) for x in (q_norm, k_norm)]
    positions, slots = positions.contiguous(), slots.contiguous()
    scale_strides = (s.stride(0) if s.dim() else 0 for s in (k_scale, v_scale))
    VARIANTS[k_cache.dtype, tile].launch(
        grid, 32 * warps, q, k, v, out, k_cache, v_cache, *norms, inv_freq.contiguous(), positions, slots,
        k_scale, v_scale, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3],
        *v_cache.stride()[:3], *scale_strides, *(x.itemsize for x in (*norms, positions, slots)),
        tokens, q_heads, kv_heads, q_warps, k_warps, dim, inv_freq.shape[0], k_cache.shape[2], eps, 1 / dim,
    )  # fmt: skip
    return out


def variant(tokens: int, q_heads: int, kv_heads: int, multiprocessors: int) -> tuple[int, int]:
    """The smallest tile that leaves no multiprocessor more than `_FEW` warps, or the largest."""
    few = (t for t in TILES if tokens * _token_warps(q_heads, kv_heads, t)[0] <= _FEW * multiprocessors)
    return next(few, TILES[-1])


def shape(
    tokens: int, q_heads: int, kv_heads: int, tile: tuple[int, int], multiprocessors: int
) -> tuple[tuple[int, int, int], int, int, int]:
    """Grid (with a 0: no work), warps of a block, warps for all q heads of a token and for its k heads, as for v."""
    total, q_warps, k_warps = _token_warps(q_heads, kv_heads, tile)
    blocks = -(-total // _BLOCK_WARPS)
    warps = -(-total // max(1, blocks))
    rows = min(tokens, max(1, multiprocessors * _WARPS // max(1, blocks * warps)))  # then a block takes several tokens
    return (blocks, rows, 1), warps, q_warps, k_warps


def _token_warps(q_heads: int, kv_heads: int, tile: tuple[int, int]) -> tuple[int, int, int]:
    chunk, rounds = tile
    q_warps, k_warps = (-(-heads // (chunk // 2 * rounds)) for heads in (q_heads, kv_heads))
    return q_warps + 2 * k_warps, q_warps, k_warps


def _loads_by_16_bytes(norm: Tensor) -> Tensor:
    aligned = norm.is_contiguous() and norm.data_ptr() % 16 == 0
    return norm if aligned else norm.clone(memory_format=torch.contiguous_format)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
