"""NVFP4 codes and block scales from activations, and back, with the bits of nvfp4.py.

A program takes BLOCKS blocks of 16, wherever rows end, so that short and long rows cost alike. Divisions are
div_rn: Triton's `/` is an approximation that changes one scale in some thousands.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numerics import from_e2m1, from_e4m3_bits, rounded_to, to_e2m1, to_e4m3_bits

BLOCKS = 64  # 1024 values, eight a thread


@triton.jit
def _quantize_kernel(x_ptr, outer_ptr, codes_ptr, scales_ptr, blocks, row_blocks, row_stride, BLOCKS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    inside = block < blocks
    column = (first % row_blocks).to(tl.int32) + tl.arange(0, BLOCKS)  # 64-bit divisions once a program only
    at = (first // row_blocks + column // row_blocks) * row_stride + column % row_blocks * 16
    x = tl.load(x_ptr + at[:, None] + tl.arange(0, 16)[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    outer = tl.load(outer_ptr)
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # as integers, NaN is the largest: tl.max would drop it
    amax = tl.max(magnitude, 1).to(tl.float32, bitcast=True)
    scale = tl.where(amax == 0, 1.0, tl.div_rn(amax, 6.0 * outer))
    scale = tl.maximum(scale, 0.001953125, propagate_nan=tl.PropagateNan.ALL)  # 2^-9, the smallest e4m3
    scale = to_e4m3_bits(scale) & 0x7F
    code = to_e2m1(tl.div_rn(x, (from_e4m3_bits(scale) * outer)[:, None]))
    low, high = tl.split(tl.reshape(code, [BLOCKS, 8, 2]))
    to = codes_ptr + block[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(to, (low | (high << 4)).to(tl.uint8), mask=inside[:, None])
    tl.store(scales_ptr + block, scale.to(tl.uint8), mask=inside)


@triton.jit
def _dequantize_kernel(codes_ptr, scales_ptr, outer_ptr, out_ptr, blocks, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    at = codes_ptr + block[:, None] * 8 + tl.arange(0, 8)[None, :]
    byte = tl.load(at, mask=inside[:, None], other=0).to(tl.int32)
    code = tl.reshape(tl.join(byte & 15, byte >> 4), [BLOCKS, 16])
    scale = from_e4m3_bits(tl.load(scales_ptr + block, mask=inside, other=0).to(tl.int32)) * tl.load(outer_ptr)
    out = rounded_to(from_e2m1(code) * scale[:, None], out_ptr.dtype.element_ty)
    tl.store(out_ptr + block[:, None] * 16 + tl.arange(0, 16)[None, :], out, mask=inside[:, None])


def quantize(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """bf16, f16 or f32 [..., k] with any strides, f32 [] -> codes u8 [..., k/2], scales e4m3 [..., k/16]."""
    *lead, k = x.shape
    codes = x.new_empty(*lead, k // 2, dtype=torch.uint8)
    scales = x.new_empty(*lead, k // 16, dtype=torch.float8_e4m3fn)
    if scales.numel() == 0:
        return codes, scales
    rows = x.reshape(-1, k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    blocks = scales.numel()
    _quantize_kernel[(triton.cdiv(blocks, BLOCKS),)](
        rows, global_scale, codes, scales.view(torch.uint8), blocks, k // 16, rows.stride(0), BLOCKS=BLOCKS
    )
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """u8 [..., k/2], e4m3 [..., k/16], f32 [] -> bf16, f16 or f32 [..., k]."""
    out = codes.new_empty(*codes.shape[:-1], codes.shape[-1] * 2, dtype=dtype)
    if out.numel() == 0:
        return out
    scales = scales.contiguous().view(torch.uint8)
    blocks = scales.numel()
    grid = (triton.cdiv(blocks, BLOCKS),)
    _dequantize_kernel[grid](codes.contiguous(), scales, global_scale, out, blocks, BLOCKS=BLOCKS)
    return out


def ahead_of_time():
    """(kernel, argument types, constants, warps) of each variant to compile without a GPU; see triton/build.py."""
    integers = dict.fromkeys(("blocks", "row_blocks", "row_stride"), "i32")
    for dtype in ("bf16", "fp16", "fp32"):
        types = {"x_ptr": f"*{dtype}", "outer_ptr": "*fp32", "codes_ptr": "*u8", "scales_ptr": "*u8", **integers}
        yield _quantize_kernel, types, {"BLOCKS": BLOCKS}, 4
        types = {"out_ptr": f"*{dtype}", "outer_ptr": "*fp32", "codes_ptr": "*u8", "scales_ptr": "*u8"}
        yield _dequantize_kernel, types | {"blocks": "i32"}, {"BLOCKS": BLOCKS}, 4
