"""RMS norm with weight 1 + w, with or without a residual to add: every element is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numerics import rounded_to

MAX_N = 65536  # a row lives in the registers of one program: 64 a thread of 32 warps


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, rows, x_stride, residual_stride, n, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < n)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        total = rounded_to(x + residual, total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * n + column, total, mask=inside)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < n, other=0.0).to(tl.float32)
    # Not rsqrt and /: both are approximations, up to 2 ulp off for the whole row, and cost as little.
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(x * x, 1), n * 1.0) + eps))
    out = x * scale[:, None] * (1.0 + weight)
    tl.store(out_ptr + row * n + column, rounded_to(out, out_ptr.dtype.element_ty), mask=inside)


def launch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """bf16, f16 or f32 [..., n] with any strides, [n] -> [..., n], contiguous."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _run(x, None, weight, eps, out, None)
    return out


def launch_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """bf16, f16 or f32 [..., n] with any strides, twice, [n] -> norm of the sum, the sum; contiguous."""
    out, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    _run(x, residual, weight, eps, out, total)
    return out, total


def _run(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, total: Tensor | None) -> None:
    if out.numel() == 0:
        return
    n = x.shape[-1]
    x = _rows(x)
    residual = x if residual is None else _rows(residual)
    block, together, warps = tile(n)
    grid = (triton.cdiv(x.shape[0], together),)
    _rms_norm_kernel[grid](
        x, residual, weight.contiguous(), out, out if total is None else total, x.shape[0], x.stride(0),
        residual.stride(0), n, eps, ADD=total is not None, ROWS=together, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def tile(n: int) -> tuple[int, int, int]:
    """BLOCK, ROWS and warps: short rows share a program of 1024 elements, 4096 elements get 8 warps."""
    block = triton.next_power_of_2(n)
    return block, max(1, 1024 // block), min(32, max(4, block // 512))


def _rows(x: Tensor) -> Tensor:
    """[..., n] -> [rows, n] with adjacent elements."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def ahead_of_time():
    """(kernel, argument types, constants, warps) of each variant to compile without a GPU; see triton/build.py."""
    pointers = ("x_ptr", "residual_ptr", "out_ptr", "total_ptr")
    integers = dict.fromkeys(("rows", "x_stride", "residual_stride", "n"), "i32")
    for dtype in ("bf16", "fp16", "fp32"):
        types = {**dict.fromkeys(pointers, f"*{dtype}"), "weight_ptr": f"*{dtype}", **integers, "eps": "fp32"}
        for add in (False, True):
            block, together, warps = tile(4096)
            yield _rms_norm_kernel, types, {"ADD": add, "ROWS": together, "BLOCK": block}, warps
