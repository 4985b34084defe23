"""The routed experts as two grouped products over tokens sorted by expert, the clamped SwiGLU inside the first.

A tile is up to TILE_M (token, slot) pairs of one expert. Which tiles exist is decided on the device; the grid is as
large as any routing could need, and programs without a tile end at once. Between the products the activation is
rounded to x's dtype; every pair's result stays f32 until a token's are summed, in the order of its slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numerics import rounded_to
from .nvfp4_linear import TILE_F32, TILES, loop, multiply, tile_for, zeros

_FEW = 64  # pairs up to which each is its own tile, for sorting would take longer than reading an expert twice
_LARGEST = 1 << 30  # bytes of f32 results at a time


@triton.jit
def _tiles_kernel(sorted_ptr, tiles_ptr, pairs, experts, tiles, TILE_M: tl.constexpr, EXPERTS: tl.constexpr):
    """From the sorted ids, each tile's expert, first and last + 1 sorted pair: i32 [3, tiles], empty ones 0, 0, 0."""
    expert = tl.arange(0, EXPERTS)
    begin, end = tl.zeros((EXPERTS,), tl.int32), tl.zeros((EXPERTS,), tl.int32)
    for step in loop(0, 31):  # two binary searches: how many ids are below the expert, and below the next
        size = 1 << (30 - step)
        below = tl.load(sorted_ptr + begin + size - 1, mask=begin + size <= pairs, other=2147483647) < expert
        begin += tl.where(below, size, 0)
        below = tl.load(sorted_ptr + end + size - 1, mask=end + size <= pairs, other=2147483647) <= expert
        end += tl.where(below, size, 0)
    count = tl.where(expert < experts, (end - begin + TILE_M - 1) // TILE_M, 0)
    first = tl.cumsum(count, 0) - count
    for i in loop(0, tl.max(count, 0)):
        to, mine = tiles_ptr + first + i, i < count
        tl.store(to, expert, mask=mine)
        tl.store(to + tiles, begin + i * TILE_M, mask=mine)
        tl.store(to + 2 * tiles, tl.minimum(begin + i * TILE_M + TILE_M, end), mask=mine)
    for start in loop(tl.sum(count, 0), tiles, EXPERTS):
        to, mine = start + expert, start + expert < tiles
        for field in tl.static_range(3):
            tl.store(tiles_ptr + field * tiles + to, 0, mask=mine)


@triton.jit
def _tile(ids_ptr, order_ptr, tiles_ptr, tile, tiles, experts, TILE_M: tl.constexpr, SORTED: tl.constexpr):
    """The tile's expert, its sorted pairs [TILE_M], which of them exist, and the pairs' own numbers."""
    lane = tl.arange(0, TILE_M)
    if SORTED:
        expert = tl.load(tiles_ptr + tile)
        position = tl.load(tiles_ptr + tiles + tile) + lane
        inside = position < tl.load(tiles_ptr + 2 * tiles + tile)
        pair = tl.load(order_ptr + position, mask=inside, other=0)
    else:
        expert = tl.load(ids_ptr + tile)
        inside = (lane == 0) & (expert >= 0) & (expert < experts)
        position = tile + lane
        pair = position.to(tl.int64)
    return expert, position, inside, pair


@triton.jit
def _gate_up_kernel(
    x_ptr, ids_ptr, order_ptr, tiles_ptr, codes_ptr, scales_ptr, global_scale_ptr, inner_ptr,
    tiles, experts, top_k, n, k, x_stride, codes_stride, scales_stride, parts, limit,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr,
    SORTED: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, TILE_N)
    tile = tl.program_id(0) // blocks  # a tile's programs follow each other: its rows of x stay in L2
    expert, position, inside, pair = _tile(ids_ptr, order_ptr, tiles_ptr, tile, tiles, experts, TILE_M, SORTED)
    if tl.max(inside.to(tl.int32), 0) == 0:
        return
    column = tl.program_id(0) % blocks * TILE_N + tl.arange(0, TILE_N)
    row = expert.to(tl.int64) * (2 * n) + tl.minimum(column, n - 1)  # beyond n: computed twice and not stored
    x_ptrs = x_ptr + (pair // top_k)[:, None] * x_stride
    gate_codes, gate_scales = codes_ptr + row[:, None] * codes_stride, scales_ptr + row[:, None] * scales_stride
    up_codes, up_scales = gate_codes + n.to(tl.int64) * codes_stride, gate_scales + n.to(tl.int64) * scales_stride
    gate = zeros(x_ptr, TILE_N, TILE_M)
    up = zeros(x_ptr, TILE_N, TILE_M)
    for first in loop(0, k, TILE_K, num_stages=STAGES):
        gate = multiply(gate, x_ptrs, inside[:, None], gate_codes, gate_scales, first, k, TILE_K, EVEN_K)
        up = multiply(up, x_ptrs, inside[:, None], up_codes, up_scales, first, k, TILE_K, EVEN_K)
    gate = gate.to(tl.float32) * tl.load(global_scale_ptr + expert * parts)
    up = up.to(tl.float32) * tl.load(global_scale_ptr + expert * parts + parts - 1)
    # As torch's clamp, NaN passes; an infinite limit changes nothing.
    gate = tl.minimum(gate / (1.0 + tl.exp(-gate)), limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    inner_ptrs = inner_ptr + position.to(tl.int64)[None, :] * n + column[:, None]
    inner = rounded_to(gate * up, inner_ptr.dtype.element_ty)
    tl.store(inner_ptrs, inner, mask=inside[None, :] & (column < n)[:, None])


@triton.jit
def _down_kernel(
    inner_ptr, ids_ptr, order_ptr, tiles_ptr, codes_ptr, scales_ptr, global_scale_ptr, weights_ptr, out_ptr,
    tiles, experts, n, k, codes_stride, scales_stride,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr,
    SORTED: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, TILE_N)
    tile = tl.program_id(0) // blocks
    expert, position, inside, pair = _tile(ids_ptr, order_ptr, tiles_ptr, tile, tiles, experts, TILE_M, SORTED)
    if tl.max(inside.to(tl.int32), 0) == 0:
        return
    column = tl.program_id(0) % blocks * TILE_N + tl.arange(0, TILE_N)
    row = expert.to(tl.int64) * n + tl.minimum(column, n - 1)
    inner_ptrs = inner_ptr + position.to(tl.int64)[:, None] * k
    codes, scales = codes_ptr + row[:, None] * codes_stride, scales_ptr + row[:, None] * scales_stride
    total = zeros(inner_ptr, TILE_N, TILE_M)
    for first in loop(0, k, TILE_K, num_stages=STAGES):
        total = multiply(total, inner_ptrs, inside[:, None], codes, scales, first, k, TILE_K, EVEN_K)
    weight = tl.load(weights_ptr + pair, mask=inside, other=0.0)
    total = total.to(tl.float32) * tl.load(global_scale_ptr + expert) * weight[None, :]
    tl.store(out_ptr + pair[None, :] * n + column[:, None], total, mask=inside[None, :] & (column < n)[:, None])


@triton.jit
def _sum_kernel(parts_ptr, ids_ptr, out_ptr, experts, top_k, n, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in loop(0, top_k):
        pair = token * top_k + slot
        id = tl.load(ids_ptr + pair)
        present = (id >= 0) & (id < experts)  # a skipped pair's row was never written
        total += tl.load(parts_ptr + pair * n + column, mask=present & (column < n), other=0.0)
    tl.store(out_ptr + token * n + column, rounded_to(total, out_ptr.dtype.element_ty), mask=column < n)


def launch(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up_codes: Tensor, gate_up_scales: Tensor, gate_up_global: Tensor,
    down_codes: Tensor, down_scales: Tensor, down_global: Tensor, limit: float | None = None,
) -> Tensor:  # fmt: skip
    """The op's arguments, x bf16, f16 or f32 -> [tokens, hidden], contiguous."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel() == 0 or ids.numel() == 0 or gate_up_codes.numel() == 0:
        return out.zero_()
    if x.stride(1) != 1:
        x = x.contiguous()
    gate_up = (gate_up_codes.contiguous(), gate_up_scales.contiguous().view(torch.uint8), gate_up_global.contiguous())
    down = (down_codes.contiguous(), down_scales.contiguous().view(torch.uint8), down_global.contiguous())
    weights, ids = weights.contiguous(), ids.contiguous()
    step = max(1, _LARGEST // (4 * ids.shape[1] * x.shape[1]))
    for t in range(0, x.shape[0], step):
        part = slice(t, t + step)
        _launch(x[part], weights[part], ids[part], gate_up, down, float("inf") if limit is None else limit, out[part])
    return out


def _launch(x: Tensor, weights: Tensor, ids: Tensor, gate_up: tuple, down: tuple, limit: float, out: Tensor) -> None:
    (tokens, hidden), (_, top_k), (experts, double, _) = x.shape, ids.shape, gate_up[0].shape
    pairs, inner_size = ids.numel(), double // 2
    tile = tile_for(-(-pairs // experts), x.dtype)
    if pairs <= _FEW:
        tile = tile_for(1, x.dtype)
        order, tiles, count = ids, ids, pairs
    else:
        keys, order = ids.flatten().sort(stable=True)
        count = min(pairs, pairs // tile.m + experts)  # an expert's last tile may be short
        tiles = ids.new_empty(3, count)
        shape = {"TILE_M": tile.m, "EXPERTS": triton.next_power_of_2(experts)}
        _tiles_kernel[(1,)](keys, tiles, pairs, experts, count, **shape, num_warps=4)
    inner = x.new_empty(pairs, inner_size)
    parts = x.new_empty(pairs, hidden, dtype=torch.float32)
    routed = (ids, order, tiles)
    _gate_up_kernel[(count * triton.cdiv(inner_size, tile.n),)](
        x, *routed, *gate_up, inner, count, experts, top_k, inner_size, hidden, x.stride(0), hidden // 2, hidden // 16,
        gate_up[2].dim(), limit, **tile.constants(hidden), SORTED=pairs > _FEW, num_warps=tile.warps,
    )  # fmt: skip
    _down_kernel[(count * triton.cdiv(hidden, tile.n),)](
        inner, *routed, *down, weights, parts, count, experts, hidden, inner_size, inner_size // 2, inner_size // 16,
        **tile.constants(inner_size), SORTED=pairs > _FEW, num_warps=tile.warps,
    )  # fmt: skip
    _sum_kernel[(tokens, triton.cdiv(hidden, 1024))](parts, ids, out, experts, top_k, hidden, BLOCK=1024, num_warps=4)


def ahead_of_time():
    """(kernel, argument types, constants, warps) of each variant to compile without a GPU; see triton/build.py."""
    tables = {"ids_ptr": "*i32", "order_ptr": "*i64", "tiles_ptr": "*i32"}
    weight = {"codes_ptr": "*u8", "scales_ptr": "*u8", "global_scale_ptr": "*fp32"}
    for dtype, tiles in (("bf16", TILES), ("fp16", TILES[:1]), ("fp32", (TILE_F32,))):
        gate_up = {"x_ptr": f"*{dtype}", **tables, **weight, "inner_ptr": f"*{dtype}"}
        sizes = ("tiles", "experts", "top_k", "n", "k", "x_stride", "codes_stride", "scales_stride", "parts")
        gate_up |= dict.fromkeys(sizes, "i32") | {"limit": "fp32"}
        down = {"inner_ptr": f"*{dtype}", **tables, **weight, "weights_ptr": "*fp32", "out_ptr": "*fp32"}
        down |= dict.fromkeys(("tiles", "experts", "n", "k", "codes_stride", "scales_stride"), "i32")
        for tile in tiles:
            for is_sorted in (False, True) if tile is TILES[0] else (True,):
                constants = tile.constants(tile.k) | {"SORTED": is_sorted}
                for kernel, types in ((_gate_up_kernel, gate_up), (_down_kernel, down)):
                    order = {} if is_sorted else {"order_ptr": "*i32"}
                    yield kernel, types | order, constants, tile.warps
        sums = {"parts_ptr": "*fp32", "ids_ptr": "*i32", "out_ptr": f"*{dtype}"}
        yield _sum_kernel, sums | dict.fromkeys(("experts", "top_k", "n"), "i32"), {"BLOCK": 1024}, 4
    pointers = {"sorted_ptr": "*i32", "tiles_ptr": "*i32", "pairs": "i32", "experts": "i32", "tiles": "i32"}
    yield _tiles_kernel, pointers, {"TILE_M": TILES[0].m, "EXPERTS": 512}, 4
