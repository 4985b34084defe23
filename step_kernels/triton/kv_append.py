"""q/k norm, rope and the paged write in one launch: q, k and v are read once, q and the caches written once.

A program takes one token and up to 1024 elements of its heads: of q, or of both k and v.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numerics import rounded_to, to_e4m3_bits


@triton.jit
def _normed_and_rotated(x_ptr, inside, weight_ptr, column, n, eps, inv_freq_ptr, rotary, position):
    """x_ptr [heads, 1], inside [heads, BLOCK], column [1, BLOCK] -> f32 [heads, BLOCK]."""
    half = rotary // 2
    turned = column < rotary
    # Each element is read again as the partner of its pair, (i, i + half): from L1, and no shuffle is needed.
    partner = tl.where(column < half, column + half, column - half)
    x = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + partner, mask=inside & turned, other=0.0).to(tl.float32)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(x * x, 1), n * 1.0) + eps))[:, None]
    weight = tl.load(weight_ptr + column, mask=column < n, other=0.0).to(tl.float32)
    other_weight = tl.load(weight_ptr + partner, mask=turned, other=0.0).to(tl.float32)
    x = x * scale * (1.0 + weight)
    other = other * scale * (1.0 + other_weight)
    # libdevice's cos and sin: they reduce angles of 262144 radians exactly, as the hardware's do not.
    angle = position * tl.load(inv_freq_ptr + tl.minimum(column, partner), mask=turned, other=0.0)
    sine = tl.sin(angle)
    return tl.where(turned, x * tl.cos(angle) + other * tl.where(column < half, -sine, sine), x)


@triton.jit
def _write(cache_ptr, at, x, inside, scale_ptr, head, scale_stride, E4M3: tl.constexpr):
    if E4M3:
        scale = tl.load(scale_ptr + head * scale_stride)  # beyond the last head its own, never stored
        tl.store(cache_ptr + at, to_e4m3_bits(tl.div_rn(x, scale)).to(tl.uint8), mask=inside)
    else:
        tl.store(cache_ptr + at, rounded_to(x, cache_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _kv_append_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, k_cache_ptr, v_cache_ptr, q_norm_ptr, k_norm_ptr, inv_freq_ptr, positions_ptr,
    slots_ptr, k_scale_ptr, v_scale_ptr, q_token, q_head, k_token, k_head, v_token, v_head, k_page, k_cache_head,
    k_offset, k_dim, v_page, v_cache_head, v_offset, v_dim, k_scale_stride, v_scale_stride, q_heads, kv_heads,
    page_size, n, rotary, eps, E4M3: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    q_programs = tl.cdiv(q_heads, HEADS)
    column = tl.arange(0, BLOCK)[None, :]
    position = tl.load(positions_ptr + token).to(tl.float32)
    if tl.program_id(1) < q_programs:
        head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        inside = (head < q_heads) & (column < n)
        row = q_ptr + token * q_token + head * q_head
        x = _normed_and_rotated(row, inside, q_norm_ptr, column, n, eps, inv_freq_ptr, rotary, position)
        at = (token * q_heads + head) * n + column
        tl.store(out_ptr + at, rounded_to(x, out_ptr.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        page = slot // page_size
        offset = slot % page_size
        head = ((tl.program_id(1) - q_programs) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        inside = (head < kv_heads) & (column < n) & (slot >= 0)
        row = k_ptr + token * k_token + head * k_head
        k = _normed_and_rotated(row, inside, k_norm_ptr, column, n, eps, inv_freq_ptr, rotary, position)
        v = tl.load(v_ptr + token * v_token + head * v_head + column, mask=inside, other=0.0).to(tl.float32)
        at = page * k_page + head * k_cache_head + offset * k_offset + column * k_dim
        last = tl.minimum(head, kv_heads - 1)
        _write(k_cache_ptr, at, k, inside, k_scale_ptr, last, k_scale_stride, E4M3)
        at = page * v_page + head * v_cache_head + offset * v_offset + column * v_dim
        _write(v_cache_ptr, at, v, inside, v_scale_ptr, last, v_scale_stride, E4M3)


def launch(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, inv_freq: Tensor, positions: Tensor,
    slots: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor,
) -> Tensor:  # fmt: skip
    """The op's arguments in bf16, f16 or f32, q, k, v and the caches with any strides -> q normed and rotated."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    tokens, q_heads, n = q.shape
    kv_heads = k.shape[1]
    if tokens == 0 or n == 0:
        return out
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    e4m3 = k_cache.dtype == torch.float8_e4m3fn
    if e4m3:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    scale_strides = (s.stride(0) if s.dim() else 0 for s in (k_scale, v_scale))
    block, heads = tile(n)
    grid = (tokens, triton.cdiv(q_heads, heads) + triton.cdiv(kv_heads, heads))
    _kv_append_kernel[grid](
        q, k, v, out, k_cache, v_cache, q_norm.contiguous(), k_norm.contiguous(), inv_freq.contiguous(),
        positions.contiguous(), slots.contiguous(), k_scale, v_scale, *q.stride()[:2], *k.stride()[:2],
        *v.stride()[:2], *k_cache.stride(), *v_cache.stride(), *scale_strides,
        q_heads, kv_heads, k_cache.shape[2], n, 2 * inv_freq.shape[0], eps, E4M3=e4m3, HEADS=heads, BLOCK=block,
    )  # fmt: skip
    return out


def tile(n: int) -> tuple[int, int]:
    """BLOCK and HEADS: 1024 elements a program, eight a thread; 8 heads of 128."""
    block = triton.next_power_of_2(n)
    return block, max(1, 1024 // block)


def ahead_of_time():
    """(kernel, argument types, constants, warps) of each variant to compile without a GPU; see triton/build.py."""
    names = _kv_append_kernel.arg_names
    floats = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "q_norm_ptr", "k_norm_ptr")
    block, heads = tile(128)
    for dtype in ("bf16", "fp16", "fp32"):
        for cache in ("u8", dtype):
            types = dict.fromkeys(floats, f"*{dtype}")
            types |= dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), f"*{cache}")
            types |= dict.fromkeys(("inv_freq_ptr", "k_scale_ptr", "v_scale_ptr"), "*fp32")
            types |= dict.fromkeys(("positions_ptr", "slots_ptr"), "*i64") | {"eps": "fp32"}
            types |= {name: "i32" for name in names if name not in types and not name.isupper()}
            yield _kv_append_kernel, types, {"E4M3": cache == "u8", "HEADS": heads, "BLOCK": block}, 4
