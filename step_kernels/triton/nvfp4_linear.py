"""x times the transpose of an NVFP4 weight in checkpoint layout: codes expanded with integer operations, f32 sums.

A program computes TILE_N rows of the weight times TILE_M rows of x. The weight is the product's left side, where
tensor cores take what was just computed in registers, and its 16 or more rows fill them even for a single token.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numerics import INTERPRETED, from_e2m1, from_e4m3_bits, rounded_to


def _interpreted_range(*bounds, num_stages=None):
    """The interpreter's scalars are arrays of one value, which numpy 2.4 takes for no integers."""
    return range(*(b.handle.data.item() if isinstance(b, tl.tensor) else b for b in bounds))


loop = _interpreted_range if INTERPRETED.value else tl.range


@dataclasses.dataclass(frozen=True)
class Tile:
    m: int
    n: int
    k: int
    stages: int
    warps: int

    def constants(self, k: int) -> dict:
        """What every kernel that multiplies by NVFP4 takes; without the masks of a k that the tile divides."""
        return {"TILE_M": self.m, "TILE_N": self.n, "TILE_K": self.k, "EVEN_K": k % self.k == 0, "STAGES": self.stages}


# Chosen so that the loads in flight stay under the 99 KB of shared memory of sm_89 and sm_120.
TILES = (Tile(16, 64, 128, 4, 4), Tile(64, 64, 128, 3, 4), Tile(128, 128, 64, 3, 8))
# 32 rows: for an f32 dot of 64 or more Triton 3.6 takes tf32 on sm_100, "ieee" or not.
TILE_F32 = Tile(16, 32, 64, 2, 4)
_PROGRAMS = 512  # about four for each multiprocessor of the largest GPUs; a short x gets there by splitting k


def tile_for(rows: int, dtype: torch.dtype) -> Tile:
    """The tile for `rows` rows of x that share a weight."""
    if dtype == torch.float32:
        return TILE_F32
    return TILES[0] if rows <= 16 else TILES[1] if rows <= 64 else TILES[2]


@triton.jit
def expand(codes, scales, dtype: tl.constexpr):
    """u8 [n, k/2] codes, u8 [n, k/16] bits of e4m3 -> [n, k] of `dtype`, exact: at most 6 significant bits."""
    n: tl.constexpr = codes.shape[0]
    half: tl.constexpr = codes.shape[1]
    nibbles = tl.interleave(codes & 15, codes >> 4)
    scale = from_e4m3_bits(scales.to(tl.int32))
    if dtype == tl.float16:  # e2m1's bits at float16's place are the value * 2^-14, subnormals included
        bits = nibbles.to(tl.int16)
        value = (((bits & 8) << 12) | ((bits & 7) << 9)).to(tl.int16).to(tl.float16, bitcast=True) * 16384.0
        scale = scale.to(tl.float16)
    elif dtype == tl.bfloat16 and not INTERPRETED:  # the value * 2^-126; bf16 arithmetic keeps subnormals
        bits = nibbles.to(tl.int16)
        value = (((bits & 8) << 12) | ((bits & 7) << 6)).to(tl.int16).to(tl.bfloat16, bitcast=True) * 2.0**126
        scale = scale.to(tl.bfloat16)
    else:
        value = from_e2m1(nibbles.to(tl.int32))
    value = tl.reshape(value, (n, half // 8, 16)) * scale[:, :, None]
    return tl.reshape(value, (n, half * 2))


@triton.jit
def multiply(
    total, x_ptrs, x_inside, codes_ptrs, scales_ptrs, first, k,
    TILE_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """total [n, m] + the weight's TILE_K columns from `first` times x's. Pointers are to column 0 of each row."""
    at = first + tl.arange(0, TILE_K)
    at_codes = first // 2 + tl.arange(0, TILE_K // 2)
    at_scales = first // 16 + tl.arange(0, TILE_K // 16)
    if EVEN_K:
        codes = tl.load(codes_ptrs + at_codes[None, :])
        scales = tl.load(scales_ptrs + at_scales[None, :])
        x = tl.load(x_ptrs + at[None, :], mask=x_inside, other=0.0)
    else:
        codes = tl.load(codes_ptrs + at_codes[None, :], mask=at_codes[None, :] < k // 2, other=0)
        scales = tl.load(scales_ptrs + at_scales[None, :], mask=at_scales[None, :] < k // 16, other=0)
        x = tl.load(x_ptrs + at[None, :], mask=x_inside & (at[None, :] < k), other=0.0)
    weight = expand(codes, scales, x.dtype)
    if INTERPRETED:
        weight, x = weight.to(tl.float32), x.to(tl.float32)
    if x.dtype == tl.float32:
        return total + tl.dot(weight, tl.trans(x), input_precision="ieee").to(total.dtype)
    else:
        return tl.dot(weight, tl.trans(x), total)


@triton.jit
def zeros(x_ptr, TILE_N: tl.constexpr, TILE_M: tl.constexpr):
    """Where `multiply` sums: f32, and f64 for an f32 x. The compiler joins f32 `total + dot` into one row of sums over
    k, which for 4096 of them erred 2.2 to 2.4 times what the accuracy rule allows."""
    return tl.zeros((TILE_N, TILE_M), tl.float64 if x_ptr.dtype.element_ty == tl.float32 else tl.float32)


@triton.jit
def _linear_kernel(
    x_ptr, codes_ptr, scales_ptr, global_scale_ptr, out_ptr,
    m, n, k, x_stride, codes_stride, scales_stride, part_rows, splits,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Programs that share a piece of the weight follow each other: x stays in L2, a vocabulary's weight does not.
    token = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    row = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    inside = row < n
    row = tl.minimum(row, n - 1)  # rows beyond n are computed twice and not stored: no mask on the weight
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * x_stride
    codes_ptrs = codes_ptr + row.to(tl.int64)[:, None] * codes_stride
    scales_ptrs = scales_ptr + row.to(tl.int64)[:, None] * scales_stride
    steps = tl.cdiv(tl.cdiv(k, TILE_K), splits)
    begin = tl.program_id(2) * steps * TILE_K
    end = tl.minimum(begin + steps * TILE_K, k)
    total = zeros(x_ptr, TILE_N, TILE_M)
    for first in loop(begin, end, TILE_K, num_stages=STAGES):
        total = multiply(
            total, x_ptrs, token[:, None] < m, codes_ptrs, scales_ptrs, first, k, TILE_K, EVEN_K
        )  # fmt: skip
    total = total.to(tl.float32) * tl.load(global_scale_ptr + row // part_rows)[:, None]
    out_ptrs = out_ptr + (tl.program_id(2) * m + token).to(tl.int64)[None, :] * n + row[:, None]
    tl.store(out_ptrs, rounded_to(total, out_ptr.dtype.element_ty), mask=inside[:, None] & (token[None, :] < m))


@triton.jit
def _sum_kernel(parts_ptr, out_ptr, count, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in loop(count):
        total += tl.load(parts_ptr + part * size + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, rounded_to(total, out_ptr.dtype.element_ty), mask=at < size)


def _splits(m: int, n: int, k: int, tile: Tile) -> int:
    """Into how many ranges to cut k, by the shape alone so that no GPU gives other bits; at least 8 steps each."""
    programs = triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)
    return max(1, min(8, _PROGRAMS // programs, k // (8 * tile.k)))


def launch(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """bf16, f16 or f32 [..., k]; u8 [n, k/2], e4m3 [n, k/16], f32 [] or [parts] -> [..., n], contiguous."""
    n, k = codes.shape[0], x.shape[-1]
    out = x.new_empty(*x.shape[:-1], n)
    if out.numel() == 0 or k == 0:
        return out.zero_()
    x = x.reshape(-1, k)
    x, codes, scales = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, codes, scales.view(torch.uint8)))
    m, tile = x.shape[0], tile_for(x.shape[0], x.dtype)
    splits = _splits(m, n, k, tile)
    parts = out if splits == 1 else x.new_empty(splits, m, n, dtype=torch.float32)
    _linear_kernel[(triton.cdiv(m, tile.m), triton.cdiv(n, tile.n), splits)](
        x, codes, scales, global_scale.reshape(-1), parts,
        m, n, k, x.stride(0), codes.stride(0), scales.stride(0), n // max(1, global_scale.numel()), splits,
        **tile.constants(k), num_warps=tile.warps,
    )  # fmt: skip
    if splits > 1:
        _sum_kernel[(triton.cdiv(m * n, 1024),)](parts, out, splits, m * n, BLOCK=1024, num_warps=4)
    return out


def ahead_of_time():
    """(kernel, argument types, constants, warps) of each variant to compile without a GPU; see triton/build.py."""
    sizes = ("m", "n", "k", "x_stride", "codes_stride", "scales_stride", "part_rows", "splits")
    for dtype, tiles in (("bf16", TILES), ("fp16", TILES[:1]), ("fp32", (TILE_F32,))):
        types = {"x_ptr": f"*{dtype}", "codes_ptr": "*u8", "scales_ptr": "*u8", "global_scale_ptr": "*fp32"}
        types |= {"out_ptr": f"*{dtype}"} | dict.fromkeys(sizes, "i32")
        for tile in tiles:
            yield _linear_kernel, types, tile.constants(tile.k), tile.warps
        sums = {"parts_ptr": "*fp32", "out_ptr": f"*{dtype}", "count": "i32", "size": "i32"}
        yield _sum_kernel, sums, {"BLOCK": 1024}, 4
