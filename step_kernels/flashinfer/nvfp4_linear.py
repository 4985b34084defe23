"""Dense NVFP4 GEMM: FlashInfer's bf16 x fp4 kernel, which keeps activations, and its faster fp4 x fp4 one."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import w4a4
from . import refuse as refuse_version
from .layout import Prepared, swizzle_scales

TILE = 64  # FlashInfer documents n and k divisible by 64


def refuse(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor) -> str | None:
    """bf16 activations and whole tiles; capability 100 to 107 and 120 to 121 is the table's to check."""
    if x.dtype != torch.bfloat16:
        return f"takes bfloat16, got {str(x.dtype).removeprefix('torch.')}"
    n, k, parts = codes.shape[0], codes.shape[1] * 2, max(1, global_scale.numel())
    if n // parts % TILE or k % TILE or not n or not k:
        return f"takes n (of each global scale) and k in multiples of {TILE}, got n = {n // parts} and k = {k}"
    return refuse_version()


def refuse_w4a4(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor) -> str | None:
    """`refuse`'s reasons, and that W4A4 must be allowed."""
    return refuse(x, codes, scales, global_scale) or w4a4.refuse()


def _split(codes: Tensor, scales: Tensor, global_scale: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(codes [n, k/2], swizzled scales, global scale [1]) of each range of rows with one global scale."""
    parts = max(1, global_scale.numel())
    return [
        # detached: a view would keep the weight alive, and the weight what was prepared of it
        (c.contiguous().detach(), swizzle_scales(s), g.clone())
        for c, s, g in zip(codes.chunk(parts), scales.chunk(parts), global_scale.reshape(-1, 1))
    ]


def _build(codes: Tensor, scales: Tensor, global_scale: Tensor) -> list[tuple]:
    import flashinfer

    # On sm_100 the codes stay the checkpoint's; on sm_120 FlashInfer repacks them, a second copy.
    return [flashinfer.prepare_bf16_fp4_weights(*p, backend="cute-dsl") for p in _split(codes, scales, global_scale)]


_prepared = Prepared(_build)
_prepared_w4a4 = Prepared(_split)


def launch(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """bf16 [..., k], NVFP4Weight's fields for [n, k] -> [..., n]."""
    import flashinfer

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if not len(rows):
        return x.new_empty(*x.shape[:-1], codes.shape[0])
    parts = _prepared(codes, scales, global_scale)
    out = [flashinfer.mm_bf16_fp4(rows, *part, backend="cute-dsl") for part in parts]
    return (out[0] if len(out) == 1 else torch.cat(out, -1)).view(*x.shape[:-1], -1)


def launch_w4a4(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """As `launch`, of x rounded to NVFP4 with its own amax: see w4a4.py."""
    import flashinfer

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if not len(rows):
        return x.new_empty(*x.shape[:-1], codes.shape[0])
    outer = w4a4.activation_scale(rows)
    # FlashInfer's global scale is the inverse of ours, 2688 / amax; alpha undoes both sides'.
    x_codes, x_scales = flashinfer.nvfp4_quantize(rows, outer.reciprocal().view(1), nvfp4_4over6=None)
    out = [
        flashinfer.mm_fp4(x_codes, c.mT, x_scales, s.mT, outer * g, torch.bfloat16)
        for c, s, g in _prepared_w4a4(codes, scales, global_scale)
    ]
    return (out[0] if len(out) == 1 else torch.cat(out, -1)).view(*x.shape[:-1], -1)
