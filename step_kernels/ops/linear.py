"""x times the transpose of a plain weight, or of one in FP8 with a scale a row, and SwiGLU of that product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import Kernel, define, expect, lazy
from .swiglu import FLOATS, check_limit, swiglu

_CUDA = "cuda.linear"


def _check(x, weight, out_dtype=None):
    expect("weight", weight, (None, None), FLOATS)
    expect("x", x, (..., weight.shape[1]), weight.dtype)
    _check_type(out_dtype)


def _check_fp8(x, codes, scale, out_dtype=None):
    expect("codes", codes, (None, None), torch.float8_e4m3fn)
    expect("scale", scale, (codes.shape[0],), torch.float32)
    expect("x", x, (..., codes.shape[1]), FLOATS)
    _check_type(out_dtype)


def _check_swiglu(x, weight, limit=None):
    _check(x, weight)
    _check_halves("weight", weight, limit)


def _check_fp8_swiglu(x, codes, scale, limit=None):
    _check_fp8(x, codes, scale)
    _check_halves("codes", codes, limit)


def _check_halves(name, weight, limit):
    if weight.shape[0] % 2:
        raise ValueError(f"{name}: got {weight.shape[0]} rows, wanted as many of gate as of up")
    check_limit(limit)


def _check_type(out_dtype):
    if out_dtype not in (None, *FLOATS):
        raise TypeError(f"out_dtype: got {out_dtype}, wanted a floating-point type of torch")


def _fake(x, weight, out_dtype=None):
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=out_dtype or x.dtype)


def _fake_fp8(x, codes, scale, out_dtype=None):
    return _fake(x, codes, out_dtype)


def _fake_swiglu(x, weight, limit=None):
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


def _fake_fp8_swiglu(x, codes, scale, limit=None):
    return _fake_swiglu(x, codes)


def _wide(x: Tensor, weight: Tensor) -> Tensor:
    """x times the weight's transpose in f32, in f64 for a float64 x."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):  # cuBLAS has it without copies in f32
        product = torch.mm(x.reshape(-1, x.shape[-1]), weight.to(x.dtype).mT, out_dtype=torch.float32)
        return product.view(*x.shape[:-1], len(weight))
    compute = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(compute), weight.to(compute))


@define(
    check=_check,
    fake=_fake,
    kernels=(Kernel("cuda", lazy(f"{_CUDA}.launch"), (90, 90), "cuda.bindings", lazy(f"{_CUDA}.refuse")),),
)
def linear(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """[..., k], [n, k] of one type -> [..., n] in it or in out_dtype, summed in f32 (f64 for float64), rounded once.

    The reference is torch's product, which also serves where cuBLAS is faster: where many tokens share a weight's read.
    """
    if out_dtype is None or out_dtype == x.dtype:
        return F.linear(x, weight)
    return _wide(x, weight).to(out_dtype)


@define(
    check=_check_fp8,
    fake=_fake_fp8,
    kernels=(Kernel("cuda", lazy(f"{_CUDA}.launch_fp8"), (90, 90), "cuda.bindings", lazy(f"{_CUDA}.refuse_fp8")),),
)
def fp8_linear(x: Tensor, codes: Tensor, scale: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """[..., k] float, e4m3 [n, k], f32 [n] -> [..., n] in x's type or out_dtype: x times (scale codes)'s transpose.

    Activations are not quantized; e4m3 is exact in bf16, and rows are scaled after they are summed, as linear sums.
    """
    product = _wide(x, codes)
    return torch.mul(product, scale.to(product.dtype), out=product.new_empty(product.shape, dtype=out_dtype or x.dtype))


@define(
    check=_check_swiglu,
    fake=_fake_swiglu,
    kernels=(
        Kernel("cuda", lazy(f"{_CUDA}.launch_swiglu"), (90, 90), "cuda.bindings", lazy(f"{_CUDA}.refuse_swiglu")),
    ),
)
def linear_swiglu(x: Tensor, weight: Tensor, limit: float | None = None) -> Tensor:
    """[..., k], [2n, k] of one type, gate's rows first -> [..., n]: swiglu of linear.

    The reference is the two ops, each with the kernel that serves it. The product is rounded to x's type before SwiGLU.
    """
    return swiglu(linear(x, weight), limit)


@define(
    check=_check_fp8_swiglu,
    fake=_fake_fp8_swiglu,
    kernels=(
        Kernel(
            "cuda", lazy(f"{_CUDA}.launch_fp8_swiglu"), (90, 90), "cuda.bindings", lazy(f"{_CUDA}.refuse_fp8_swiglu")
        ),
    ),
)
def fp8_linear_swiglu(x: Tensor, codes: Tensor, scale: Tensor, limit: float | None = None) -> Tensor:
    """[..., k] float, e4m3 [2n, k], f32 [2n], gate's rows first -> [..., n] in x's type: swiglu of fp8_linear.

    The reference is the two ops, each with the kernel that serves it. The product is rounded to x's type before SwiGLU.
    """
    return swiglu(fp8_linear(x, codes, scale), limit)
