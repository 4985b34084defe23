"""RMS norm with weight 1 + w, alone or of a sum: every element is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numerics import rounded_to

MAX_N = 65536  # a row lives in the registers of one program: 64 a thread of 32 warps


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, other_ptr, weight_ptr, out_ptr, total_ptr, rows, x_stride, residual_stride, other_stride, n,
    eps, TERMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < n)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if TERMS > 1:
        x += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        if TERMS > 2:
            x += tl.load(other_ptr + row * other_stride + column, mask=inside, other=0.0).to(tl.float32)
        total = rounded_to(x, total_ptr.dtype.element_ty)
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
    _run((x,), weight, eps, out, out)
    return out


def launch_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float, other: Tensor | None = None):
    """bf16, f16 or f32 [..., n] with any strides, two or three times, [n] -> norm of the sum, the sum; contiguous."""
    out, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    _run((x, residual) if other is None else (x, residual, other), weight, eps, out, total)
    return out, total


def _run(terms: tuple[Tensor, ...], weight: Tensor, eps: float, out: Tensor, total: Tensor) -> None:
    if out.numel() == 0:
        return
    count, n = len(terms), out.shape[-1]
    terms = [_rows(term) for term in terms]
    terms += [terms[0]] * (3 - count)
    rows, strides = terms[0].shape[0], [term.stride(0) for term in terms]
    block, together, warps = tile(n)
    _rms_norm_kernel[(triton.cdiv(rows, together),)](
        *terms, weight.contiguous(), out, total, rows, *strides, n, eps, TERMS=count, ROWS=together, BLOCK=block,
        num_warps=warps,
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
    pointers = ("x_ptr", "residual_ptr", "other_ptr", "out_ptr", "total_ptr")
    integers = dict.fromkeys(("rows", "x_stride", "residual_stride", "other_stride", "n"), "i32")
    for dtype in ("bf16", "fp16", "fp32"):
        types = {**dict.fromkeys(pointers, f"*{dtype}"), "weight_ptr": f"*{dtype}", **integers, "eps": "fp32"}
        for terms in (1, 2, 3):
            block, together, warps = tile(4096)
            yield _rms_norm_kernel, types, {"TERMS": terms, "ROWS": together, "BLOCK": block}, warps
