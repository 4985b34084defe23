"""nvfp4_linear and nvfp4_moe of many tokens with both sides rounded to FP8 (w4a8.py), where that was allowed:
csrc/sm90_nvfp4_prefill_w4a8.cu, and sm90_nvfp4_moe_prefill.cu around the experts' products."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import w4a8
from . import nvfp4_linear, nvfp4_moe, nvfp4_prefill
from .driver import Kernel, multiprocessors
from .nvfp4_prefill import BLOCKS, COMBINE, GROUP, TILE_K, bounds, sort, tensor_map

# Fewer go the way of bf16 activations, which was as fast or faster there on an H200: experts at 1024 tokens, 28 pairs
# each, 1123 us to 1251, at 57 pairs 1408 to 1398; 1024 rows of 4096 k at 8192 tokens 94 to 111.
FEWEST_TOKENS, FEWEST_ROWS = 1024, 2048  # of a dense product
FEWEST_PER_EXPERT = 64  # (token, slot) pairs on average
SIZES = {"128": (32, 64, 96, 128), "192": (128, 192), "256": (128, 224, 256)}  # tile sizes (tokens) of each kernel
_AHEAD = 4  # chunks of 64 k that a kernel takes at a time: k is padded to that
_LARGEST = 1 << 30  # bytes of the experts' bf16 results at a time
_ROWS_AT_ONCE = 8  # that a block of `quantize` rounds

_SHARED_BYTES = 1024 + 4 * 256 * 128 + 2 * 256 * 128  # alignment, stages of x, staged outputs
_SOURCE = "sm90_nvfp4_prefill_w4a8"
PLAIN, PAIRED = (
    {name: Kernel(_SOURCE, f"{_SOURCE}_{kind}_{name}", "PPPPPPiiiiiiiif" + 32 * "q", _SHARED_BYTES) for name in SIZES}
    for kind in ("plain", "paired")
)
QUANTIZE = Kernel(_SOURCE, f"{_SOURCE}_quantize", "PPPPqiiii")

# Measured on an H200, clocks of 1.755 GHz of a cluster for 256 rows x 64 k by tile size; tensor cores need 2 a token.
_CLOCKS = {32: 490, 64: 545, 96: 620, 128: 650, 192: 750, 224: 815, 256: 900}
_TILE_CLOCKS = 3000  # of a tile's first copies and its output


def refuse_linear(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor, n: int | None = None) -> str | None:
    """Why the kernel does not take nvfp4_linear's arguments, or None."""
    reason = nvfp4_linear.refuse(x, codes, scales, global_scale, n) or w4a8.refuse()
    if reason:
        return reason
    m, n = x.numel() // max(1, x.shape[-1]), n or 64 * codes.shape[0]
    if m < FEWEST_TOKENS or n < FEWEST_ROWS:
        return f"takes at least {FEWEST_TOKENS} tokens and {FEWEST_ROWS} rows of the weight, got {m} and {n}"


def refuse_moe(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up_codes: Tensor, gate_up_scales: Tensor, gate_up_global: Tensor,
    *rest,
) -> str | None:  # fmt: skip
    """Why the kernels do not take nvfp4_moe's arguments, or None."""
    reason = nvfp4_moe.refuse(x, weights, ids, gate_up_codes, gate_up_scales, gate_up_global) or w4a8.refuse()
    if reason:
        return reason
    pairs, experts = ids.numel(), gate_up_codes.shape[0]
    if pairs < max(1, FEWEST_PER_EXPERT * experts):
        return f"takes at least {FEWEST_PER_EXPERT} pairs of token and slot an expert, got {pairs} for {experts}"


def launch_linear(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor, n: int | None = None) -> Tensor:
    """bf16 [..., k]; u8 [r, c, 2048] and [r, c, 256], f32 [] or [parts] -> bf16 [..., n], contiguous; n <= 64 r."""
    n, k = n or 64 * codes.shape[0], x.shape[-1]
    out = x.new_empty(x.numel() // max(1, k), -(-n // 8) * 8)  # the copy engine writes rows of a multiple of 16 bytes
    if out.numel() == 0 or k == 0:
        return x.new_zeros(*x.shape[:-1], n)
    rows, (blocks, chunks) = nvfp4_prefill._copyable(x.reshape(-1, k)), codes.shape[:2]
    name, size = dense_plan(len(rows), blocks, chunks, multiprocessors(x.device.index))
    tiles = -(-len(rows) // size)
    rounded = _quantize(rows, len(rows), tiles * size)
    weight = codes.contiguous(), scales.contiguous(), global_scale.contiguous()
    _product(PLAIN[name], rounded, weight, (0, 0, tiles, size, GROUP), out, n)
    return out[:, :n].contiguous().view(*x.shape[:-1], n)


def launch_moe(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up_codes: Tensor, gate_up_scales: Tensor, gate_up_global: Tensor,
    down_codes: Tensor, down_scales: Tensor, down_global: Tensor, limit: float | None = None,
) -> Tensor:  # fmt: skip
    """nvfp4_moe's arguments, x bf16 -> [tokens, hidden], contiguous."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel() == 0 or ids.numel() == 0 or gate_up_codes.numel() == 0:
        return out.zero_()
    x, weights, ids = nvfp4_prefill._copyable(x), weights.contiguous(), ids.contiguous()
    gate_up = gate_up_codes.contiguous(), gate_up_scales.contiguous(), gate_up_global.contiguous()
    down = down_codes.contiguous(), down_scales.contiguous(), down_global.contiguous()
    step = max(1, _LARGEST // (2 * ids.shape[1] * x.shape[1]))
    for t in range(0, len(x), step):
        part = slice(t, t + step)
        _moe(x[part], weights[part], ids[part], gate_up, down, float("inf") if limit is None else limit, out[part])
    return out


def _moe(x, weights, ids, gate_up, down, limit, out) -> None:
    (tokens, hidden), (pairs, experts), top_k = x.shape, (ids.numel(), len(gate_up[0])), ids.shape[1]
    name = moe_kernel(pairs / experts)
    tiles, rows = bounds(pairs, experts, SIZES[name])
    position, table, count = sort(ids, experts, SIZES[name], tiles)
    work = table, count, tiles, 0, 1
    inner, results = x.new_empty(rows, 32 * gate_up[0].shape[1]), x.new_empty(rows, hidden)
    rounded = _quantize(x, tokens, rows, position, top_k)
    _product(PAIRED[name], rounded, gate_up, work, inner, inner.shape[1], limit, 32)
    rounded = _quantize(inner, pairs, rows, position, 1, sorted_x=True)
    _product(PLAIN[name], rounded, down, work, results, hidden)
    COMBINE.launch((tokens, -(-hidden // 2048), 1), 256, results, weights, position, out, hidden, top_k)


def _quantize(x, count, places, position=0, slots=1, sorted_x=False) -> tuple[Tensor, Tensor]:
    """bf16 [.., k] -> u8 [places, k], of e4m3 in a fragment's order, and f32 [places]; `count` as the kernel's."""
    k = x.shape[1]
    x8, x_scales = x.new_empty(places, k, dtype=torch.uint8), x.new_empty(places, dtype=torch.float32)
    sizes = (x.stride(0), count, k, slots, int(sorted_x))
    QUANTIZE.launch((-(-count // _ROWS_AT_ONCE), 1, 1), 32 * _ROWS_AT_ONCE, x, position, x8, x_scales, *sizes)
    return x8, x_scales


def _product(kernel, rounded, weight, work, out, rows, limit=0.0, box_columns=64) -> None:
    """`work`: tiles, tile_count, (at most) token_tiles, tile_tokens, group."""
    x8, x_scales = rounded
    codes, scales, global_scale = weight
    blocks, chunks = codes.shape[-3:-1]
    parts = global_scale.numel() // (len(codes) if codes.dim() == 4 else 1)
    row_tiles = -(-blocks // BLOCKS)
    clusters = min(multiprocessors(x8.device.index) // 2, work[2] * row_tiles)
    maps = (*tensor_map(x8.view(torch.bfloat16), TILE_K), *tensor_map(out, box_columns))  # bytes move in pairs
    values = (*work, row_tiles, blocks, chunks, parts, rows, limit)
    kernel.launch((2 * clusters, 1, 1), 384, codes, scales, global_scale, x_scales, *values, *maps)


@functools.lru_cache(1024)
def dense_plan(tokens: int, blocks: int, chunks: int, multiprocessors: int) -> tuple[str, int]:
    """Kernel and tokens a tile for the shortest way through all tiles."""
    plans = []
    for name in SIZES:
        for size in SIZES[name]:
            waves = -(-(-(-tokens // size) * -(-blocks // BLOCKS)) // (multiprocessors // 2))
            plans.append((waves * (-(-chunks // _AHEAD) * _AHEAD * _CLOCKS[size] + _TILE_CLOCKS), name, size))
    return min(plans)[1:]


def moe_kernel(mean: float) -> str:
    """The kernel that is best where experts have `mean` tokens, give or take its square root."""

    def clocks(name: str) -> float:
        total, largest = 0, SIZES[name][-1]
        for tokens in (mean + deviations * mean**0.5 for deviations in (-1.5, -0.5, 0.5, 1.5)):
            count = max(1, -(-tokens // largest))
            total += count * (_CLOCKS[next(s for s in SIZES[name] if s * count >= tokens)] + 80)
        return total

    return min(SIZES, key=clocks)
