"""What lies between the q/k/v projections and attention: RMS-norm of q and k, rope, and the paged write."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nvfp4 import E4M3_MAX
from ..registry import Kernel, define, expect, lazy
from .rms_norm import normalized
from .swiglu import FLOATS

CACHE_DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32)


def _check(q, k, v, q_norm, k_norm, eps, inv_freq, positions, slots, k_cache, v_cache, k_scale, v_scale):
    expect("q", q, (None, None, None), FLOATS)
    tokens, _, dim = q.shape
    expect("k", k, (tokens, None, dim), q.dtype)
    expect("v", v, tuple(k.shape), q.dtype)
    expect("q_norm", q_norm, (dim,), FLOATS)
    expect("k_norm", k_norm, (dim,), FLOATS)
    expect("inv_freq", inv_freq, (None,), torch.float32)
    if 2 * inv_freq.shape[0] > dim:
        raise ValueError(f"inv_freq: got {inv_freq.shape[0]} frequencies, wanted at most head_dim / 2 = {dim // 2}")
    expect("positions", positions, (tokens,), (torch.int32, torch.int64))
    expect("slots", slots, (tokens,), (torch.int32, torch.int64))
    expect("k_cache", k_cache, (None, k.shape[1], None, dim), CACHE_DTYPES)
    expect("v_cache", v_cache, tuple(k_cache.shape), k_cache.dtype)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        expect(name, scale, () if scale.dim() == 0 else (k.shape[1],), torch.float32)


def _fake(q, *args):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _triton_refuses(q, k, v, q_norm, k_norm, *args):
    for name, tensor in (("q", q), ("q_norm", q_norm), ("k_norm", k_norm)):
        if tensor.dtype == torch.float64:
            return f"takes bfloat16, float16 and float32, got {name} in float64"


@define(
    check=_check,
    fake=_fake,
    kernels=(
        Kernel("cuda", lazy("cuda.kv_append.launch"), (90, 129), "cuda.bindings", lazy("cuda.kv_append.refuse")),
        Kernel("triton", lazy("triton.kv_append.launch"), package="triton", refuse=_triton_refuses),
    ),
    mutates=("k_cache", "v_cache"),
)
def kv_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
    inv_freq: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
) -> Tensor:
    """q [tokens, q_heads, d], k and v [tokens, kv_heads, d] -> q normed and rotated; k and v go to the cache.

    q_norm, k_norm [d] are deltas (the factor is 1 + w), over each head. Rope is NeoX half-split on the first
    2 * len(inv_freq) dims, angle = position * inv_freq in f32. The caches are [pages, kv_heads, page_size, d];
    token i's slot is page * page_size + offset, a negative slot is not written. An e4m3 cache holds
    x / scale, saturated at 448 (scale f32 [] or [kv_heads]); other caches hold x.
    """
    angle = positions.float()[:, None, None] * inv_freq
    q = rope(normalized(q, q_norm, eps), angle).to(q.dtype)
    k = rope(normalized(k, k_norm, eps), angle)
    page_size = k_cache.shape[2]
    kept = (slots >= 0).nonzero()[:, 0]
    page, offset = slots[kept] // page_size, slots[kept] % page_size
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        x = x[kept]
        if cache.dtype == torch.float8_e4m3fn:
            x = (x.float() / scale.reshape(-1, 1)).clamp(-E4M3_MAX, E4M3_MAX).to(cache.dtype).view(torch.uint8)
            cache = cache.view(torch.uint8)  # float8 has no indexed assignment
        cache[page.long(), :, offset.long()] = x.to(cache.dtype)
    return q


def rope(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate the pairs (i, i + r) of x's first 2r dims by angle [..., r]; the rest passes through."""
    cos, sin = angle.cos(), angle.sin()
    r = angle.shape[-1]
    a, b, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
