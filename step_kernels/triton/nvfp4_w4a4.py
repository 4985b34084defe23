"""Dense W4A4 GEMM on Blackwell's FP4 tensor cores: e2m1 x e2m1, an e4m3 scale every 16 along k on both sides."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import w4a4
from .numerics import INTERPRETED, from_e2m1, rounded_to
from .nvfp4_linear import loop
from .nvfp4_quantize import quantize

# Triton 3.6 compiles `dot_scaled` with e4m3 scales for these alone; on sm_80 to sm_90 its MLIR pass fails.
ARCHITECTURES = (100, 103, 120)


@triton.jit
def _expand(codes, scales, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """u8 [ROWS, BLOCK_K / 2], e4m3 [ROWS, BLOCK_K / 16] -> f32 [ROWS, BLOCK_K]."""
    values = tl.interleave(from_e2m1((codes & 15).to(tl.int32)), from_e2m1((codes >> 4).to(tl.int32)))
    values = tl.reshape(values, (ROWS, BLOCK_K // 16, 16)) * scales.to(tl.float32)[:, :, None]
    return tl.reshape(values, (ROWS, BLOCK_K))


@triton.jit
def _w4a4_kernel(
    x_ptr,
    x_scales_ptr,
    x_global_ptr,
    codes_ptr,
    scales_ptr,
    global_ptr,
    out_ptr,
    m,
    n,
    k,
    part_rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.arange(0, BLOCK_K // 2)
    group = tl.arange(0, BLOCK_K // 16)
    row_offset, column_offset = row.to(tl.int64), column.to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in loop(0, k, BLOCK_K):
        # Past k both codes and scales read as 0: those products vanish.
        bytes_inside = (start // 2 + byte) < k // 2
        groups_inside = (start // 16 + group) < k // 16
        x = tl.load(
            x_ptr + row_offset[:, None] * (k // 2) + (start // 2 + byte)[None, :],
            mask=(row < m)[:, None] & bytes_inside[None, :],
            other=0,
        )
        x_scales = tl.load(
            x_scales_ptr + row_offset[:, None] * (k // 16) + (start // 16 + group)[None, :],
            mask=(row < m)[:, None] & groups_inside[None, :],
            other=0.0,
        )
        codes = tl.load(
            codes_ptr + column_offset[None, :] * (k // 2) + (start // 2 + byte)[:, None],
            mask=(column < n)[None, :] & bytes_inside[:, None],
            other=0,
        )
        scales = tl.load(
            scales_ptr + column_offset[:, None] * (k // 16) + (start // 16 + group)[None, :],
            mask=(column < n)[:, None] & groups_inside[None, :],
            other=0.0,
        )
        if INTERPRETED:  # which has no dot_scaled
            left, right = _expand(x, x_scales, BLOCK_M, BLOCK_K), _expand(tl.trans(codes), scales, BLOCK_N, BLOCK_K)
            total += tl.dot(left, tl.trans(right), input_precision="ieee")
        else:
            total = tl.dot_scaled(x, x_scales, "e2m1", codes, scales, "e2m1", total)
    outer = tl.load(global_ptr + column // part_rows, mask=column < n, other=0.0) * tl.load(x_global_ptr)
    out = rounded_to(total * outer[None, :], out_ptr.dtype.element_ty)
    tl.store(out_ptr + row_offset[:, None] * n + column[None, :], out, mask=(row < m)[:, None] & (column < n)[None, :])


def refuse(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor) -> str | None:
    """Takes bf16, f16 and f32 activations, and only where W4A4 was allowed."""
    if x.dtype == torch.float64:
        return "takes bfloat16, float16 and float32, got float64"
    return w4a4.refuse()


def launch(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """[..., k] float, NVFP4Weight's fields for [n, k] -> [..., n]; x is quantized by its own amax, on the device."""
    n, k = codes.shape[0], codes.shape[1] * 2
    out = x.new_empty(*x.shape[:-1], n)
    if x.numel() == 0 or n == 0:
        return out.zero_()  # k = 0 sums nothing
    rows = x.reshape(-1, k).contiguous()
    m = rows.shape[0]
    x_global = w4a4.activation_scale(rows)
    x_codes, x_scales = quantize(rows, x_global)
    part_rows = n // max(1, global_scale.numel())
    block_m = 128  # tcgen05's rows
    block_n = 128 if m > 128 else 64  # few rows: more programs share the weights
    grid = (triton.cdiv(n, block_n), triton.cdiv(m, block_m))
    _w4a4_kernel[grid](
        x_codes, x_scales, x_global, codes.contiguous(), scales.contiguous(), global_scale.contiguous(), out,
        m, n, k, part_rows, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=128, num_warps=4,
    )  # fmt: skip
    return out


def ahead_of_time():
    """(kernel, argument types, constants, warps) of each variant to compile without a GPU; see triton/build.py."""
    types = {"x_ptr": "*u8", "x_scales_ptr": "*fp8e4nv", "x_global_ptr": "*fp32"}
    types |= {"codes_ptr": "*u8", "scales_ptr": "*fp8e4nv", "global_ptr": "*fp32"}
    sizes = dict.fromkeys(("m", "n", "k", "part_rows"), "i32")
    for dtype, block_n in (("bf16", 64), ("bf16", 128), ("fp16", 128), ("fp32", 128)):
        constants = {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": 128}
        yield _w4a4_kernel, {**types, "out_ptr": f"*{dtype}", **sizes}, constants, 4
